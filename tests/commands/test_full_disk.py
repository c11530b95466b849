"""Every command that writes, on a full file system and on a read-only one, both real."""

import json
import os

import pytest
from harness import FILLING, make_run, mounted, small_disk
from tiny import PICTURES, command

PREDICT = f"predict {{run}} {' '.join(PICTURES[:4])} -backend=eager"
BENCHMARK = "benchmark inference -cfg {run}/config.yaml --backends eager --rounds 1 --batch_sizes 1"

# A command line without the file that it writes, the name of that, and what the command needs.
CASES = [
    (f"{PREDICT} -output", "results.jsonl", "numpy"),
    (f"{PREDICT} -output", "results.csv", "numpy"),
    (f"{PREDICT} --save-pictures", "drawn", "numpy"),
    (f"{PREDICT} --save-grid", "grid.png", "numpy"),
    ("export {run} -output", "exported", "numpy"),
    ("export {run} -format onnx -output", "exported", "onnx"),
    ("merge {run} -output", "merged.safetensors", "numpy"),
    ("convert {run} -output", "weights.pdparams", "numpy"),
    ("plot {run} -output", "curves.png", "matplotlib"),
    (f"{BENCHMARK} -output", "figures.json", "numpy"),
]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("run"), classes=400)
    (folder / "metrics.jsonl").write_text(json.dumps({"epoch": 1, "val_loss": 1.0}) + "\n")
    return folder


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0].split()[0]} {case[1]} {case[2]}")
def write_into(request, run_folder, capfd):
    """Runs a command that writes into a folder and has to fail; its target and what it says."""
    line, name, needs = request.param
    pytest.importorskip(needs)
    words = line.format(run=run_folder).split()

    def run(folder):
        capfd.readouterr()
        assert command(words[0])([*words[1:], str(folder / name)]) == 2
        error = capfd.readouterr().err
        assert error.count("error: ") == 1 and "Traceback" not in error
        return str(folder / name), error

    return run


def test_a_full_disk_is_one_message_with_the_path(write_into, tmp_path):
    with small_disk(tmp_path / "full") as folder:
        path, error = write_into(folder)
        message = error[error.index("error: ") :]
        assert message.startswith(f"error: [Errno 28] No space left on device: '{path}")
        assert message.count("\n") == 1
        left = [path for path in folder.rglob("*") if path.name not in (FILLING, "drawn")]
        assert left == []


def test_a_read_only_folder_is_found_before_the_work(write_into, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "replknet_paddle.checkpoints.load.load_pretrained", lambda *_, **__: pytest.fail("works")
    )
    with mounted(tmp_path / "read_only", "ro") as folder:
        path, error = write_into(folder)
        assert f"error: folder {os.path.dirname(path)} is not writable; name another one" in error
