"""run_train_multi.sh under MAX_RESTARTS: what is restarted, from where, and what is not."""

import os
import re
import signal
import sys

import pytest
from launched import SIGNALLED_AFTER_STEP_4, wrapped
from processes import Script, assert_same_end, failing_python, finish, step_of, wait_for, worker

from replknet_paddle.checkpoints.training import load_checkpoint


@pytest.fixture
def failing(tmp_path, tiny_config_file, tiny_data):
    """Runs the script with a program that fails after the given steps, one of them a start."""

    def run(*flags, failures, restarts, how="killed", status=None, folder=None):
        starts = tmp_path / "starts"
        python = failing_python(tmp_path, failures=failures, how=how)
        where = [] if folder is None else [f"-output={folder}"]
        arguments = [f"-cfg={tiny_config_file}", f"-data_path={tiny_data}", *where, *flags]
        got, said = Script(arguments, restarts=restarts, python=python).finish()
        if status is not None:
            assert got == status, said
        return got, said, starts.read_text().splitlines() if starts.exists() else []

    return run


# Stands for Python and a run: each start reaches the next step of a plan, and ends as that says.
PLANNED = """#!/bin/sh
echo "$*" >> "{here}/starts"
set -- $(sed -n "$(wc -l < "{here}/starts")p" "{here}/plan")
mkdir -p "{run}"
printf '%-12s\\n' "$1" > "{run}/step"
[ "$2" != killed ] || kill -KILL $$
exit "$2"
"""


@pytest.fixture
def planned(tmp_path):
    """Runs the script with a program that ends as planned: (step, status or 'killed'), ..."""

    def run(*plan, restarts):
        run_folder, python = tmp_path / "run", tmp_path / "python"
        (tmp_path / "plan").write_text("".join(f"{step} {how}\n" for step, how in plan))
        python.write_text(PLANNED.format(here=tmp_path, run=run_folder))
        python.chmod(0o755)
        got, said = Script([f"-output={run_folder}"], restarts=restarts, python=python).finish()
        return got, said, (tmp_path / "starts").read_text().splitlines()

    return run


# ---- the script, whatever it starts


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


def test_without_restarts_the_script_is_the_program(planned):
    got, said, starts = planned((1, "killed"), restarts=0)
    assert got in (137, -signal.SIGKILL) and len(starts) == 1
    assert "failed with status" not in said


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
    failing,
    straight,
    tmp_path,
):
    """Fails at the first step, before anything is saved, then in the middle, then no more."""
    folder = tmp_path / "run"
    _, said, starts = failing(folder=folder, failures=[1, 7], restarts=2, status=0)
    assert len(starts) == 3
    assert (
        "-resume" not in starts[0] and "-resume=auto" in starts[1] and "-resume=auto" in starts[2]
    )
    log = (folder / "log.txt").read_text()
    for line in (
        "failed with status 137 at step 1; restart 1 of 2",
        "failed with status 137 at step 7; restart 2 of 2",
    ):
        assert line in said
        assert re.search(rf"\d\d:\d\d:\d\d .*{line}", log), log
    assert_same_end(folder, straight)


@pytest.mark.slow
def test_a_run_that_fails_twice_at_the_same_step_stops(failing, tmp_path):
    folder = tmp_path / "run"
    failures = [2, 5, 5, 5]
    got, said, starts = failing(folder=folder, failures=failures, restarts=9, how="raises")
    assert got == 1 and len(starts) == 3, said
    assert "at step 5 for the second time; not restarting" in said
    assert load_checkpoint(str(folder / "last")).progress.step == 3


def test_bad_input_is_not_restarted(tiny_config_file, tmp_path):
    missing, python, starts = (tmp_path / name for name in ("imagenet", "python", "starts"))
    python.write_text(f'#!/bin/sh\necho >> "{starts}"\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    status, said = Script(
        [f"-cfg={tiny_config_file}", f"-data_path={missing}", f"-output={tmp_path / 'run'}"],
        restarts=3, python=python,
    ).finish()  # fmt: skip
    assert status == 2, said
    assert len(starts.read_text()) == 1
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
    script = Script(flags, restarts=3, python=wrapped(tmp_path, SIGNALLED_AFTER_STEP_4))
    wait_for(lambda: step_of(folder) == 4 or script.process.poll() is not None)
    if how == "TERM":
        script.process.send_signal(signal.SIGTERM)
    else:  # a terminal tells every process of the foreground's group
        os.killpg(script.process.pid, signal.SIGINT)
    status, said = script.finish()
    assert status == (143 if how == "TERM" else 130), said
    assert "Traceback" not in said, said
    assert load_checkpoint(str(folder / "last")).progress.step == step_of(folder) >= 4
    finish([*flags, "-resume=auto"], output=tmp_path / "log")
    assert_same_end(folder, straight)


@pytest.mark.slow
def test_restarts_of_a_resumed_run_lose_nothing(failing, straight, tmp_path):
    """`-resume=RUN` without -output goes on in RUN; so does a restart, even one before a save."""
    folder = tmp_path / "run"
    failing(folder=folder, failures=[5], restarts=0)
    assert load_checkpoint(str(folder / "last")).progress.step == 3
    (tmp_path / "starts").unlink()
    _, said, starts = failing(f"-resume={folder}", failures=[4], restarts=2, status=0)
    assert len(starts) == 2
    assert said.count("continuing after epoch 1, step 3") == 2, said
    assert_same_end(folder, straight)
