"""Runs whose processes are killed at random moments lose nothing and end as straight ones do.

KILLS is the number of kills: 50 take a minute in one process, and ten in two, which have to be
started anew each time. KILLS_SEED repeats a sequence, as far as the machine is as busy.
"""

import fcntl
import functools
import os
import random
import shutil
import signal
import time

import pytest
from processes import (
    Run,
    Script,
    assert_same_end,
    children,
    finish,
    metrics,
    step_of,
    wait_for,
    whole_steps,
)

from replknet_paddle.checkpoints.run_folder import (
    checkpoints,
    load_checkpoint,
    newest_whole_checkpoint,
)

KILLS = int(os.environ.get("KILLS", 12))


def stuck_in_mid_write(arguments: list[str]) -> int:
    """A run that waits for ever once it has written half of the first piece of its checkpoint of
    step 8."""
    import builtins

    from processes import main_status

    really_open = builtins.open

    def open_to_get_stuck(name, mode="r", *rest, **options):
        file = really_open(name, mode, *rest, **options)
        if "step_00000008" in str(name) and "w" in mode:
            file.write = functools.partial(write_half, file, file.write)
        return file

    def write_half(file, really_write, data):
        really_write(data[: len(data) // 2])
        file.flush()
        signal.pause()

    builtins.open = open_to_get_stuck
    return main_status(arguments)


def test_a_run_killed_while_it_saves_goes_on_from_the_checkpoint_before(
    run_flags, straight, tmp_path
):
    flags = [*run_flags, "-opts", "SAVE_STEPS", "1"]
    folder = tmp_path / "run"
    run = Run([*flags, f"-output={folder}"], output=tmp_path / "log", target=stuck_in_mid_write)
    half = folder / "checkpoints" / f"epoch_0002_step_00000008.safetensors.{run.pid}.unfinished"
    wait_for(lambda: half.exists() and half.stat().st_size or not run.process.is_alive())
    run.send(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL, run.text()
    assert half.exists() and max(whole_steps(folder)) == 7
    said = finish([*flags, f"-output={folder}", "-resume=auto"], output=tmp_path / "log")
    assert "continuing after epoch 2, step 7" in said
    assert_same_end(folder, straight)
    assert not [n for n in os.listdir(folder / "checkpoints") if "unfinished" in n]


def slow_disk(arguments: list[str]) -> int:
    """A run whose checkpoints take a while to write, so that many kills meet one half written."""
    import builtins

    from processes import main_status

    really_open = builtins.open

    class Slow:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            self.file.flush()
            time.sleep(0.0003)
            return self.file.write(data)

    def slow_open(name, mode="r", *rest, **options):
        file = really_open(name, mode, *rest, **options)
        return Slow(file) if str(name).endswith(".unfinished") and "b" in mode else file

    builtins.open = slow_open
    return main_status(arguments)


@pytest.mark.slow
def test_runs_killed_at_random_moments_lose_nothing_saved(run_flags, straight, tmp_path):
    seed = int(os.environ.get("KILLS_SEED", time.time()))
    rng = random.Random(seed)
    flags = [*run_flags, "-opts", "SAVE_STEPS", "1"]
    folder, log = tmp_path / "run", tmp_path / "log"
    halves = kills = runs = 0
    stages = set()
    while kills < KILLS:
        saved = max(whole_steps(folder), default=0)
        if saved == 12:  # the run is through: once more
            assert_same_end(folder, straight)
            shutil.rmtree(folder)
            saved, runs = 0, runs + 1
        run = Run([*flags, f"-output={folder}", "-resume=auto"], output=log, target=slow_disk)
        if rng.random() < 0.6:  # while a checkpoint is written, or soon after
            target = saved + rng.randrange(4)
            wait_for(
                lambda run=run, target=target: (
                    not run.process.is_alive()
                    or max(whole_steps(folder), default=0) >= target
                    and unfinished(folder, run.pid)
                ),
                every=0.0005,
            )
            time.sleep(rng.uniform(0, 0.3))
        else:
            time.sleep(rng.uniform(0, 2.5))
        run.send(signal.SIGKILL)
        status = run.wait()
        assert status in (0, -signal.SIGKILL), f"seed {seed}: {run.text()}"
        kills += status != 0
        halves += bool(folder.exists() and unfinished(folder, run.pid))
        steps = whole_steps(folder)
        stages.add(max(steps, default=0))
        assert max(steps, default=0) >= saved, f"seed {seed}"
        newest = newest_whole_checkpoint(str(folder))
        if steps:  # every file of a checkpoint's name is a whole one
            assert newest.progress.step == max(steps), f"seed {seed}"
    finish([*flags, f"-output={folder}", "-resume=auto"], output=log)
    assert_same_end(folder, straight)
    assert not [n for n in os.listdir(folder / "checkpoints") if "unfinished" in n]
    print(
        f"{kills} kills, {halves} of them in mid-write, {runs + 1} runs, "
        f"newest checkpoints {sorted(stages)}, seed {seed}"
    )
    assert halves >= KILLS // 8, f"only {halves} of {kills} kills met a half-written checkpoint"


def test_loader_workers_die_with_a_killed_run(run_flags, tmp_path):
    run = Run(
        [*run_flags, f"-output={tmp_path / 'run'}", "-opts", "DATA.NUM_WORKERS", "2"],
        output=tmp_path / "log",
    )
    workers = wait_for(lambda: len(children(run.pid)) >= 2 and children(run.pid))
    run.send(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in workers), timeout=20)


def unfinished(folder, pid) -> list[str]:
    """Checkpoints that process `pid` has begun to write."""
    where = folder / "checkpoints"
    names = os.listdir(where) if where.exists() else []
    return [name for name in names if name.endswith(f".{pid}.unfinished")]


# ---- other settings at each resume


@pytest.mark.slow
def test_runs_whose_settings_change_at_each_resume_lose_nothing(run_flags, tmp_path):
    """Killed or stopped at random moments; then resumed with another batch size, accumulation or
    number of processes, except where a stop came in mid-epoch, which needs the same ones."""
    seed = int(os.environ.get("KILLS_SEED", time.time()))
    rng = random.Random(seed)
    folder, log = tmp_path / "run", tmp_path / "log"
    ends: dict[str, int] = {}
    settings, done = [], (0, 0)
    while sum(ends.values()) < KILLS:
        before = progress_of(folder)
        in_mid_epoch = before is not None and before.batch > 0
        if not in_mid_epoch:
            processes = rng.choice([1, 1, 1, 2])
            settings = [
                f"-batch_size={rng.choice([4, 5, 8, 12, 16]) // processes}",
                f"-accum_iter={rng.choice([1, 2, 3])}",
                f"-nproc={processes}",
            ]
        flags = [*run_flags, f"-output={folder}", "-resume=auto", *settings]
        run = Run([*flags, "-opts", "TRAIN.NUM_EPOCHS", "40"], output=log)
        begun = step_of(folder)
        wait_for(
            lambda run=run, begun=begun: not run.process.is_alive() or step_of(folder) > begun,
            timeout=120,
        )
        time.sleep(rng.uniform(0, 1.5))
        number = rng.choice([signal.SIGKILL, signal.SIGTERM])
        run.send(number)
        status = run.wait()
        # A launcher that is killed takes its processes with it, a moment later.
        if processes > 1:
            wait_for(lambda: not is_locked(folder), timeout=30)
        assert status in (0, -signal.SIGKILL, 143), f"seed {seed}: {run.text()}"
        assert "resume it with the same" not in run.text()
        ends[signal.Signals(number).name] = ends.get(signal.Signals(number).name, 0) + 1
        progress = progress_of(folder)
        if progress is None:  # killed in the first epoch
            continue
        newest = os.path.realpath(checkpoints(str(folder))[-1])
        assert os.path.realpath(folder / "last") == newest, f"seed {seed}"
        assert (progress.epoch, progress.step) >= done, f"seed {seed}: {settings}"
        done = (progress.epoch, progress.step)
        recorded = progress.epoch - bool(progress.record)
        epochs = [r["epoch"] for r in metrics(folder)] if recorded else []
        assert epochs[:recorded] == list(range(1, recorded + 1)), f"seed {seed}"
        assert not (folder / "superseded").exists()
        if progress.epoch == 40:
            shutil.rmtree(folder)
            done = (0, 0)
    print(f"{ends}, epoch {done[0]}, seed {seed}")


def progress_of(folder):
    """The progress of RUN/last; None where there is none yet."""
    if not os.path.lexists(folder / "last"):
        return None
    return load_checkpoint(str(folder / "last")).progress


def is_locked(folder) -> bool:
    """Whether a process still has the run folder."""
    with open(folder / "lock", "a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


# ---- any process of a run in two processes, under MAX_RESTARTS


def descendants(pid: int) -> list[int]:
    """All processes that `pid` started, and that those started, and so on."""
    found = children(pid)
    for child in list(found):
        found += descendants(child)
    return found


@pytest.mark.slow
def test_any_process_of_a_restarted_run_may_be_killed(
    tiny_config_file, tiny_data, straight_on_two, tmp_path
):
    """The program, Paddle's launcher, the training processes and their loader workers.

    A script that gives up, because a killed loader worker is a failure of the run and two of those
    may come at the same step, is started again, as its user would do.
    """
    seed = int(os.environ.get("KILLS_SEED", time.time()))
    rng = random.Random(seed)
    wanted = int(os.environ.get("KILLS", 5))
    folder = tmp_path / "run"
    flags = [f"-cfg={tiny_config_file}", f"-data_path={tiny_data}", "-batch_size=4", "-nproc=2",
             f"-output={folder}", "-resume=auto",
             "-opts", "DATA.NUM_WORKERS", "1", "SAVE_STEPS", "1"]  # fmt: skip
    killed: dict[str, int] = {}
    runs, said = 0, ""
    script = Script(flags, restarts=1000)
    try:
        while sum(killed.values()) < wanted:
            saved = max(whole_steps(folder), default=0)
            deadline = time.monotonic() + 120
            if rng.random() < 0.6:  # once the run has come further
                goal = saved + rng.randrange(1, 4)
                while script.process.poll() is None and max(whole_steps(folder), default=0) < goal:
                    assert time.monotonic() < deadline, f"seed {seed}: no progress"
                    time.sleep(0.01)
                time.sleep(rng.uniform(0, 0.5))
            else:
                time.sleep(rng.uniform(0, 10))
            running = descendants(script.process.pid)
            if script.process.poll() is not None:
                status, said = script.finish()
                gave_up = status == 1 and "for the second time" in said
                assert status == 0 or gave_up, f"seed {seed}: {killed}, status {status}\n{said}"
                if status == 0:
                    assert_same_end(folder, straight_on_two)
                    shutil.rmtree(folder)
                    runs, saved = runs + 1, 0
                script = Script(flags, restarts=1000)
            elif running:
                victim = rng.choice(running)
                kind = kind_of(victim)
                try:
                    os.kill(victim, signal.SIGKILL)
                except ProcessLookupError:
                    continue
                killed[kind] = killed.get(kind, 0) + 1
            assert max(whole_steps(folder), default=0) >= saved, f"seed {seed}"
        while True:
            status, said = script.finish(timeout=300)
            if status == 0:
                break
            assert status == 1 and "for the second time" in said, f"seed {seed}: {said}"
            script = Script(flags, restarts=1000)
    finally:
        script.kill()
    assert_same_end(folder, straight_on_two)
    assert not (folder / "superseded").exists(), "a checkpoint was passed over"
    print(f"killed {killed}, {runs + 1} runs, seed {seed}")


def kind_of(pid: int) -> str:
    """What a process of a run is, by its command line and environment."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            command = file.read()
        with open(f"/proc/{pid}/environ", "rb") as file:
            is_rank = b"PADDLE_TRAINER_ID=" in file.read()
        with open(f"/proc/{pid}/stat", "rb") as file:
            parent = int(file.read().rpartition(b")")[2].split()[1])
        with open(f"/proc/{parent}/cmdline", "rb") as file:
            same_as_parent = file.read() == command
    except OSError:
        return "other"
    if b"paddle.distributed.launch" in command:
        return "launcher"
    if not is_rank:
        return "program" if b"main_multi_gpu" in command else "other"
    return "loader worker" if same_as_parent else "training process"
