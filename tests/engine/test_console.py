"""What people see of a run: bars, lines, the end, and how to go on."""

import re
import shlex
import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from launched import SIGNALLED_AFTER_STEP_4, LaunchedRun
from processes import (
    Run,
    assert_same_end,
    children,
    customized,
    finish,
    paused,
    start_really,
    step_of,
    wait_for,
)
from terminal import OnTerminal, Screen
from tiny import ROOT, make_data

from replknet_paddle.checkpoints.training import Progress
from replknet_paddle.engine.run_log import time_left

LOG_LINE = re.compile(r"[-\d]+ [\d:,]+ [A-Z]+ (.*)")


def messages(run_folder) -> list[str]:
    lines = (run_folder / "log.txt").read_text().splitlines()
    return [match[1] for line in lines if (match := LOG_LINE.fullmatch(line))]


def run_typed(line: str, timeout: float = 180) -> subprocess.CompletedProcess:
    """Run a `replknet` command line as a shell in the checkout does."""
    words = shlex.split(line)
    words[: words.index("train") if "train" in words else words.index("eval")] = []
    return subprocess.run(
        [sys.executable, "-m", "replknet_paddle", *words],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=timeout,
    )


# ---- bars


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_bars_and_lines_on_a_terminal(tiny_config_file, tmp_path, processes):
    run, data = tmp_path / "run", tmp_path / "data"
    make_data(data, train=60, val=20)
    for number in (3, 30, 50):  # there is a line for each, in the middle of an epoch
        next((data / "train").rglob(f"{number:04d}.jpg")).write_bytes(b"no image")
    program = OnTerminal(
        [
            *(sys.executable, ROOT / "main_multi_gpu.py", f"-cfg={tiny_config_file}"),
            *(f"-data_path={data}", f"-output={run}"),
            *(f"-nproc={processes}", "-batch_size=4", "-opts", "TRAIN.NUM_EPOCHS", 2),
        ]
    )
    assert program.finish() == 0, program.raw.decode()
    raw = program.raw.decode()
    assert len(set(re.findall(r"epoch 2/2: +\d+%[^\r\n]*images/s[^\r\n]*left", raw))) > 1
    assert "evaluation: " in raw
    # Bars are gone at the end, and each line stands alone.
    logged = messages(run)
    assert sum("cannot read image" in line for line in logged) == 3 or processes == 2
    assert len(logged) > 8 and not [line for line in logged if ", batch " in line]
    shown = program.screen()
    assert [line for line in shown if line in logged] == logged
    assert [line for line in shown if line not in logged] == []


def test_without_a_terminal_there_are_lines_with_the_time_left(straight):
    lines = [line for line in messages(straight) if ", batch " in line]
    assert len(lines) == 4
    assert all(re.search(r", data wait \d+%, \d\d:\d\d left$", line) for line in lines)
    assert lines[-1].endswith("data wait 0%, 00:00 left") or "epoch 4/4" in lines[-1]


def test_the_screen_of_these_tests_shows_splices():
    screen = Screen()
    screen.feed("\rbar 10%\rbar 20%a line\r\nnext\r\n")
    assert screen.text() == ["bar 20%a line", "next"]


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


# ---- the end


def test_the_summary_names_the_best_and_a_command_that_works(straight, tiny_data, tmp_path):
    lines = messages(straight)[-4:]
    assert re.fullmatch(r"finished: trained epochs 1 to 4 in \d\d:\d\d", lines[0])
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


def test_ctrl_c_shows_the_command_that_continues(run_flags, straight, tmp_path):
    folder, go = tmp_path / "run", tmp_path / "go"
    run = Run(
        [*run_flags, f"-output={folder}"],
        output=tmp_path / "said",
        target=paused,
        environment={"PAUSE_AT": "4", "GO": str(go)},
    )
    wait_for(lambda: step_of(folder) == 4 or not run.process.is_alive())
    run.send(signal.SIGINT)
    go.touch()
    check_ctrl_c(run.wait(), run.text(), folder, straight)


@pytest.mark.slow
def test_ctrl_c_with_several_processes_shows_it_too(run_flags, straight_on_two, tmp_path):
    folder = tmp_path / "run"
    process = start_really(
        [*run_flags, "-batch_size=4", "-nproc=2", f"-output={folder}"],
        **customized(tmp_path, SIGNALLED_AFTER_STEP_4),
    )
    try:
        wait_for(lambda: step_of(folder) == 4 or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    check_ctrl_c(process.returncode, said, folder, straight_on_two)


def check_ctrl_c(status, said, run, wanted) -> None:
    assert status == 130, said
    for noise in ("Traceback", "gloo", "ccache", "KeyboardInterrupt"):
        assert noise not in said, said
    [line] = [line for line in said.splitlines() if line.startswith("to continue: ")]
    assert "stopped by" in (run / "log.txt").read_text()
    done = run_typed(line.removeprefix("to continue: "))
    assert done.returncode == 0, done.stderr
    assert_same_end(run, wanted)


def test_ctrl_c_before_the_first_checkpoint_promises_nothing(run_flags, tmp_path):
    run = LaunchedRun([*run_flags, "-nproc=2", f"-output={tmp_path / 'run'}"],
                      output=tmp_path / "said")  # fmt: skip
    try:
        wait_for(lambda: children(run.pid) or not run.process.is_alive())
        run.send(signal.SIGINT)
        status, said = run.wait(), run.text()
    finally:
        run.kill()
    assert status == 130, said
    assert "to continue" not in said and "Traceback" not in said, said


@pytest.mark.slow
def test_a_run_in_several_processes_says_nothing_of_paddles_own(run_flags, tmp_path):
    said = finish_really([*run_flags, "-nproc=2", "-batch_size=4", f"-output={tmp_path / 'run'}"])
    for noise in ("ccache", "Warning", "gloo", "Traceback", "LAUNCH"):
        assert noise not in said, said


def finish_really(flags) -> str:
    process = start_really(flags)
    try:
        said, _ = process.communicate(timeout=180)
    finally:
        process.kill()
    assert process.returncode == 0, said
    return said


def test_evaluation_without_weights_has_to_be_asked_for(run_flags, validation_images, tmp_path):
    flags = [*run_flags, "-eval", f"-output={tmp_path / 'run'}"]
    said = finish(flags, output=tmp_path / "log", status=2)
    assert "-eval without weights" in said and "-pretrained=random" in said
    assert not (tmp_path / "run").exists()
    said = finish([*flags, "-pretrained=random"], output=tmp_path / "log")
    assert f"{validation_images} images" in said
