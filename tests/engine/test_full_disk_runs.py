"""Training and evaluation on a full disk: one message with the path, nothing left."""

import os

import pytest
from harness import FILLING, Program, finish, mounted, small_disk

from replknet_paddle.runtime.files import append_whole


@pytest.fixture
def full_disk(tmp_path):
    with small_disk(tmp_path / "full") as folder:
        yield folder


def errors_of(said: str) -> list[str]:
    assert "Traceback" not in said
    return [line for line in said.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("what", ["train", "eval"])
def test_a_full_disk_is_named_and_nothing_is_left(run_flags, full_disk, tmp_path, what):
    flags = ["-eval", "-pretrained=random"] if what == "eval" else []
    said = finish(
        [*run_flags, *flags, f"-output={full_disk / 'run'}"], output=tmp_path / "log", status=2
    )
    [line] = errors_of(said)
    assert "No space left on device" in line and str(full_disk / "run") in line
    assert os.listdir(full_disk) == [FILLING]


def test_so_it_is_with_several_processes(run_flags, full_disk):
    status, said = Program([*run_flags, "-nproc=2", f"-output={full_disk / 'run'}"]).finish()
    assert status == 2, said
    [line] = errors_of(said)
    assert "No space left on device" in line and str(full_disk / "run") in line
    assert os.listdir(full_disk) == [FILLING]


@pytest.mark.parametrize("what", ["train", "eval", "report"])
def test_a_read_only_folder_is_found_before_the_work(run_flags, tmp_path, what):
    flags = [] if what == "train" else ["-eval", "-pretrained=random"]
    with mounted(tmp_path / "read_only", "ro") as folder:
        output = tmp_path / "run" if what == "report" else folder / "new" / "run"
        if what == "report":
            flags.append(f"-report={folder / 'new' / 'report'}")
        said = finish([*run_flags, *flags, f"-output={output}"], output=tmp_path / "log", status=2)
    assert said.splitlines() == [f"error: folder {folder} is not writable; name another one"]


def test_a_report_that_does_not_fit_leaves_the_evaluation(straight, tiny_data, tmp_path):
    with small_disk(tmp_path / "full", free_bytes=40_000) as full:
        said = finish(
            [
                *("-eval", f"-pretrained={straight / 'best'}", f"-data_path={tiny_data}"),
                *(f"-output={tmp_path / 'eval'}", f"-report={full / 'report'}"),
            ],
            output=tmp_path / "log",
            status=2,
        )
        [line] = errors_of(said)
        assert "No space left on device" in line and str(full / "report") in line
        assert os.listdir(full) == [FILLING]
    assert (tmp_path / "eval" / "metrics.jsonl").is_file()


def test_a_disk_that_fills_up_leaves_whole_files(run_flags, tmp_path):
    with small_disk(tmp_path / "full", free_bytes=420_000) as full:
        run = full / "run"
        said = finish(
            [*run_flags, f"-output={run}", "-opts", "SAVE_KEEP", 9],
            output=tmp_path / "log",
            status=1,
        )
        [line] = errors_of(said)
        assert str(run / "checkpoints") in line and "No space left on device" in line
        left = [path for path in run.rglob("*") if path.is_file()]
        empty = [path for path in left if path.stat().st_size == 0]
        assert not empty and not [p for p in left if "unfinished" in p.name], left
        (full / FILLING).unlink()
        finish([f"-resume={run}"], output=tmp_path / "log")


def test_a_full_table_of_inodes_is_named(run_flags, tmp_path):
    with mounted(tmp_path / "small", "nr_inodes=9") as small:
        said = finish([*run_flags, f"-output={small / 'run'}"], output=tmp_path / "log", status=1)
    assert "No free inodes" in said and "MiB free" not in said


def test_appending_is_all_or_nothing(tmp_path):
    with small_disk(tmp_path / "full", free_bytes=4096) as full:
        path = full / "metrics.jsonl"
        append_whole(path, "a\n" * 100)
        with pytest.raises(OSError, match="No space left on device.*metrics.jsonl"):
            append_whole(path, "b\n" * 3000)
        assert path.read_text() == "a\n" * 100
