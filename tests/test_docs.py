"""Every command line and every Python snippet of README and docs runs, or says what it needs.

A command that cannot run here says so behind it, `# needs ImageNet`, or in a comment before its
block, `<!-- needs a GPU -->`.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from PIL import Image
from runs import make_run
from tiny import FIXTURES, ROOT, make_data

from replknet_paddle.commands import main, run_command

PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("README*.md"), *(ROOT / "docs").glob("*.md"))
)
# Run by tests of their own: the demo and the tests by hand, installing by test_install.py.
ELSEWHERE = ("sh run_demo.sh", "sh run_tests.sh", "sh setup_env.sh")
# Pages that a test of their own runs from the first command to the last.
OWN_TEST = ("docs/your_own_images.md", "docs/segmentation.md")


def blocks(page: str, language: str) -> list[tuple[str, str]]:
    """(what the comment before it says it needs, text) of each fenced block of a language."""
    text = (ROOT / page).read_text(encoding="utf-8")
    pattern = rf"(?:<!-- needs ([^>]+) -->\n)?^```{language}\n(.*?)^```$"
    return re.findall(pattern, text, re.MULTILINE | re.DOTALL)


def command_lines(page: str) -> list[str]:
    """The commands of a page that need nothing which is not here."""
    lines = []
    for needs, text in blocks(page, "sh"):
        for line in text.replace("\\\n", " ").splitlines():
            if line.strip() and not needs and "# needs " not in line:
                lines.append(line)
    return lines


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with what the pages speak of: datasets, a run, photos, and the checkout's files."""
    for name in ("configs", "requirements", "main_multi_gpu.py", "main_single_gpu.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    for data in ("flowers", "digits"):
        (tmp_path / "data" / data).mkdir(parents=True)
        make_data(tmp_path / "data" / data, train=16, val=8)
    for listing in (tmp_path / "data" / "flowers").glob("*_list.txt"):
        listing.unlink()  # make-lists writes them
    (tmp_path / "output").mkdir()
    for run in ("RUN", "a", "b"):
        make_run_with_metrics(tmp_path / "output" / run)
    (tmp_path / "photos").mkdir()
    for path in sorted((FIXTURES / "images").glob("[!eR]*.jpg")):
        shutil.copy(path, tmp_path / "photos" / path.name)
        Image.open(path).convert("RGB").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_run_with_metrics(folder):
    folder.mkdir()
    make_run(folder)
    record = '{"epoch": 1, "train_loss": 2.0, "val_loss": 1.5, "val_top1_percent": 30.0}\n'
    (folder / "metrics.jsonl").write_text(record)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in OWN_TEST])
def test_every_command_of_a_page_runs(page, workplace):
    for line in command_lines(page):
        words = shlex.split(line, comments=True)
        if words[:2] == ["pip", "install"]:
            check_installable(words[2:])
        elif not line.startswith(ELSEWHERE):
            if words[0] == "replknet":
                arguments = words[1:]
            else:
                assert words[0] == "python" and words[1].startswith("main_"), line
                arguments = ["train", *words[2:]]
            try:
                status = main(arguments)
            except SystemExit as stop:  # -h
                status = stop.code
            # 1: check-data has found something, predict has skipped something.
            allowed = (0, 1) if arguments[0] in ("check-data", "predict") else (0,)
            assert status in allowed, f"{page}: {line}"


def check_installable(words: list[str]) -> None:
    """`pip install` names requirement files and extras that exist."""
    extras = re.findall(r'\[([\w,]+)\]"?', " ".join(words))
    known = (ROOT / "pyproject.toml").read_text()
    for extra in ",".join(extras).split(",") if extras else ():
        assert re.search(rf"^{extra} = {{ file", known, re.MULTILINE), words
    for flag, name in zip(words, words[1:]):
        assert flag != "-r" or os.path.isfile(name), words


@pytest.mark.parametrize("page", PAGES)
def test_the_snippets_of_a_page_run(page, workplace):
    code = "\n".join(text for needs, text in blocks(page, "python") if not needs)
    if "import" not in code:
        pytest.skip("no snippets on this page")
    if "exported" in code:
        assert run_command("export", ["-pretrained", "output/RUN/best", "exported"]) == 0
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        text=True,
        capture_output=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), target
