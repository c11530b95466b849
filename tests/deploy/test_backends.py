"""Every backend computes what the network computes, and says clearly what it cannot do."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from small_networks import CONFIG, FORMS, assert_same, images, logits, small_config, small_network

from replknet_paddle.checkpoints.files import write_safetensors
from replknet_paddle.deploy import backends as module
from replknet_paddle.deploy import inference_model, installed_backends, open_backend
from replknet_paddle.deploy.backends import PACKAGES, open_for_evaluation
from replknet_paddle.deploy.export import export_model
from replknet_paddle.deploy.runtimes import Backend, check_images
from replknet_paddle.deploy.sidecar import FILE, Sidecar
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.packages import is_installed

pytestmark = [pytest.mark.numbers, pytest.mark.paddle_version]


def needs(name):
    """Skip where the packages of backend `name` are missing."""
    for package in PACKAGES[name]:
        pytest.importorskip(package)


@pytest.fixture
def config(tmp_path):
    return small_config(tmp_path)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Folder of one export of each format that can be made here."""
    folder = tmp_path_factory.mktemp("exports")
    config = small_config(folder)
    for format in ("paddle", "onnx") if is_installed("onnx") else ("paddle",):
        sidecar = Sidecar.build(config, format=format)
        export_model(small_network(config), folder / format, sidecar)
    return folder


@pytest.fixture
def export(tmp_path, originals):
    """Gives an export folder of a format, to be spoilt."""

    def copy(format):
        if format == "onnx":
            pytest.importorskip("onnx")
        return Path(shutil.copytree(originals / format, tmp_path / format))

    return copy


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", PACKAGES)
def test_a_network_gives_the_same_logits_on_every_backend(tmp_path, name, form):
    needs(name)
    config = small_config(tmp_path, form)
    model = small_network(config)
    backend = open_backend(model, name, config=config, threads=1)
    assert isinstance(backend, Backend) and backend.name == name
    for batch in (images(3), images(1), images(2, size=64)):
        assert_same(backend.run(batch), logits(model, batch))
    assert backend.sidecar.num_classes == 5
    backend.close()


def test_bfloat16_is_close_and_not_the_same(config):
    needs("openvino")
    model = small_network(config)
    try:
        backend = open_backend(model, "openvino", config=config, precision="bf16")
    except InputError as error:
        pytest.skip(str(error))
    outputs, reference = backend.run(images(8)), logits(model, images(8))
    assert_same(outputs, reference, 0.2)
    assert not np.allclose(outputs, reference, atol=1e-5)


@pytest.mark.parametrize(
    "name, sources", [("dygraph", ("run", "run/last")), ("paddle", ("run/last",))]
)
def test_a_run_folder_and_a_checkpoint_in_it_are_enough(tmp_path, config, name, sources):
    model = small_network(config)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(f"{CONFIG}{FORMS['31B']}\n")
    weights = {key: value.numpy() for key, value in model.state_dict().items()}
    write_safetensors(run / "last", weights, {})
    for source in sources:
        assert_same(open_backend(tmp_path / source, name).run(images(2)), logits(model, images(2)))


@pytest.mark.parametrize("name", ["paddle", "onnxruntime", "openvino"])
def test_an_export_folder_is_enough(config, export, name):
    needs(name)
    folder = export("paddle" if name == "paddle" else "onnx")
    reference = logits(small_network(config), images(3))
    assert_same(open_backend(folder, name, threads=1).run(images(3)), reference)
    assert_same(open_backend(str(folder)).run(images(3)), reference)


def test_auto_chooses_from_the_installed_ones(monkeypatch):
    monkeypatch.setattr(module, "installed_backends", lambda: ["dygraph", "paddle", "onnxruntime"])
    assert module.candidates(list(PACKAGES), "fp32") == ["paddle", "onnxruntime"]


def test_auto_on_an_onnx_export_without_its_readers_says_what_to_install(monkeypatch):
    monkeypatch.setattr(module, "installed_backends", lambda: ["dygraph", "paddle"])
    with pytest.raises(InputError, match="openvino or onnxruntime.*requirements/deploy.txt"):
        module.candidates(["onnxruntime", "openvino"], "int8")


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_missing_extra_is_named_with_the_command(monkeypatch, config, name):
    def missing(package):
        raise ImportError(f"No module named {package!r}")

    monkeypatch.setattr("replknet_paddle.runtime.packages.importlib.import_module", missing)
    with pytest.raises(InputError, match=r"needs onnx .*pip install -r .*requirements/deploy\.txt"):
        open_backend(small_network(config), name, config=config)


def test_what_is_installed_is_what_can_be_imported():
    for name in installed_backends():
        assert all(map(is_installed, PACKAGES[name]))
    assert {"dygraph", "paddle"} <= set(installed_backends())
    assert not is_installed("no_such_package")


@pytest.mark.parametrize("name", PACKAGES)
def test_images_of_another_shape_or_type_are_refused(config, export, name):
    needs(name)
    if name == "dygraph":
        backend = open_backend(small_network(config), name, config=config)
    else:
        backend = open_backend(export("paddle" if name == "paddle" else "onnx"), name)
    whole = images(1)
    for batch in (
        whole[0],
        whole.astype("float64"),
        whole[:, :2],
        whole[:0],
        (whole * 100).astype("uint8"),
    ):
        with pytest.raises(InputError, match=r"allowed: float32 \(N, 3, H, W\)"):
            backend.run(batch)


def test_an_export_for_one_size_refuses_others(config):
    sidecar = dataclasses.replace(Sidecar.build(config, format="onnx"), input_size=(32, 32))
    check_images(images(1), sidecar)
    with pytest.raises(InputError, match="takes 32 x 32 alone"):
        check_images(images(1, size=64), sidecar)


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"name": "tensorrt"}, "backend 'tensorrt'; allowed: auto, dygraph"),
        ({"name": "openvino"}, "does not open; allowed: auto, paddle"),
        ({"threads": 0}, "threads is 0"),
        ({"precision": "int8"}, "made for fp32; allowed: fp32 or bf16"),
        ({"precision": "fp8"}, "made for fp32"),
    ],
)
def test_what_an_export_cannot_do(export, arguments, says):
    with pytest.raises(InputError, match=says):
        open_backend(export("paddle"), **arguments)


def test_what_a_network_in_memory_cannot_do(config):
    model = small_network(config)
    with pytest.raises(InputError, match="int8 needs images to calibrate"):
        open_backend(model, config=config, precision="int8")
    with pytest.raises(InputError, match="with backend dygraph; allowed: fp32"):
        open_backend(model, "dygraph", config=config, precision="bf16")


@pytest.mark.parametrize("name", ["paddle", "onnxruntime", "openvino"])
@pytest.mark.parametrize("damage", ["missing", "empty", "garbage", "cut"])
def test_a_damaged_model_file_is_one_message(export, name, damage):
    needs(name)
    folder = export("paddle" if name == "paddle" else "onnx")
    path = next(folder.glob("model.[!p]*" if name != "paddle" else "model.*[!s]"))
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "garbage": b"x" * 5000, "cut": whole[:2000]}[damage])
    with pytest.raises(InputError, match="export it again"):
        open_backend(folder, name)


@pytest.mark.parametrize("damage", [b"", b"x" * 5000, 2000], ids=["empty", "garbage", "cut"])
@pytest.mark.parametrize(
    "name, pattern",
    [
        ("paddle", "model.*[!s]"),
        ("paddle", "model.pdiparams"),
        ("onnxruntime", "model.onnx"),
        ("openvino", "model.onnx"),
    ],
)
def test_what_a_program_says_of_a_model_file_is_one_message(config, export, name, pattern, damage):
    """As the sidecar promises it, and yet no model."""
    needs(name)
    folder = export("paddle" if name == "paddle" else "onnx")
    path = next(folder.glob(pattern))
    path.write_bytes(path.read_bytes()[:damage] if isinstance(damage, int) else damage)
    Sidecar.build(config, format="paddle" if name == "paddle" else "onnx").write(folder)
    with pytest.raises(InputError, match="cannot read .*export it again"):
        open_backend(folder, name)


@pytest.mark.parametrize("missing", ["program", "weights", "onnx"])
def test_the_sidecar_must_list_what_is_opened(export, missing):
    folder = export("onnx" if missing == "onnx" else "paddle")
    content = json.loads((folder / FILE).read_text())
    name = next(n for n in content["files"] if (n == "model.pdiparams") == (missing == "weights"))
    del content["files"][name]
    (folder / FILE).write_text(json.dumps(content))
    with pytest.raises(InputError, match="lists .*; an export of format"):
        open_backend(folder)


def test_of_two_programs_none_is_taken(config, export):
    folder = export("paddle")
    for name in ("model.json", "model.pdmodel"):
        (folder / name).touch()
    Sidecar.build(config, format="paddle").write(folder)
    with pytest.raises(InputError, match=r"has model\.json or model\.pdmodel and"):
        open_backend(folder)


def test_a_network_keeps_its_mode_whatever_runs_it(config):
    model = small_network(config)
    expected = logits(model, images(2))
    backend = open_backend(model, "dygraph", config=config)
    model.train()
    model.stages[0].eval()  # as where a part is frozen
    modes = [layer.training for layer in model.sublayers(include_self=True)]
    assert_same(backend.run(images(2)), expected)
    assert [layer.training for layer in model.sublayers(include_self=True)] == modes
    inference_model(model, np.zeros((40, 40, 3), "uint8"))
    assert [layer.training for layer in model.sublayers(include_self=True)] == modes
    assert_same(backend.run(images(2)), expected)


def test_auto_passes_over_what_does_not_compute_in_bfloat16(monkeypatch):
    monkeypatch.setattr(module, "installed_backends", lambda: list(PACKAGES))
    monkeypatch.setattr(module, "computes_in", lambda name, precision: name != "openvino")
    assert module.candidates(list(PACKAGES), "bf16") == ["paddle"]
    with pytest.raises(InputError, match="does not compute in bfloat16.*another precision"):
        module.candidates(["onnxruntime", "openvino"], "bf16")


def test_paddle_refuses_bfloat16_where_the_processor_would_emulate_it(monkeypatch, export):
    monkeypatch.setattr("replknet_paddle.runtime.processes.processor_has", lambda flag: False)
    with pytest.raises(InputError, match="bf16 with backend paddle on a processor .*AVX512-BF16"):
        open_backend(export("paddle"), "paddle", precision="bf16")


def test_processes_of_this_machine_alone_share_its_cores(monkeypatch, export):
    given = []

    def opener(path, sidecar, threads, precision):
        given.append(threads)

    monkeypatch.setitem(module.OPENERS, "paddle", opener)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(12))
    monkeypatch.setenv("LARGE_KERNEL_THREADS", "5")
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "6")
    monkeypatch.setenv("PADDLE_CURRENT_ENDPOINT", "a:1")
    monkeypatch.setenv("PADDLE_TRAINER_ENDPOINTS", "a:1,a:2,b:1,b:2,c:1,c:2")
    open_backend(export("paddle"), "paddle")
    assert given == [6]


def test_a_folder_that_is_nothing(tmp_path):
    with pytest.raises(InputError, match=r"is not an exported model: it has no replknet\.json"):
        open_backend(tmp_path)


def test_an_export_of_other_preprocessing_is_not_evaluated(tmp_path, config, export):
    folder = export("paddle")
    changed = config.clone()
    changed.defrost()
    changed.MODEL.PRETRAINED = str(folder)
    open_for_evaluation(changed, "auto")
    changed.DATA.CROP_PCT = 1.0
    changed.MODEL.NUM_CLASSES = 7
    with pytest.raises(InputError, match="num_classes is 5.* 7; preprocessing"):
        open_for_evaluation(changed, "auto")


def test_an_export_names_its_classes(tmp_path, config):
    needs("onnxruntime")
    sidecar = Sidecar.build(config, format="onnx", class_names=list("abcde"))
    export_model(small_network(config), tmp_path / "named", sidecar)
    assert open_backend(tmp_path / "named").sidecar.class_names == tuple("abcde")
    assert json.loads((tmp_path / "named" / FILE).read_text())["format_version"] == 1
