"""Configuration files: BASE, and everything that a user can get wrong."""

import re

import pytest
from tiny import ROOT, flags, leaves

from replknet_paddle.config import get_config, update_config
from replknet_paddle.config_keys import KEYS
from replknet_paddle.runtime.errors import InputError

CONFIGS = ROOT / "configs"
ALL_CONFIGS = sorted(path.name for path in CONFIGS.glob("*.yaml"))


@pytest.fixture
def load(tmp_path):
    """get_config of a text."""

    def load_text(text, name="user.yaml"):
        path = tmp_path / name
        path.write_text(text)
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


@pytest.mark.parametrize("base", ["['']", "['', '']", "''", "[]", "null"])
def test_an_empty_base_is_none(load, base):
    assert load(f"BASE: {base}\nSEED: 7\n").SEED == 7


def test_base_is_relative_to_its_file_and_the_child_goes_last(tmp_path, load, monkeypatch):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "grandparent.yaml").write_text(
        "SEED: 1\nSAVE_FREQ: 1\nREPORT_FREQ: 1\nTRAIN: {NUM_EPOCHS: 50, WARMUP_EPOCHS: 3}\n"
    )
    (tmp_path / "deep" / "parent.yaml").write_text(
        "BASE: ['grandparent.yaml']\nSEED: 2\nSAVE_FREQ: 2\n"
    )
    monkeypatch.chdir("/")  # the working folder has nothing to do with it
    config = load("BASE: ['deep/parent.yaml']\nSEED: 3\nTRAIN: {NUM_EPOCHS: 60}\n")
    assert (config.SEED, config.SAVE_FREQ, config.REPORT_FREQ) == (3, 2, 1)
    assert (config.TRAIN.NUM_EPOCHS, config.TRAIN.WARMUP_EPOCHS) == (60, 3)


def test_of_several_bases_the_later_goes_over_the_earlier(tmp_path, load):
    (tmp_path / "a.yaml").write_text("SEED: 1\nSAVE_FREQ: 1\n")
    (tmp_path / "b.yaml").write_text("SEED: 2\n")
    config = load("BASE: [a.yaml, b.yaml]\n")
    assert (config.SEED, config.SAVE_FREQ) == (2, 1)


def test_two_bases_may_share_one(tmp_path, load):
    (tmp_path / "root.yaml").write_text("SEED: 1\n")
    (tmp_path / "a.yaml").write_text("BASE: root.yaml\n")
    (tmp_path / "b.yaml").write_text("BASE: root.yaml\nSAVE_FREQ: 4\n")
    config = load("BASE: [a.yaml, b.yaml]\n")
    assert (config.SEED, config.SAVE_FREQ) == (1, 4)


@pytest.mark.parametrize("base", ["user.yaml", "other.yaml", "./user.yaml"])
def test_a_base_that_leads_back_is_refused(tmp_path, complaint, base):
    (tmp_path / "other.yaml").write_text("BASE: user.yaml\n")
    [line] = complaint(f"BASE: ['{base}']\n")
    assert "user.yaml" in line and "BASE" in line


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


@pytest.mark.parametrize("base", ["3", "true", "1.5", "[3]", "[[a.yaml]]", "{a: b}"])
def test_a_base_that_is_no_file_name_is_a_wrong_value(load, base):
    with pytest.raises((InputError, FileNotFoundError), match="BASE"):
        load(f"BASE: {base}\n")


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
        "!!python/object/apply:subprocess.check_output [['touch', '{}']]",
        "!!python/name:os.system",
        "!!python/module:os",
    ],
)
@pytest.mark.parametrize(
    "place", ["SEED: {}", "{}", "BASE: {}", "? {}\n: 1", "MODEL: {{NAME: {} }}"]
)
def test_unsafe_tags_run_nothing_and_are_refused(tmp_path, complaint, tag, place):
    mark = tmp_path / "ran"
    [line] = complaint(place.format(tag.format(mark)) + "\n")
    assert "user.yaml" in line and "python/" in line
    assert not mark.exists()


@pytest.mark.parametrize(
    "text",
    [
        "DATA: {IMAGE_SIZE: 224",
        "DATA:\n\t- IMAGE_SIZE: 224",
        '"',
        "a: b: c",
        "%",
        "*nobody",
        "SEED: 1\n---\nSEED: 2\n",
    ],
)
def test_invalid_yaml_is_one_line_that_names_the_file(complaint, text):
    [line] = complaint(text)
    assert "user.yaml" in line and "YAML" in line


@pytest.mark.parametrize("content", [b"\xff\xfeS\x00", b"MODEL: {NAME: \xe9}", b"SEED: 1\x00"])
def test_a_file_that_is_no_text_is_named(tmp_path, content):
    (tmp_path / "user.yaml").write_bytes(content)
    with pytest.raises(InputError, match="user.yaml is not valid YAML"):
        get_config(tmp_path / "user.yaml")


@pytest.mark.parametrize("value", ["2024-02-30", "9" * 5000])
def test_values_that_yaml_itself_cannot_build_are_reported(load, value):
    with pytest.raises(InputError, match="user.yaml"):
        load(f"SAVE: {value}\n")


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing\n", "---\n", "DATA:\nMODEL:\nTRAIN:\n"])
def test_an_empty_file_is_the_defaults(load, text):
    assert load(text) == get_config()


@pytest.mark.parametrize("text", ["[1, 2]", "text", "3", "- DATA"])
def test_a_file_without_sections_is_refused(complaint, text):
    [line] = complaint(text)
    assert "user.yaml" in line and "DATA" in line


def test_a_file_that_sets_a_key_twice_is_refused(complaint):
    """YAML's own rule; PyYAML would forget the first section without a word."""
    lines = complaint("TRAIN:\n  BASE_LR: 1.0\nSEED: 1\nTRAIN:\n  NUM_EPOCHS: 20\n")
    assert "TRAIN" in " ".join(lines)


# ---- wrong keys


@pytest.mark.parametrize(
    "text, written, meant",
    [
        ("TRAIN: {BASELR: 1}", "TRAIN.BASELR", "TRAIN.BASE_LR"),
        ("MODEL: {DROP_PATH: 0.1}", "MODEL.DROP_PATH", "MODEL.DROPPATH"),
        ("data: {batch_size: 3}", "data.batch_size", "DATA.BATCH_SIZE"),
        ("BATCH_SIZE: 3", "BATCH_SIZE", "DATA.BATCH_SIZE"),
        ("MODEL: {IMAGE_SIZE: 5}", "MODEL.IMAGE_SIZE", "DATA.IMAGE_SIZE"),
        ("TRAIN: {NUM_CLASSES: 5}", "TRAIN.NUM_CLASSES", "MODEL.NUM_CLASSES"),
        ("TRAIN: {OPTIMIZER: {BETA: [0.9, 0.99]}}", "OPTIMIZER.BETA", "TRAIN.OPTIMIZER.BETAS"),
        ("OPTIMIZER: {EPS: 1.0e-6}", "OPTIMIZER.EPS", "TRAIN.OPTIMIZER.EPS"),
        ("SED: 1", "SED", "SEED"),
    ],
)
def test_an_unknown_key_suggests_the_nearest(complaint, text, written, meant):
    [line] = complaint(text)
    assert line.endswith(f"did you mean {meant}?")
    assert written in line and "user.yaml" in line


@pytest.mark.parametrize("text", ["QQQQ: 1", "QQQQ: {ZZZZ: 1}", "3: 4", "null: 1", "'': {'': 3}"])
def test_a_key_like_no_other_is_refused_without_a_suggestion(complaint, text):
    [line] = complaint(text)
    assert "unknown key" in line and "did you mean" not in line


@pytest.mark.parametrize("text", ["MODLE:", "MODLE: {}", "MODEL: {LAYER: {}}", "TRAIN: {X: {}}"])
def test_an_unknown_key_is_refused_even_without_a_value(complaint, text):
    [line] = complaint(text)
    assert "unknown key" in line


# ---- wrong values


@pytest.mark.parametrize(
    "text, key, allowed",
    [
        ("DATA: {BATCH_SIZE: 0}", "DATA.BATCH_SIZE", "an integer >= 1"),
        ("DATA: {BATCH_SIZE: -1}", "DATA.BATCH_SIZE", "an integer >= 1"),
        ("DATA: {BATCH_SIZE: 1.5}", "DATA.BATCH_SIZE", "an integer >= 1"),
        ("DATA: {BATCH_SIZE: True}", "DATA.BATCH_SIZE", "an integer >= 1"),
        ("DATA: {BATCH_SIZE: '8 '' '}", "DATA.BATCH_SIZE", "an integer >= 1"),
        ("DATA: {BATCH_SIZE: }", "DATA.BATCH_SIZE", "an integer >= 1"),
        ("DATA: {BATCH_SIZE: [8]}", "DATA.BATCH_SIZE", "an integer >= 1"),
        ("DATA: {IMAGE_SIZE: .inf}", "DATA.IMAGE_SIZE", "an integer >= 1"),
        ("DATA: {IMAGE_SIZE: '(224, 224)'}", "DATA.IMAGE_SIZE", "an integer >= 1"),
        ("DATA: {IMAGE_CHANNELS: 1}", "DATA.IMAGE_CHANNELS", "3"),
        ("DATA: {CROP_PCT: 0}", "DATA.CROP_PCT", "to 1"),
        ("DATA: {CROP_PCT: 1.01}", "DATA.CROP_PCT", "to 1"),
        ("DATA: {RESIZE_MODE: Warp}", "DATA.RESIZE_MODE", "'short_crop' or 'warp'"),
        ("DATA: {DATASET: cifar10}", "DATA.DATASET", "'imagenet2012'"),
        ("DATA: {DATA_PATH: ''}", "DATA.DATA_PATH", "text"),
        ("DATA: {DATA_PATH: [a, b]}", "DATA.DATA_PATH", "text"),
        ("DATA: {IMAGENET_MEAN: [0.5, 0.5]}", "DATA.IMAGENET_MEAN", "3 values"),
        ("DATA: {IMAGENET_MEAN: [123.7, 116.3, 103.5]}", "DATA.IMAGENET_MEAN", "0 to 1"),
        ("DATA: {IMAGENET_STD: [0, 0, 0]}", "DATA.IMAGENET_STD", "3 values"),
        ("MODEL: {NAME: 31}", "MODEL.NAME", "text"),
        ("MODEL: {TYPE: ResNet}", "MODEL.TYPE", "'RepLKNet'"),
        ("MODEL: {LAYERS: [2, 2, 18]}", "MODEL.LAYERS", "4 values"),
        ("MODEL: {LAYERS: [2, 2, 0, 2]}", "MODEL.LAYERS", "4 values"),
        ("MODEL: {LAYERS: 2}", "MODEL.LAYERS", "4 values"),
        ("MODEL: {LAYERS: '2222'}", "MODEL.LAYERS", "4 values"),
        ("MODEL: {DROPPATH: 1.0}", "MODEL.DROPPATH", "0.999"),
        ("MODEL: {OUT_INDICES: [4]}", "MODEL.OUT_INDICES", "0 to 3"),
        ("MODEL: {OUT_INDICES: [-1]}", "MODEL.OUT_INDICES", "0 to 3"),
        ("MODEL: {OUT_INDICES: 3}", "MODEL.OUT_INDICES", "0 to 3"),
        ("MODEL: {SMALL_KERNEL: false}", "MODEL.SMALL_KERNEL", "or None"),
        ("MODEL: {SYNC_BN: 1}", "MODEL.SYNC_BN", "True or False"),
        ("MODEL: {SYNC_BN: None}", "MODEL.SYNC_BN", "True or False"),
        ("TRAIN: {BASE_LR: -1e-3}", "TRAIN.BASE_LR", "a number >= 0"),
        ("TRAIN: {BASE_LR: .nan}", "TRAIN.BASE_LR", "a number >= 0"),
        ("TRAIN: {BASE_LR: .inf}", "TRAIN.BASE_LR", "a number >= 0"),
        ("TRAIN: {BASE_LR: 1e999}", "TRAIN.BASE_LR", "a number >= 0"),
        ("TRAIN: {BASE_LR: None}", "TRAIN.BASE_LR", "a number >= 0"),
        ("TRAIN: {BASE_LR: 1+2j}", "TRAIN.BASE_LR", "a number >= 0"),
        ("TRAIN: {NUM_EPOCHS: 0}", "TRAIN.NUM_EPOCHS", "an integer >= 1"),
        ("TRAIN: {GRAD_CLIP: 0}", "TRAIN.GRAD_CLIP", "None"),
        ("TRAIN: {OPTIMIZER: {NAME: SGD}}", "TRAIN.OPTIMIZER.NAME", "'AdamW'"),
        ("TRAIN: {OPTIMIZER: {BETAS: [0.9, 1.0]}}", "TRAIN.OPTIMIZER.BETAS", "2 values"),
        ("TRAIN: {OPTIMIZER: AdamW}", "TRAIN.OPTIMIZER", "section"),
        ("TRAIN: {RANDOM_ERASE_PROB: 1.5}", "TRAIN.RANDOM_ERASE_PROB", "0 to 1"),
        ("TRAIN: {MIXUP_MODE: elem}", "TRAIN.MIXUP_MODE", "'batch'"),
        ("SEED: -1", "SEED", "0 to 2147483647"),
        ("SEED: 2147483648", "SEED", "0 to 2147483647"),
        ("EVAL: 'yes'", "EVAL", "True or False"),
        ("MODEL: 3", "MODEL", "section"),
        ("MODEL: [1]", "MODEL", "section"),
        ("SAVE: 7", "SAVE", "text"),
    ],
)
def test_a_wrong_value_names_the_key_the_value_and_what_is_allowed(complaint, text, key, allowed):
    [line] = complaint(text)
    assert re.search(rf"user\.yaml: {re.escape(key)} is .*; allowed: ", line)
    assert allowed in line.split("; allowed: ")[1]


@pytest.mark.parametrize("text", ["TRAIN: {BASE_LR: 1%s}", "MODEL: {FFN_RATIO: '1%s'}"])
def test_a_number_too_large_for_a_float_is_a_wrong_value(complaint, text):
    [line] = complaint(text % ("0" * 400))
    assert "allowed: a number" in line


@pytest.mark.parametrize(
    "text", ["SEED: {}", "MODEL: {LAYERS: {}}", "SEED: {a: 1}", "EVAL: {EVAL: 1}"]
)
def test_a_section_in_place_of_a_value_is_refused(complaint, text):
    assert any(key in complaint(text)[0] for key in ("SEED", "MODEL.LAYERS", "EVAL"))


@pytest.mark.parametrize("text", ["DATA: &a {DATA: *a}", "MODEL: {LAYERS: &a [*a]}"])
def test_a_file_that_contains_itself_is_refused(complaint, text):
    assert complaint(text)


def test_all_problems_are_reported_at_once(complaint):
    lines = complaint("""
DATA: {BATCH_SIZE: 0, IMAGESIZE: 224}
MODEL: {LAYERS: [1, 2], NMAE: x}
TRAIN: {OPTIMIZER: {EPS: tiny}}
SEDE: 1
""")
    assert len(lines) == 6
    for line, key in zip(
        lines,
        [
            "DATA.BATCH_SIZE is 0",
            "DATA.IMAGESIZE",
            "MODEL.LAYERS is [1, 2]",
            "MODEL.NMAE",
            "TRAIN.OPTIMIZER.EPS is 'tiny'",
            "SEDE",
        ],
    ):
        assert key in line


@pytest.mark.parametrize(
    "text, keys",
    [
        ("MODEL: {LARGE_KERNEL_SIZES: [31, 28, 27, 13]}", ["MODEL.LARGE_KERNEL_SIZES"]),
        ("MODEL: {SMALL_KERNEL: 4}", ["MODEL.SMALL_KERNEL"]),
        ("MODEL: {SMALL_KERNEL: 15}", ["MODEL.SMALL_KERNEL", "13"]),
        ("MODEL: {OUT_INDICES: []}", ["MODEL.OUT_INDICES"]),
        ("MODEL: {OUT_INDICES: [1, 1]}", ["MODEL.OUT_INDICES"]),
        ("MODEL: {OUT_INDICES: [3]}\nEVAL: True", ["MODEL.OUT_INDICES", "EVAL"]),
        ("MODEL: {RESUME: a}\nEVAL: True", ["MODEL.RESUME", "EVAL", "MODEL.PRETRAINED"]),
        ("MODEL: {DW_RATIO: 0.01, CHANNELS: [16, 128, 128, 128]}", ["MODEL.DW_RATIO"]),
        ("MODEL: {FFN_RATIO: 0.01, CHANNELS: [16, 128, 128, 128]}", ["MODEL.FFN_RATIO"]),
        ("TRAIN: {WARMUP_EPOCHS: 301}", ["TRAIN.WARMUP_EPOCHS", "301", "300"]),
        ("TRAIN: {LAST_EPOCH: 300}", ["TRAIN.LAST_EPOCH", "300"]),
        ("TRAIN: {CROP_SCALE: [1.0, 0.5]}", ["TRAIN.CROP_SCALE"]),
        ("TRAIN: {CROP_RATIO: [2, 1]}", ["TRAIN.CROP_RATIO"]),
        ("TRAIN: {CUTMIX_MINMAX: [0.8, 0.2]}", ["TRAIN.CUTMIX_MINMAX"]),
    ],
)
def test_values_that_contradict_each_other_are_refused(complaint, text, keys):
    [line] = complaint(text)
    assert all(key in line for key in ["user.yaml", "allowed", *keys])


def test_contradictions_are_reported_together(complaint):
    text = "MODEL: {SMALL_KERNEL: 4}\nTRAIN: {WARMUP_EPOCHS: 400, LAST_EPOCH: 400}"
    assert len(complaint(text)) == 3


@pytest.mark.parametrize("text", ["TRAIN: {WARMUP_EPOCHS: 300}", "TRAIN: {LAST_EPOCH: 299}"])
def test_values_at_the_edge_go_together(load, text):
    load(text)


# ---- the result


@pytest.mark.parametrize("name", [None, *ALL_CONFIGS])
def test_a_dumped_config_loads_as_the_same(name, load):
    config = get_config(name and CONFIGS / name)
    assert load(config.dump()) == config


def test_awkward_values_survive_dump_and_load(load):
    opts = ["MODEL.NAME", "123", "SAVE", "yes", "MODEL.PRETRAINED", "1e3", "TRAIN.WEIGHT_DECAY"]
    opts += ["1e-8", "MODEL.OUT_INDICES", "[3, 0]", "DATA.DATA_PATH", "a: b # c/é", "AMP", "True"]
    config = update_config(get_config(), flags(opts=opts))
    assert load(config.dump()) == config
    assert (config.MODEL.NAME, config.SAVE, config.MODEL.PRETRAINED) == ("123", "yes", "1e3")


def test_results_are_frozen_and_share_nothing(load):
    first, second = get_config(), get_config()
    for config in (first, load("SEED: 1\n"), update_config(first, flags())):
        with pytest.raises(AttributeError):
            config.SEED = 1
        with pytest.raises(AttributeError):
            config.MODEL.NAME = "x"
        with pytest.raises(AttributeError):
            config.TRAIN.OPTIMIZER.EPS = 1
    updated = update_config(first, flags())
    for key, value in leaves(first).items():
        if isinstance(value, list):
            value.append("mine")
            assert "mine" not in leaves(second)[key]
            assert "mine" not in leaves(updated)[key]
            assert "mine" not in leaves(get_config())[key]


def test_every_default_passes_its_own_rule():
    for key, (default, rule) in KEYS.items():
        read = rule.read(default)
        assert read == default, key
        assert isinstance(read, bool) == isinstance(default, bool), key
        assert rule.allowed, key


def test_the_config_is_the_table():
    assert leaves(get_config()).keys() == KEYS.keys()


@pytest.mark.parametrize("key", sorted(KEYS))
def test_no_rule_lets_an_object_through(key):
    _, rule = KEYS[key]
    for value in (object(), {}, {"a": 1}, {1, 2}, b"x", [None], [[]]):
        with pytest.raises((ValueError, TypeError)):
            rule.read(value)
