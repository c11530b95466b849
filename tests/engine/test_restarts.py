"""run_train_multi.sh under MAX_RESTARTS: what is restarted, from where, and what is not."""

import re
import signal
import subprocess
import sys

import pytest
from harness import (
    Program,
    Run,
    assert_same_end,
    failing,
    finish,
    progress_of,
    step_of,
    wait_for,
    with_fault,
)

from replknet_paddle.runtime.launch import run_with_restarts


@pytest.fixture
def fails(tmp_path, run_flags):
    """Runs the script with a run that has these faults, one each start."""

    def run(*flags, faults=(), restarts, status=0):
        starts = tmp_path / "starts"
        starts.unlink(missing_ok=True)
        program = Program([*run_flags, *flags], restarts=restarts, **failing(tmp_path, *faults))
        got, said = program.finish()
        assert got == status, said
        return said, starts.read_text().splitlines()

    return run


def killed_at(step: int, rank: int | None = None) -> tuple:
    return f"step {step}", "SIGKILL", rank


# Stands for a run: each start reaches the next step of a plan, and ends as that says.
PLANNED = """#!/bin/sh
echo "$*" >> "{here}/starts"
set -- $(sed -n "$(wc -l < "{here}/starts")p" "{here}/plan")
mkdir -p "{here}/run"
printf '%-12s\\n' "$1" > "{here}/run/step"
[ "$2" != killed ] || kill -KILL $$
exit "$2"
"""

# (Step, status) of each start; restarts; the status and the starts in the end; what is said.
PLANS = {
    "used up": ("1 killed, 2 killed", 1, 137, 2, "all 1 restarts are used up"),
    "the same step twice": ("2 1, 5 1, 5 1, 6 0", 9, 1, 3, "at step 5 for the second time; not re"),
    "killed at a step twice": ("5 killed, 5 killed, 5 1, 6 0", 9, 0, 4, "restart 3 of 9"),
    "done": ("5 0", 9, 0, 1, None),
    "bad input": ("5 2", 9, 2, 1, None),
    "SIGINT": ("5 130", 9, 130, 1, None),
    "SIGTERM": ("5 143", 9, 143, 1, None),
}


@pytest.mark.parametrize("has_log", [True, False])
@pytest.mark.parametrize("plan, restarts, status, starts, says", PLANS.values(), ids=PLANS)
def test_what_is_restarted(plan, restarts, status, starts, says, has_log, tmp_path, capfd):
    """A log that cannot be written stops no restart."""
    folder, program = tmp_path / "run", tmp_path / "program"
    if not has_log:
        (folder / "log.txt").mkdir(parents=True)
    (tmp_path / "plan").write_text(plan.replace(", ", "\n") + "\n")
    program.write_text(PLANNED.format(here=tmp_path))
    program.chmod(0o755)
    got = run_with_restarts(
        [str(program)], restarts=restarts, run_folder=str(folder), is_resuming=False
    )
    said = capfd.readouterr().out
    assert (got, len((tmp_path / "starts").read_text().splitlines())) == (status, starts), said
    assert says in said if says else "failed with status" not in said
    if says and has_log:
        assert says in (folder / "log.txt").read_text()


def test_a_run_finds_the_package_from_any_folder(tmp_path, monkeypatch):
    """Without what is installed, as where only a checkout is there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    command = [sys.executable, "-S", "-c", "import replknet_paddle.runtime.launch"]
    assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 1
    assert run_with_restarts(command, restarts=0, run_folder="run", is_resuming=False) == 0


def test_a_run_that_fails_as_it_is_stopped_is_not_restarted(tmp_path):
    program = [sys.executable, "-c", FAILS_WHEN_STOPPED, str(tmp_path / "ready")]
    parent = Run([*program, tmp_path], output=tmp_path / "said", target=restarting)
    wait_for((tmp_path / "ready").exists)
    parent.send(signal.SIGTERM)
    assert parent.wait() == 1
    assert "failed" not in parent.text()


FAILS_WHEN_STOPPED = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
open(sys.argv[1], "w").close()
signal.pause()
"""


def restarting(arguments: list[str]) -> int:
    """Restart a program in the run folder that is the last argument."""
    *command, folder = arguments
    return run_with_restarts(command, restarts=9, run_folder=folder, is_resuming=False)


# ---- with real runs


@pytest.mark.slow
def test_a_run_that_fails_on_is_restarted_as_often_as_allowed(fails, straight, tmp_path):
    """Fails at the first step, before anything is saved, then in the middle, then no more."""
    folder = tmp_path / "run"
    said, starts = fails(f"-output={folder}", faults=[killed_at(1), killed_at(7)], restarts=2)
    assert ["MODEL.RESUME auto" in start for start in starts] == [False, True, True]
    log = (folder / "log.txt").read_text()
    for line in (
        "failed with status 137 at step 1; restart 1 of 2",
        "failed with status 137 at step 7; restart 2 of 2",
    ):
        assert line in said
        assert re.search(rf"\d\d:\d\d:\d\d .*{line}", log), log
    assert_same_end(folder, straight)


@pytest.mark.slow
def test_killed_workers_are_restarted_and_the_end_is_the_same(fails, straight_on_two, tmp_path):
    folder = tmp_path / "run"
    said, starts = fails(
        *("-batch_size=4", "-nproc=2", f"-output={folder}"),
        *("-opts", "DATA.NUM_WORKERS", "1", "SAVE_STEPS", "2"),
        faults=[killed_at(2, rank=1), killed_at(8, rank=0)],
        restarts=2,
    )
    log = (folder / "log.txt").read_text()
    assert len(starts) == 3 and "restart 1 of 2" in log and "restart 2 of 2" in log, log
    assert_same_end(folder, straight_on_two)


def test_bad_input_is_not_restarted(fails, tmp_path):
    missing = tmp_path / "imagenet"
    flags = [f"-data_path={missing}", f"-output={tmp_path / 'run'}"]
    said, starts = fails(*flags, restarts=3, status=2)
    assert len(starts) == 1, said
    assert said.count("error: ") == 1 and str(missing) in said


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_stop_is_passed_on_saved_and_not_restarted(run_flags, straight, tmp_path, number):
    folder = tmp_path / "run"
    flags = [*run_flags, f"-output={folder}"]
    environment = with_fault(tmp_path, "step 4", "be signalled")
    script = Program(flags, restarts=3, **environment)
    script.wait_for_step(folder, 4)
    script.send_signal(number)
    status, said = script.finish()
    assert status == 128 + number and "Traceback" not in said, said
    assert progress_of(folder).step == step_of(folder) >= 4
    finish([*flags, "-resume=auto"], output=tmp_path / "log")
    assert_same_end(folder, straight)


@pytest.mark.slow
def test_restarts_of_a_resumed_run_lose_nothing(fails, straight, tmp_path):
    """`-resume=RUN` without -output goes on in RUN; so does a restart, even one before a save."""
    folder = tmp_path / "run"
    fails(f"-output={folder}", faults=[killed_at(5)] * 2, restarts=1, status=137)
    assert progress_of(folder).step == 3
    said, starts = fails(f"-resume={folder}", faults=[killed_at(4)], restarts=2)
    assert len(starts) == 2
    assert said.count("continuing after epoch 1, step 3") == 2, said
    assert_same_end(folder, straight)


@pytest.mark.parametrize("where", ["before", "after"])
def test_output_and_resume_mean_the_same_before_and_after_opts(fails, straight, tmp_path, where):
    """A restart begins where the run was, whatever the order of the flags."""
    folder = tmp_path / "run"
    flags = [f"-output={folder}", "-opts", "SAVE_STEPS", "1"]
    flags = flags if where == "before" else [*flags[1:], flags[0]]
    said, starts = fails(*flags, faults=[killed_at(2)], restarts=1)
    assert len(starts) == 2 and "continuing after epoch 0, step 1" in said, said
    assert_same_end(folder, straight)
