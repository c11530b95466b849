"""One run at a time in a run folder, whatever became of the one before."""

import errno
import fcntl
import logging
import os
import re
import signal

import pytest
from processes import (
    Run,
    assert_same_end,
    children,
    customized,
    finish,
    main_status,
    paused,
    step_of,
    wait_for,
)

from replknet_paddle.engine import run_log
from replknet_paddle.engine.run_log import RunLock


def hold(arguments: list[str]) -> int:
    """Lock a folder, say so, and wait to be killed; a child lives on, as loader workers may."""
    lock = RunLock(arguments[0])
    if os.fork() == 0:
        signal.pause()
    print("locked", lock is not None, flush=True)
    signal.pause()
    return 1


def lock_at_once(arguments: list[str]) -> int:
    """Lock a folder; the status says whether that worked."""
    from replknet_paddle.runtime.errors import InputError

    run_log.WAIT_SECONDS = float(arguments[1])
    try:
        RunLock(arguments[0])
    except InputError as error:
        print(error)
        return 2
    return 0


@pytest.fixture
def holder(tmp_path):
    run = Run([tmp_path], output=tmp_path / "holder.log", target=hold)
    wait_for(lambda: "locked" in run.text())
    [child] = children(run.pid)
    yield run
    run.send(signal.SIGKILL)
    run.wait()
    os.kill(child, signal.SIGKILL)


def test_the_second_process_is_reported_which_one_holds_the_lock(holder, tmp_path):
    said = finish([tmp_path, 0.3], output=tmp_path / "log", target=lock_at_once, status=2)
    assert f"{tmp_path} is in use by process {holder.pid} on " in said


def test_a_killed_process_has_no_lock_though_its_children_live(holder, tmp_path):
    holder.send(signal.SIGKILL)
    finish([tmp_path, 60], output=tmp_path / "log", target=lock_at_once)


def test_a_released_lock_is_free(tmp_path):
    RunLock(str(tmp_path)).release()
    finish([tmp_path, 60], output=tmp_path / "log", target=lock_at_once)


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    with caplog.at_level(logging.WARNING):
        RunLock(str(tmp_path)).release()
    assert "cannot be locked (No locks available)" in caplog.text


def run_at_step_4(run_flags, tmp_path) -> Run:
    """A run in the folder `run` that waits after its fourth step until `go` exists."""
    run = Run(
        [*run_flags, f"-output={tmp_path / 'run'}"],
        output=tmp_path / "first.log",
        target=paused,
        environment={"PAUSE_AT": "4", "GO": str(tmp_path / "go")},
    )
    wait_for(lambda: step_of(tmp_path / "run") >= 4)
    return run


def impatient(arguments: list[str]) -> int:
    """A run that does not wait long for its folder."""
    run_log.WAIT_SECONDS = 0.3
    return main_status(arguments)


# The same of launched processes.
IMPATIENT = """
    from replknet_paddle.engine import run_log
    run_log.WAIT_SECONDS = 0.3
"""


def test_a_second_run_stops_and_the_first_is_undisturbed(run_flags, straight, tmp_path):
    folder = tmp_path / "run"
    first = run_at_step_4(run_flags, tmp_path)
    for flags in (["-resume=auto"], [f"-resume={folder}"], []):
        said = finish(
            [*run_flags, f"-output={folder}", *flags],
            output=tmp_path / "log", status=2, target=impatient,
        )  # fmt: skip
        assert f"in use by process {first.pid}" in said or "of another run" in said, said
        assert "Traceback" not in said
    said = finish(
        [*run_flags, f"-output={folder}", "-resume=auto", "-nproc=2"],
        output=tmp_path / "log", status=2, environment=customized(tmp_path, IMPATIENT),
    )  # fmt: skip
    assert said.count(f"in use by process {first.pid}") == 1, said
    assert "in use" not in (folder / "log.txt").read_text()
    (tmp_path / "go").touch()
    assert first.wait() == 0, first.text()
    assert_same_end(folder, straight)


def test_a_run_takes_up_what_the_one_before_it_saved_while_ending(run_flags, straight, tmp_path):
    """The newest checkpoint is looked for once the folder is free, and so it is the last one."""
    folder = tmp_path / "run"
    first = run_at_step_4(run_flags, tmp_path)
    second = Run(
        [*run_flags, f"-output={folder}", "-resume=auto"],
        output=tmp_path / "second.log",
        target=patient,
    )
    wait_for(lambda: "Paddle" in second.text())
    first.send(signal.SIGTERM)
    (tmp_path / "go").touch()
    assert first.wait() == 143, first.text()
    [stopped_at] = re.findall(r"stopped by SIGTERM (after epoch 1, step [45]);", first.text())
    assert second.wait() == 0, second.text()
    assert f"continuing {stopped_at}" in second.text()
    assert not (folder / "superseded").exists()
    assert_same_end(folder, straight)


def patient(arguments: list[str]) -> int:
    """A run that waits long for its folder."""
    run_log.WAIT_SECONDS = 100.0
    return main_status(arguments)
