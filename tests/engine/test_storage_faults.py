"""Runs on storage that fails for a while, for ever, or hangs: what they end with and as."""

import re
import time

import faulty_storage
import pytest
from harness import Program, assert_same_end, customized, finish, finish_ranks, main_status
from tiny import ROOT


@pytest.fixture
def arguments(tiny_config_file, tiny_data, tmp_path):
    """Of a run with two workers; more -opts may follow."""
    return [
        *(f"-cfg={tiny_config_file}", f"-data_path={tiny_data}", f"-output={tmp_path / 'run'}"),
        *("-opts", "DATA.NUM_WORKERS", "2"),
    ]


def test_failures_for_a_second_change_no_bit(arguments, straight, tmp_path):
    faults = tmp_path / "faults"
    said = finish(
        arguments,
        output=tmp_path / "said",
        target=faulty_storage.flaky_for_a_second,
        environment={"FAULTS": str(faults)},
    )
    assert len(faults.read_text().splitlines()) >= 2
    assert said.count("read again") >= 2 and "another image takes its place" not in said
    assert "input/output error" in said or "stale file handle" in said
    assert_same_end(tmp_path / "run", straight)


def test_lasting_failures_end_with_status_1_and_a_resumed_run_loses_nothing(
    arguments, straight, tmp_path
):
    start = time.monotonic()
    said = finish(
        [*arguments, "SAVE_STEPS", "1"],
        output=tmp_path / "said",
        status=1,
        target=faulty_storage.broken_for_ever,
    )
    assert time.monotonic() - start < 60  # three seconds of pauses
    assert "Traceback" not in said and "MAX_BAD_IMAGES" not in said
    [error] = [line for line in said.splitlines() if line.startswith("error: ")]
    assert re.search(r"0020.jpg.*input/output error, in \d attempts over 3.1\d* s", error), error
    finish([*arguments, "-resume=auto"], output=tmp_path / "again", target=resumed)
    assert_same_end(tmp_path / "run", straight)


def resumed(arguments) -> int:
    """-opts takes all that follows, so -resume goes first."""
    return main_status([arguments[-1], *arguments[:-1]])


def test_every_rank_ends_when_one_has_lasting_failures(arguments, tmp_path):
    texts = finish_ranks(
        ["-batch_size=4", *arguments],
        folder=tmp_path,
        status=1,
        target=faulty_storage.broken_for_ever,
    )
    assert any("0020.jpg" in text and " attempts" in text for text in texts)


def test_a_worker_that_hangs_ends_the_run_after_the_set_time(arguments, tmp_path):
    start = time.monotonic()
    said = finish(
        [*arguments, "DATA.WORKER_TIMEOUT", "3"],
        output=tmp_path / "said",
        status=1,
        target=faulty_storage.hanging,
    )
    assert time.monotonic() - start > 3
    assert "since 1.5 s: storage may hang" in said and "train_list.txt, line " in said
    assert "within 3 s (DATA.WORKER_TIMEOUT)" in said and "Traceback" not in said


BROKEN_AT_FIRST = """
    if not os.path.exists({healed!r}):
        open({healed!r}, "w").close()
        sys.path.append({tests!r})
        import faulty_storage
        faulty_storage.break_for_ever()
"""


@pytest.mark.slow
def test_max_restarts_goes_on_once_the_storage_has_healed(
    tiny_config_file, tiny_data, straight, tmp_path
):
    folder = tmp_path / "run"
    code = BROKEN_AT_FIRST.format(healed=str(tmp_path / "healed"), tests=str(ROOT / "tests"))
    status, said = Program(
        [f"-cfg={tiny_config_file}", f"-data_path={tiny_data}", f"-output={folder}"],
        restarts=1,
        **customized(tmp_path, code),
    ).finish()
    assert status == 0, said
    assert "error: cannot read image" in said
    assert "failed with status 1 at step " in said and "restart 1 of 1" in said
    assert_same_end(folder, straight)
