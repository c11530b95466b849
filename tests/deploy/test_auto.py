"""`auto` takes the backend that is the fastest here, and measures it once."""

import json
import logging
import types

import numpy as np
import pytest
from small_networks import assert_same, images, logits, small_config, small_network

from replknet_paddle.deploy import auto, open_backend
from replknet_paddle.deploy.backends import candidates
from replknet_paddle.deploy.export import export_model
from replknet_paddle.deploy.sidecar import Sidecar
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.packages import is_installed

FACTS = {"network": "a", "image_size": 8, "precision": "fp32", "threads": 1}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setattr(auto, "SETTLE_SECONDS", 0)
    folder = tmp_path / "cache"
    monkeypatch.setenv("REPLKNET_PADDLE_CACHE", str(folder))
    return folder


class Clock:
    """Stands for the module `time`; goes on when someone sleeps, and not otherwise."""

    def __init__(self):
        self.now = 0.0

    def sleep(self, seconds):
        self.now += seconds

    def read(self):
        return self.now

    def module(self):
        return types.SimpleNamespace(sleep=self.sleep, monotonic=self.read, perf_counter=self.read)


class Sleeper:
    """A backend whose run takes a time of its own."""

    def __init__(self, name, seconds, opened, clock):
        self.clock = clock
        self.name = name
        self.seconds = seconds
        self.runs = []
        self.closed = False
        opened.append(self)

    def run(self, batch):
        self.runs.append(batch.shape)
        if isinstance(self.seconds, Exception):
            raise self.seconds
        self.clock.sleep(self.seconds)
        return np.zeros((len(batch), 3), "float32")

    def close(self):
        self.closed = True


def fastest(seconds, *, facts=FACTS, batch_size=1):
    """The chosen backend, and all that were opened, of {name: seconds of a run or an error}."""
    opened, clock = [], Clock()

    def open_one(name):
        if isinstance(seconds[name], InputError):
            raise seconds[name]
        return Sleeper(name, seconds[name], opened, clock)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auto, "time", clock.module())
        chosen = auto.open_fastest(list(seconds), open_one, facts=facts, batch_size=batch_size)
    return chosen, opened


SECONDS = {"openvino": 0.2, "paddle": 0.002, "onnxruntime": 0.1}


def test_the_fastest_is_taken_and_the_others_are_closed(caplog):
    with caplog.at_level(logging.INFO):
        chosen, opened = fastest(SECONDS)
    assert chosen.name == "paddle" and not chosen.closed
    assert {b.name for b in opened if b.closed} == {"openvino", "onnxruntime"}
    assert "backend paddle: the fastest of openvino 2" in caplog.text


def test_it_is_measured_once_and_remembered(cache, caplog):
    fastest(SECONDS)
    # What is slow now was fast then: only the file can know.
    with caplog.at_level(logging.INFO):
        chosen, opened = fastest(dict(zip(SECONDS, reversed(SECONDS.values()))))
    assert [b.name for b in opened] == ["paddle"] and chosen.runs == []
    (file,) = (cache / "fastest_backend").glob("*.json")
    assert str(file) in caplog.text
    assert set(json.loads(file.read_text())["milliseconds"]) == set(SECONDS)


@pytest.mark.parametrize(
    "change",
    [
        {"network": "b"},
        {"precision": "bf16"},
        {"threads": 2},
    ],
)
def test_another_network_precision_or_number_of_threads_is_measured_anew(change):
    fastest(SECONDS)
    _, opened = fastest(SECONDS, facts={**FACTS, **change})
    assert len(opened) == 3


@pytest.mark.parametrize(
    "name, value", [("processor_name", "another"), ("_version", "9.9"), ("available_cores", 77)]
)
def test_another_machine_or_version_is_measured_anew(monkeypatch, name, value):
    fastest(SECONDS)
    monkeypatch.setattr(auto, name, lambda *_: value)
    _, opened = fastest(SECONDS)
    assert len(opened) == 3


def test_batches_are_measured_as_large_as_they_will_come_up_to_a_limit():
    assert fastest(SECONDS, batch_size=3)[0].runs[0] == (3, 3, 8, 8)
    assert fastest(SECONDS, batch_size=500)[0].runs[0] == (8, 3, 8, 8)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"milliseconds": {"rm": 1}}', "{}"])
def test_a_file_that_something_else_wrote_is_replaced(cache, content):
    fastest(SECONDS)
    (file,) = (cache / "fastest_backend").glob("*.json")
    file.write_text(content)
    assert len(fastest(SECONDS)[1]) == 3
    assert json.loads(file.read_text())["facts"]["network"] == "a"


def test_what_fails_is_left_out_and_reported(caplog):
    seconds = {**SECONDS, "paddle": RuntimeError("broken\nkernel"), "openvino": InputError("none")}
    chosen, _ = fastest(seconds)
    assert chosen.name == "onnxruntime"
    assert "backend paddle is left out: broken" in caplog.text
    assert "backend openvino is left out: none" in caplog.text


def test_if_all_fail_it_is_an_error():
    with pytest.raises(InputError, match="cannot"):
        fastest(dict.fromkeys(SECONDS, InputError("cannot")))
    with pytest.raises(InputError, match="no backend runs this network"):
        fastest(dict.fromkeys(SECONDS, RuntimeError("broken")))


def test_a_cache_that_cannot_be_written_is_done_without(cache, caplog):
    cache.write_text("a file where the folder belongs")
    assert fastest(SECONDS)[0].name == "paddle"
    assert "not remembered" in caplog.text


def test_one_backend_is_not_measured(cache):
    chosen, _ = fastest({"paddle": 0.1})
    assert chosen.runs == [] and not cache.exists()


def test_the_time_is_bounded(monkeypatch):
    """Backends whose runs are long have one to warm up and one that is timed."""
    monkeypatch.setattr(auto, "MAX_SECONDS", 0.2)
    monkeypatch.setattr(auto, "LONG_SECONDS", 0.1)
    _, opened = fastest({"openvino": 0.2, "paddle": 0.21})
    assert [len(b.runs) for b in opened] == [2, 2]


@pytest.mark.parametrize("exported", [False, True])
def test_a_real_network_is_measured_on_the_real_backends(tmp_path, cache, exported):
    if not (is_installed("onnx") and is_installed("onnxruntime")):
        pytest.skip("onnx and ONNX Runtime are not installed (requirements/deploy.txt)")
    config = small_config(tmp_path)
    model = small_network(config)
    source, options = model, {"config": config}
    readers = ["paddle", "onnxruntime", "openvino"]
    if exported:
        source, options, readers = tmp_path / "export", {}, ["onnxruntime", "openvino"]
        export_model(model, source, Sidecar.build(config, format="onnx"))
    backend = open_backend(source, threads=1, **options)
    assert_same(backend.run(images(2)), logits(model, images(2)))
    files = list((cache / "fastest_backend").glob("*.json"))
    names = candidates(readers, "fp32")
    if len(names) > 1:
        (file,) = files
        milliseconds = json.loads(file.read_text())["milliseconds"]
        assert set(milliseconds) == set(names) and min(milliseconds.values()) > 0
        assert backend.name == min(milliseconds, key=milliseconds.get)
        assert open_backend(source, threads=1, **options).name == backend.name
