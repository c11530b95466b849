"""Whatever ends a run: its exit status, what it says, what it has saved; resumed, it ends as one
that nothing happened to."""

import os
import re
import signal
from typing import NamedTuple

import pytest
from harness import (
    Program,
    Run,
    assert_same_end,
    children,
    failing,
    finish,
    finish_ranks,
    progress_of,
    run_typed,
    unfinished,
    wait_for,
)


class Row(NamedTuple):
    """A fault of `harness.install`, and how the run ends.

    Attributes:
        status: of the run, or minus the signal that killed it.
        says: pattern of a line that it prints, or of its log where it prints none.
        saved: step of RUN/last; None: nothing is saved.
        flags: more of them.
        rank: of two processes, the one with the fault; None: each.
        send: to the program that was started, once the fault's step is done.
        restarts: of the script, of one process; None: the program, of two.
    """

    at: str
    do: str
    status: int
    says: str
    saved: int | None
    flags: tuple = ()
    rank: int | None = None
    send: int | None = None
    restarts: int | None = None


TERM, INT = signal.SIGTERM, signal.SIGINT
WORKERS = ("-opts", "DATA.NUM_WORKERS", "2")
STEPS = (*WORKERS, "SAVE_STEPS", "1")
NO_SPACE = "OSError(28, 'No space left on device')"
UNREADABLE = "SystemFault('cannot read image a.jpg: Input/output error')"
BROKEN = r"error: cannot read image .*0020.jpg.*input/output error, in \d attempts over 3.1\d* s"
HANGS = r"error: .*train_list.txt, line .* within 3 s \(DATA.WORKER_TIMEOUT\)"
FLAKY = "(?s)(input/output error|stale file handle).* read again .* read again "
KILLED = (
    r"error: a process of this run was killed by signal 9 \(SIGKILL\); the output of each is in "
)

ROWS = {
    # asked to stop: the step under way is the last one
    "SIGTERM": Row("step 1", "SIGTERM", 143, "stopped by SIGTERM after epoch 0, step 2;", 2),
    "SIGINT": Row("step 4", "SIGINT", 130, "by SIGINT after epoch 1, step 5;", 5, STEPS),
    "last batch": Row("step 6", "SIGTERM", 143, "stopped by SIGTERM after epoch 2, step 6;", 6),
    "workers": Row("step 4", "SIGTERM", 143, "SIGTERM after epoch 1, step 5;", 5, WORKERS),
    "last evaluation": Row("validation 4", "SIGTERM", 0, "finished: ", 12),
    # an evaluation costs no epoch
    "memory": Row("evaluation 4", "MemoryError()", 1, "error: out of memory", 6),
    "evaluation's disk": Row("evaluation 4", NO_SPACE, 1, "error: .*No space left on device", 6),
    "killed in evaluation": Row("evaluation 4", "SIGKILL", -9, "epoch 2/4, batch", 6),
    "killed after it": Row("metrics 2", "SIGKILL", -9, "epoch 2, EMA weights: top-1", 6),
    "killed as it saves": Row("step 8", "killed in a write", -25, "epoch 2, EMA weights", 7, STEPS),
    # what a restart may cure, and what is a defect
    "disk": Row(
        "step 6", "full disk", 1, r"error: cannot write .*step_0+6\.\w+: File too large", 3
    ),
    "loader": Row("reading 0", UNREADABLE, 1, "error: cannot read image a.jpg: Input/output", None),
    "defect": Row("reading 0", "ZeroDivisionError()", 1, "ZeroDivisionError", None),
    # storage
    "an image": Row("opening 0020.jpg", "EIO", 1, BROKEN, 1, STEPS),
    "storage": Row("opening .jpg", "flaky", 0, FLAKY, 12, WORKERS),
    "hanging storage": Row(
        "opening 0020.jpg", "hang", 1, HANGS, 1, (*STEPS, "DATA.WORKER_TIMEOUT", "3")
    ),
}
SEVERAL = {
    "rank 1 killed": Row("step 2", "SIGKILL", 137, KILLED, None, rank=1),
    "rank 0 killed": Row("step 5", "SIGKILL", 137, KILLED, 3, rank=0),
    "rank 1 fails": Row("step 5", "ValueError('on rank 1')", 1, "ValueError: on rank 1", 3, rank=1),
    "input of rank 1": Row("step 5", "InputError('on rank 1')", 2, "error: on rank 1", 3, rank=1),
    "an image": Row("opening 0020.jpg", "EIO", 1, BROKEN, 1, STEPS),
    "program signalled": Row("step 4", "be signalled", 143, "by SIG", 5, WORKERS, 0, TERM),
    "Ctrl-C": Row("step 4", "be signalled", 130, "stopped by SIG", 5, WORKERS, 0, INT),
    "signalled at the end": Row("step 12", "be signalled", 0, "finished: ", 12, (), 0, TERM),
    "script signalled": Row("step 4", "be signalled", 143, "by SIGTERM", 5, send=TERM, restarts=3),
    "script's Ctrl-C": Row("step 4", "be signalled", 130, "by SIGINT", 5, send=INT, restarts=3),
}
IS_SLOW = set(SEVERAL) - {"rank 1 killed", "script signalled"}
DEFECTS = ("ZeroDivisionError", "ValueError: on rank 1")


def check_end(row: Row, status: int, said: str, folder) -> None:
    assert status == row.status, said
    log = (folder / "log.txt").read_text()
    assert ("Traceback" in said) == (row.says in DEFECTS), said
    for noise in ("ccache", "gloo", "LAUNCH", "KeyboardInterrupt"):
        assert noise not in said + log, said
    is_error = status in (1, 2, 137)
    for text in (said, log) if is_error else (log,):
        assert re.search(row.says.removeprefix("error: "), text), text
    assert ("ERROR the run ended: " in log) == is_error, log
    progress = progress_of(folder)
    assert (progress and progress.step) == row.saved
    if row.saved:
        assert bool(unfinished(folder)) == (row.do == "killed in a write")


@pytest.mark.parametrize("name", ROWS)
def test_a_run_in_one_process_loses_nothing(run_flags, straight, tmp_path, name):
    row, folder = ROWS[name], tmp_path / "run"
    flags = [*run_flags, f"-output={folder}"]
    run = Run([*flags, *row.flags], output=tmp_path / "said", fault=(row.at, row.do))
    status, said = run.wait(), run.text()
    check_end(row, status, said, folder)
    if status == 130:
        continue_as_told(said)
    else:
        finish([*flags, "-resume=auto"])
    assert_same_end(folder, straight)
    assert not unfinished(folder)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in IS_SLOW else ()) for n in SEVERAL]
)
def test_nor_does_one_in_two_or_of_the_script(run_flags, straight, straight_on_two, tmp_path, name):
    row, folder = SEVERAL[name], tmp_path / "run"
    is_alone = row.restarts is not None
    two = [] if is_alone else ["-batch_size=4", "-nproc=2"]
    flags = [*run_flags, f"-output={folder}", *two]
    environment = failing(tmp_path, (row.at, row.do, row.rank))
    program = Program([*flags, *row.flags], restarts=row.restarts, **environment)
    try:
        if row.send is not None:
            program.wait_for_step(folder, int(row.at.split()[1]))
        if row.send == INT and not is_alone:  # a terminal sends it to all
            os.killpg(program.pid, INT)
        elif row.send is not None:
            program.send_signal(row.send)
    finally:
        status, said = program.finish()
    check_end(row, status, said, folder)
    assert said.count("error: a process of this run was killed") == (status == 137), said
    if status == 130:
        continue_as_told(said)
    elif is_alone:
        finish([*flags, "-resume=auto"])
    else:
        finish_ranks([*flags, "-resume=auto"])
    assert_same_end(folder, straight if is_alone else straight_on_two)


def continue_as_told(said: str) -> None:
    """Run the command line that a stopped run prints."""
    [line] = [line for line in said.splitlines() if line.startswith("to continue: ")]
    done = run_typed(line.removeprefix("to continue: "))
    assert done.returncode == 0, done.stderr


def test_ctrl_c_before_the_first_checkpoint_promises_nothing(run_flags, tmp_path):
    flags = [*run_flags, "-nproc=2", f"-output={tmp_path / 'run'}"]
    run = Run(flags, output=tmp_path / "said")
    wait_for(lambda: children(run.pid) or not run.process.is_alive())
    run.send(INT)
    assert run.wait() == 130, run.text()
    assert "to continue" not in run.text() and "Traceback" not in run.text(), run.text()


def test_a_system_fault_ends_an_evaluation_with_status_1(run_flags, tmp_path):
    flags = [*run_flags, "-eval", "-pretrained=random", f"-output={tmp_path / 'run'}"]
    said = finish(flags, status=1, fault=("reading 0", UNREADABLE))
    assert said.splitlines()[-1] == "error: cannot read image a.jpg: Input/output error"
    assert "ended: cannot read image a.jpg" in (tmp_path / "run" / "log.txt").read_text()


def test_a_run_whose_folder_is_deleted_ends_with_status_1(run_flags, tmp_path):
    folder = tmp_path / "run"
    fault = ("step 4", f"__import__('shutil').rmtree({str(folder)!r})")
    flags = [*run_flags, f"-output={folder}"]
    said = finish(flags, status=1, fault=fault)
    assert f"cannot write {folder / 'checkpoints'}" in said and not folder.exists()


@pytest.mark.parametrize("fault", ["missing", "damaged"])
def test_an_image_that_cannot_be_evaluated_costs_no_epoch(
    tiny_config_file, own_data, straight, tmp_path, fault
):
    data, image = own_data
    content, folder = image.read_bytes(), tmp_path / "run"
    image.write_bytes(content[:100])
    if fault == "missing":
        image.unlink()
    flags = [f"-cfg={tiny_config_file}", f"-data_path={data}", f"-output={folder}"]
    said = finish(flags, status=2)
    assert image.name in said and "Traceback" not in said
    assert progress_of(folder).step == 3
    finish([f"-resume={folder}"], status=2)  # as long as it is so
    image.write_bytes(content)
    said = finish([f"-resume={folder}"])
    assert "epoch 1 is trained; its evaluation is next" in said
    assert_same_end(folder, straight)
