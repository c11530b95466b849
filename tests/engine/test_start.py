"""What a run starts from: a file that is read once; for several ranks, on a folder that lags."""

import builtins
import io
import os
import re
import sys
import time

import pytest
from harness import assert_same_end, copy_run, finish, finish_ranks, main_status

from replknet_paddle.engine import start


def lagging(arguments: list[str]) -> int:
    """A run whose rank 1 sees the files of a folder, the last argument, late: for it they do not
    exist until that many seconds, the first argument, after it first looks for one."""
    seconds, *arguments, folder = arguments
    if os.environ.get("PADDLE_TRAINER_ID") == "1":
        hide(folder, float(seconds))
    return main_status(arguments)


def never_seeing(arguments: list[str]) -> int:
    """The same of a run that waits only a second."""
    start.FILE_WAIT_SECONDS = 1.0
    return lagging(arguments)


def hide(folder: str, seconds: float) -> None:
    """Let whatever is below `folder`, besides its config.yaml, appear late to this process."""
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

    looking = ("stat", "lstat", "open", "readlink", "listdir", "scandir")
    for module, names in ((os, looking), (builtins, ["open"]), (io, ["open"])):
        for name in names:
            setattr(module, name, late(getattr(module, name)))


@pytest.fixture
def flags(run_flags):
    return [*run_flags, "-batch_size=4"]


@pytest.fixture
def half_way(flags, tmp_path, straight_on_two):
    """A run folder as a run of two processes leaves it that is killed after epoch 2."""
    folder = copy_run(straight_on_two, tmp_path / "half way")
    for path in (folder / "checkpoints").iterdir():
        if not path.name.startswith("epoch_0002"):
            path.unlink()
    link(folder, "epoch_0002_step_00000006.safetensors")
    return folder


def link(folder, name: str) -> None:
    """Let `last` and `best` be this checkpoint."""
    for link in (folder / "last", folder / "best"):
        link.unlink()
        link.symlink_to(f"checkpoints/{name}")


@pytest.mark.parametrize("resume", ["auto", "folder"])
def test_a_rank_that_sees_checkpoints_late_resumes_the_same_one(
    flags, half_way, straight_on_two, tmp_path, resume
):
    """By itself, the newest that is whole."""
    if resume == "auto":
        (half_way / "checkpoints" / "epoch_0003_step_00000009.safetensors").write_bytes(b"damaged")
    resume = "auto" if resume == "auto" else half_way
    arguments = [*flags, f"-output={half_way}", f"-resume={resume}"]
    said = finish_ranks(["1", *arguments, half_way], target=lagging)
    assert "continuing after epoch 2, step 6" in said[0], said[0]
    assert ("trying the one before it" in said[0]) == (resume == "auto")
    assert_same_end(half_way, straight_on_two)


def test_a_rank_that_sees_pretrained_weights_late_starts_from_them(flags, straight, tmp_path):
    folders = [tmp_path / "late", tmp_path / "at once"]
    for folder, seconds in zip(folders, ("1", "0")):
        arguments = [*flags, f"-output={folder}", f"-pretrained={straight / 'best'}"]
        arguments += ["-opts", "TRAIN.NUM_EPOCHS", "2"]
        finish_ranks([seconds, *arguments, straight], target=lagging)
    assert_same_end(*folders)


@pytest.mark.parametrize("what", ["-resume", "-pretrained"])
def test_a_file_that_a_rank_never_sees_ends_all_ranks(flags, half_way, tmp_path, what):
    arguments = [*flags, f"-output={tmp_path / 'run'}", f"{what}={half_way / 'last'}"]
    said = finish_ranks(["1e9", *arguments, half_way], status=1, target=never_seeing)
    for text in said:
        assert "is not on every rank what it is on rank 0 after 1 seconds (1 of 2 ranks" in text
        assert "Traceback" not in text


def other_seed(arguments: list[str]) -> int:
    """A run whose rank 1 initializes its network otherwise."""
    if os.environ.get("PADDLE_TRAINER_ID") == "1":
        arguments = [*arguments, "-opts", "SEED", "7"]
    return main_status(arguments)


def test_ranks_with_other_weights_are_refused(flags, tmp_path):
    said = finish_ranks([*flags, f"-output={tmp_path / 'run'}"], status=2, target=other_seed)
    for text in said:
        assert "ranks 1 start with other weights than rank 0" in text, text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["-resume", "-pretrained"])
def test_all_ranks_report_what_rank_0_cannot_find(flags, tmp_path, flag):
    missing = tmp_path / "missing"
    said = finish_ranks([*flags, f"-output={tmp_path / 'run'}", f"{flag}={missing}"], status=2)
    for text in said:
        assert re.search(f"error: no (model|checkpoint) {missing}", text), text


def counting(arguments: list[str]) -> int:
    """A run that writes to a file, the last argument, which checkpoints it opens and maps."""
    *arguments, counted = arguments
    counted = os.open(counted, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def watch(event, values):
        if event == "open" and isinstance(values[0], (str, bytes, os.PathLike)):
            path = os.path.realpath(os.fsdecode(values[0]))
        elif event == "mmap.__new__" and values[0] >= 0:
            path = os.path.realpath(f"/proc/self/fd/{values[0]}")
        else:
            return
        if path.endswith(".safetensors"):
            os.write(counted, f"{event} {path}\n".encode())

    sys.addaudithook(watch)
    return main_status(arguments)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="asks /proc which file is mapped")
@pytest.mark.parametrize(
    "what", ["-eval", "-resume=auto", pytest.param("-resume", marks=pytest.mark.slow)]
)
def test_a_run_reads_its_checkpoint_once(what, run_flags, straight, tmp_path):
    run = copy_run(straight, tmp_path / "run")
    *_, path, damaged = sorted(run.joinpath("checkpoints").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-1])
    link(run, path.name)
    flags = {
        "-eval": ["-eval", f"-pretrained={run / 'best'}", f"-output={tmp_path / 'eval'}"],
        "-resume=auto": ["-resume=auto", f"-output={run}"],
        "-resume": [f"-resume={run}", f"-output={run}"],
    }[what]
    counted = tmp_path / "counted"
    said = finish([*run_flags, *flags, counted], target=counting)
    seen = counted.read_text().splitlines()
    assert [seen.count(f"{event} {path}") for event in ("open", "mmap.__new__")] == [1, 1]
    if what == "-resume=auto":
        assert seen.count(f"open {damaged}") == 1
        assert "trying the one before it" in said
