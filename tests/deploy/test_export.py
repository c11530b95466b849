"""Export folders appear whole or not at all, and are read or refused."""

import json
import os
import shutil

import numpy as np
import paddle
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_networks import FORMS, assert_same, images, logits, small_config, small_network
from tiny import command

from replknet_paddle.config import get_config
from replknet_paddle.deploy import open_backend
from replknet_paddle.deploy.export import (
    FILE,
    FILE_OF_0_2,
    ModelInfo,
    check_combination,
    check_target,
    export_model,
    is_export,
    read_export,
    write_record,
)
from replknet_paddle.runtime.errors import InputError

NAMES = ("Ähre", "b", "c", "d e", "e")
WHOLE = ["class_names.txt", "config.yaml", FILE, "model.json", "model.pdiparams"]


@pytest.fixture
def config(tmp_path):
    return small_config(tmp_path)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An export of the small network in format `paddle`; writing one takes long."""
    folder = tmp_path_factory.mktemp("exported")
    config = small_config(folder)
    info = ModelInfo(config, class_names=NAMES, source_sha256="0" * 64)
    export_model(small_network(config), folder / "dst", info)
    return folder / "dst"


@pytest.fixture
def earlier(tmp_path, exported):
    """The same as an earlier export in `dst`."""
    return shutil.copytree(exported, tmp_path / "dst")


@pytest.fixture
def copied(exported, monkeypatch):
    """Exports have the model files of `exported`, for tests of where they go."""

    def write(form, folder, matmul_side=None):
        for path in exported.glob("model.*"):
            shutil.copy(path, folder)

    monkeypatch.setattr("replknet_paddle.deploy.export.write_paddle_model", write)


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def contents(folder):
    return {path: path.is_dir() or path.read_bytes() for path in folder.rglob("*")}


# ---- what is in it


def test_an_export_is_a_folder_like_that_of_a_run(exported):
    assert listing(exported.parent) == ["dst", "small.yaml"]
    assert listing(exported) == WHOLE
    assert (exported / "class_names.txt").read_text(encoding="utf-8").splitlines() == list(NAMES)
    record = json.loads((exported / FILE).read_text())
    assert record["paddle_version"] == paddle.__version__


def test_what_is_written_is_read(tmp_path, config):
    changes = {"DATA__RESIZE_MODE": "warp", "DATA__IMAGENET_MEAN": [0.5, 0.4, 0.3]}
    config = get_config(tmp_path / "small.yaml", **changes, SAVE="x", MODEL__RESUME="y")
    (tmp_path / "dst").mkdir()
    info = ModelInfo(config, "onnx", "int8", True, NAMES, "0" * 64)
    write_record(info, tmp_path / "dst")
    given = read_export(tmp_path / "dst")
    assert given.config == get_config(tmp_path / "small.yaml", **changes)
    for key in ("format", "precision", "fixed_size", "class_names", "source_sha256"):
        assert getattr(given, key) == getattr(info, key), key
    assert set(given.files) == {"class_names.txt", "config.yaml"}


@pytest.mark.parametrize("names", [("a",), tuple("abcdef")])
def test_names_must_be_as_many_as_classes(config, names):
    with pytest.raises(InputError, match=f"{len(names)} class names for 5 classes"):
        ModelInfo(config, class_names=names)


@pytest.mark.parametrize("name", ["two\nlines", "", " blank", "half a letter \udc80"])
def test_a_name_that_is_no_line_of_text_is_refused(tmp_path, config, name):
    with pytest.raises(InputError, match="class_names.txt; allowed: one line of UTF-8"):
        write_record(ModelInfo(config, class_names=(name, *"bcde")), tmp_path)


@pytest.mark.parametrize("form", FORMS)
def test_the_onnx_graph_is_valid_and_has_free_batch_and_size(tmp_path, form):
    onnx = pytest.importorskip("onnx")
    config = small_config(tmp_path, form)
    export_model(small_network(config), tmp_path / "dst", ModelInfo(config, "onnx"))
    assert listing(tmp_path / "dst") == ["config.yaml", FILE, "model.onnx"]
    model = onnx.load(tmp_path / "dst" / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    dims = [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    assert dims == ["batch", 3, "height", "width"]
    assert {node.op_type for node in model.graph.node} == {
        "Conv", "Relu", "Gelu", "Add", "GlobalAveragePool", "Flatten", "Gemm",
    }  # fmt: skip


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_weights_take_half_the_room(tmp_path, config, precision):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model = small_network(config)
    sizes = {}
    for name in ("fp32", precision):
        export_model(model, tmp_path / name, ModelInfo(config, "onnx", name))
        graph = onnx.load(tmp_path / name / "model.onnx").graph
        sizes[name] = sum(len(weight.raw_data) for weight in graph.initializer)
    assert sizes[precision] < 0.6 * sizes["fp32"]
    if precision == "fp16":
        outputs = open_backend(tmp_path / precision, "onnxruntime").run(images(4))
        assert_same(outputs, logits(model, images(4)), 1e-2)


@pytest.mark.parametrize("form", FORMS)
def test_large_kernels_are_products_and_logits_stay(form, tmp_path):
    config = small_config(tmp_path, form)
    model = small_network(config)
    operations = {}
    for name in ("paddle", "matmul"):
        export_model(model, tmp_path / name, ModelInfo(config, fixed_size=name == "matmul"))
        program = paddle.jit.load(str(tmp_path / name / "model")).program()
        operations[name] = [op.name() for op in program.global_block().ops]

    def count(name, word):
        return sum(word in op for op in operations[name])

    large = 5  # blocks, each of which has one, merged
    assert count("matmul", "matmul") - count("paddle", "matmul") == large
    assert count("matmul", "index_select") >= 2 * large and count("paddle", "index_select") == 0
    backend = open_backend(tmp_path / "matmul", "paddle")
    for batch in (1, 3):
        assert_same(backend.run(images(batch)), logits(model, images(batch)), 1e-5)
    with pytest.raises(InputError, match="40 x 40 pixels; this export takes 32 x 32 alone"):
        backend.run(np.zeros((1, 3, 40, 40), "float32"))


def test_what_cannot_be_exported(tmp_path, config, monkeypatch):
    check_combination("paddle", "fp16", "matmul")
    for values, says in {
        ("paddle", "int8"): "int8 with -format paddle; allowed: -format onnx",
        ("tflite", "fp32"): "-format tflite; allowed: paddle, onnx",
        ("onnx", "fp8"): "-precision fp8; allowed: fp32",
        ("onnx", "fp32", "matmul"): "-conv_impl matmul with -format onnx",
        ("paddle", "fp32", "fft"): "-conv_impl fft; allowed: paddle, matmul",
    }.items():
        with pytest.raises(InputError, match=says):
            check_combination(*values)
    backbone = small_config(tmp_path, extra="  OUT_INDICES: [3]\n")
    with pytest.raises(InputError, match="OUT_INDICES"):
        export_model(small_network(backbone), tmp_path / "dst", ModelInfo(backbone))

    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(InputError, match=r"needs onnx.*pip install -r .*requirements/deploy\.txt"):
        export_model(small_network(config), tmp_path / "dst", ModelInfo(config, "onnx"))
    assert listing(tmp_path) == ["small.yaml"]


# ---- where it goes


def test_an_earlier_export_is_replaced(tmp_path, config, earlier):
    before = open_backend(earlier).run(images(1))
    export_model(small_network(config, seed=9), earlier, ModelInfo(config))
    assert not np.allclose(open_backend(earlier).run(images(1)), before)
    assert listing(tmp_path) == ["dst", "small.yaml"]
    assert listing(earlier) == [name for name in WHOLE if name != "class_names.txt"]


@pytest.mark.parametrize("what", ["nothing", "an empty folder", "an export of 0.2"])
def test_what_an_export_may_replace(tmp_path, config, copied, what):
    target = tmp_path / "dst"
    if what != "nothing":
        target.mkdir()
    if what == "an export of 0.2":
        write_of_0_2(target, OF_0_2)
    export_model(small_network(config), target, ModelInfo(config, class_names=NAMES))
    assert listing(target) == WHOLE


@pytest.mark.parametrize("what", ["a file", "another folder", "a run folder"])
def test_nothing_else_is_overwritten(tmp_path, config, what):
    target = tmp_path / "dst"
    if what == "a file":
        target.write_text("precious")
    else:
        target.mkdir()
        name = {"another folder": "precious", "a run folder": "config.yaml"}[what]
        (target / name).write_text("precious")
    before = contents(tmp_path)
    with pytest.raises(InputError, match="not an earlier export"):
        export_model(small_network(config), target, ModelInfo(config))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("what", ["notes.txt", "a folder", "no record"])
def test_an_earlier_export_with_other_things_in_it_stays(tmp_path, earlier, what):
    if what == "a folder":
        (earlier / what).mkdir()
    else:
        (earlier / (FILE if what == "no record" else what)).write_text("precious")
    before = contents(tmp_path)
    with pytest.raises(InputError, match=FILE if what == "no record" else f"wrote: {what}; allo"):
        check_target(earlier)
    assert contents(tmp_path) == before


def test_what_comes_while_it_is_exported_stays(tmp_path, config, monkeypatch):
    target = tmp_path / "dst"
    target.mkdir()
    monkeypatch.setattr(
        "replknet_paddle.deploy.export.write_paddle_model",
        lambda *_: (target / "precious").write_text("precious"),
    )
    with pytest.raises(InputError, match="not an earlier export"):
        export_model(small_network(config), target, ModelInfo(config))
    assert listing(target) == ["precious"]


def test_a_link_leads_to_the_folder_that_is_replaced(tmp_path, config, copied):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk/dst")
    for names in (None, NAMES):
        export_model(small_network(config), tmp_path / "link", ModelInfo(config, class_names=names))
        assert read_export(tmp_path / "disk" / "dst").class_names == names
    assert (tmp_path / "link").is_symlink() and listing(tmp_path / "disk") == ["dst"]


def test_a_place_that_cannot_be_is_named(tmp_path, config, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        check_target(tmp_path / "nowhere" / "dst")
    (tmp_path / "dst").mkdir()
    monkeypatch.chdir(tmp_path / "dst")
    with pytest.raises(InputError, match="the folder that this runs in"):
        check_target(".")


@pytest.mark.parametrize("where", ["while it is written", "where it gets its name"])
def test_a_failed_export_leaves_the_earlier_one(
    tmp_path, config, earlier, copied, monkeypatch, where
):
    before, rename = contents(tmp_path), os.rename

    def full(*_):
        raise OSError(28, os.strerror(28))

    def broken(source, destination):
        if str(source).endswith(".unfinished"):
            raise OSError(28, os.strerror(28))
        rename(source, destination)

    if where == "while it is written":
        monkeypatch.setattr("replknet_paddle.deploy.export.write_paddle_model", full)
    else:
        monkeypatch.setattr("os.rename", broken)
        monkeypatch.setattr("replknet_paddle.runtime.files._exchange", full)
    with pytest.raises(OSError, match="No space"):
        export_model(small_network(config, seed=9), earlier, ModelInfo(config))
    assert contents(tmp_path) == before


# ---- reading it

# The replknet.json that version 0.2 wrote for a UPerNet; for a classifier, `segmentation` is null.
OF_0_2 = {
    "format_version": 1,
    "architecture": "up",
    "format": "onnx",
    "precision": "fp16",
    "input_size": None,
    "preprocessing": {
        "image_size": 32,
        "crop_pct": 0.9,
        "mode": "warp",
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.2, 0.1],
        "interpolation": "bicubic",
        "native_pixels": True,
    },
    "num_classes": 4,
    "class_names": ["n0", "n1", "n2", "n3"],
    "segmentation": {
        "align_corners": True,
        "resize": [64, 48],
        "slide_stride": 21,
        "eval_ratios": [0.5, 1.0],
        "eval_flip": True,
        "palette": None,
    },
    "source_sha256": "ab",
    "paddle_version": "3.3.1",
    "files": {},
}


def write_of_0_2(folder, content):
    (folder / FILE_OF_0_2).write_text(json.dumps(content))


def test_exports_of_0_2_are_read(tmp_path):
    write_of_0_2(tmp_path, OF_0_2)
    assert is_export(tmp_path)
    info = read_export(tmp_path)
    assert (info.format, info.precision, info.fixed_size) == ("onnx", "fp16", False)
    assert info.class_names == ("n0", "n1", "n2", "n3") and info.source_sha256 == "ab"
    config = info.config
    assert (config.MODEL.NAME, config.MODEL.TYPE, config.MODEL.NUM_CLASSES) == ("up", "UPerNet", 4)
    assert (config.DATA.IMAGE_SIZE, config.DATA.CROP_PCT) == (32, 0.9)
    assert (config.DATA.RESIZE_MODE, config.DATA.IMAGENET_MEAN) == ("warp", [0.5, 0.4, 0.3])
    assert config.DATA.IMAGENET_STD == [0.2, 0.2, 0.1]
    segmentation = config.SEGMENTATION
    assert (segmentation.ALIGN_CORNERS, segmentation.RESIZE) == (True, [64, 48])
    assert (segmentation.SLIDE_STRIDE, segmentation.EVAL_RATIOS) == (21, [0.5, 1.0])
    assert segmentation.EVAL_FLIP and segmentation.PALETTE is None


def test_exports_of_classifiers_of_0_2_and_0_1_run_as_before(earlier, tiny_data, tmp_path):
    """Those of 0.1 have no segmentation and no native_pixels."""
    before = open_backend(earlier, "paddle").run(images(2))
    files = json.loads((earlier / FILE).read_text())["files"]
    for name in ("config.yaml", "class_names.txt", FILE):
        (earlier / name).unlink()
        files.pop(name, None)
    content = {**OF_0_2, "num_classes": 5, "class_names": None, "input_size": [32, 32]}
    content |= {"format": "paddle", "precision": "fp32", "files": files, "segmentation": None}
    for without in ((), ("segmentation", "native_pixels")):
        content["preprocessing"] = dict(OF_0_2["preprocessing"])
        for key in without:
            (content if key in content else content["preprocessing"]).pop(key)
        write_of_0_2(earlier, content)
        info = read_export(earlier)
        assert info.config.MODEL.TYPE == "RepLKNet" and info.fixed_size
        assert np.array_equal(open_backend(earlier, "paddle").run(images(2)), before)
    flags = [f"-pretrained={earlier}", f"-data_path={tiny_data}", f"-output={tmp_path / 'run'}"]
    assert command("eval")(flags) == 0  # by the configuration that it carries


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
SECTIONS = ("preprocessing", "segmentation")
MANY = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
PLACES = [(key,) for key in OF_0_2]
PLACES += [(section, key) for section in SECTIONS for key in OF_0_2[section]]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.sampled_from(PLACES), value=JSON, is_missing=st.booleans())
def test_any_record_of_0_2_is_read_or_refused(tmp_path, place, value, is_missing):
    """Whatever stands in the place of an entry, or where it is missing."""
    content = json.loads(json.dumps(OF_0_2))
    holder = content if len(place) == 1 else content[place[0]]
    holder[place[-1]] = value
    if is_missing:
        del holder[place[-1]]
    write_of_0_2(tmp_path, content)
    try:
        info = read_export(tmp_path)
    except InputError as error:
        assert FILE_OF_0_2 in str(error) or "class names" in str(error)
    else:
        assert info.format in ("paddle", "onnx") and info.config.DATA.IMAGE_SIZE >= 1


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    key=st.sampled_from(["format_version", "format", "precision", "fixed_size", "files"]),
    value=JSON,
)
def test_any_record_is_read_or_refused(exported, tmp_path, key, value):
    folder = tmp_path / "dst"
    shutil.copytree(exported, folder, dirs_exist_ok=True)
    record = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text(json.dumps({**record, key: value}))
    try:
        info = read_export(folder)
        info.verify(folder)
    except (InputError, OSError) as error:  # OSError: a name longer than names of files are
        assert "\n" not in str(error)
    else:
        assert (info.format, info.precision) == ("paddle", "fp32")


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '{"a": 1', "\udcff", "[" * 100_000])
@pytest.mark.parametrize("name", [FILE, FILE_OF_0_2])
def test_what_is_no_record_is_refused(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=name):
        read_export(tmp_path)


@pytest.mark.parametrize("name", ["../model.json", "a/b", "..", "", "a\\b", "a\n"])
def test_no_file_of_another_folder_is_opened(earlier, name):
    record = json.loads((earlier / FILE).read_text())
    record["files"][name] = "0" * 64
    (earlier / FILE).write_text(json.dumps(record))
    with pytest.raises(InputError, match="file names of this folder"):
        read_export(earlier)


def test_other_folders_are_no_exports(tmp_path):
    with pytest.raises(FileNotFoundError, match="no export folder"):
        read_export(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"is not an exported model: it has no export\.json"):
        open_backend(tmp_path)


@pytest.mark.parametrize("name", [name for name in WHOLE if name != FILE])
def test_files_are_those_that_were_written(earlier, name):
    read_export(earlier).verify(earlier)
    with open(earlier / name, "ab") as file:
        file.write(b"# x")
    says = "has 6 lines" if name == "class_names.txt" else "is not the file that export.json was"
    with pytest.raises(InputError, match=f"{name} {says}"):
        read_export(earlier).verify(earlier)
    (earlier / name).unlink()
    with pytest.raises((InputError, FileNotFoundError), match=name):
        read_export(earlier).verify(earlier)
