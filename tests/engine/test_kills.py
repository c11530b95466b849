"""Runs whose processes are killed at random moments lose nothing and end as straight ones do.

KILLS is the number of kills: 50 take a minute in one process, and ten in two, which have to be
started anew each time. KILLS_SEED repeats a sequence, as far as the machine is as busy.
"""

import builtins
import os
import random
import shutil
import signal
import time

import pytest
from harness import (
    Program,
    Run,
    assert_same_end,
    children,
    descendants,
    finish,
    main_status,
    metrics,
    progress_of,
    step_of,
    unfinished,
    wait_for,
    whole_steps,
)

from replknet_paddle.checkpoints.run_folder import checkpoints, load_checkpoint
from replknet_paddle.engine import run_log

KILLS = int(os.environ.get("KILLS", 12))
SEED = int(os.environ.get("KILLS_SEED", time.time()))
EACH_STEP = ["-opts", "SAVE_STEPS", "1"]


def newest_step(folder) -> int:
    """The step of the newest checkpoint; 0 where there is none."""
    return max(whole_steps(folder), default=0)


class SlowFile:
    """A file each of whose writes takes a while."""

    def __init__(self, file):
        self.file = file

    def write(self, data):
        self.file.flush()
        time.sleep(0.0003)
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def slow_disk(arguments: list[str]) -> int:
    """A run whose checkpoints take a while to write, so that many kills meet one half written."""
    really_open = builtins.open

    def slow_open(path, mode="r", *rest, **options):
        file = really_open(path, mode, *rest, **options)
        return SlowFile(file) if str(path).endswith(".unfinished") and "b" in mode else file

    builtins.open = slow_open
    return main_status(arguments)


@pytest.mark.slow
def test_runs_killed_at_random_moments_lose_nothing_saved(run_flags, straight, tmp_path):
    rng = random.Random(SEED)
    folder, log = tmp_path / "run", tmp_path / "log"
    flags = [*run_flags, f"-output={folder}", "-resume=auto", *EACH_STEP]
    halves = kills = 0
    while kills < KILLS:
        saved, last, left = newest_step(folder), progress_of(folder), unfinished(folder)
        # The checkpoint of the last step is written once more when its epoch is evaluated.
        if last and last.step == 12 and not last.record:  # the run is through: once more
            assert_same_end(folder, straight)
            shutil.rmtree(folder)
            saved = 0
        run = Run(flags, output=log, target=slow_disk)
        if rng.random() < 0.6:  # while a checkpoint is written, or soon after
            target = saved + rng.randrange(4)
            wait_for(
                lambda run=run, target=target, left=left: (
                    not run.process.is_alive()
                    or newest_step(folder) >= target
                    and unfinished(folder) - left
                ),
                every=0.0005,
            )
            time.sleep(rng.uniform(0, 0.3))
        else:
            time.sleep(rng.uniform(0, 2.5))
        run.send(signal.SIGKILL)
        status = run.wait()
        assert status in (0, -signal.SIGKILL), f"seed {SEED}: {run.text()}"
        kills += status != 0
        halves += bool(unfinished(folder) - left)
        assert newest_step(folder) >= saved, f"seed {SEED}"
        if newest_step(folder):  # every file of a checkpoint's name is a whole one
            newest = load_checkpoint(checkpoints(str(folder))[-1])
            assert newest.progress.step == newest_step(folder), f"seed {SEED}"
    finish(flags, output=log)
    assert_same_end(folder, straight)
    assert not unfinished(folder)
    assert halves >= KILLS // 8, f"only {halves} of {kills} kills met a half-written checkpoint"


def test_loader_workers_die_with_a_killed_run(run_flags, tmp_path):
    flags = [*run_flags, f"-output={tmp_path / 'run'}", "-opts", "DATA.NUM_WORKERS", "2"]
    run = Run(flags, output=tmp_path / "log")
    workers = wait_for(lambda: len(children(run.pid)) >= 2 and children(run.pid))
    run.send(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in workers), timeout=20)


# ---- other settings at each resume


@pytest.mark.slow
def test_runs_whose_settings_change_at_each_resume_lose_nothing(run_flags, tmp_path, monkeypatch):
    """Killed or stopped at random moments; then resumed with another batch size, accumulation or
    number of processes, except where a stop came in mid-epoch, which needs the same ones."""
    monkeypatch.setattr(run_log, "WAIT_SECONDS", 30.0)
    rng = random.Random(SEED)
    folder = tmp_path / "run"
    settings, done = [], (0, 0)
    for _ in range(KILLS):
        before = progress_of(folder)
        if before is None or before.batch == 0:
            processes = rng.choice([1, 1, 1, 2])
            settings = [
                f"-batch_size={rng.choice([4, 5, 8, 12, 16]) // processes}",
                f"-accum_iter={rng.choice([1, 2, 3])}",
                f"-nproc={processes}",
            ]
        flags = [*run_flags, f"-output={folder}", "-resume=auto", *settings]
        run = Run([*flags, "-opts", "TRAIN.NUM_EPOCHS", "40"], output=tmp_path / "log")
        run.wait_for_step(folder, step_of(folder) + 1)
        time.sleep(rng.uniform(0, 1.5))
        run.send(rng.choice([signal.SIGKILL, signal.SIGTERM]))
        status = run.wait()
        # A launcher that is killed takes its processes with it, a moment later.
        run_log.RunLock(str(folder), resume="auto").release()
        assert status in (0, -signal.SIGKILL, 143), f"seed {SEED}: {run.text()}"
        assert "resume it with the same" not in run.text()
        progress = progress_of(folder)
        if progress is None:  # killed in the first epoch
            continue
        assert (progress.epoch, progress.step) >= done, f"seed {SEED}: {settings}"
        done = (progress.epoch, progress.step)
        recorded = progress.epoch - bool(progress.record)
        epochs = [r["epoch"] for r in metrics(folder)] if recorded else []
        assert epochs[:recorded] == list(range(1, recorded + 1)), f"seed {SEED}"
        assert not (folder / "superseded").exists()
        if progress.epoch == 40:
            shutil.rmtree(folder)
            done = (0, 0)


# ---- any process of a run in two processes, under MAX_RESTARTS


@pytest.mark.slow
def test_any_process_of_a_restarted_run_may_be_killed(run_flags, straight_on_two, tmp_path):
    """The program, Paddle's launcher, the training processes and their loader workers.

    A script that gives up, because a killed loader worker is a failure of the run and two of those
    may come at the same step, is started again, as its user would do.
    """
    rng = random.Random(SEED)
    folder = tmp_path / "run"
    flags = [*run_flags, "-batch_size=4", "-nproc=2", f"-output={folder}", "-resume=auto"]
    flags += ["-opts", "DATA.NUM_WORKERS", "1", "SAVE_STEPS", "1"]
    kills = 0
    script = Program(flags, restarts=1000)
    try:
        while kills < int(os.environ.get("KILLS", 5)):
            saved = newest_step(folder)
            if rng.random() < 0.6:  # once the run has come further
                goal = saved + rng.randrange(1, 4)
                wait_for(
                    lambda script=script, goal=goal: (
                        script.poll() is not None or newest_step(folder) >= goal
                    ),
                    timeout=120,
                )
                time.sleep(rng.uniform(0, 0.5))
            else:
                time.sleep(rng.uniform(0, 10))
            running = descendants(script.pid)
            if script.poll() is not None:
                if end_of(script) == 0:
                    assert_same_end(folder, straight_on_two)
                    shutil.rmtree(folder)
                    saved = 0
                script = Program(flags, restarts=1000)
            elif running:
                victim = rng.choice(running)
                try:
                    os.kill(victim, signal.SIGKILL)
                except ProcessLookupError:
                    continue
                kills += 1
            assert newest_step(folder) >= saved, f"seed {SEED}"
        while end_of(script) != 0:
            script = Program(flags, restarts=1000)
    finally:
        script.end()
    assert_same_end(folder, straight_on_two)
    assert not (folder / "superseded").exists(), "a checkpoint was passed over"


def end_of(script: Program) -> int:
    """The exit status: 0, or 1 where it has given up."""
    status, said = script.finish(timeout=300)
    gave_up = status == 1 and "for the second time" in said
    assert status == 0 or gave_up, f"seed {SEED}: status {status}\n{said}"
    return status
