"""Training and evaluation on full, small and read-only disks: one message with the path, and
nothing left but whole files."""

import os

import pytest
from harness import FILLING, finish, mounted, small_disk

from replknet_paddle.runtime.files import append_whole

TRAIN, EVAL, TWO = (), ("-eval", "-pretrained=random"), ("-nproc=2",)


def error_of(flags, tmp_path, status=2) -> str:
    """The one error that a run ends with."""
    said = finish(flags, status=status)
    assert "Traceback" not in said
    [line] = [line for line in said.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize("flags", [TRAIN, EVAL, TWO], ids=["train", "eval", "two processes"])
def test_a_full_disk_is_named_and_nothing_is_left(run_flags, tmp_path, flags):
    with small_disk(tmp_path / "full") as full:
        line = error_of([*run_flags, *flags, f"-output={full / 'run'}"], tmp_path)
        assert "No space left on device" in line and str(full / "run") in line
        assert os.listdir(full) == [FILLING]


@pytest.mark.parametrize(
    "flags",
    [
        ("-output={read_only}/new/run",),
        (*EVAL, "-output={read_only}/new/run"),
        (*EVAL, "-output={here}/run", "-report={read_only}/new/report"),
    ],
    ids=["train", "eval", "report"],
)
def test_a_read_only_folder_is_found_before_the_work(run_flags, tmp_path, flags):
    with mounted(tmp_path / "read_only", "ro") as folder:
        flags = [flag.format(read_only=folder, here=tmp_path) for flag in flags]
        said = finish([*run_flags, *flags], status=2)
    assert said.splitlines() == [f"error: folder {folder} is not writable; name another one"]


def test_a_report_that_does_not_fit_leaves_the_evaluation(straight, tiny_data, tmp_path):
    flags = ["-eval", f"-pretrained={straight / 'best'}", f"-data_path={tiny_data}"]
    with small_disk(tmp_path / "full", free_bytes=40_000) as full:
        outputs = [f"-output={tmp_path / 'eval'}", f"-report={full / 'report'}"]
        line = error_of([*flags, *outputs], tmp_path)
        assert "No space left on device" in line and str(full / "report") in line
        assert os.listdir(full) == [FILLING]
    assert (tmp_path / "eval" / "metrics.jsonl").is_file()


def test_a_full_table_of_inodes_is_named(run_flags, tmp_path):
    with mounted(tmp_path / "small", "nr_inodes=9") as small:
        line = error_of([*run_flags, f"-output={small / 'run'}"], tmp_path, status=1)
    assert "No free inodes" in line and "MiB free" not in line


def test_appending_is_all_or_nothing(tmp_path):
    with small_disk(tmp_path / "full", free_bytes=4096) as full:
        path = full / "metrics.jsonl"
        append_whole(path, "a\n" * 100)
        with pytest.raises(OSError, match="No space left on device.*metrics.jsonl"):
            append_whole(path, "b\n" * 3000)
        assert path.read_text() == "a\n" * 100
