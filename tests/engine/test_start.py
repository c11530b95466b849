"""What a run starts from: a file that is read once; for several ranks, on a folder that lags."""

import os
import re
import shutil
import subprocess
import sys
import time

import pytest
from harness import (
    assert_same_end,
    finish_ranks,
    main_status,
)
from tiny import ROOT

LAG_SECONDS = 1.0


def lagging(arguments: list[str]) -> int:
    """A run whose rank 1 sees the files of a folder, the last argument, a second late.

    For that rank they do not exist until a second after it first looks for one.
    """
    *arguments, folder = arguments
    if os.environ.get("PADDLE_TRAINER_ID") == "1":
        hide(folder, LAG_SECONDS)
    return main_status(arguments)


def never_seeing(arguments: list[str]) -> int:
    """The same, but the files never appear, and runs wait only a second."""
    from replknet_paddle.engine import start

    *arguments, folder = arguments
    start.FILE_WAIT_SECONDS = 1.0
    if os.environ.get("PADDLE_TRAINER_ID") == "1":
        hide(folder, 1e9)
    return main_status(arguments)


def hide(folder: str, seconds: float) -> None:
    """Let whatever is below `folder`, besides its config.yaml, appear late to this process."""
    import builtins
    import io

    first_look = []

    def hidden(path) -> bool:
        if isinstance(path, int):
            return False
        path = os.path.abspath(os.fsdecode(path))
        if not path.startswith(folder + os.sep) or path.endswith("config.yaml"):
            return False
        first_look.append(time.monotonic())
        return time.monotonic() - first_look[0] < seconds

    def late(function):
        def call(path, *rest, **options):
            if hidden(path):
                raise FileNotFoundError(2, "No such file or directory", os.fspath(path))
            return function(path, *rest, **options)

        return call

    for module, names in (
        (os, ("stat", "lstat", "open", "readlink", "listdir", "scandir")),
        (builtins, ("open",)),
        (io, ("open",)),
    ):
        for name in names:
            setattr(module, name, late(getattr(module, name)))


@pytest.fixture
def flags(run_flags):
    return [*run_flags, "-batch_size=4"]


@pytest.fixture
def half_way(flags, tmp_path, straight_on_two):
    """A run folder as a run of two processes leaves it that is killed after epoch 2."""
    folder = tmp_path / "half way" / "run"
    shutil.copytree(straight_on_two, folder, symlinks=True)
    for path in (folder / "checkpoints").iterdir():
        if not path.name.startswith("epoch_0002"):
            path.unlink()
    for name in ("last", "best"):
        (folder / name).unlink()
        os.symlink("checkpoints/epoch_0002_step_00000006.safetensors", folder / name)
    return folder


@pytest.mark.parametrize("resume", ["auto", "folder"])
def test_a_rank_that_sees_checkpoints_late_resumes_the_same_one(
    flags, half_way, straight_on_two, tmp_path, resume
):
    resume = "auto" if resume == "auto" else half_way
    said = finish_ranks(
        [*flags, f"-output={half_way}", f"-resume={resume}", half_way],
        folder=tmp_path, target=lagging,
    )  # fmt: skip
    assert "continuing after epoch 2, step 6" in said[0], said[0]
    assert_same_end(half_way, straight_on_two)


def test_a_rank_that_sees_pretrained_weights_late_starts_from_them(flags, straight, tmp_path):
    ends = []
    for name, target in (("late", lagging), ("at once", main_status)):
        folder = tmp_path / name
        hidden = [straight] if target is lagging else []
        finish_ranks(
            [*flags, f"-output={folder}", f"-pretrained={straight / 'best'}",
             "-opts", "TRAIN.NUM_EPOCHS", "2", *hidden],
            folder=tmp_path, target=target,
        )  # fmt: skip
        ends.append(folder)
    assert_same_end(*ends)


@pytest.mark.parametrize("what", ["-resume", "-pretrained"])
def test_a_file_that_a_rank_never_sees_ends_all_ranks(flags, half_way, tmp_path, what):
    said = finish_ranks(
        [*flags, f"-output={tmp_path / 'run'}", f"{what}={half_way / 'last'}", half_way],
        folder=tmp_path, status=1, target=never_seeing,
    )  # fmt: skip
    for text in said:
        assert "is not on every rank what it is on rank 0 after 1 seconds (1 of 2 ranks" in text
        assert "Traceback" not in text


def other_seed(arguments: list[str]) -> int:
    """A run whose rank 1 initializes its network otherwise."""
    if os.environ.get("PADDLE_TRAINER_ID") == "1":
        arguments = [*arguments, "-opts", "SEED", "7"]
    return main_status(arguments)


def test_ranks_with_other_weights_are_refused(flags, tmp_path):
    said = finish_ranks(
        [*flags, f"-output={tmp_path / 'run'}"], folder=tmp_path, status=2, target=other_seed
    )
    for text in said:
        assert "ranks 1 start with other weights than rank 0" in text, text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["-resume", "-pretrained"])
def test_all_ranks_report_what_rank_0_cannot_find(flags, tmp_path, flag):
    missing = tmp_path / "missing"
    said = finish_ranks(
        [*flags, f"-output={tmp_path / 'run'}", f"{flag}={missing}"], folder=tmp_path, status=2
    )
    for text in said:
        assert re.search(rf"error: no checkpoint {missing}", text), text


def test_a_damaged_newest_checkpoint_is_passed_over_by_all_ranks(
    flags, half_way, straight_on_two, tmp_path
):
    damaged = half_way / "checkpoints" / "epoch_0003_step_00000009.safetensors"
    damaged.write_bytes(b"damaged")
    said = finish_ranks([*flags, f"-output={half_way}", "-resume=auto"], folder=tmp_path)
    assert "trying the one before it" in said[0]
    assert_same_end(half_way, straight_on_two)


# Written to a sitecustomize, which Python imports before it runs a program.
COUNT = """
import os, sys
def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        path = os.path.realpath(os.fsdecode(arguments[0]))
    elif event == "mmap.__new__" and arguments[0] >= 0:
        path = os.path.realpath(f"/proc/self/fd/{arguments[0]}")
    else:
        return
    if path.endswith(".safetensors"):
        os.write(counted, f"{event} {path}\\n".encode())
counted = os.open(os.environ["COUNTED"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
sys.addaudithook(watch)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="asks /proc which file is mapped")
@pytest.mark.parametrize(
    "what", ["-eval", "-resume=auto", pytest.param("-resume", marks=pytest.mark.slow)]
)
def test_a_run_reads_its_checkpoint_once(what, run_flags, straight, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight, run, symlinks=True)
    files = sorted(run.joinpath("checkpoints").iterdir())
    damaged, path = files[-1], files[-2]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (run / "last").unlink()
    (run / "best").unlink()
    for name in ("last", "best"):
        (run / name).symlink_to(path)
    flags = {
        "-eval": ["-eval", f"-pretrained={run / 'best'}", f"-output={tmp_path / 'eval'}"],
        "-resume=auto": ["-resume=auto", f"-output={run}"],
        "-resume": [f"-resume={run}", f"-output={run}"],
    }[what]
    (tmp_path / "sitecustomize.py").write_text(COUNT)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
        "COUNTED": str(tmp_path / "counted"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "main_single_gpu.py", *run_flags, *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    seen = (tmp_path / "counted").read_text().splitlines()
    assert [seen.count(f"{event} {path}") for event in ("open", "mmap.__new__")] == [1, 1]
    if what == "-resume=auto":
        assert seen.count(f"open {damaged}") == 1
        assert "trying the one before it" in done.stderr + done.stdout
