"""run_train_multi.sh under MAX_RESTARTS: what is restarted, from where, and what is not."""

import os
import re
import signal

import pytest
from processes import Script, assert_same_end, failing_python, step_of, wait_for, worker

from replknet_paddle.checkpoints.training import load_checkpoint

pytest_plugins = ["run_fixtures"]


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
    assert "failed with status 137 at step 7; restart 2 of 2" in said
    assert_same_end(folder, straight)


def test_restarts_run_out(failing, tmp_path):
    folder = tmp_path / "run"
    status, said, starts = failing(folder=folder, failures=[1, 2, 3], restarts=1)
    assert status == 137 and len(starts) == 2
    assert "all 1 restarts are used up" in said
    assert "all 1 restarts are used up" in (folder / "log.txt").read_text()


def test_a_run_that_fails_twice_at_the_same_step_stops(failing, tmp_path):
    folder = tmp_path / "run"
    failures = [2, 5, 5, 5]
    got, said, starts = failing(folder=folder, failures=failures, restarts=9, how="raises")
    assert got == 1 and len(starts) == 3, said
    assert "at step 5 for the second time; not restarting" in said
    assert load_checkpoint(str(folder / "last")).progress.step == 3


def test_bad_input_is_not_restarted(failing, tmp_path):
    missing = tmp_path / "imagenet"
    _, said, starts = failing(
        f"-data_path={missing}", folder=tmp_path / "run", failures=[], restarts=3, status=2
    )
    assert len(starts) == 1
    assert said.count("error: ") == 1 and str(missing) in said


def test_without_restarts_the_script_is_the_program(failing, tmp_path):
    got, said, starts = failing(folder=tmp_path / "run", failures=[1], restarts=0)
    assert got in (137, -signal.SIGKILL) and len(starts) == 1
    assert "failed with status" not in said


@pytest.mark.parametrize("how", ["TERM", "Ctrl-C"])
def test_a_stop_is_passed_on_saved_and_not_restarted(
    tiny_config_file,
    tiny_data,
    straight,
    tmp_path,
    how,
):
    folder = tmp_path / "run"
    flags = [f"-cfg={tiny_config_file}", f"-data_path={tiny_data}", f"-output={folder}"]
    script = Script(flags, restarts=3)
    wait_for(lambda: step_of(folder) >= 4 or script.process.poll() is not None)
    if how == "TERM":
        script.process.send_signal(signal.SIGTERM)
    else:  # a terminal tells every process of the foreground's group
        os.killpg(script.process.pid, signal.SIGINT)
    status, said = script.finish()
    assert status == (143 if how == "TERM" else 130), said
    assert "Traceback" not in said, said
    assert load_checkpoint(str(folder / "last")).progress.step == step_of(folder) >= 4
    status, said = Script([*flags, "-resume=auto"], restarts=0).finish()
    assert status == 0, said
    assert_same_end(folder, straight)


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


def test_what_it_says_names_the_status_the_step_and_the_count(failing, tmp_path):
    folder = tmp_path / "run"
    _, said, _ = failing(folder=folder, failures=[2], restarts=4, status=0)
    line = r"failed with status 137 at step 2; restart 1 of 4"
    assert re.search(line, said)
    assert re.search(rf"\d\d:\d\d:\d\d .*{line}", (folder / "log.txt").read_text())
