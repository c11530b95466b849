"""Export folders appear whole or not at all, and hold what they say."""

import os
import shutil

import numpy as np
import pytest
from small_networks import FORMS, assert_same, images, logits, small_config, small_network

from replknet_paddle.deploy import open_backend
from replknet_paddle.deploy.export import export_model
from replknet_paddle.deploy.sidecar import FILE, Sidecar
from replknet_paddle.runtime.errors import InputError

pytestmark = pytest.mark.paddle_version


@pytest.fixture
def config(tmp_path):
    return small_config(tmp_path)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An export of the small network in format `paddle`; writing one takes long."""
    folder = tmp_path_factory.mktemp("exported")
    config = small_config(folder)
    export_model(small_network(config), folder / "dst", Sidecar.build(config, format="paddle"))
    return folder / "dst"


@pytest.fixture
def earlier(tmp_path, exported):
    """The same as an earlier export in `dst`."""
    return shutil.copytree(exported, tmp_path / "dst")


@pytest.fixture
def copied(exported, monkeypatch):
    """Exports have the model files of `exported`, for tests of where they go."""

    def write(form, folder, matmul_size=None):
        for path in exported.glob("model.*"):
            shutil.copy(path, folder)

    monkeypatch.setattr("replknet_paddle.deploy.export.write_paddle_model", write)


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_paddle_export_is_program_weights_and_sidecar(exported):
    assert listing(exported.parent) == ["dst", "small.yaml"]
    files = set(listing(exported))
    assert {"model.pdiparams", FILE} < files and len(files) == 3
    assert files & {"model.json", "model.pdmodel"}


@pytest.mark.parametrize("form", FORMS)
def test_the_onnx_graph_is_valid_and_has_free_batch_and_size(tmp_path, form):
    onnx = pytest.importorskip("onnx")
    config = small_config(tmp_path, form)
    export_model(small_network(config), tmp_path / "dst", Sidecar.build(config, format="onnx"))
    assert listing(tmp_path / "dst") == ["model.onnx", FILE]
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
    for name in ("fp32", precision):
        sidecar = Sidecar.build(config, format="onnx", precision=name)
        export_model(small_network(config), tmp_path / name, sidecar)

    def weight_bytes(name):
        graph = onnx.load(tmp_path / name / "model.onnx").graph
        return sum(len(weight.raw_data) for weight in graph.initializer)

    assert weight_bytes(precision) < 0.6 * weight_bytes("fp32")


def test_fp16_weights_compute_almost_the_same(tmp_path, config):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model = small_network(config)
    export_model(model, tmp_path / "dst", Sidecar.build(config, format="onnx", precision="fp16"))
    outputs = open_backend(tmp_path / "dst", "onnxruntime").run(images(4))
    assert_same(outputs, logits(model, images(4)), 1e-2)


def test_an_earlier_export_is_replaced(tmp_path, config, earlier):
    before = open_backend(earlier).run(images(1))
    network = small_network(config, seed=9)
    export_model(network, earlier, Sidecar.build(config, format="paddle"))
    assert not np.allclose(open_backend(earlier).run(images(1)), before)
    assert listing(tmp_path) == ["dst", "small.yaml"]


def test_an_empty_folder_is_filled(tmp_path, config, copied):
    (tmp_path / "dst").mkdir()
    export_model(small_network(config), tmp_path / "dst", Sidecar.build(config, format="paddle"))
    assert (tmp_path / "dst" / FILE).exists()


@pytest.mark.parametrize("what", ["a file", "another folder"])
def test_nothing_else_is_overwritten(tmp_path, config, what):
    target = tmp_path / "dst"
    if what == "a file":
        target.write_text("precious")
    else:
        target.mkdir()
        (target / "precious").write_text("precious")
    with pytest.raises(InputError, match="not an earlier export"):
        export_model(small_network(config), target, Sidecar.build(config, format="paddle"))
    assert listing(tmp_path) == ["dst", "small.yaml"]
    assert (target if what == "a file" else target / "precious").read_text() == "precious"


@pytest.mark.parametrize("what", ["notes.txt", "a folder", "no sidecar"])
def test_an_earlier_export_with_other_things_in_it_stays(tmp_path, config, earlier, what):
    target, sidecar = earlier, Sidecar.build(config, format="paddle")
    if what == "a folder":
        (target / what).mkdir()
    else:
        (target / (FILE if what == "no sidecar" else what)).write_text("precious")
    before = {p: p.is_dir() or p.read_bytes() for p in target.rglob("*")}
    with pytest.raises(InputError, match=FILE if what == "no sidecar" else f"wrote: {what}; allo"):
        export_model(small_network(config, seed=9), target, sidecar)
    assert {p: p.is_dir() or p.read_bytes() for p in target.rglob("*")} == before
    assert listing(tmp_path) == ["dst", "small.yaml"]


def test_what_comes_while_it_is_exported_stays(tmp_path, config, monkeypatch):
    target, sidecar = tmp_path / "dst", Sidecar.build(config, format="paddle")
    target.mkdir()
    monkeypatch.setattr(
        "replknet_paddle.deploy.export.write_paddle_model",
        lambda *_: (target / "precious").write_text("precious"),
    )
    with pytest.raises(InputError, match="not an earlier export"):
        export_model(small_network(config), target, sidecar)
    assert listing(target) == ["precious"]


def test_a_link_leads_to_the_folder_that_is_replaced(tmp_path, config, exported, copied):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk/dst")
    network, sidecar = small_network(config), Sidecar.build(config, format="paddle")
    export_model(network, tmp_path / "link", sidecar)
    weights = tmp_path / "disk" / "dst" / "model.pdiparams"
    assert weights.read_bytes() == (exported / "model.pdiparams").read_bytes()
    sidecar = Sidecar.build(config, format="paddle", class_names=list("abcde"))
    export_model(network, tmp_path / "link", sidecar)
    backend = open_backend(tmp_path / "disk" / "dst")
    assert backend.sidecar.class_names == tuple("abcde")
    assert_same(backend.run(images(1)), logits(network, images(1)))
    assert (tmp_path / "link").is_symlink() and listing(tmp_path / "disk") == ["dst"]


def test_the_folder_that_it_runs_in_is_not_replaced(tmp_path, config, monkeypatch):
    (tmp_path / "dst").mkdir()
    monkeypatch.chdir(tmp_path / "dst")
    with pytest.raises(InputError, match="the folder that this runs in"):
        export_model(small_network(config), ".", Sidecar.build(config, format="paddle"))
    assert listing(tmp_path) == ["dst", "small.yaml"]


def test_an_earlier_export_comes_back_where_the_new_one_cannot_have_its_name(
    tmp_path, config, earlier, copied, monkeypatch
):
    target = earlier
    sidecar = Sidecar.build(config, format="paddle", class_names=list("abcde"))  # unlike that one
    before = {name: (target / name).read_bytes() for name in listing(target)}
    rename = os.rename

    def broken(source, destination):
        if str(source).endswith(".unfinished"):
            raise OSError(5, os.strerror(5))
        rename(source, destination)

    monkeypatch.setattr("replknet_paddle.deploy.export.os.rename", broken)
    with pytest.raises(OSError, match="Input/output"):
        export_model(small_network(config, seed=9), target, sidecar)
    assert {name: (target / name).read_bytes() for name in listing(target)} == before
    assert listing(tmp_path) == ["dst", "small.yaml"]


def test_a_failed_export_leaves_the_earlier_one(tmp_path, config, earlier, monkeypatch):
    target, sidecar = earlier, Sidecar.build(config, format="paddle")
    before = {name: (target / name).read_bytes() for name in listing(target)}

    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("replknet_paddle.deploy.export.write_paddle_model", full)
    with pytest.raises(OSError, match="No space"):
        export_model(small_network(config, seed=9), target, sidecar)
    assert {name: (target / name).read_bytes() for name in listing(target)} == before
    assert listing(tmp_path) == ["dst", "small.yaml"]


def test_what_cannot_be_exported(tmp_path, config):
    model, target = small_network(config), tmp_path / "dst"
    with pytest.raises(InputError, match="int8 with -format paddle; allowed: -format onnx"):
        export_model(model, target, Sidecar.build(config, format="paddle", precision="int8"))
    with pytest.raises(InputError, match="-format tflite; allowed: paddle, onnx"):
        export_model(model, target, Sidecar.build(config, format="tflite"))
    backbone = small_config(tmp_path, extra="  OUT_INDICES: [3]\n")
    with pytest.raises(InputError, match="OUT_INDICES"):
        export_model(small_network(backbone), target, Sidecar.build(backbone, format="paddle"))
    assert listing(tmp_path) == ["small.yaml"]


def test_no_folder_to_write_into(tmp_path, config):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        sidecar = Sidecar.build(config, format="paddle")
        export_model(small_network(config), tmp_path / "nowhere" / "dst", sidecar)


def test_onnx_without_its_package_says_what_to_install(tmp_path, config, monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("replknet_paddle.runtime.packages.importlib.import_module", missing)
    with pytest.raises(InputError, match=r"needs onnx.*pip install -r .*requirements/deploy\.txt"):
        sidecar = Sidecar.build(config, format="onnx")
        export_model(small_network(config), tmp_path / "dst", sidecar)
    assert listing(tmp_path) == ["small.yaml"]
