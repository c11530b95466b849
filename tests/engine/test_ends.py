"""How runs end: the exit status, the console, and what log.txt says of it."""

import os
import re
import signal

import pytest
from launched import LaunchedRun
from processes import (
    Run,
    assert_same_end,
    customized,
    finish,
    main_status,
    step_of,
    wait_for,
    worker,
)

from replknet_paddle.runtime.launch import killed_by


@pytest.fixture
def two_processes(run_flags, tmp_path):
    """Starts a run in two processes, of which each runs some code first."""
    started = []

    def start(code: str):
        run = LaunchedRun(
            [*run_flags, "-batch_size=4", f"-output={tmp_path / 'run'}", "-nproc=2"],
            output=tmp_path / "said",
            environment=customized(tmp_path, code),
        )
        started.append(run)
        return run

    yield start
    for run in started:
        run.kill()


# ---- a finished run


def signalled_in_last_validation(arguments: list[str]) -> int:
    """A run that gets SIGTERM while it evaluates after its last epoch."""
    from replknet_paddle.engine.run import Training

    really_validate = Training.validate

    def validate(self, record):
        if self.progress.epoch == self.config.TRAIN.NUM_EPOCHS:
            os.kill(os.getpid(), signal.SIGTERM)
        return really_validate(self, record)

    Training.validate = validate
    return main_status(arguments)


def test_a_signal_in_the_last_validation_does_not_stop_a_finished_run(
    run_flags, straight, tmp_path
):
    said = finish(
        [*run_flags, f"-output={tmp_path / 'run'}"],
        output=tmp_path / "log",
        target=signalled_in_last_validation,
    )
    assert "stopped by" not in said
    assert_same_end(tmp_path / "run", straight)


# The signal has come back, by way of the launcher, before rank 0 goes on.
LAST_VALIDATION = """
    really_validate, really_note, noted = run.Training.validate, StopSignals.note, []
    def note(self, *rest):
        noted.append(rest)
        really_note(self, *rest)
    def validate(self, record):
        if rank == 0 and self.progress.epoch == self.config.TRAIN.NUM_EPOCHS:
            os.kill(int(open({main!r}).read()), signal.SIGTERM)
            while not noted:
                time.sleep(0.01)
        return really_validate(self, record)
    StopSignals.note, run.Training.validate = note, validate
"""


@pytest.mark.slow
def test_nor_does_one_to_a_run_of_several_processes(two_processes, straight_on_two, tmp_path):
    run = two_processes(LAST_VALIDATION.format(main=str(tmp_path / "main")))
    (tmp_path / "main").write_text(str(run.pid))
    assert run.wait() == 0, run.text()
    assert_same_end(tmp_path / "run", straight_on_two)


# ---- killed processes


# Rank 0 goes on, and the other one with it, once a file exists.
WAITS_AFTER_STEP_2 = """
    really_write_step = run_log.RunLog.write_step
    def write_step(self, step):
        really_write_step(self, step)
        while rank == 0 and step == 2 and not os.path.exists({go!r}):
            time.sleep(0.01)
    run_log.RunLog.write_step = write_step
"""


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_process_is_one_line_and_128_plus_the_signal(two_processes, tmp_path, rank):
    run = two_processes(WAITS_AFTER_STEP_2.format(go=str(tmp_path / "go")))
    run_folder = tmp_path / "run"
    wait_for(lambda: step_of(run_folder) >= 2 or not run.process.is_alive())
    os.kill(wait_for(lambda: worker(run.pid, rank)), signal.SIGKILL)
    (tmp_path / "go").touch()
    status, said = run.wait(), run.text()
    assert status == 128 + signal.SIGKILL, said
    line = "a process of this run was killed by signal 9 (SIGKILL); the output of each is in "
    assert said.count(line) == 1, said
    assert "Traceback" not in said and "gloo" not in said, said
    log = (run_folder / "log.txt").read_text()
    assert re.search(rf"ERROR the run ended: error: {re.escape(line)}", log), log
    assert "Traceback" not in log and "gloo" not in log, log


@pytest.mark.parametrize(
    "status, number",
    [(0, None), (1, None), (2, None), (143, None), (-9, 9), (247, 9), (241, 15), (245, 11)],
)
def test_the_signal_in_a_launchers_status(status, number):
    assert killed_by(status) == number


# ---- errors


@pytest.mark.slow
def test_an_error_of_another_rank_is_in_the_log(two_processes, tmp_path):
    code = """
    def write_step(self, step):
        if rank == 1 and step == 5:
            raise ValueError("fails on rank 1")
    run_log.RunLog.write_step = write_step
"""
    run = two_processes(code)
    status, said = run.wait(), run.text()
    assert status == 1, said
    log = (tmp_path / "run" / "log.txt").read_text()
    for text in (said, log):
        assert "ValueError: fails on rank 1" in text and "gloo" not in text, text


def full_disk(arguments: list[str]) -> int:
    """A run that cannot write files of more than 100 kB from step 3 on."""
    import resource

    from replknet_paddle.engine.run_log import RunLog

    really_write = RunLog.write_step

    def write_step(self, step):
        really_write(self, step)
        if step == 3:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    RunLog.write_step = write_step
    return main_status(arguments)


def test_a_disk_that_fails_in_mid_run_gives_a_status_that_is_restarted(
    run_flags, straight, tmp_path
):
    flags = [*run_flags, f"-output={tmp_path / 'run'}"]
    said = finish(flags, output=tmp_path / "log", status=1, target=full_disk)
    assert re.search(r"error: cannot write .*step_00000003.safetensors: File too large", said)
    assert "Traceback" not in said
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "ERROR the run ended: cannot write" in log, log
    finish([*flags, "-resume=auto"], output=tmp_path / "log")
    assert_same_end(tmp_path / "run", straight)


def broken_system(arguments: list[str]) -> int:
    """A run whose loader finds that the system fails."""
    from replknet_paddle.data.loader import Loader
    from replknet_paddle.runtime.errors import SystemFault

    def fail(self):
        raise SystemFault("cannot read image a.jpg: Input/output error")

    Loader.__iter__ = fail
    return main_status(arguments)


@pytest.mark.parametrize("flags", [[], ["-eval", "-pretrained=random"]])
def test_a_system_fault_is_status_1_and_one_line(run_flags, tmp_path, flags):
    said = finish(
        [*run_flags, f"-output={tmp_path / 'run'}", *flags],
        output=tmp_path / "log", status=1, target=broken_system,
    )  # fmt: skip
    assert said.splitlines()[-1] == "error: cannot read image a.jpg: Input/output error"
    assert "Traceback" not in said
    assert "ended: cannot read image a.jpg" in (tmp_path / "run" / "log.txt").read_text()


def test_a_defect_leaves_its_traceback_in_the_log(run_flags, tmp_path):
    run = Run([*run_flags, f"-output={tmp_path / 'run'}"], output=tmp_path / "log", target=defect)
    assert run.wait() == 1
    for text in (run.text(), (tmp_path / "run" / "log.txt").read_text()):
        assert "Traceback" in text and "ZeroDivisionError" in text, text


def defect(arguments: list[str]) -> int:
    from replknet_paddle.data.loader import Loader

    Loader.__iter__ = lambda self: 1 / 0
    return main_status(arguments)
