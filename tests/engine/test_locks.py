"""One run at a time in a run folder, whatever became of the one before."""

import errno
import fcntl
import logging
import os
import re
import signal
import time

import pytest
from harness import (
    Program,
    Run,
    assert_same_end,
    children,
    customized,
    failing,
    finish,
    main_status,
    step_of,
    wait_for,
)

from replknet_paddle.commands.train import default_run_folder
from replknet_paddle.config import get_config
from replknet_paddle.engine import run_log
from replknet_paddle.engine.run_log import RunLock
from replknet_paddle.runtime.errors import InputError


def hold(arguments: list[str]) -> int:
    """Lock a folder and say so; a child lives on, as loader workers may."""
    os.setsid()
    lock = RunLock(arguments[0])
    if os.fork() == 0:
        signal.pause()
    open(os.path.join(lock.folder, "locked"), "w").close()
    signal.pause()
    return 0


@pytest.fixture
def start_holder(tmp_path, monkeypatch):
    """Starts a process that holds the folder `run`, for which this one does not wait long."""
    monkeypatch.setattr(run_log, "WAIT_SECONDS", 0.3)
    started = []

    def start() -> Run:
        started.append(Run([tmp_path / "run"], output=tmp_path / "holder.log", target=hold))
        return started[-1]

    yield start
    for run in started:
        os.killpg(run.pid, signal.SIGKILL)


def test_a_lock_names_its_holder_and_ends_with_it_though_its_children_live(start_holder, tmp_path):
    folder, holder = tmp_path / "run", start_holder()
    wait_for((folder / "locked").exists)
    with pytest.raises(InputError, match=f"{folder} is in use by process {holder.pid} on "):
        RunLock(str(folder))
    holder.send(signal.SIGKILL)
    holder.wait()
    RunLock(str(folder)).release()


def test_a_lock_of_a_folder_that_was_withdrawn_is_not_one(start_holder, tmp_path):
    """The run that made the folder takes it away; one that waits for it makes another."""
    folder = tmp_path / "run"
    first = RunLock(str(folder))
    waiting = start_holder()
    time.sleep(0.5)
    first.withdraw()
    wait_for((folder / "locked").exists)
    with pytest.raises(InputError, match=f"in use by process {waiting.pid}"):
        RunLock(str(folder))


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    with caplog.at_level(logging.WARNING):
        RunLock(str(tmp_path)).release()
    assert "cannot be locked (No locks available)" in caplog.text


def run_at_step_4(run_flags, tmp_path, do: str) -> Run:
    """A run in the folder `run` that does something after its fourth step."""
    folder = tmp_path / "run"
    flags = [*run_flags, f"-output={folder}"]
    run = Run(flags, output=tmp_path / "first.log", fault=("step 4", do))
    run.wait_for_step(folder, 4)
    return run


def waiting(arguments: list[str]) -> int:
    """A run that waits so many seconds, the first argument, for its folder."""
    run_log.WAIT_SECONDS = float(arguments[0])
    return main_status(arguments[1:])


# Code of launched processes, which do not wait long.
IMPATIENT = """
    from replknet_paddle.engine import run_log
    run_log.WAIT_SECONDS = 0.3
"""


def test_a_second_run_stops_and_the_first_is_undisturbed(run_flags, straight, tmp_path):
    folder = tmp_path / "run"
    first = run_at_step_4(run_flags, tmp_path, f"wait {tmp_path / 'go'}")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    flags = [*run_flags, f"-output={folder}"]
    alone, launched = {"target": waiting}, {"environment": customized(tmp_path, IMPATIENT)}
    for more, options in (
        (["-resume=auto"], alone),
        ([f"-resume={folder}"], alone),
        ([], alone),
        (["-resume=auto", "-nproc=2"], launched),
    ):
        wait_seconds = ["0.3"] if options is alone else []
        arguments = [*wait_seconds, *flags, *more]
        said = finish(arguments, status=2, **options)
        assert said.count(f"in use by process {first.pid}") == 1 and "Traceback" not in said, said
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    (tmp_path / "go").touch()
    assert first.wait() == 0, first.text()
    assert_same_end(folder, straight)


def test_a_run_takes_up_what_the_one_before_it_saved_while_ending(run_flags, straight, tmp_path):
    """The newest checkpoint is looked for once the folder is free, and so it is the last one."""
    folder = tmp_path / "run"
    first = run_at_step_4(run_flags, tmp_path, "be signalled")
    flags = ["100", *run_flags, f"-output={folder}", "-resume=auto"]
    second = Run(flags, output=tmp_path / "second.log", target=waiting)
    wait_for(lambda: "Paddle" in second.text())
    first.send(signal.SIGTERM)
    assert first.wait() == 143, first.text()
    [stopped_at] = re.findall(r"stopped by SIGTERM (after epoch 1, step [45]);", first.text())
    assert second.wait() == 0, second.text()
    assert f"continuing {stopped_at}" in second.text()
    assert not (folder / "superseded").exists()
    assert_same_end(folder, straight)


@pytest.mark.parametrize("resume", [None, "auto"])
def test_a_run_that_made_the_folder_and_came_second_removes_nothing(resume, tmp_path, monkeypatch):
    """The first one locked it at once, trained, and ended."""
    folder, wait = tmp_path / "run", RunLock._wait
    names = ["config.yaml", "log.txt", "checkpoints/epoch_0001_step_00000003.safetensors"]

    def wait_for_the_first(lock):
        (folder / "checkpoints").mkdir()
        for name in names:
            (folder / name).write_text("of the first run")
        wait(lock)

    monkeypatch.setattr(RunLock, "_wait", wait_for_the_first)
    if resume is None:
        with pytest.raises(InputError, match="checkpoints of another run"):
            RunLock(str(folder))
    else:  # continues it, and fails when it writes
        RunLock(str(folder), resume=resume).withdraw()
    assert all((folder / name).read_text() == "of the first run" for name in names)
    assert (folder / "lock").exists()


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_of_three_runs_of_one_moment_one_trains(
    run_flags, straight, straight_on_two, tmp_path, processes
):
    folder = tmp_path / "run"
    flags = [
        *run_flags,
        f"-output={folder}",
        f"-nproc={processes}",
        f"-batch_size={8 // processes}",
    ]
    started = [Run(flags, output=tmp_path / f"said{i}") for i in range(3)]
    ended = sorted((run.wait(), run.text()) for run in started)
    assert [status for status, _ in ended] == [0, 2, 2], ended
    for _, said in ended[1:]:
        assert "in use by process" in said or "checkpoints of another run" in said, said
    assert_same_end(folder, straight if processes == 1 else straight_on_two)
    names = {"checkpoints", "config.yaml", "lock", "log.txt", "metrics.jsonl", "step"}
    assert set(os.listdir(folder)) - {"workers"} == names | {"best", "last"}


def test_a_killed_script_takes_the_training_with_it(run_flags, tmp_path):
    """So that the next run finds the folder free."""
    folder = tmp_path / "run"
    environment = failing(tmp_path, ("step 4", "be signalled"))
    script = Program([*run_flags, f"-output={folder}"], restarts=1, **environment)
    script.wait_for_step(folder, 4)
    assert step_of(folder) == 4, script.finish()
    [training] = children(script.pid)
    script.send_signal(signal.SIGKILL)
    wait_for(lambda: not os.path.exists(f"/proc/{training}"), timeout=20)
    script.finish()


def test_default_run_folders_of_one_second_differ(tiny_config_file, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda *_: "20260101-000000")
    folder = default_run_folder(get_config(tiny_config_file))
    assert folder == f"output/tiny-train-20260101-000000-{os.getpid()}"
