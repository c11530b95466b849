"""run_train_multi.sh under MAX_RESTARTS: what is restarted, from where, and what is not."""

import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from launched import SIGNALLED_AFTER_STEP_4
from processes import (
    Run,
    Script,
    assert_same_end,
    customized,
    failing,
    finish,
    step_of,
    wait_for,
    worker,
)

from replknet_paddle.checkpoints.run_folder import load_checkpoint
from replknet_paddle.runtime.launch import run_with_restarts


@pytest.fixture
def fails(tmp_path, tiny_config_file, tiny_data):
    """Runs the script with a run that fails after the given steps, one of them a start."""

    def run(*flags, failures, restarts, how="killed", status=None, folder=None):
        starts = tmp_path / "starts"
        shutil.rmtree(tmp_path / "custom", ignore_errors=True)
        environment = failing(tmp_path, failures=failures, how=how)
        where = [] if folder is None else [f"-output={folder}"]
        arguments = [f"-cfg={tiny_config_file}", f"-data_path={tiny_data}", *where, *flags]
        got, said = Script(arguments, restarts=restarts, **environment).finish()
        if status is not None:
            assert got == status, said
        return got, said, starts.read_text().splitlines() if starts.exists() else []

    return run


# Stands for a run: each start reaches the next step of a plan, and ends as that says.
PLANNED = """#!/bin/sh
echo "$*" >> "{here}/starts"
set -- $(sed -n "$(wc -l < "{here}/starts")p" "{here}/plan")
mkdir -p "{run}"
printf '%-12s\\n' "$1" > "{run}/step"
[ "$2" != killed ] || kill -KILL $$
exit "$2"
"""


@pytest.fixture
def planned(tmp_path, capfd):
    """Restarts a program that ends as planned: (step, status or 'killed'), ..."""

    def run(*plan, restarts):
        run_folder, program = tmp_path / "run", tmp_path / "program"
        (tmp_path / "plan").write_text("".join(f"{step} {how}\n" for step, how in plan))
        program.write_text(PLANNED.format(here=tmp_path, run=run_folder))
        program.chmod(0o755)
        got = run_with_restarts(
            [str(program)], restarts=restarts, run_folder=str(run_folder), is_resuming=False
        )
        return got, capfd.readouterr().out, (tmp_path / "starts").read_text().splitlines()

    return run


# ---- whatever is started


def test_restarts_run_out(planned, tmp_path):
    status, said, starts = planned((1, "killed"), (2, "killed"), restarts=1)
    assert status == 137 and len(starts) == 2
    assert "all 1 restarts are used up" in said
    assert "all 1 restarts are used up" in (tmp_path / "run" / "log.txt").read_text()


def test_the_same_step_twice_stops(planned):
    got, said, starts = planned((2, 1), (5, 1), (5, 1), (6, 0), restarts=9)
    assert got == 1 and len(starts) == 3, said
    assert "at step 5 for the second time; not restarting" in said


def test_being_killed_twice_at_the_same_step_does_not_stop(planned):
    got, said, starts = planned((5, "killed"), (5, "killed"), (5, 1), (6, 0), restarts=9)
    assert got == 0 and len(starts) == 4, said


@pytest.mark.parametrize("status", [0, 2, 130, 143])
def test_ends_that_are_not_restarted(planned, status):
    got, said, starts = planned((5, status), restarts=9)
    assert got == status and len(starts) == 1
    assert "failed with status" not in said


def test_a_log_that_cannot_be_written_stops_no_restart(planned, tmp_path):
    (tmp_path / "run" / "log.txt").mkdir(parents=True)
    status, said, starts = planned((1, 1), (2, 0), restarts=1)
    assert status == 0 and len(starts) == 2 and "restart 1 of 1" in said


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
def test_killed_workers_are_restarted_and_the_end_is_the_same(
    tiny_config_file,
    tiny_data,
    straight_on_two,
    tmp_path,
):
    folder = tmp_path / "run"
    script = Script(
        [f"-cfg={tiny_config_file}", f"-data_path={tiny_data}", "-batch_size=4", "-nproc=2",
         f"-output={folder}", "-opts", "DATA.NUM_WORKERS", "1", "SAVE_STEPS", "2"],
        restarts=2,
    )  # fmt: skip
    try:
        for rank, step in ((1, 2), (0, 8)):
            wait_for(lambda step=step: step_of(folder) >= step or script.process.poll() is not None)
            os.kill(wait_for(lambda rank=rank: worker(script.process.pid, rank)), signal.SIGKILL)
            wait_for(
                lambda rank=rank: (
                    "restart " in (folder / "log.txt").read_text()[-200:]
                    or script.process.poll() is not None
                )
            )
    finally:
        status, said = script.finish()
    assert status == 0, said
    log = (folder / "log.txt").read_text()
    assert "restart 1 of 2" in log and "restart 2 of 2" in log, log
    assert_same_end(folder, straight_on_two)


@pytest.mark.slow
def test_a_run_that_fails_on_is_restarted_as_often_as_allowed(
    fails,
    straight,
    tmp_path,
):
    """Fails at the first step, before anything is saved, then in the middle, then no more."""
    folder = tmp_path / "run"
    _, said, starts = fails(folder=folder, failures=[1, 7], restarts=2, status=0)
    assert len(starts) == 3
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
def test_a_run_that_fails_twice_at_the_same_step_stops(fails, tmp_path):
    folder = tmp_path / "run"
    failures = [2, 5, 5, 5]
    got, said, starts = fails(folder=folder, failures=failures, restarts=9, how="raises")
    assert got == 1 and len(starts) == 3, said
    assert "at step 5 for the second time; not restarting" in said
    assert load_checkpoint(str(folder / "last")).progress.step == 3


def test_bad_input_is_not_restarted(fails, tmp_path):
    missing = tmp_path / "imagenet"
    got, said, starts = fails(
        f"-data_path={missing}", failures=[], restarts=3, folder=tmp_path / "run"
    )
    assert got == 2 and len(starts) == 1, said
    assert said.count("error: ") == 1 and str(missing) in said


@pytest.mark.parametrize("how", ["TERM", pytest.param("Ctrl-C", marks=pytest.mark.slow)])
def test_a_stop_is_passed_on_saved_and_not_restarted(
    tiny_config_file,
    tiny_data,
    straight,
    tmp_path,
    how,
):
    folder = tmp_path / "run"
    flags = [f"-cfg={tiny_config_file}", f"-data_path={tiny_data}", f"-output={folder}"]
    script = Script(flags, restarts=3, **customized(tmp_path, SIGNALLED_AFTER_STEP_4))
    wait_for(lambda: step_of(folder) == 4 or script.process.poll() is not None)
    number = signal.SIGTERM if how == "TERM" else signal.SIGINT
    script.process.send_signal(number)
    status, said = script.finish()
    assert status == (143 if how == "TERM" else 130), said
    assert "Traceback" not in said, said
    assert load_checkpoint(str(folder / "last")).progress.step == step_of(folder) >= 4
    finish([*flags, "-resume=auto"], output=tmp_path / "log")
    assert_same_end(folder, straight)


@pytest.mark.slow
def test_restarts_of_a_resumed_run_lose_nothing(fails, straight, tmp_path):
    """`-resume=RUN` without -output goes on in RUN; so does a restart, even one before a save."""
    folder = tmp_path / "run"
    fails(folder=folder, failures=[5, 5], restarts=1, status=137)
    assert load_checkpoint(str(folder / "last")).progress.step == 3
    (tmp_path / "starts").unlink()
    _, said, starts = fails(f"-resume={folder}", failures=[4], restarts=2, status=0)
    assert len(starts) == 2
    assert said.count("continuing after epoch 1, step 3") == 2, said
    assert_same_end(folder, straight)


@pytest.mark.parametrize("where", ["before", "after"])
def test_output_and_resume_mean_the_same_before_and_after_opts(fails, straight, tmp_path, where):
    """A restart begins where the run was, whatever the order of the flags."""
    folder = tmp_path / "run"
    flags = [f"-output={folder}", "-opts", "SAVE_STEPS", "1"]
    flags = flags if where == "before" else [*flags[1:], flags[0]]
    _, said, starts = fails(*flags, failures=[2], restarts=1, status=0)
    assert len(starts) == 2 and "continuing after epoch 0, step 1" in said, said
    assert_same_end(folder, straight)
