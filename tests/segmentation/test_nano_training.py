"""The nano recipe on the shapes that the tool writes, to the mIoU that the documentation states."""

import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
from test_docs import command_lines
from tiny import FIXTURES, ROOT

from replknet_paddle.commands import main


@pytest.fixture
def commands(tmp_path):
    """All that docs/segmentation.md shows and that needs no dataset, in its order; without
    `replknet`, and for the folder `tmp_path`."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "photos").mkdir()
    shutil.copy(sorted((FIXTURES / "images").glob("[!eR]*.jpg"))[0], tmp_path / "photos")
    lines = command_lines("docs/segmentation.md")
    assert len(lines) == 6
    return [shlex.split(line, comments=True)[1:] for line in lines]


def test_the_documentations_commands_run(commands, tmp_path, monkeypatch):
    """With few images and one step of training."""
    monkeypatch.chdir(tmp_path)
    one_step = ["TRAIN.NUM_EPOCHS", "1", "SEGMENTATION.EPOCH_STEPS", "1"]
    shorter = {
        "make-shapes": ["-count", "10"],
        "segment train": ["-opts", *one_step, "SEGMENTATION.WARMUP_STEPS", "0"],
    }
    for command in commands:
        name = " ".join(command[: 2 if command[0] == "segment" else 1])
        assert main([*command, *shorter.get(name, [])]) == 0, command
    assert len((tmp_path / "output/shapes/metrics.jsonl").read_text().splitlines()) == 1
    assert len(list((tmp_path / "predictions").iterdir())) == 2 * 10
    assert len(list((tmp_path / "tinted_photos").iterdir())) == 2


@pytest.mark.slow
def test_the_documentations_commands_train_and_use_the_nano_network(commands, tmp_path):
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "replknet_paddle", *command],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            text=True,
            capture_output=True,
            timeout=1200,
        )
        assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    text = (tmp_path / "output/shapes/metrics.jsonl").read_text()
    last = json.loads(text.splitlines()[-1])
    assert last["val_miou_percent"] > 90
    assert min(last["val_class_iou_percent"]) > 80
    assert len(list((tmp_path / "predictions").iterdir())) == 2 * 200
    assert len(list((tmp_path / "tinted_photos").iterdir())) == 2


def test_the_tool_writes_the_same_images_every_time(tmp_path):
    for folder in ("one", "two"):
        assert main(["make-shapes", str(tmp_path / folder), "-count", "10"]) == 0
    names = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert len(names) == 10 * 2 + 3
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_tool_refuses_too_few_images(tmp_path, capsys):
    assert main(["make-shapes", str(tmp_path), "-count", "4"]) == 2
    assert "-count is 4; allowed: an integer >= 5" in capsys.readouterr().err
