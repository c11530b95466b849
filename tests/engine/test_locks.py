"""One run at a time in a run folder, whatever became of the one before."""

import errno
import fcntl
import logging
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from harness import (
    Program,
    Run,
    assert_same_end,
    children,
    customized,
    finish,
    main_status,
    step_of,
    wait_for,
    with_fault,
)
from tiny import ROOT

from replknet_paddle.engine import run_log
from replknet_paddle.engine.run_log import RunLock
from replknet_paddle.runtime.errors import InputError


def hold(arguments: list[str]) -> int:
    """Lock a folder, say so, and write into it a second later; a child lives on, as loader workers
    may."""
    folder, lock = arguments[0], RunLock(arguments[0])
    if os.fork() == 0:
        signal.pause()
    open(os.path.join(folder, "locked"), "w").close()
    time.sleep(1)
    for name in ("log.txt", "config.yaml", "class_names.txt", "metrics.jsonl", "step"):
        with open(os.path.join(folder, name), "w") as file:
            file.write(f"{lock.folder}\n")
    signal.pause()
    return 0


def lock_at_once(arguments: list[str]) -> int:
    """Lock a folder; the status says whether that worked."""
    run_log.WAIT_SECONDS = float(arguments[1])
    try:
        RunLock(arguments[0])
    except InputError as error:
        print(error)
        return 2
    return 0


@pytest.fixture
def holder(tmp_path):
    """A process that holds the folder `run`, which it has made."""
    run = Run([tmp_path / "run"], output=tmp_path / "holder.log", target=hold)
    wait_for((tmp_path / "run" / "locked").exists)
    [child] = children(run.pid)
    yield run
    run.send(signal.SIGKILL)
    run.wait()
    os.kill(child, signal.SIGKILL)


def test_a_lock_names_its_holder_and_ends_with_it_though_its_children_live(holder, tmp_path):
    log = tmp_path / "log"
    said = finish([tmp_path / "run", 0.3], output=log, target=lock_at_once, status=2)
    assert f"{tmp_path / 'run'} is in use by process {holder.pid} on " in said
    holder.send(signal.SIGKILL)
    finish([tmp_path / "run", 60], output=log, target=lock_at_once)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_refused_run_takes_nothing_away(holder, run_flags, tmp_path, processes):
    folder = tmp_path / "run"
    flags = [f"-output={folder}", "-resume=auto", f"-nproc={processes}"]
    said = finish([*run_flags, *flags], output=tmp_path / "log", status=2)
    assert f"in use by process {holder.pid}" in said
    written = ["class_names.txt", "config.yaml", "log.txt", "metrics.jsonl", "step"]
    assert sorted(os.listdir(folder)) == sorted([*written, "lock", "locked"])
    assert all((folder / name).read_text() == f"{folder}\n" for name in written)


def test_a_released_lock_is_free(tmp_path):
    RunLock(str(tmp_path)).release()
    finish([tmp_path, 60], output=tmp_path / "log", target=lock_at_once)


def test_a_lock_of_a_folder_that_was_withdrawn_is_not_one(tmp_path):
    """The run that made the folder takes it away; one that waits for it makes another."""
    folder = tmp_path / "run"
    first = RunLock(str(folder))
    waiting = Run([folder], output=tmp_path / "said", target=hold)
    time.sleep(0.5)
    first.withdraw()
    wait_for((folder / "locked").exists)
    with pytest.raises(InputError, match=f"in use by process {waiting.pid}"):
        RunLock(str(folder))
    [child] = children(waiting.pid)
    for pid in (waiting.pid, child):
        os.kill(pid, signal.SIGKILL)
    waiting.wait()


def test_the_folder_of_another_run_and_one_that_cannot_be_are_refused(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "epoch_0001_step_00000003.safetensors").touch()
    for resume in (None, str(tmp_path / "elsewhere")):
        with pytest.raises(InputError, match="holds the checkpoints of another run"):
            RunLock(str(run), resume=resume)
    RunLock(str(run), resume="auto").release()
    (run / "config.yaml").touch()
    RunLock(str(run), resume=str(run)).release()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write the run folder .*file/run"):
        RunLock(str(tmp_path / "file" / "run"))


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
    first = run_at_step_4(run_flags, tmp_path, f"wait {tmp_path / 'go'}")
    several = [f"-output={folder}", "-resume=auto", "-nproc=2"]
    for flags, options in (
        (["-resume=auto"], {"target": impatient}),
        ([f"-resume={folder}"], {"target": impatient}),
        ([], {"target": impatient}),
        (several, {"environment": customized(tmp_path, IMPATIENT)}),
    ):
        flags = [*run_flags, f"-output={folder}", *flags]
        said = finish(flags, output=tmp_path / "log", status=2, **options)
        assert said.count(f"in use by process {first.pid}") == 1 or "of another run" in said, said
        assert "Traceback" not in said
    assert "in use" not in (folder / "log.txt").read_text()
    (tmp_path / "go").touch()
    assert first.wait() == 0, first.text()
    assert_same_end(folder, straight)


def patient(arguments: list[str]) -> int:
    """A run that waits long for its folder."""
    run_log.WAIT_SECONDS = 100.0
    return main_status(arguments)


def test_a_run_takes_up_what_the_one_before_it_saved_while_ending(run_flags, straight, tmp_path):
    """The newest checkpoint is looked for once the folder is free, and so it is the last one."""
    folder = tmp_path / "run"
    first = run_at_step_4(run_flags, tmp_path, "be signalled")
    flags = [*run_flags, f"-output={folder}", "-resume=auto"]
    second = Run(flags, output=tmp_path / "second.log", target=patient)
    wait_for(lambda: "Paddle" in second.text())
    first.send(signal.SIGTERM)
    assert first.wait() == 143, first.text()
    [stopped_at] = re.findall(r"stopped by SIGTERM (after epoch 1, step [45]);", first.text())
    assert second.wait() == 0, second.text()
    assert f"continuing {stopped_at}" in second.text()
    assert not (folder / "superseded").exists()
    assert_same_end(folder, straight)


@pytest.mark.parametrize("processes", [1, 1, pytest.param(2, marks=pytest.mark.slow)])
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
    environment = with_fault(tmp_path, "step 4", "be signalled")
    script = Program([*run_flags, f"-output={folder}"], restarts=1, **environment)
    script.wait_for_step(folder, 4)
    assert step_of(folder) == 4, script.finish()
    [training] = children(script.pid)
    script.send_signal(signal.SIGKILL)
    wait_for(lambda: not os.path.exists(f"/proc/{training}"), timeout=20)
    script.finish()


def test_default_run_folders_of_one_second_differ(tiny_config_file, tmp_path):
    code = (
        "import time; time.strftime = lambda *_: '20260101-000000'\n"
        "from replknet_paddle.commands.train import default_run_folder\n"
        "from replknet_paddle.config import get_config\n"
        f"print(default_run_folder(get_config({str(tiny_config_file)!r})))"
    )
    command = [sys.executable, "-c", code]
    names = {subprocess.check_output(command, cwd=ROOT, text=True) for _ in range(2)}
    assert len(names) == 2 and all(name.startswith("output/tiny-train-2026") for name in names)
