"""Every command that writes, on a full file system and on a read-only one, both real."""

import json
import os

import pytest
from harness import FILLING, make_run, mounted, small_disk
from tiny import FIXTURES, command

PICTURES = sorted(map(str, (FIXTURES / "images").glob("[!eR]*")))[:4]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("run"), classes=400)
    (folder / "metrics.jsonl").write_text(json.dumps({"epoch": 1, "val_loss": 1.0}) + "\n")
    return folder


@pytest.fixture
def full_disk(tmp_path):
    with small_disk(tmp_path / "full") as folder:
        yield folder


@pytest.fixture
def read_only(tmp_path):
    with mounted(tmp_path / "read_only", "ro") as folder:
        yield folder


def arguments(run, target):
    """{what: (command, arguments, the path that the message names)} that write into `target`."""
    predict = [str(run), *PICTURES, "-backend=dygraph"]
    inference = ["inference", "-cfg", str(run / "config.yaml"), "--backends", "dygraph"]
    inference += ["--rounds", "1", "--batch_sizes", "1"]
    cases = {
        "predict jsonl": ("predict", [*predict, "--out"], "results.jsonl"),
        "predict csv": ("predict", [*predict, "--out"], "results.csv"),
        "predict pictures": ("predict", [*predict, "--save-pictures"], "drawn"),
        "predict grid": ("predict", [*predict, "--save-grid"], "grid.png"),
        "export paddle": ("export", ["-pretrained", str(run)], "exported"),
        "export onnx": ("export", ["-pretrained", str(run), "-format", "onnx"], "exported"),
        "merge": ("merge", ["-pretrained", str(run)], "merged.safetensors"),
        "convert": ("convert", [str(run)], "weights.pdparams"),
        "plot": ("plot", [str(run), "--out"], "curves.png"),
        "benchmark json": ("benchmark", [*inference, "--json"], "figures.json"),
        "benchmark chart": ("benchmark", [*inference, "--chart"], "figures.png"),
    }
    return {
        what: (name, [*given, str(target / file)], str(target / file))
        for what, (name, given, file) in cases.items()
    }


CASES = [
    "predict jsonl", "predict csv", "predict pictures", "predict grid", "export paddle",
    "export onnx", "merge", "convert", "plot", "benchmark json", "benchmark chart",
]  # fmt: skip
NEEDS = {"export onnx": "onnx", "plot": "matplotlib", "benchmark chart": "matplotlib"}


@pytest.mark.parametrize("what", CASES)
def test_a_full_disk_is_one_message_with_the_path(what, full_disk, run_folder, capfd):
    if what in NEEDS:
        pytest.importorskip(NEEDS[what])
    name, given, path = arguments(run_folder, full_disk)[what]
    capfd.readouterr()
    assert command(name)(given) == 2
    error = capfd.readouterr().err
    message = error[error.index("error: ") :]
    assert message.startswith(f"error: [Errno 28] No space left on device: '{path}")
    assert message.count("\n") == 1 and "Traceback" not in error
    left = [path for path in full_disk.rglob("*") if path.name not in (FILLING, "drawn")]
    assert left == []


@pytest.mark.parametrize("what", CASES)
def test_a_read_only_folder_is_found_before_the_work(
    what, read_only, run_folder, capfd, monkeypatch
):
    if what in NEEDS:
        pytest.importorskip(NEEDS[what])
    monkeypatch.setattr(
        "replknet_paddle.checkpoints.convert.load_pretrained", lambda *_, **__: pytest.fail("works")
    )
    monkeypatch.setattr(
        "replknet_paddle.deploy.backends.load_pretrained", lambda *_, **__: pytest.fail("works")
    )
    name, given, path = arguments(run_folder, read_only)[what]
    capfd.readouterr()
    assert command(name)(given) == 2
    error = capfd.readouterr().err
    assert f"error: folder {os.path.dirname(path)} is not writable; name another one" in error
    assert error.count("error: ") == 1 and "Traceback" not in error


def test_the_cases_are_all(run_folder, tmp_path):
    assert list(arguments(run_folder, tmp_path)) == CASES
