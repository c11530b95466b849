"""run_train_multi.sh under MAX_RESTARTS: what is restarted, from where, and what is not."""

import re
import signal
import subprocess
import sys
from typing import NamedTuple

import pytest
from harness import Program, Run, assert_same_end, failing, finish, progress_of, wait_for

from replknet_paddle.runtime.launch import run_with_restarts

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


class Restarted(NamedTuple):
    """Faults of `harness.install`, one for each start but the last, and lines that are printed."""

    faults: list
    says: list
    flags: tuple


KILLED_EARLY = [("step 2", "SIGKILL")]
STEPS = ("-opts", "SAVE_STEPS", "1")
RUNS = {
    # before anything is saved, then in the middle, then no more
    "killed twice": Restarted(
        [("step 1", "SIGKILL"), ("step 7", "SIGKILL")],
        [
            "failed with status 137 at step 1; restart 1 of 2",
            "failed with status 137 at step 7; restart 2 of 2",
        ],
        ("-output={folder}",),
    ),
    "two processes": Restarted(
        [("step 2", "SIGKILL", 1), ("step 8", "SIGKILL", 0)],
        ["; restart 1 of 2", "; restart 2 of 2"],
        ("-batch_size=4", "-nproc=2", "-output={folder}", *STEPS, "DATA.NUM_WORKERS", "1"),
    ),
    "an image that heals": Restarted(
        [("opening 0020.jpg", "EIO")],
        ["error: cannot read image", "failed with status 1 at step "],
        ("-output={folder}",),
    ),
    # a restart begins where the run was, whatever the order of the flags
    "output first": Restarted(
        KILLED_EARLY, ["continuing after epoch 0, step 1"], ("-output={folder}", *STEPS)
    ),
    "output last": Restarted(
        KILLED_EARLY, ["continuing after epoch 0, step 1"], (*STEPS, "-output={folder}")
    ),
}
IS_FAST = ("output first", "output last")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in IS_FAST else pytest.mark.slow) for n in RUNS]
)
def test_a_restarted_run_ends_the_same(run_flags, straight, straight_on_two, tmp_path, name):
    run, folder = RUNS[name], tmp_path / "run"
    flags = [*run_flags, *(flag.format(folder=folder) for flag in run.flags)]
    restarts = len(run.faults)
    status, said = Program(flags, restarts=restarts, **failing(tmp_path, *run.faults)).finish()
    assert status == 0 and all(line in said for line in run.says), said
    starts = (tmp_path / "starts").read_text().splitlines()
    assert ["MODEL.RESUME auto" in start for start in starts] == [False] + restarts * [True]
    log = (folder / "log.txt").read_text()
    assert len(re.findall(r"\d\d:\d\d:\d\d .*failed with status .*; restart ", log)) == restarts
    assert_same_end(folder, straight_on_two if "-nproc=2" in flags else straight)


def test_bad_input_is_not_restarted(run_flags, tmp_path):
    missing = tmp_path / "imagenet"
    flags = [*run_flags, f"-data_path={missing}", f"-output={tmp_path / 'run'}"]
    status, said = Program(flags, restarts=3, **failing(tmp_path)).finish()
    assert status == 2 and len((tmp_path / "starts").read_text().splitlines()) == 1, said
    assert said.count("error: ") == 1 and str(missing) in said


@pytest.mark.slow
def test_restarts_of_a_resumed_run_lose_nothing(run_flags, straight, tmp_path):
    """`-resume=RUN` without -output goes on in RUN; so does a restart, even one before a save."""
    folder = tmp_path / "run"
    flags = [*run_flags, f"-output={folder}"]
    finish(flags, status=-9, fault=("step 5", "SIGKILL"))
    assert progress_of(folder).step == 3
    flags = [*run_flags, f"-resume={folder}"]
    status, said = Program(flags, restarts=2, **failing(tmp_path, ("step 4", "SIGKILL"))).finish()
    assert status == 0 and len((tmp_path / "starts").read_text().splitlines()) == 2
    assert said.count("continuing after epoch 1, step 3") == 2, said
    assert_same_end(folder, straight)
