"""docs/your_own_images.md from its first command to its last, on 300 photographs in five classes.

Each command is a process of its own. Nothing is changed between them but what the guide asks for:
files that check-data names are deleted.
"""

import contextlib
import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.request

import pytest
from harness import free_ports, wait_for
from photographs import (
    CLASSES,
    CORRUPT,
    EXIF_ORIENTATION,
    MISLABELLED,
    ROTATED,
    SHOWN_IN_MISLABELLED,
    make_photographs,
)
from PIL import Image
from test_docs import command_lines
from tiny import ROOT, table

GUIDE = "docs/your_own_images.md"
EACH = 60  # photographs of a class
VALIDATION = 6  # of these
TIMEOUT_SECONDS = 900

pytest.importorskip("matplotlib", reason="optional: requirements/plots.txt")
pytest.importorskip("sklearn", reason="optional: requirements/demo.txt")


class Guide:
    """A guide's commands, one after another, in a folder of its own."""

    def __init__(self, folder, page: str = GUIDE):
        self.folder = folder
        self.commands = [shlex.split(line) for line in command_lines(page)]
        self.environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONIOENCODING": "utf-8",
            "PYTHONPATH": str(ROOT),
        }

    def next(self, *expected: str) -> list[str]:
        """The arguments of the next command, which begins as `expected`."""
        program, *arguments = self.commands.pop(0)
        assert program == "replknet" and tuple(arguments[: len(expected)]) == expected
        return [sys.executable, "-m", "replknet_paddle", *arguments]

    def run(self, *expected: str, status: int = 0, more: tuple[str, ...] = ()) -> str:
        """Run the next command, with more flags; what it prints."""
        done = subprocess.run(
            [*self.next(*expected), *more],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            timeout=TIMEOUT_SECONDS,
        )
        assert done.returncode == status, done.stdout
        assert "Traceback" not in done.stdout
        return done.stdout


@pytest.mark.slow
def test_the_guide_from_its_first_command_to_its_last(tmp_path):
    make_photographs(tmp_path / "photos", each=EACH, seed=0)
    make_photographs(tmp_path / "new", each=3, seed=1_000_000)
    guide = Guide(tmp_path)

    assert "train_list.txt: 270 lines" in guide.run("make-lists", "photos")
    found = guide.run("check-data", "photos", status=1)
    assert f"cannot read image {CORRUPT}: " in found and "Problems found: 1" in found
    (tmp_path / "photos" / CORRUPT).unlink()
    assert "train_list.txt: 269 lines" in guide.run("make-lists", "photos")
    assert "No problems found" in guide.run("check-data", "photos")
    names = (tmp_path / "photos" / "class_names.txt").read_text(encoding="utf-8").splitlines()
    assert names == sorted(CLASSES)

    guide.run("make-digits")
    guide.run("train", "-cfg=configs/replknet_nano.yaml")
    trained = guide.run("train", "-cfg=configs/replknet_nano_finetune.yaml")
    assert "the head of output/digits/best (10 classes) is not loaded" in trained
    assert "its fresh one for 5 classes" in trained
    best = re.search(r"best: epoch \d+, weights, top-1 ([\d.]+) %", trained).group(1)
    guide.run("plot")
    assert Image.open(tmp_path / "curves.png").width > 500

    evaluated = guide.run("eval")
    assert f"top-1 {best} % (" in evaluated  # the checkpoint is the one that training found best
    check_report(tmp_path / "report", names, best)

    check_predictions(guide, tmp_path)
    check_page(guide)
    assert guide.commands == []


def check_report(folder, names, best_percent) -> None:
    """The report has the accuracy of the run's log, and shows which photograph is mislabelled."""
    classes = table(folder / "per_class.csv")
    assert [row["class"] for row in classes] == names
    assert [int(row["images"]) for row in classes] == [VALIDATION] * 5
    right = sum(int(row["right"]) for row in classes)
    images = VALIDATION * len(names)
    assert f"{100 * right / images:.2f}" == best_percent
    assert right >= 0.8 * images  # six of 30 by chance

    confused = {row["true class"]: row for row in table(folder / "confusion_matrix.csv")}
    assert int(confused[MISLABELLED.split("/")[0]][SHOWN_IN_MISLABELLED]) >= 1
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in names)
    assert MISLABELLED in page.partition("Most confident mistakes")[2]
    assert len(list((folder / "mistakes").iterdir())) == images - right


def check_predictions(guide, folder) -> None:
    """The checkpoint and its export say the same of new photographs, but for the damaged one."""
    said = guide.run("predict", "output/photos", status=1)
    assert "classified 14 images, skipped 1" in said and f"{CORRUPT}: damaged" in said
    guide.run("export")
    guide.run("predict", "exported", status=1)
    predictions, exported = (
        {row["path"]: row for row in table(folder / name)}
        for name in ("predictions.csv", "exported_predictions.csv")
    )
    assert len(predictions) == 15 and list(predictions) == list(exported)
    assert predictions[f"new/{CORRUPT}"]["problem"]
    with Image.open(folder / "new" / ROTATED) as image:
        assert image.getexif()[EXIF_ORIENTATION] == 6
    classified = {path: row for path, row in predictions.items() if not row["problem"]}
    right = sum(row["class_1"] == path.split("/")[1] for path, row in classified.items())
    assert right >= 12
    for path, row in classified.items():
        assert abs(float(row["score_1"]) - float(exported[path]["score_1"])) < 1e-3
    pictures = [path for path in (folder / "pictures").rglob("*") if path.is_file()]
    assert len(pictures) == len(classified)


def check_page(guide) -> None:
    """The page is served until Ctrl-C; without Gradio, the message says what to install."""
    if importlib.util.find_spec("gradio") is None:
        assert "requirements/page.txt" in guide.run("page", status=2)
        return
    (port,) = free_ports(1)
    command = [*guide.next("page"), "--port", str(port)]
    process = subprocess.Popen(command, cwd=guide.folder, env=guide.environment)

    def answers() -> bool:
        address = f"http://127.0.0.1:{port}/"
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=60) as answer:
            return answer.status == 200

    try:
        wait_for(
            lambda: answers() or process.poll() is not None, timeout=TIMEOUT_SECONDS, every=0.5
        )
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.wait(timeout=TIMEOUT_SECONDS)
    finally:
        process.kill()
        process.wait()
