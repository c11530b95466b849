"""Configuration files, BASE, flags, and everything that a user can get wrong."""

import logging
import re

import numpy as np
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import ROOT, flags, leaves

from replknet_paddle.commands.flags import CommandParser, add_config_flags
from replknet_paddle.config import config_changes, get_config, update_config
from replknet_paddle.config_keys import FIXED_KEYS, KEYS
from replknet_paddle.runtime.errors import InputError

CONFIGS = ROOT / "configs"
ALL_CONFIGS = sorted(path.name for path in CONFIGS.glob("*.yaml"))


@pytest.fixture
def load(tmp_path):
    """get_config of a text."""

    def load_text(text):
        path = tmp_path / "user.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return get_config(path)

    return load_text


@pytest.fixture
def complaint(load):
    """What get_config says about a text: the lines of its InputError."""

    def lines(text):
        with pytest.raises(InputError) as caught:
            load(text)
        return str(caught.value).splitlines()

    return lines


# ---- BASE


def test_bases_are_relative_to_their_file_and_the_later_goes_over_the_earlier(
    tmp_path, load, monkeypatch
):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "root.yaml").write_text(
        "SEED: 1\nSAVE_FREQ: 1\nREPORT_FREQ: 1\nTRAIN: {NUM_EPOCHS: 50, WARMUP_EPOCHS: 3}\n"
    )
    (tmp_path / "deep" / "a.yaml").write_text("BASE: root.yaml\nSEED: 2\nSAVE_FREQ: 2\n")
    (tmp_path / "deep" / "b.yaml").write_text("BASE: ['root.yaml']\nSEED: 3\n")
    monkeypatch.chdir("/")  # the working folder has nothing to do with it
    config = load("BASE: ['deep/a.yaml', 'deep/b.yaml']\nTRAIN: {NUM_EPOCHS: 60}\n")
    assert (config.SEED, config.SAVE_FREQ, config.REPORT_FREQ) == (3, 1, 1)
    assert (config.TRAIN.NUM_EPOCHS, config.TRAIN.WARMUP_EPOCHS) == (60, 3)


@pytest.mark.parametrize("base", ["user.yaml", "other.yaml", "./user.yaml"])
def test_a_base_that_leads_back_is_refused(tmp_path, complaint, base):
    (tmp_path / "other.yaml").write_text("BASE: user.yaml\n")
    [line] = complaint(f"BASE: ['{base}']\n")
    assert "user.yaml" in line and "BASE" in line


def test_bases_of_bases_are_bounded(tmp_path, complaint):
    for i in range(9):
        (tmp_path / f"{i}.yaml").write_text(f"BASE: [{', '.join([f'{i + 1}.yaml'] * 10)}]\n")
    (tmp_path / "9.yaml").write_text("SEED: 1\n")
    assert "BASE leads to more than 100 files" in complaint("BASE: 0.yaml\n")[0]


def test_a_missing_base_names_both_files(load, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        load("BASE: [nowhere.yaml]\n")
    assert str(tmp_path / "nowhere.yaml") in str(caught.value)
    assert str(tmp_path / "user.yaml") in str(caught.value)


def test_a_problem_in_a_base_names_the_base(tmp_path, complaint):
    (tmp_path / "parent.yaml").write_text("SED: 1\n")
    lines = complaint("BASE: [parent.yaml]\nSAVE_FREQ: 0\n")
    assert len(lines) == 2
    assert "parent.yaml" in lines[0] and "SEED" in lines[0]
    assert "user.yaml" in lines[1] and "SAVE_FREQ" in lines[1]


# ---- files that are no configuration


def test_a_missing_file_suggests_the_nearest():
    with pytest.raises(FileNotFoundError, match=r"configs/replknet_31b\.yaml"):
        get_config("configs/replknet_31B.yml")
    with pytest.raises(FileNotFoundError, match="configs/"):
        get_config("qqqqqqqq")


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['touch {}']",
        "!!python/object/new:os.system ['touch {}']",
        "!!python/name:os.system",
        "!!python/module:os",
    ],
)
@pytest.mark.parametrize("place", ["SEED: {}", "{}", "BASE: {}", "? {}\n: 1"])
def test_unsafe_tags_run_nothing_and_are_refused(tmp_path, complaint, tag, place):
    mark = tmp_path / "ran"
    [line] = complaint(place.format(tag.format(mark)) + "\n")
    assert "user.yaml" in line and "python/" in line
    assert not mark.exists()


EMPTY = ["", "\n\n", "# nothing\n", "---\n", "DATA:\nMODEL:\nTRAIN:\n", "BASE: ['']"]


@pytest.mark.parametrize("text", [*EMPTY, "BASE: ['', '']", "BASE: ''", "BASE: []", "BASE: null"])
def test_an_empty_file_or_base_is_the_defaults(load, text):
    assert load(text) == get_config()


@pytest.mark.parametrize(
    "text, says",
    [
        ("DATA: {IMAGE_SIZE: 224", "user.yaml is not valid YAML"),
        ("DATA:\n\t- IMAGE_SIZE: 224", "user.yaml is not valid YAML"),
        ("SEED: 1\n---\nSEED: 2\n", "user.yaml is not valid YAML"),
        ("SEED: 1\x00", "user.yaml is not valid YAML"),
        ("SAVE: 2024-02-30", "user.yaml is not valid YAML"),
        ("TRAIN: {SEED: 1}\nTRAIN: {SEED: 2}", "TRAIN is given twice"),
        ("- DATA", "expected sections such as DATA"),
        ("3", "expected sections such as DATA"),
        ("BASE: [3]", "BASE is [3]; allowed: file names"),
        ("BASE: {a: b}", "BASE is {'a': 'b'}; allowed: file names"),
        (b"MODEL: {NAME: \xe9}", "user.yaml is not valid YAML"),
        ("DATA: &a {DATA: *a}", "DATA"),
        ("MODEL: {LAYERS: &a [*a]}", "MODEL.LAYERS"),
    ],
)
def test_a_file_that_is_no_configuration_is_one_line_that_names_it(complaint, text, says):
    [line] = complaint(text)
    assert "user.yaml" in line and says in line


# ---- wrong keys and values


@pytest.mark.parametrize(
    "text, key, meant",
    [
        ("TRAIN: {BASELR: 1}", "TRAIN.BASELR", "TRAIN.BASE_LR"),
        ("data: {batch_size: 3}", "data.batch_size", "DATA.BATCH_SIZE"),
        ("BATCH_SIZE: 3", "BATCH_SIZE", "DATA.BATCH_SIZE"),
        ("MODEL: {IMAGE_SIZE: 5}", "MODEL.IMAGE_SIZE", "DATA.IMAGE_SIZE"),
        ("TRAIN: {OPTIMIZER: {BETA: [0.9]}}", "TRAIN.OPTIMIZER.BETA", "TRAIN.OPTIMIZER.BETAS"),
        ("OPTIMIZER: {EPS: 1.0e-6}", "OPTIMIZER.EPS", "TRAIN.OPTIMIZER.EPS"),
        ("SED: 1", "SED", "SEED"),
        ("QQQQ: 1", "QQQQ", None),
        ("QQQQ: {ZZZZ: 1}", "QQQQ.ZZZZ", None),
        ("3: 4", "3", None),
        ("null: 1", "None", None),
        ("'': {'': 3}", ".", None),
        ("MODLE:", "MODLE", ""),  # whatever it suggests
        ("MODLE: {}", "MODLE", ""),
        ("MODEL: {LAYER: {}}", "MODEL.LAYER", "MODEL.LAYERS"),
        ("TRAIN: {X: {}}", "TRAIN.X", ""),
    ],
)
def test_an_unknown_key_is_refused_and_suggests_the_nearest(complaint, text, key, meant):
    [line] = complaint(text)
    assert f"user.yaml: unknown key {key}" in line
    if meant is None:
        assert line.endswith(f"unknown key {key}")
    elif meant:
        assert line.endswith(f"; did you mean {meant}?")


@pytest.mark.parametrize(
    "key, values, allowed",
    [
        ("DATA.BATCH_SIZE", [0, -1, 1.5, True, "8 '", None, [8], 10**400], "an integer >= 1"),
        ("DATA.IMAGE_SIZE", [float("inf"), "(224, 224)"], "an integer >= 1"),
        ("DATA.IMAGE_CHANNELS", [1], "an integer from 3 to 3"),
        ("DATA.CROP_PCT", [0, 1.01], "a number from 0.01 to 1"),
        ("DATA.RESIZE_MODE", ["Warp"], "'short_crop' or 'warp'"),
        ("DATA.DATA_PATH", ["", ["a", "b"], 31], "text"),
        ("DATA.IMAGENET_MEAN", [[0.5, 0.5], [123.7, 116.3, 103.5]], "3 values, each a number from"),
        (
            "MODEL.LAYERS",
            [[2, 2, 18], [2, 2, 0, 2], 2, "2222", [1, 1, 1001, 1]],
            "4 values, each an integer from 1 to 1000",
        ),
        ("MODEL.OUT_INDICES", [[4], [-1], 4], "a list of values, each an integer from 0 to 3"),
        ("MODEL.SMALL_KERNEL", [False], "an integer >= 1, or None"),
        ("MODEL.SYNC_BN", [1, None, "yes"], "True, False or 'auto'"),
        (
            "TRAIN.BASE_LR",
            [-1e-3, float("nan"), float("inf"), "1e999", "1+2j", 10**400],
            "a number >= 0",
        ),
        ("TRAIN.FREEZE", ["", "stem,", [], ["stem", 1], 3], "names with commas between, or a list"),
        ("TRAIN.CLASS_WEIGHTS", ["even", [-1]], "'balanced', or a list of values, each a number"),
        ("TRAIN.OPTIMIZER.NAME", ["SGD"], "'AdamW'"),
        ("SEGMENTATION.PALETTE", ["ff00zz", "ff00ff00", " ", "+12345"], "colours of six hexa"),
        ("SEED", [-1, 2**31, {}, {"a": 1}], "an integer from 0 to 2147483647"),
        ("TRAIN.OPTIMIZER", ["AdamW"], "a section with keys"),
        ("MODEL", [3, [1]], "a section with keys"),
    ],
)
def test_a_wrong_value_names_the_key_the_value_and_what_is_allowed(complaint, key, values, allowed):
    for value in values:
        tree = value
        for part in reversed(key.split(".")):
            tree = {part: tree}
        [line] = complaint(yaml.safe_dump(tree))
        found = re.search(rf"user\.yaml: {re.escape(key)} is (.*); allowed: (.*)", line)
        assert found and allowed in found[2] and len(found[1]) < 210, line


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS + "SEED: *a9\n",
        LAUGHS.replace("[", "{k: ").replace("]", "}").replace(", ", ", k"),
        "".join(f"k{i}: 1\n" for i in range(60_000)),
        "".join(f"k{i}: 1\n" for i in range(9_000)),
        "SEED: &a [*a]\n",
        "TRAIN: &a {x: *a, SEED: *a}\nSEED: *a\n",
        f"SEED: {'[' * 400}{']' * 400}\n",
        f"SEED: '{'x' * 10**6}'\n",
        f"? {'K' * 10**5}\n: 1\n",
        f"SEED: [{', '.join(['[1, 2, 3]'] * 900)}]\n",
        f"BASE: [{', '.join(['[1, 2, 3]'] * 900)}]\n",
    ],
    ids=range(11),
)
def test_a_small_file_gives_a_short_message(complaint, text):
    """Aliases make a tree of any size out of a few bytes; and a message is for reading."""
    lines = complaint(text)
    assert 1 <= len(lines) <= 51 and sum(map(len, lines)) < 20_000


def test_an_empty_name_is_no_file_of_the_project():
    with pytest.raises(FileNotFoundError, match="no config file '' "):
        get_config("")


def test_aliases_of_values_are_read(load):
    config = load("DATA: {IMAGENET_MEAN: &m [0.5, 0.5, 0.5], IMAGENET_STD: *m}\n")
    assert config.DATA.IMAGENET_STD == [0.5, 0.5, 0.5]


def test_python_takes_numpys_numbers_paths_and_a_single_stage(tmp_path, load):
    config = get_config(
        MODEL__NUM_CLASSES=np.int64(5),
        MODEL__LAYERS=np.array([1, 1, 2, 1]),
        MODEL__CHANNELS=[np.int32(8)] * 4,
        MODEL__OUT_INDICES=3,
        MODEL__NAME=np.str_("n"),
        MODEL__SYNC_BN=np.bool_(True),
        TRAIN__BASE_LR=np.float32(0.5),
        SAVE=tmp_path,
    )
    assert config.MODEL.LAYERS == [1, 1, 2, 1] and config.MODEL.OUT_INDICES == [3]
    assert (config.SAVE, config.TRAIN.BASE_LR) == (str(tmp_path), 0.5)
    assert load(config.dump()) == config  # plain YAML, without NumPy's types


def test_all_problems_are_reported_at_once(complaint):
    lines = complaint("""
DATA: {BATCH_SIZE: 0, IMAGESIZE: 224}
MODEL: {LAYERS: [1, 2], NMAE: x}
TRAIN: {OPTIMIZER: {EPS: tiny}}
SEDE: 1
""")
    wanted = ["DATA.BATCH_SIZE is 0", "DATA.IMAGESIZE", "MODEL.LAYERS is [1, 2]", "MODEL.NMAE"]
    wanted += ["TRAIN.OPTIMIZER.EPS is 'tiny'", "SEDE"]
    assert len(lines) == 6 and all(key in line for line, key in zip(lines, wanted))


UPERNET = "MODEL: {TYPE: UPerNet, OUT_INDICES: [0, 1, 2, 3], NUM_CLASSES: 9, %s}\nTRAIN: {%s}\n%s"


@pytest.mark.parametrize(
    "text, says",
    [
        ("MODEL: {LARGE_KERNEL_SIZES: [31, 28, 27, 13]}", "is [31, 28, 27, 13]; allowed: odd"),
        ("MODEL: {SMALL_KERNEL: 4}", "MODEL.SMALL_KERNEL is 4; allowed: odd, at most"),
        ("MODEL: {SMALL_KERNEL: 15}", "smallest of MODEL.LARGE_KERNEL_SIZES (13), or None"),
        ("MODEL: {OUT_INDICES: []}", "MODEL.OUT_INDICES is []; allowed: distinct"),
        ("MODEL: {OUT_INDICES: [1, 1]}", "MODEL.OUT_INDICES is [1, 1]; allowed: distinct"),
        ("MODEL: {OUT_INDICES: [3]}\nEVAL: True", "OUT_INDICES makes a backbone without a head"),
        ("MODEL: {RESUME: a}\nEVAL: True", "MODEL.RESUME goes with training, EVAL does not"),
        ("MODEL: {RESUME: auto}", "MODEL.RESUME is auto; allowed with a run folder"),
        ("MODEL: {DW_RATIO: 0.01, CHANNELS: [16, 9, 9, 9]}", "MODEL.DW_RATIO is 0.01; allowed: at"),
        ("MODEL: {FFN_RATIO: 0.01, CHANNELS: [16, 9, 9, 9]}", "CHANNELS ([16, 9, 9, 9])"),
        ("TRAIN: {WARMUP_EPOCHS: 301}", "is 301; allowed: at most TRAIN.NUM_EPOCHS (300)"),
        ("TRAIN: {LAST_EPOCH: 300}", "is 300; allowed: less than TRAIN.NUM_EPOCHS (300)"),
        ("TRAIN: {CROP_SCALE: [1.0, 0.5]}", "TRAIN.CROP_SCALE is [1.0, 0.5]; allowed: the smaller"),
        ("TRAIN: {CUTMIX_MINMAX: [0.8, 0.2]}", "TRAIN.CUTMIX_MINMAX is [0.8, 0.2]"),
        (UPERNET % ("", "WARMUP_EPOCHS: 0, LAYER_DECAY: 0.9", ""), "LAYER_DECAY is 0.9; allowed"),
        (UPERNET % ("", "WARMUP_EPOCHS: 0, BEST_BY: macro_f1", ""), "UPerNet: top1, which stands"),
        (UPERNET % ("", "WARMUP_EPOCHS: 0, CLASS_WEIGHTS: balanced", ""), "UPerNet: None"),
        (UPERNET % ("", "WARMUP_EPOCHS: 0, SAMPLER: balanced", ""), "UPerNet: shuffle"),
        (UPERNET % ("", "WARMUP_EPOCHS: 1", ""), "UPerNet: 0; SEGMENTATION.WARMUP_STEPS sets"),
        (UPERNET % ("", "WARMUP_EPOCHS: 0, VFLIP_PROB: 0.5", ""), "VFLIP_PROB is 0.5; allowed"),
        (UPERNET % ("", "WARMUP_EPOCHS: 0, QUARTER_TURNS: True", ""), "UPerNet: False; its"),
        (
            UPERNET.replace("9", "None") % ("", "WARMUP_EPOCHS: 0", ""),
            "MODEL.NUM_CLASSES is None; allowed with MODEL.TYPE UPerNet: 2 to 255",
        ),
        (
            UPERNET.replace("0, 1, 2, 3", "3") % ("", "WARMUP_EPOCHS: 0", ""),
            "MODEL.OUT_INDICES is [3]; allowed with MODEL.TYPE UPerNet: [0, 1, 2, 3]",
        ),
        *(
            (UPERNET % ("", "WARMUP_EPOCHS: 0, NUM_EPOCHS: 2", f"SEGMENTATION: {{{keys}}}"), says)
            for keys, says in (
                ("WARMUP_STEPS: 11, EPOCH_STEPS: 5", "is 11; allowed: at most the 10 steps"),
                ("SLIDE_STRIDE: 225", "is 225; allowed: at most DATA.IMAGE_SIZE (224), so that"),
                ("EVAL_RATIOS: []", "SEGMENTATION.EVAL_RATIOS is []; allowed: at least one"),
                ("PALETTE: 00ff00 ff0000", "PALETTE has 2 colours; allowed: one for each of the 9"),
            )
        ),
    ],
)
def test_values_that_contradict_each_other_are_refused(complaint, text, says):
    [line] = complaint(text)
    assert line.startswith(line.split("user.yaml: ")[0] + "user.yaml: ") and says in line


def test_contradictions_are_reported_together_and_edges_are_none(complaint, load):
    text = "MODEL: {SMALL_KERNEL: 4}\nTRAIN: {WARMUP_EPOCHS: 400, LAST_EPOCH: 400}"
    assert len(complaint(text)) == 3
    load("TRAIN: {WARMUP_EPOCHS: 300, LAST_EPOCH: 299}")


def takes(rule, value):
    try:
        rule.read(value)
    except (ValueError, TypeError, OverflowError):
        return False
    return True


# Values of every kind, and for each key some that its own rule allows, so that trees get as far as
# the contradictions.
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
)
POOL = [None, True, False, 0, 1, 2, 3, 4, 13, 31, 255, 256, 10**9, 10**400]
POOL += [0.0, 0.01, 0.5, 1.0, 1e308, "auto", "UPerNet", "ff00ff 000000"]
POOL += [[], [0], [1, 1], [0, 1, 2, 3], [4, 7, 9, 31], [0.9, 0.1]]
LEGAL = {
    key: [value for value in POOL if takes(rule, value)] or [default]
    for key, (default, rule) in (KEYS | FIXED_KEYS).items()
}


@st.composite
def trees(draw):
    """A tree of sections: legal values for the most part."""
    tree = {}
    for key in draw(st.lists(st.sampled_from(sorted(LEGAL)), max_size=15)):
        *sections, leaf = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = draw(st.sampled_from(LEGAL[key]))
    if draw(st.integers(0, 3)) == 0:
        key = draw(st.sampled_from(["BASE", "DATA", "MODEL", "SEED", "SAVE", "x"]))
        tree[key] = draw(ANYTHING)
    return tree


@settings(max_examples=100)
@given(tree=trees())
@example(tree={})
@example(tree={"MODEL": {"TYPE": "UPerNet", "NUM_CLASSES": None, "OUT_INDICES": [0, 1, 2, 3]}})
@example(tree={"MODEL": {"FFN_RATIO": 1e308}})
@example(tree={"BASE": "a\0b"})
def test_any_tree_is_a_configuration_or_bad_input(tmp_path, tree):
    """And a configuration that loads is itself again, dumped and loaded."""
    path = tmp_path / "user.yaml"
    path.write_text(yaml.safe_dump(tree))
    try:
        config = get_config(path)
    except (InputError, OSError) as error:  # OSError: a BASE that is not there
        assert str(error)
        return
    path.write_text(config.dump())
    assert get_config(path) == config and config.is_frozen()
    assert leaves(config).keys() == KEYS.keys()
    for key, value in leaves(config).items():
        read = KEYS[key][1].read(value)
        assert read == value and isinstance(read, bool) == isinstance(value, bool), key


# ---- the result


@pytest.mark.parametrize("name", [None, *ALL_CONFIGS])
def test_a_dumped_config_loads_as_the_same(name, load):
    config = get_config(name and CONFIGS / name)
    assert load(config.dump()) == config


def test_results_are_frozen_and_share_nothing(load):
    first, second = get_config(), get_config()
    for config in (first, load("SEED: 1\n"), update_config(first, flags())):
        for node in (config, config.MODEL, config.TRAIN.OPTIMIZER):
            with pytest.raises(AttributeError):
                node.NEW = 1
    updated = update_config(first, flags())
    for key, value in leaves(first).items():
        if isinstance(value, list):
            value.append("mine")
            for other in (second, updated, get_config()):
                assert "mine" not in leaves(other)[key]


# ---- keys without effect


def test_keys_with_one_value_are_read_and_reported_together_where_they_ask_for_another(
    load, caplog
):
    same = {key: value for key, (value, _) in FIXED_KEYS.items()}
    config = update_config(
        load("SAVE_MINUTES: null\nLOG: {METRICS_JSONL: true}\nDATA: {DATASET: imagenet2012}\n"),
        flags(dataset="imagenet2012", opts=[x for key in same for x in (key, str(same[key]))]),
    )
    assert config == get_config() and not caplog.records
    load("SAVE_MINUTES: 10\nLOG: {METRICS_JSONL: False}\nDATA: {NATIVE_PIXELS: 'True'}\n")
    [record] = caplog.records
    assert record.levelno == logging.WARNING and "NATIVE_PIXELS" not in record.getMessage()
    for part in ("user.yaml: SAVE_MINUTES 10.0 (always None)", "LOG.METRICS_JSONL False (always T"):
        assert part in record.getMessage()


def test_a_run_of_0_2_is_resumed_without_a_word_on_keys_that_are_gone():
    before = get_config().dump() + "SAVE_MINUTES: 5\n"
    assert config_changes(before, get_config(None, SEED=1).dump()) == ["SEED is 1, was 42"]
    older = before.replace("  TEMPERATURE: 1.0\n", "")  # of a version without that key
    assert older != before and config_changes(older, before) == []
    warm = get_config(None, MODEL__TEMPERATURE=2).dump()
    assert config_changes(older, warm) == ["MODEL.TEMPERATURE is 2.0, was 1.0"]


# ---- flags and -opts

ALL_FLAGS = {
    "data_path": ("/d", {"DATA.DATA_PATH": "/d"}),
    "output": ("run", {"SAVE": "run"}),
    "batch_size": ("16", {"DATA.BATCH_SIZE": 16, "DATA.BATCH_SIZE_EVAL": 16}),
    "batch_size_eval": ("8", {"DATA.BATCH_SIZE_EVAL": 8}),
    "image_size": ("96", {"DATA.IMAGE_SIZE": 96}),
    "accum_iter": ("3", {"TRAIN.ACCUM_ITER": 3}),
    "pretrained": ("w.pdparams", {"MODEL.PRETRAINED": "w.pdparams"}),
    "resume": ("run/last", {"MODEL.RESUME": "run/last"}),
    "last_epoch": ("5", {"TRAIN.LAST_EPOCH": 5}),
    "best_by": ("macro_f1", {"TRAIN.BEST_BY": "macro_f1"}),
    "freeze": ("stem, stages.0", {"TRAIN.FREEZE": ["stem", "stages.0"]}),
    "patience": ("5", {"TRAIN.PATIENCE": 5}),
    "eval": (True, {"EVAL": True}),
    "amp": (True, {"AMP": True}),
}


@pytest.mark.parametrize("flag", ALL_FLAGS)
def test_a_flag_sets_its_keys_and_no_other(flag):
    value, expected = ALL_FLAGS[flag]
    config = get_config()
    before = config.dump()
    absent = dict.fromkeys(ALL_FLAGS) | {"eval": False, "amp": False, "opts": None, "cfg": None}
    updated = update_config(config, flags(**absent | {flag: value}))
    changed = {
        key: value
        for key, value in leaves(updated).items()
        if value != leaves(config)[key] or key in expected
    }
    assert changed == expected
    assert config.dump() == before and config.is_frozen() and updated.is_frozen()
    assert update_config(config, flags()) == config


# What is typed behind -opts, and the value that it means.
TYPED = [
    ("TRAIN.BASE_LR", "1e-3", 1e-3),
    ("TRAIN.WEIGHT_DECAY", "1", 1.0),
    ("TRAIN.LAYER_DECAY", "None", None),
    ("MODEL.LARGE_KERNEL_SIZES", "[13,13,13,13]", [13, 13, 13, 13]),
    ("MODEL.CHANNELS", "13, 13, 13, 13", [13, 13, 13, 13]),
    ("TRAIN.OPTIMIZER.BETAS", "(0.9, 0.95)", [0.9, 0.95]),
    ("MODEL.NAME", "2024", "2024"),
    ("SAVE", "yes", "yes"),
    ("MODEL.PRETRAINED", "1e3", "1e3"),
    ("DATA.DATA_PATH", "a: b # c/é", "a: b # c/é"),
    ("AMP", "True", True),
    ("EVAL", "false", False),
]


def test_opts_are_read_as_their_keys_types_and_survive_dump_and_load(load):
    opts = [word for key, text, _ in TYPED for word in (key, text)]
    config = update_config(get_config(), flags(opts=opts))
    for key, _, value in TYPED:
        read = leaves(config)[key]
        assert read == value and type(read) is type(value), key
    assert load(config.dump()) == config


def test_opts_go_over_flags_and_the_later_one_wins():
    parser = CommandParser("any")
    add_config_flags(parser, "")
    epochs, seed = ["-opts", "TRAIN.NUM_EPOCHS", "20", "SEED", "1"], ["--opts", "SEED", "7"]
    args, _ = parser.parse(["-cfg=x", *epochs, *seed, "-opts", "DATA.BATCH_SIZE", "4"])
    args.batch_size = 32
    config = update_config(get_config(), args)
    assert (config.TRAIN.NUM_EPOCHS, config.SEED) == (20, 7)
    assert (config.DATA.BATCH_SIZE, config.DATA.BATCH_SIZE_EVAL) == (4, 32)
    updated = update_config(get_config(), flags(batch_size=32, batch_size_eval=128))
    assert (updated.DATA.BATCH_SIZE, updated.DATA.BATCH_SIZE_EVAL) == (32, 128)


def test_wrong_flags_and_opts_are_reported_together_by_the_names_that_were_typed():
    opts = ["SED", "1", "AMP"]
    wrong = flags(batch_size="0", image_size=0, last_epoch="x", dataset="mnist", opts=opts)
    with pytest.raises(InputError) as caught:
        update_config(get_config(), wrong)
    lines = str(caught.value).splitlines()
    assert len(lines) == 7  # -batch_size sets two keys
    for part in (
        *("-batch_size: DATA.BATCH_SIZE is '0'", "-batch_size: DATA.BATCH_SIZE_EVAL"),
        *("-image_size: DATA.IMAGE_SIZE is 0; allowed", "-last_epoch: ", "-dataset: "),
        *("did you mean SEED?", "AMP has no value"),
    ):
        assert any(part in line for line in lines)


def test_flags_can_contradict_the_file():
    with pytest.raises(InputError, match="TRAIN.LAST_EPOCH"):
        update_config(get_config(CONFIGS / "replknet_31b_384.yaml"), flags(last_epoch="30"))
