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


@pytest.mark.slow
def test_the_documentations_commands_train_and_use_the_nano_network(tmp_path):
    """All that docs/segmentation.md shows and that needs no dataset, in its order."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "photos").mkdir()
    shutil.copy(sorted((FIXTURES / "images").glob("[!eR]*.jpg"))[0], tmp_path / "photos")
    lines = command_lines("docs/segmentation.md")
    assert len(lines) == 6
    for line in lines:
        done = subprocess.run(
            [sys.executable, "-m", "replknet_paddle", *shlex.split(line, comments=True)[1:]],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            text=True,
            capture_output=True,
            timeout=1200,
        )
        assert done.returncode == 0, f"{line}:\n{done.stdout}\n{done.stderr}"
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
