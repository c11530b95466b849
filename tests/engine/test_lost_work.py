"""What has been trained outlives a failed evaluation, changed settings, weights that are not finite
and runs that are refused."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from launched import SIGNALLED_AFTER_STEP_4
from processes import (
    Run,
    Script,
    assert_same_end,
    children,
    customized,
    finish,
    main_status,
    metrics,
    paused,
    step_of,
    wait_for,
)
from small_disk import mounted
from tiny import ROOT

from replknet_paddle.checkpoints.training import checkpoints, load_checkpoint
from replknet_paddle.engine.run_log import RunLock, json_text
from replknet_paddle.runtime.errors import InputError


def assert_last_opens(folder):
    """The progress of RUN/last, which is the newest checkpoint."""
    assert os.path.realpath(folder / "last") == os.path.realpath(checkpoints(str(folder))[-1])
    return load_checkpoint(str(folder / "last")).progress


# ---- evaluations that fail


@pytest.fixture
def own_data(tiny_data, tmp_path):
    """A copy of the data, and the validation image that is read last."""
    shutil.copytree(tiny_data, tmp_path / "data")
    last = (tmp_path / "data" / "val_list.txt").read_text().splitlines()[-1].rsplit(" ", 1)[0]
    return tmp_path / "data", tmp_path / "data" / last


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
    said = finish(flags, output=tmp_path / "log", status=2)
    assert image.name in said and "Traceback" not in said
    assert assert_last_opens(folder).step == 3
    finish([f"-resume={folder}"], output=tmp_path / "log", status=2)  # as long as it is so
    image.write_bytes(content)
    said = finish([f"-resume={folder}"], output=tmp_path / "log")
    assert "epoch 1 is trained; its evaluation is next" in said
    assert_same_end(folder, straight)


def evaluation_that_fails(arguments: list[str]) -> int:
    """The evaluation after epoch 2 ends as the first argument says."""
    from replknet_paddle.engine import run

    how, really_evaluate = arguments[0], run.evaluate

    def evaluate(*, model, **rest):
        metrics = really_evaluate(model=model, **rest)
        nonlocal evaluations
        evaluations += 1
        if evaluations == 4:  # of the EMA weights
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise {"memory": MemoryError(), "disk": OSError(28, "No space left on device")}[how]
        return metrics

    evaluations, run.evaluate = 0, evaluate
    return main_status(arguments[1:])


@pytest.mark.parametrize("how, status", [("memory", 1), ("disk", 1), ("killed", -9)])
def test_an_evaluation_that_ends_the_run_costs_no_epoch(run_flags, straight, tmp_path, how, status):
    folder = tmp_path / "run"
    flags = [*run_flags, f"-output={folder}"]
    finish([how, *flags], output=tmp_path / "log", status=status, target=evaluation_that_fails)
    assert assert_last_opens(folder).step == 6
    assert [record["epoch"] for record in metrics(folder)] == [1]
    finish([f"-resume={folder}"], output=tmp_path / "log")
    assert_same_end(folder, straight)


def killed_before_the_second_save(arguments: list[str]) -> int:
    """A run that is killed once the evaluation of epoch 2 is in metrics.jsonl."""
    from replknet_paddle.engine.run_log import RunLog

    really_write = RunLog.write_metrics

    def write_metrics(self, record):
        really_write(self, record)
        if record["epoch"] == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    RunLog.write_metrics = write_metrics
    return main_status(arguments)


def test_an_evaluation_that_is_repeated_is_recorded_once(run_flags, straight, tmp_path):
    folder = tmp_path / "run"
    finish(
        [*run_flags, f"-output={folder}"],
        output=tmp_path / "log", status=-9, target=killed_before_the_second_save,
    )  # fmt: skip
    assert [record["epoch"] for record in metrics(folder)] == [1, 2]
    finish([f"-resume={folder}"], output=tmp_path / "log")
    assert_same_end(folder, straight)


# ---- other settings than before


OTHER_SETTINGS = {
    "larger batch": ["-batch_size=16"],
    "smaller batch": ["-batch_size=5"],
    "more accumulation": ["-accum_iter=6"],
    "two processes": ["-nproc=2"],
}


@pytest.mark.parametrize(
    "settings", [*list(OTHER_SETTINGS)[:-1], pytest.param("two processes", marks=pytest.mark.slow)]
)
def test_a_resumed_run_may_have_other_steps_and_is_resumed_again(run_flags, tmp_path, settings):
    """Killed in its first epoch, by which the checkpoint that it resumed is the newest one."""
    first, folder, straight = (tmp_path / name for name in ("first", "run", "straight"))
    finish(
        [*run_flags, f"-output={first}", "-opts", "TRAIN.NUM_EPOCHS", "1"], output=tmp_path / "log"
    )
    shutil.copytree(first, folder, symlinks=True)
    shutil.copytree(first, straight, symlinks=True)
    more = [*OTHER_SETTINGS[settings], "-opts", "TRAIN.NUM_EPOCHS", "3", "SAVE_KEEP", "9"]
    finish([f"-resume={straight}", *more], output=tmp_path / "log")

    is_alone = settings != "two processes"
    killed = Run(
        [f"-resume={folder}", *more],
        output=tmp_path / "killed",
        target=killed_at_step_4 if is_alone else None,
        environment=customized(tmp_path, KILLED_AT_STEP_4),
    )
    assert killed.wait() == (-9 if is_alone else 137), killed.text()
    assert assert_last_opens(folder).step == 3
    said = finish([f"-resume={folder}", *more], output=tmp_path / "log")
    assert "continuing after epoch 1, step 3" in said
    assert not (folder / "superseded").exists()
    assert_last_opens(folder)
    assert_same_end(folder, straight)
    steps = [record["step"] for record in metrics(folder)]
    assert steps == sorted(steps) and steps[0] == 3


KILLED_AT_STEP_4 = """
    run_log.RunLog.write_step = lambda self, step: step == 4 and os.kill(os.getpid(), 9)
"""


def killed_at_step_4(arguments: list[str]) -> int:
    """A run that is killed before step 4 can be saved."""
    from replknet_paddle.engine.run_log import RunLog

    RunLog.write_step = lambda self, step: step == 4 and os.kill(os.getpid(), signal.SIGKILL)
    return main_status(arguments)


@pytest.mark.parametrize("flags", [["-batch_size=12"], ["-batch_size=4", "-accum_iter=6"]])
def test_a_checkpoint_in_mid_epoch_is_newer_than_the_one_resumed(run_flags, tmp_path, flags):
    """An epoch of two steps, after one of three."""
    folder = tmp_path / "run"
    finish(
        [*run_flags, f"-output={folder}", "-opts", "TRAIN.NUM_EPOCHS", "1"], output=tmp_path / "log"
    )
    run = Run(
        [
            *(f"-resume={folder}", *flags),
            *("-opts", "TRAIN.NUM_EPOCHS", "2", "SAVE_STEPS", "1", "SAVE_KEEP", "1"),
        ],
        output=tmp_path / "log",
        target=paused,
        environment={"PAUSE_AT": "5", "GO": str(tmp_path / "go")},
    )
    wait_for(lambda: step_of(folder) == 5 or not run.process.is_alive())
    run.send(signal.SIGKILL)
    run.wait()
    progress = assert_last_opens(folder)
    assert (progress.epoch, progress.step) == (1, 4)


def test_the_learning_rate_follows_the_share_of_the_run_that_is_done(run_flags, tmp_path):
    """Half the steps per epoch: the second half of the run has the rates of its epochs."""
    folder, straight = tmp_path / "run", tmp_path / "straight"
    finish(
        [*run_flags, f"-output={folder}", "-opts", "TRAIN.NUM_EPOCHS", "2"], output=tmp_path / "log"
    )
    finish(
        [f"-resume={folder}", "-batch_size=4", "-opts", "TRAIN.NUM_EPOCHS", "4"],
        output=tmp_path / "log",
    )
    finish([*run_flags, "-batch_size=4", f"-output={straight}"], output=tmp_path / "log")
    rates = [[r["learning_rate"] for r in metrics(f)][2:] for f in (folder, straight)]
    assert rates[0] == rates[1] and len(rates[0]) == 2


def test_an_older_checkpoint_resumed_is_the_last_at_once(run_flags, tmp_path):
    folder = tmp_path / "run"
    finish([*run_flags, f"-output={folder}", "-opts", "SAVE_KEEP", "9"], output=tmp_path / "log")
    second = checkpoints(str(folder))[1]
    run = Run([f"-resume={second}"], output=tmp_path / "log", target=stopped_before_training)
    assert run.wait() == -signal.SIGKILL, run.text()
    assert assert_last_opens(folder).epoch == 2
    assert len(os.listdir(folder / "superseded")) == 2
    assert os.path.exists(folder / "best")


def stopped_before_training(arguments: list[str]) -> int:
    """A run that is killed before its first step."""
    from replknet_paddle.engine.run import Training

    Training.train_epochs = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    return main_status(arguments)


# ---- weights that are not finite

EXPLODING = ["-accum_iter=6", "-opts", "TRAIN.WARMUP_EPOCHS", "0", "TRAIN.BASE_LR"]


def test_weights_that_are_not_finite_are_not_saved(run_flags, tmp_path):
    folder = tmp_path / "run"
    said = finish(
        [*run_flags, f"-output={folder}", *EXPLODING, "1e39"], output=tmp_path / "log", status=1
    )
    assert "weights are no longer finite" in said and "TRAIN.BASE_LR" in said
    assert "finished" not in said and "Traceback" not in said
    assert not checkpoints(str(folder)) and not os.path.lexists(folder / "last")


def test_they_leave_the_checkpoint_before_as_it_is(run_flags, tmp_path):
    folder = tmp_path / "run"
    finish(
        [*run_flags, f"-output={folder}", "-opts", "TRAIN.NUM_EPOCHS", "1"], output=tmp_path / "log"
    )
    before = (folder / "last").read_bytes()
    more = [*EXPLODING, "1e39", "TRAIN.NUM_EPOCHS", "2"]
    said = finish([f"-resume={folder}", *more], output=tmp_path / "log", status=1)
    assert "weights are no longer finite" in said
    assert assert_last_opens(folder).epoch == 1
    assert (folder / "last").read_bytes() == (folder / "best").read_bytes() == before
    assert [record["epoch"] for record in metrics(folder)] == [1]


def test_weights_whose_loss_is_not_finite_are_not_the_best(run_flags, tmp_path):
    """They are finite themselves, so they are saved."""
    folder = tmp_path / "run"
    flags = [*run_flags, f"-output={folder}", *EXPLODING, "1e38"]
    said = finish([*flags, "TRAIN.NUM_EPOCHS", "1"], output=tmp_path / "log", status=1)
    assert "the loss of the evaluation is not finite" in said and "finished" not in said
    assert assert_last_opens(folder).epoch == 1 and not os.path.lexists(folder / "best")
    finish([*flags, "-resume=auto"], output=tmp_path / "log", status=1)  # the loss in training
    assert metrics(folder)[0]["val_loss"] is None and not os.path.lexists(folder / "best")


def test_json_has_no_word_for_a_number_that_is_not_finite():
    value = {"loss": math.nan, "all": [1.5, -math.inf, [math.inf]], "n": 3, "text": "NaN"}
    expected = {"loss": None, "all": [1.5, None, [None]], "n": 3, "text": "NaN"}
    assert json.loads(json_text(value)) == expected


# ---- run folders used from elsewhere


def in_folder(arguments: list[str]) -> int:
    """A run in the folder that is the first argument."""
    os.chdir(arguments[0])
    return main_status(arguments[1:])


def test_a_run_finds_its_data_from_any_folder(tiny_config_file, own_data, tmp_path):
    """And not a folder of the same name that lies there."""
    data, _ = own_data
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    (elsewhere / "data").mkdir(parents=True)
    flags = [f"-cfg={tiny_config_file}", "-data_path=data", "-output=run"]
    said = finish(
        [tmp_path, *flags, "-opts", "TRAIN.NUM_EPOCHS", "1"],
        output=tmp_path / "log", target=in_folder,
    )  # fmt: skip
    assert yaml.safe_load((folder / "config.yaml").read_text())["DATA"]["DATA_PATH"] == str(data)
    assert f"-pretrained={folder / 'best'}" in said  # next
    evaluate = [elsewhere, "-eval", "-pretrained=../run/best", "-output=eval"]
    said = finish(evaluate, output=tmp_path / "log", target=in_folder)
    for text in (said, (elsewhere / "eval" / "log.txt").read_text()):
        assert f"evaluating the images of {data / 'val_list.txt'}" in text
    data.rename(tmp_path / "moved")
    said = finish(evaluate[:-1], output=tmp_path / "log", target=in_folder, status=2)
    assert f"no data folder {data}" in said and "-data_path" in said


# ---- runs that are refused


def writer(arguments: list[str]) -> int:
    """A run under way: it holds the folder, and writes into it a second later."""
    folder, lock = arguments[0], RunLock(arguments[0])
    open(os.path.join(folder, "locked"), "w").close()
    time.sleep(1)
    for name in ("log.txt", "config.yaml", "class_names.txt", "metrics.jsonl", "step"):
        with open(os.path.join(folder, name), "w") as file:
            file.write(f"{lock.folder}\n")
    signal.pause()
    return 0


@pytest.mark.parametrize("processes", [1, 2])
def test_a_refused_run_takes_nothing_away(run_flags, tmp_path, processes):
    folder = tmp_path / "run"
    holder = Run([folder], output=tmp_path / "holder", target=writer)
    wait_for((folder / "locked").exists)
    said = finish(
        [*run_flags, f"-output={folder}", "-resume=auto", f"-nproc={processes}"],
        output=tmp_path / "log",
        status=2,
    )
    assert f"in use by process {holder.pid}" in said
    names = ["class_names.txt", "config.yaml", "lock", "locked", "log.txt", "metrics.jsonl", "step"]
    assert sorted(os.listdir(folder)) == names
    assert all((folder / name).read_text() == f"{folder}\n" for name in names[4:] + names[:2])
    holder.send(signal.SIGKILL)
    holder.wait()


@pytest.mark.parametrize("round_", range(int(os.environ.get("ROUNDS", 3))))
def test_of_three_runs_of_one_moment_one_trains(run_flags, straight, tmp_path, round_):
    folder = tmp_path / "run"
    flags = [*run_flags, f"-output={folder}"]
    started = [Run(flags, output=tmp_path / f"said{i}") for i in range(3)]
    ended = sorted((run.wait(), run.text()) for run in started)
    assert [status for status, _ in ended] == [0, 2, 2], ended
    for _, said in ended[1:]:
        assert "in use by process" in said or "checkpoints of another run" in said, said
    assert_same_end(folder, straight)
    names = {"checkpoints", "config.yaml", "lock", "log.txt", "metrics.jsonl", "step"}
    assert set(os.listdir(folder)) == names | {"best", "last"}


@pytest.mark.slow
def test_of_three_runs_in_two_processes_one_trains(run_flags, straight_on_two, tmp_path):
    folder = tmp_path / "run"
    flags = [*run_flags, "-batch_size=4", "-nproc=2", f"-output={folder}"]
    started = [Run(flags, output=tmp_path / f"said{i}") for i in range(3)]
    ended = sorted((run.wait(), run.text()) for run in started)
    assert [status for status, _ in ended] == [0, 2, 2], ended
    assert_same_end(folder, straight_on_two)


def test_a_lock_of_a_folder_that_was_withdrawn_is_not_one(tmp_path):
    """The run that made the folder takes it away; one that waits for it makes another."""
    folder = tmp_path / "run"
    first = RunLock(str(folder))
    waiting = Run([folder], output=tmp_path / "said", target=writer)
    time.sleep(0.5)
    first.withdraw()
    wait_for((folder / "locked").exists)
    with pytest.raises(InputError, match=f"in use by process {waiting.pid}"):
        RunLock(str(folder))
    waiting.send(signal.SIGKILL)
    waiting.wait()


# ---- ends that must be noticed


def test_a_run_whose_folder_is_deleted_ends_with_status_1(run_flags, tmp_path):
    folder = tmp_path / "run"
    run = Run(
        [*run_flags, f"-output={folder}"],
        output=tmp_path / "log",
        target=paused,
        environment={"PAUSE_AT": "4", "GO": str(tmp_path / "go")},
    )
    wait_for(lambda: step_of(folder) == 4)
    shutil.rmtree(folder)
    (tmp_path / "go").touch()
    assert run.wait() == 1, run.text()
    assert f"cannot write {folder / 'checkpoints'}" in run.text()
    assert not folder.exists()


def test_a_full_table_of_inodes_is_named(run_flags, tmp_path):
    with mounted(tmp_path / "small", "nr_inodes=9") as small:
        said = finish([*run_flags, f"-output={small / 'run'}"], output=tmp_path / "log", status=1)
    assert "No free inodes" in said and "MiB free" not in said


def test_a_killed_script_takes_the_training_with_it(run_flags, tmp_path):
    folder = tmp_path / "run"
    environment = customized(tmp_path, SIGNALLED_AFTER_STEP_4)
    script = Script([*run_flags, f"-output={folder}"], restarts=1, **environment)
    wait_for(lambda: step_of(folder) == 4)
    [training] = children(script.process.pid)
    script.process.send_signal(signal.SIGKILL)
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
