"""Every backend computes what the network computes, and says clearly what it cannot do; `auto`
takes the fastest one here, and measures it once."""

import json
import logging
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import paddle
import pytest
from small_networks import CONFIG, FORMS, assert_same, images, logits, small_config, small_network
from tiny import ROOT

from replknet_paddle.checkpoints.files import write_safetensors
from replknet_paddle.config import override
from replknet_paddle.deploy import backends as module
from replknet_paddle.deploy import (
    get_model,
    inference_model,
    installed_backends,
    open_backend,
)
from replknet_paddle.deploy.backends import (
    BACKENDS,
    Backend,
    candidates,
    check_precision,
    open_for_evaluation,
)
from replknet_paddle.deploy.export import FILE, ModelInfo, export_model, write_record
from replknet_paddle.runtime import processes
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.packages import is_installed

pytestmark = [pytest.mark.numbers, pytest.mark.paddle_version]

READERS = [name for name in BACKENDS if name != "eager"]


def needs(name):
    """Skip where the packages of backend `name` are missing."""
    for package in BACKENDS[name].packages:
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
        export_model(small_network(config), folder / format, ModelInfo(config, format))
    return folder


@pytest.fixture
def export(tmp_path, originals):
    """Gives an export folder for a backend, to be spoilt."""

    def copy(name):
        needs(name)
        format = BACKENDS[name].format
        return Path(shutil.copytree(originals / format, tmp_path / format))

    return copy


# ---- numbers


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", BACKENDS)
def test_a_network_gives_the_same_logits_on_every_backend(tmp_path, name, form):
    needs(name)
    config = small_config(tmp_path, form)
    model = small_network(config)
    backend = open_backend(model, name, config=config, threads=1)
    assert isinstance(backend, Backend) and backend.name == name
    for batch in (images(3), images(1), images(2, size=64)):
        assert_same(backend.run(batch), logits(model, batch))
    assert backend.info.config is config
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
    "name, sources", [("eager", ("run", "run/last")), ("paddle", ("run/last",))]
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


@pytest.mark.parametrize("name", READERS)
def test_an_export_folder_is_enough(config, export, name):
    folder = export(name)
    reference = logits(small_network(config), images(3))
    assert_same(open_backend(folder, name, threads=1).run(images(3)), reference)
    assert_same(open_backend(str(folder)).run(images(3)), reference)


def test_a_network_keeps_its_mode_whatever_runs_it(config):
    model = small_network(config)
    expected = logits(model, images(2))
    backend = open_backend(model, "eager", config=config)
    model.train()
    model.stages[0].eval()  # as where a part is frozen
    modes = [layer.training for layer in model.sublayers(include_self=True)]
    assert_same(backend.run(images(2)), expected)
    assert [layer.training for layer in model.sublayers(include_self=True)] == modes
    inference_model(model, np.zeros((40, 40, 3), "uint8"))
    assert [layer.training for layer in model.sublayers(include_self=True)] == modes
    assert_same(backend.run(images(2)), expected)


# Prints how many MiB a backend of an export takes for the second hundred of image sizes.
GROWTH = """
import sys
import numpy as np
from replknet_paddle.deploy import open_backend
backend = open_backend(sys.argv[1], "openvino", threads=1)
kibibytes = []
for i in range(1, 201):
    backend.run(np.zeros((1, 3, 64 + i, 264 - i), "float32"))
    if i % 100 == 0:
        status = open("/proc/self/status").read().split()
        kibibytes.append(int(status[status.index("VmRSS:") + 1]))
print((kibibytes[1] - kibibytes[0]) // 1024)
"""


def test_memory_does_not_grow_with_each_input_size(export):
    """That of OpenVINO grew by 123 MiB here, and grows by 4 with a bounded cache."""
    folder = export("openvino")
    command = [sys.executable, "-c", GROWTH, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = subprocess.run(command, env=environment, text=True, capture_output=True, check=True)
    assert int(said.stdout) < 40


# ---- what cannot be


def test_images_of_another_shape_or_type_are_refused(export):
    backend, whole = open_backend(export("paddle"), "paddle"), images(1)
    wrong = [whole[0], whole.astype("float64"), whole[:, :2], whole[:0], whole.astype("uint8")]
    for batch in wrong:
        with pytest.raises(InputError, match=r"allowed: float32 \(N, 3, H, W\)"):
            backend.run(batch)


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"name": "tensorrt"}, "backend 'tensorrt'; allowed: auto, eager"),
        ({"name": "openvino"}, "does not open; allowed: auto, paddle"),
        ({"threads": 0}, "threads is 0"),
        ({"precision": "int8"}, "made for fp32; allowed: fp32 or bf16"),
        ({"precision": "fp8"}, "made for fp32"),
    ],
)
def test_what_an_export_cannot_do(export, arguments, says):
    with pytest.raises(InputError, match=says):
        open_backend(export("paddle"), **arguments)


@pytest.mark.parametrize(
    "name, precision, says",
    [
        ("auto", "fp8", "precision fp8; allowed: fp32, fp16, bf16, int8"),
        ("auto", "int8", "int8 needs images to calibrate"),
        ("eager", "bf16", "with backend eager on CPU; allowed: fp32"),
        ("paddle", "fp16", "fp16 with backend paddle on CPU; allowed: fp32, bf16"),
        ("onnxruntime", "bf16", "bf16 with backend onnxruntime on CPU; allowed: fp32, fp16, int8"),
    ],
)
def test_what_a_network_in_memory_cannot_do(config, name, precision, says):
    with pytest.raises(InputError, match=says):
        open_backend(small_network(config), name, config=config, precision=precision)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("damage", ["missing", b"", b"x" * 5000, 2000], ids=str)
@pytest.mark.parametrize("is_promised", [False, True])
def test_a_damaged_model_file_is_one_message(config, export, name, damage, is_promised):
    """Whether its digest says so or, where that is right, the program that reads the file."""
    folder = export(name)
    paths = [folder / "model.onnx"]
    if name == "paddle":
        paths = [folder / "model.json", folder / "model.pdiparams"]
    for path in paths:
        whole = path.read_bytes()
        path.unlink()
        if damage != "missing":
            path.write_bytes(whole[:damage] if isinstance(damage, int) else damage)
        if is_promised:
            write_record(ModelInfo(config, BACKENDS[name].format), folder)
        with pytest.raises(InputError, match="again$"):
            open_backend(folder, name)
        path.write_bytes(whole)


def test_the_name_of_eager_mode_in_0_2_is_still_known(config):
    assert open_backend(small_network(config), "dygraph", config=config).name == "eager"


@pytest.mark.parametrize("missing", ["model.json", "model.pdiparams", "model.onnx"])
def test_the_record_must_list_what_is_opened(export, missing):
    folder = export("onnxruntime" if missing == "model.onnx" else "paddle")
    content = json.loads((folder / FILE).read_text())
    del content["files"][missing]
    (folder / FILE).write_text(json.dumps(content))
    with pytest.raises(InputError, match="lists .*; an export of format"):
        open_backend(folder)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("classes", [1, 4, 6, 2**31 - 1])
def test_the_model_has_the_last_word_on_its_classes(config, export, name, classes):
    """Not a number in a file beside it, and before anything makes as many names."""
    folder = export(name)
    config = override(config, MODEL__NUM_CLASSES=classes)
    write_record(ModelInfo(config, BACKENDS[name].format), folder)
    with pytest.raises(InputError, match=rf"shape \(1, 5\), .* MODEL.NUM_CLASSES {classes}; exp"):
        open_backend(folder, name)
    with pytest.raises(InputError, match="NUM_CLASSES|warnings above"):
        get_model(folder)


def test_an_export_of_other_preprocessing_is_not_evaluated(config, export):
    folder = export("paddle")
    config = override(config, MODEL__PRETRAINED=str(folder))
    open_for_evaluation(config, "auto")
    config = override(config, DATA__CROP_PCT=1.0, MODEL__NUM_CLASSES=7)
    with pytest.raises(InputError, match=r"NUM_CLASSES is 5, .* 7; DATA.CROP_PCT is 0.9, .* 1.0$"):
        open_for_evaluation(config, "auto")


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_missing_extra_is_named_with_the_command(monkeypatch, config, name):
    def missing(package):
        raise ImportError(f"No module named {package!r}")

    model = small_network(config)
    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(InputError, match=r"needs onnx .*pip install -r .*requirements/deploy\.txt"):
        open_backend(model, name, config=config)


# ---- devices and precisions


@pytest.fixture
def on_gpu(monkeypatch):
    """This process believes that it computes on GPU 1, of the given compute capability."""

    def pretend(capability=(8, 0)):
        monkeypatch.setattr(paddle.device, "get_device", lambda: "gpu:1")
        monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda *_: capability)
        assert processes.on_gpu()

    return pretend


class Settings:
    """Stands for `paddle.inference.Config`: notes which methods were called, and with what."""

    def __init__(self):
        self.calls = {}

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.__setitem__(name, (args, kwargs))


@pytest.mark.parametrize(
    "precision, kind", [("fp32", "Float32"), ("fp16", "Half"), ("bf16", "Bfloat16")]
)
def test_paddle_inference_computes_on_this_processes_gpu(on_gpu, precision, kind):
    on_gpu()
    settings = Settings()
    module.compute_on_gpu(settings, precision)
    calls = settings.calls
    assert calls["enable_use_gpu"][0][1:] == (1, getattr(paddle.inference.PrecisionType, kind))
    # It would accumulate in half precision.
    ((excluded,), _) = calls["exp_disable_mixed_precision_ops"]
    assert excluded == {"depthwise_conv2d", "pd_op.depthwise_conv2d"}
    paddle.inference.Config().exp_disable_mixed_precision_ops(excluded)  # Paddle's own takes it


def test_what_computes_in_what_on_a_gpu(on_gpu, config):
    network = small_network(config)
    on_gpu((8, 0))
    for precision in ("fp32", "fp16", "bf16"):
        check_precision("paddle", precision)
        assert candidates(["paddle", "onnx"], precision) == ["paddle"]
    with pytest.raises(InputError, match="int8 .* paddle on GPU; allowed: fp32, fp16, bf16"):
        check_precision("paddle", "int8")
    on_gpu((7, 5))
    with pytest.raises(InputError, match="compute capability below 8.0"):
        open_backend(network, "paddle", config=config, precision="bf16")


def test_auto_chooses_from_the_installed_ones_that_compute_so(monkeypatch):
    both = ["paddle", "onnx"]
    monkeypatch.setattr(module, "installed_backends", lambda: ["eager", "paddle", "onnxruntime"])
    assert candidates(both, "fp32") == ["onnxruntime", "paddle"]
    monkeypatch.setattr(processes, "supports_bfloat16", lambda device: True)
    assert candidates(both, "bf16") == ["paddle"]
    with pytest.raises(InputError, match="fp16 in this format runs on a GPU alone"):
        candidates(["paddle"], "fp16")
    monkeypatch.setattr(module, "installed_backends", lambda: ["eager", "paddle"])
    with pytest.raises(InputError, match="openvino or onnxruntime.*requirements/deploy.txt"):
        candidates(["onnx"], "int8")
    assert {"eager", "paddle"} <= set(installed_backends())


@pytest.mark.parametrize(
    "flags, largest, computes",
    [
        ("avx512f avx512_bf16", "", True),
        ("avx512f", "", False),
        ("avx512f avx512_bf16", "AVX512_CORE", False),
        ("avx512f avx512_bf16", "avx2", False),
    ],
)
def test_bfloat16_is_refused_where_the_processor_would_emulate_it(
    monkeypatch, export, flags, largest, computes
):
    has = flags.split().__contains__
    monkeypatch.setattr(processes, "processor_has", has)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", largest)
    assert processes.supports_bfloat16("cpu") == computes
    if not computes:
        with pytest.raises(InputError, match="bf16 with backend paddle on a pro.*AVX512-BF16"):
            open_backend(export("paddle"), "paddle", precision="bf16")


def test_processes_of_this_machine_alone_share_its_cores(monkeypatch, export):
    given = []

    def opened(path, threads, precision):
        given.append(threads)
        return lambda batch: np.zeros((len(batch), 5), "float32")

    monkeypatch.setitem(BACKENDS, "paddle", BACKENDS["paddle"]._replace(opener=opened))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(12))
    monkeypatch.setenv("LARGE_KERNEL_THREADS", "5")
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "6")
    monkeypatch.setenv("PADDLE_CURRENT_ENDPOINT", "a:1")
    monkeypatch.setenv("PADDLE_TRAINER_ENDPOINTS", "a:1,a:2,b:1,b:2,c:1,c:2")
    open_backend(export("paddle"), "paddle")
    assert given == [6]


# ---- auto

FACTS = {"network": "a", "image_size": 8, "precision": "fp32", "threads": 1}
SECONDS = {"openvino": 0.2, "paddle": 0.002, "onnxruntime": 0.1}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, which no measurement has seen."""
    monkeypatch.setattr(module, "SETTLE_SECONDS", 0)
    monkeypatch.setenv("REPLKNET_PADDLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Sleeper:
    """A backend whose run takes a time of its own, by a clock that moves with it alone."""

    now = 0.0

    def __init__(self, name, seconds):
        self.name, self.seconds = name, seconds
        self.runs, self.is_closed = [], False

    def run(self, batch):
        self.runs.append(batch.shape)
        if isinstance(self.seconds, Exception):
            raise self.seconds
        Sleeper.now += self.seconds

    def close(self):
        self.is_closed = True


@pytest.fixture
def fastest(monkeypatch, cache):
    """Gives the chosen backend, and all opened ones, of {name: seconds of a run or an error}."""
    clock = types.SimpleNamespace(
        sleep=lambda _: None, monotonic=lambda: Sleeper.now, perf_counter=lambda: Sleeper.now
    )
    monkeypatch.setattr(module, "time", clock)

    def choose(seconds, *, facts=FACTS, batch_size=1):
        opened = {}

        def open_one(name):
            if isinstance(seconds[name], InputError):
                raise seconds[name]
            opened[name] = Sleeper(name, seconds[name])
            return opened[name]

        return module.open_fastest(list(seconds), open_one, facts, batch_size), opened

    return choose


def test_the_fastest_is_taken_and_measured_once(fastest, cache, caplog):
    caplog.set_level(logging.INFO)
    chosen, opened = fastest(SECONDS)
    assert chosen.name == "paddle" and not chosen.is_closed
    assert {name for name in opened if opened[name].is_closed} == {"openvino", "onnxruntime"}
    assert "backend paddle: the fastest of openvino 200 ms, paddle 2 ms" in caplog.text
    # What is slow now was fast then: only the file can know.
    chosen, opened = fastest(dict(zip(SECONDS, reversed(SECONDS.values()))))
    assert list(opened) == ["paddle"] and chosen.runs == []
    (file,) = (cache / "fastest_backend").glob("*.json")
    assert str(file) in caplog.text
    assert set(json.loads(file.read_text())["milliseconds"]) == set(SECONDS)


@pytest.mark.parametrize("key", ["network", "precision", "threads"])
def test_another_network_precision_or_number_of_threads_is_measured_anew(fastest, key):
    fastest(SECONDS)
    assert len(fastest(SECONDS, facts={**FACTS, key: "another"})[1]) == 3


@pytest.mark.parametrize("name", ["processor_name", "version", "available_cores"])
def test_another_machine_or_version_is_measured_anew(fastest, monkeypatch, name):
    fastest(SECONDS)
    monkeypatch.setattr(module, name, lambda *_: "another")
    assert len(fastest(SECONDS)[1]) == 3


def test_batches_are_measured_as_large_as_they_will_come_up_to_a_limit(fastest):
    assert fastest(SECONDS, batch_size=3)[0].runs[0] == (3, 3, 8, 8)
    assert fastest(SECONDS, batch_size=500)[0].runs[0] == (8, 3, 8, 8)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"milliseconds": {"rm": 1}}', "{}"])
def test_a_file_that_something_else_wrote_is_replaced(fastest, cache, content):
    fastest(SECONDS)
    (file,) = (cache / "fastest_backend").glob("*.json")
    file.write_text(content)
    assert len(fastest(SECONDS)[1]) == 3
    assert json.loads(file.read_text())["facts"]["network"] == "a"


def test_what_fails_is_left_out_and_reported(fastest, caplog):
    seconds = {**SECONDS, "paddle": RuntimeError("broken"), "openvino": InputError("none")}
    assert fastest(seconds)[0].name == "onnxruntime"
    assert "backend paddle is left out: broken" in caplog.text
    assert "backend openvino is left out: none" in caplog.text
    for error in (InputError("cannot"), RuntimeError("broken")):
        with pytest.raises(InputError, match="no backend runs this network"):
            fastest(dict.fromkeys(SECONDS, error), facts={**FACTS, "network": str(error)})


def test_a_cache_that_cannot_be_written_is_done_without(fastest, cache, caplog):
    cache.write_text("a file where the folder belongs")
    assert fastest(SECONDS)[0].name == "paddle"
    assert "not remembered" in caplog.text


def test_the_time_is_bounded_and_one_backend_is_not_measured(fastest, cache):
    chosen, _ = fastest({"paddle": 0.1})
    assert chosen.runs == [] and not cache.exists()
    # Backends whose runs are long have one to warm up and one that is timed.
    _, opened = fastest({"openvino": 4.0, "paddle": 4.1})
    assert [len(backend.runs) for backend in opened.values()] == [2, 2]


@pytest.mark.parametrize("exported", [False, True])
def test_a_real_network_is_measured_on_the_real_backends(config, cache, export, exported):
    needs("onnxruntime")
    model = small_network(config)
    source, options, formats = model, {"config": config}, ["paddle", "onnx"]
    if exported:
        source, options, formats = export("onnxruntime"), {}, ["onnx"]
    backend = open_backend(source, threads=1, **options)
    assert_same(backend.run(images(2)), logits(model, images(2)))
    names = candidates(formats, "fp32")
    if len(names) > 1:
        (file,) = (cache / "fastest_backend").glob("*.json")
        milliseconds = json.loads(file.read_text())["milliseconds"]
        assert set(milliseconds) == set(names) and min(milliseconds.values()) > 0
        assert backend.name == min(milliseconds, key=milliseconds.get)
        assert open_backend(source, threads=1, **options).name == backend.name
