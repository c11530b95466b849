"""Every command line and every Python snippet of README and docs runs, or says what it needs.

A command that cannot run here says so behind it, `# needs ImageNet`, or in a comment before its
block, `<!-- needs a GPU -->`.
"""

import os
import re
import shlex
import shutil
from pathlib import Path

import paddle
import pytest
from harness import make_run
from paddle import nn
from PIL import Image
from tiny import FIXTURES, ROOT, make_data

from replknet_paddle import model as replknet
from replknet_paddle.checkpoints.files import write_safetensors
from replknet_paddle.commands import COMMANDS, help_of, main, run_command
from replknet_paddle.config import get_config
from replknet_paddle.segmentation.upernet import build_upernet

PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("README*.md"), *(ROOT / "docs").glob("*.md"))
)
# Run by tests of their own: the demo and the tests by hand, installing by test_install.py.
ELSEWHERE = ("sh run_demo.sh", "sh run_tests.sh", "sh setup_env.sh", ". .venv/bin/activate")
# Pages that a test of their own runs from the first command to the last.
OWN_TEST = ("docs/your_own_images.md", "docs/segmentation.md", "docs/solar_cells.md")
TRANSLATION, ORIGINAL = "README_zh.md", "README.md"  # one program in two languages: it runs once
RUN_HERE = [page for page in PAGES if page != TRANSLATION]


def blocks(page: str, language: str) -> list[tuple[str, str]]:
    """(what the comment before it says it needs, text) of each fenced block of a language."""
    text = (ROOT / page).read_text(encoding="utf-8")
    pattern = rf"(?:<!-- needs ([^>]+) -->\n)?^```{language}\n(.*?)^```$"
    return re.findall(pattern, text, re.MULTILINE | re.DOTALL)


def command_lines(page: str) -> list[str]:
    """The commands of a page that need nothing which is not here, and are not run elsewhere."""
    lines = []
    for needs, text in blocks(page, "sh"):
        for line in text.replace("\\\n", " ").splitlines():
            if line.strip() and not needs and "# needs " not in line:
                lines.append(line)
    return [line for line in lines if not line.startswith(ELSEWHERE)]


@pytest.fixture(scope="module")
def furnished(tmp_path_factory):
    """A folder with what the pages speak of: datasets, runs, photos, and the checkout's files."""
    folder = tmp_path_factory.mktemp("furnished")
    for name in ("configs", "requirements", "main_multi_gpu.py", "main_single_gpu.py"):
        (folder / name).symlink_to(ROOT / name)
    for data in ("flowers", "digits"):
        (folder / "data" / data).mkdir(parents=True)
        make_data(folder / "data" / data, train=32, val=8)
    for listing in (folder / "data" / "flowers").glob("*_list.txt"):
        listing.unlink()  # make-lists writes them
    (folder / "output" / "RUN").mkdir(parents=True)
    make_run(folder / "output" / "RUN")
    record = '{"epoch": 1, "train_loss": 2.0, "val_loss": 1.5, "val_top1_percent": 30.0}\n'
    (folder / "output" / "RUN" / "metrics.jsonl").write_text(record)
    for run in ("a", "b"):
        shutil.copytree(folder / "output" / "RUN", folder / "output" / run)
    (folder / "photos").mkdir()
    for path in sorted((FIXTURES / "images").glob("[!eR]*.jpg")):
        shutil.copy(path, folder / "photos" / path.name)
        Image.open(path).convert("RGB").save(folder / "photo.jpg")
    return folder


@pytest.fixture
def workplace(furnished, tmp_path, monkeypatch):
    """A copy of `furnished`, which this process is in."""
    shutil.copytree(furnished, tmp_path / "workplace", symlinks=True)
    monkeypatch.chdir(tmp_path / "workplace")
    return tmp_path / "workplace"


@pytest.mark.parametrize("page", [page for page in RUN_HERE if page not in OWN_TEST])
def test_every_command_of_a_page_runs(page, workplace):
    for line in command_lines(page):
        words = shlex.split(line, comments=True)
        if words[:2] == ["pip", "install"]:
            check_installable(words[2:])
        else:
            run_line(line)


def run_line(line: str) -> None:
    """Run a command line here; it has to succeed."""
    words = shlex.split(line, comments=True)
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
    assert status in allowed, line


def test_the_commands_of_0_2_run_and_name_the_new_spelling(workplace, capfd):
    """Each command line of the README and docs of 0.2 that a flag or argument has changed in, and
    others; those that did are told the new one."""
    lines = (FIXTURES / "commands_of_0_2.txt").read_text().splitlines()
    old = r" -(pretrained [^-]|-out |out |-json |report report.json)"
    for line in lines:
        capfd.readouterr()
        run_line(line)
        said = capfd.readouterr().err
        is_old = re.search(old, line) is not None and "eval" not in line
        is_old |= line.startswith(("replknet convert", "replknet model-info -cfg"))
        is_old |= "export -pretrained" in line
        is_old |= "benchmark" in line and "-cfg" in line and "inference" not in line
        assert (re.search("^note: .* is now ", said, re.MULTILINE) is not None) == is_old, line


EXAMPLES = [
    line
    for name in COMMANDS
    for line in help_of(name)[1].replace("\\\n", " ").splitlines()
    if re.search("replknet |python ", line)
]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda line: " ".join(line.split()[:4]))
def test_the_examples_of_help_run(example, workplace):
    line = re.sub(" {2,}[a-z].*", "", re.sub("^ *(examples?:)? *", "", example))
    line = re.sub(" {2,}", " ", line)
    if line.startswith("replknet page"):
        pytest.skip("a server; test_page_command.py starts one")
    if line.startswith("replknet benchmark conv") or "devkit" in line:
        pytest.skip("takes minutes, or ImageNet")
    for package in ("matplotlib",) if re.search("erf|kernels|plot", line) else ():
        pytest.importorskip(package)
    if "make-solar-cells" in line:
        pytest.importorskip("elpv_dataset", reason="optional: requirements/solar.txt")
    if re.search("make-digits|make-shapes", line):
        shutil.rmtree(line.split()[2], ignore_errors=True)
    if "segment" in line:
        run_line("replknet make-shapes data/shapes -count 20")
        make_upernet(Path("output/shapes"))
    if "other.npy" in line:
        run_line("replknet erf output/RUN photos -num_images 1 -image_size 64 -o run.npy")
        shutil.copy("run.npy", "other.npy")
    if line.startswith("replknet probe"):
        pytest.importorskip("sklearn")
        for part in ("train", "val"):
            run_line(f"replknet embed output/RUN data/digits/{part} -output {part}.npy")
    if line.startswith("replknet make-lists"):
        (listed,) = [word for word in line.split() if word in ("photos", "data/flowers")]
        if listed == "photos":
            shutil.rmtree("photos")
            shutil.copytree("data/flowers/train", "photos")
    if "segment train" in line:
        line = f"{line} -batch_size 4 -opts SEGMENTATION.EPOCH_STEPS 2"
        line += " SEGMENTATION.WARMUP_STEPS 1"
        shutil.rmtree("output/shapes")
    run_line(line)


def make_upernet(folder: Path) -> None:
    """Write a run folder of a tiny UPerNet with fresh weights."""
    folder.mkdir()
    config = get_config("configs/upernet_nano_shapes.yaml", MODEL__CHANNELS=[4, 6, 8, 10])
    (folder / "config.yaml").write_text(config.dump())
    state = build_upernet(config).state_dict()
    write_safetensors(folder / "best", {k: v.numpy() for k, v in state.items()}, {})


def check_installable(words: list[str]) -> None:
    """`pip install` names requirement files and extras that exist."""
    extras = re.findall(r'\[([\w,]+)\]"?', " ".join(words))
    known = (ROOT / "pyproject.toml").read_text()
    for extra in ",".join(extras).split(",") if extras else ():
        assert re.search(rf"^{extra} = {{ file", known, re.MULTILINE), words
    for flag, name in zip(words, words[1:]):
        assert flag != "-r" or os.path.isfile(name), words


@pytest.mark.parametrize("page", RUN_HERE)
def test_the_snippets_of_a_page_run(page, workplace, monkeypatch):
    code = "\n".join(text for needs, text in blocks(page, "python") if not needs)
    if "import" not in code:
        pytest.skip("no snippets on this page")
    if "exported" in code:
        assert run_command("export", ["output/RUN/best", "-output", "exported"]) == 0
    # As written, but for what takes long and does not matter: values at random, and large images.
    zeros = paddle.ParamAttr(initializer=nn.initializer.Constant(0.0))
    monkeypatch.setattr(replknet, "uniform", lambda fan_in: zeros)
    code = code.replace("zeros([1, 3, 224, 224])", "zeros([1, 3, 32, 32])")
    exec(compile(code, page, "exec"), {"__name__": "snippets"})


def test_the_translation_has_the_same_commands_and_snippets():
    def programs(page):
        return [
            (needs, [(line.partition("#")[0].rstrip(), "# needs " in line) for line in lines])
            for language in ("sh", "python")
            for needs, lines in ((n, text.splitlines()) for n, text in blocks(page, language))
        ]

    assert programs(TRANSLATION) == programs(ORIGINAL)


def test_the_translation_is_set_as_chinese_text_is():
    """With full-width punctuation, and without the blanks that line breaks become."""
    text = re.sub(r"^```.*?^```$|`[^`]*`", "", (ROOT / TRANSLATION).read_text(), flags=re.M | re.S)
    assert not re.search(r"[\u4e00-\u9fff][,.:;!?()]|[,:;!?(][\u4e00-\u9fff]", text)
    assert not re.search(r"[\u4e00-\u9fff，。；：、]\n[^\n|#*>]", text)
    assert not re.search(r"^#+ [^\u4e00-\u9fff]*$", text, re.M)


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), target
