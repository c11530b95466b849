"""What people see of a run: bars, lines, the time left, the summary."""

import json
import re
import sys

import pytest
from harness import finish, main_status, on_terminal, run_typed, screen
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FIXTURES, ROOT, TINY, make_data

from replknet_paddle.checkpoints.run_folder import Progress
from replknet_paddle.engine import run
from replknet_paddle.engine.run_log import time_left

LOG_LINE = re.compile(r"[-\d]+ [\d:,]+ [A-Z]+ (.*)")


def messages(run_folder) -> list[str]:
    lines = (run_folder / "log.txt").read_text().splitlines()
    return [match[1] for line in lines if (match := LOG_LINE.fullmatch(line))]


# ---- bars


@pytest.mark.parametrize(
    "processes, columns", [(1, 80), (1, 120), pytest.param(2, 120, marks=pytest.mark.slow)]
)
def test_bars_and_lines_on_a_terminal(tiny_config_file, tmp_path, processes, columns):
    folder, data = tmp_path / "run", tmp_path / "data"
    make_data(data, train=120, val=20)
    for number in (3, 30, 50):  # there is a line for each, in the middle of an epoch
        next((data / "train").rglob(f"{number:04d}.jpg")).write_bytes(b"no image")
    status, raw = on_terminal(
        [
            *(sys.executable, ROOT / "main_multi_gpu.py", f"-cfg={tiny_config_file}"),
            *(f"-data_path={data}", f"-output={folder}"),
            *(f"-nproc={processes}", "-batch_size=4", "-opts", "TRAIN.NUM_EPOCHS", 2),
        ],
        columns,
    )
    assert status == 0, raw
    numbers = r"epoch 2/2  \d:\d\d:\d\d left  loss [\d.]+  lr \S+  [\d.,]+ images/s"
    numbers += "" if columns == 80 else r"  \d+/\d+ batches  data wait \d+%"
    assert re.search(numbers + r" \|#* *\|", raw), raw
    assert re.search(r"evaluation  \d+/20 images", raw), raw
    # Bars are gone at the end, and each line stands alone.
    logged = messages(folder)
    assert sum("cannot read image" in line for line in logged) == 3 or processes == 2
    assert len(logged) > 8 and not [line for line in logged if ", batch " in line]
    shown = screen(raw)
    assert [line for line in shown if line in logged] == logged
    assert [line for line in shown if line not in logged] == []


def test_without_a_terminal_there_are_lines_with_the_time_left(straight):
    lines = [line for line in messages(straight) if ", batch " in line]
    assert len(lines) == 4
    assert all(re.search(r", data wait \d+%, \d:\d\d:\d\d left$", line) for line in lines)
    assert lines[-1].endswith("data wait 0%, 0:00:00 left") or "epoch 4/4" in lines[-1]


@settings(deadline=None)
@given(epochs=st.integers(1, 40), every=st.integers(1, 12), data=st.data())
def test_the_time_left_is_that_of_all_batches_and_evaluations_to_come(epochs, every, data):
    done = data.draw(st.integers(0, epochs))
    batch = data.draw(st.integers(0, 9 if done < epochs else 0))
    left = time_left(
        Progress(epoch=done, batch=batch, batches=10),
        epochs=epochs, every=every, batch_seconds=1.0, evaluation_seconds=1000.0,
    )  # fmt: skip
    evaluations = [e for e in range(done + 1, epochs + 1) if e % every == 0 or e == epochs]
    seconds = 10 * (epochs - done) - batch + 1000 * len(evaluations)
    assert sum(60**i * int(x) for i, x in enumerate(reversed(left.split(":")))) == seconds


def kept_times(arguments: list[str]) -> int:
    """A run that keeps what the time left is made of, step by step."""

    def time_left_and_keep(progress, *, evaluation_seconds, **rest):
        with open(arguments[-1], "a") as file:
            file.write(json.dumps([progress.epoch, evaluation_seconds]) + "\n")
        return time_left(progress, evaluation_seconds=evaluation_seconds, **rest)

    run.time_left = time_left_and_keep
    return main_status(arguments[:-1])


def test_the_seconds_of_an_evaluation_are_those_of_the_last_one(run_flags, tmp_path):
    """And not of the save after an epoch that is not evaluated."""
    flags = [*run_flags, f"-output={tmp_path / 'run'}", "-opts", "VALIDATE_FREQ", "2"]
    finish([*flags, tmp_path / "times"], target=kept_times)
    times = [json.loads(line) for line in (tmp_path / "times").read_text().splitlines()]
    by_epoch = {epoch: {s for e, s in times if e == epoch} for epoch in range(4)}
    assert by_epoch[0] == by_epoch[1] == {0.0}
    assert by_epoch[2] == by_epoch[3] != {0.0}


def test_names_from_files_steer_no_terminal(tmp_path):
    """Those of the network, of images and of folders, on the console and in log.txt."""
    folder, data = tmp_path / "ru\x1b[31mn", tmp_path / "data"
    make_data(data, train=16, val=8)
    image = next((data / "train").rglob("*.jpg"))
    image.with_name("b\x1b]0;owned\x07.jpg").write_bytes(b"no image")
    with open(data / "train_list.txt", "a") as file:
        file.write(f"{image.relative_to(data).parent}/b\x1b]0;owned\x07.jpg 0\n")
    config = TINY.replace("NAME: tiny", r'NAME: "tiny\e[2J"').replace("EPOCHS: 4", "EPOCHS: 1")
    (tmp_path / "config.yaml").write_text(config)
    flags = [f"-cfg={tmp_path}/config.yaml", f"-data_path={data}", f"-output={folder}"]
    command = [sys.executable, ROOT / "main_single_gpu.py", *flags]
    status, raw = on_terminal([*command, "-batch_size=4"], 120)
    assert status == 0, raw
    for text in (raw.replace("\x1b[A", ""), (folder / "log.txt").read_text()):
        assert r"b\x1b]0;owned\x07.jpg" in text and r"ru\x1b[31mn/best" in text
        assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", text)


# ---- the end

# Runs a command that gets a signal once it has shown that two are done.
INTERRUPTED = """
import os, sys
from replknet_paddle.runtime.progress import Bar
show = Bar.show

def show_and_interrupt(bar, done, parts=None):
    show(bar, done, parts)
    if done >= 2 and bar.title.startswith(sys.argv[1]):
        print("^C", end="", file=sys.stderr, flush=True)
        os.kill(os.getpid(), 2)

Bar.show = show_and_interrupt
from replknet_paddle.commands import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    "title, words, message",
    [
        ("check", "check-data DATA -workers=1", "interrupted"),
        ("check", "check-data DATA -workers=2", "interrupted"),
        ("prediction", "predict RUN PICTURES -backend=eager", "interrupted"),
        ("evaluation", "eval -pretrained=RUN/best -data_path=DATA -output=NEW", "interrupted"),
        (
            "epoch 1/4",
            "train -cfg=CONFIG -data_path=DATA -output=NEW",
            "train -resume=NEW",  # after "replknet", or Python and the package
        ),
    ],
)
def test_an_interruption_clears_the_bar(
    title, words, message, straight, tiny_data, tiny_config_file, tmp_path
):
    """The message is the last line, and no bar is anywhere."""
    places = {"DATA": tiny_data, "RUN": straight, "PICTURES": FIXTURES / "images"}
    places |= {"CONFIG": tiny_config_file, "NEW": tmp_path / "new"}

    def placed(text: str) -> str:
        return re.sub("|".join(places), lambda found: str(places[found[0]]), text)

    command = [sys.executable, "-c", INTERRUPTED, title, *map(placed, words.split())]
    status, raw = on_terminal(command, 120)
    assert status == 130, raw
    shown = screen(raw)
    assert shown[-1].endswith(placed(message)), raw
    assert "|" in raw and not [line for line in shown if "|" in line or "^C" in line], raw
    assert "Traceback" not in raw


def test_the_summary_names_the_best_and_a_command_that_works(straight, tiny_data, tmp_path):
    lines = messages(straight)[-4:]
    assert re.fullmatch(r"finished: trained epochs 1 to 4 in \d:\d\d:\d\d", lines[0])
    best = re.fullmatch(
        rf"best: epoch (\d), (EMA )?weights, top-1 ([\d.]+) %, in {straight}/best", lines[1]
    )
    assert best, lines[1]
    assert "last, log.txt, metrics.jsonl" in lines[2]
    command = lines[3].removeprefix("next: ").replace(str(straight / "report"), str(tmp_path / "r"))
    done = run_typed(f"{command} -output={tmp_path / 'eval'}")
    assert done.returncode == 0, done.stderr
    assert f"top-1 {best[3]} %" in done.stdout
    assert (tmp_path / "r" / "report.html").is_file()


def test_evaluation_without_weights_has_to_be_asked_for(run_flags, validation_images, tmp_path):
    flags = [*run_flags, "-eval", f"-output={tmp_path / 'run'}"]
    said = finish(flags, status=2)
    assert "evaluation without weights" in said and "-pretrained=random" in said
    assert not (tmp_path / "run").exists()
    said = finish([*flags, "-pretrained=random"])
    assert f"{validation_images} images" in said
