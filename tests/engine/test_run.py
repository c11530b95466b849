"""Whole runs: stopped, resumed, killed and spread over processes, they end as straight ones do.

Most runs are forks of one process that has imported everything (processes.py); those that test how
processes are started are started as people start them.
"""

import os
import re
import shutil
import signal

import numpy as np
import pytest
from launched import SIGNALLED_AFTER_STEP_4, LaunchedRun
from processes import (
    Run,
    assert_same_end,
    customized,
    finish,
    finish_ranks,
    free_ports,
    paused,
    start_really,
    step_of,
    wait_for,
    whole_steps,
)

from replknet_paddle.checkpoints.training import (
    checkpoints,
    load_checkpoint,
    newest_whole_checkpoint,
)

# What Paddle says of itself, its compilers and its launcher.
PADDLES_OWN = ("ccache", "Warning", "gloo", "LAUNCH", "Traceback")

# ---- the same seed


def test_same_seed_same_weights_another_seed_others(run_flags, straight, tmp_path):
    finish([*run_flags, f"-output={tmp_path / 'same'}"], output=tmp_path / "log")
    assert_same_end(tmp_path / "same", straight)
    finish(
        [*run_flags, f"-output={tmp_path / 'other'}", "-opts", "SEED", "1"],
        output=tmp_path / "log",
    )
    ours, theirs = (
        load_checkpoint(str(folder / "last")).model["head.weight"]
        for folder in (straight, tmp_path / "other")
    )
    assert not np.allclose(ours, theirs)


def test_a_run_started_as_people_start_it_is_the_same(run_flags, straight, tmp_path, run_main):
    done = run_main(*run_flags, f"-output={tmp_path / 'run'}", script="main_single_gpu.py")
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert not [noise for noise in PADDLES_OWN if noise in said], said
    assert_same_end(tmp_path / "run", straight)


# ---- stopping and going on


def stop_at(flags, folder, step, number, tmp_path) -> int:
    """Run, and signal after an optimizer step; the exit status."""
    go = tmp_path / "go"
    run = Run(
        [*flags, f"-output={folder}"],
        output=tmp_path / "stopped.log",
        target=paused,
        environment={"PAUSE_AT": str(step), "GO": str(go)},
    )
    wait_for(lambda: step_of(folder) == step or not run.process.is_alive())
    run.send(number)
    go.touch()
    return run.wait()


def test_loader_workers_change_nothing(run_flags, straight, tmp_path):
    flags = [*run_flags, "-opts", "DATA.NUM_WORKERS", 2]
    finish([*flags, f"-output={tmp_path / 'run'}"], output=tmp_path / "log")
    assert_same_end(tmp_path / "run", straight)


@pytest.mark.parametrize("workers", [0, 2])
def test_two_epochs_stop_and_two_more_are_four(run_flags, straight, tmp_path, workers):
    """The checkpoint of epoch 2 in a folder of its own: as after a stop between two epochs."""
    flags = [*run_flags, "-opts", "DATA.NUM_WORKERS", workers]
    first = tmp_path / "first"
    first.mkdir()
    (first / "checkpoints").mkdir()
    shutil.copy(straight / "config.yaml", first)
    lines = (straight / "metrics.jsonl").read_text().splitlines(keepends=True)
    (first / "metrics.jsonl").write_text("".join(lines[:2]))
    name = "epoch_0002_step_00000006.safetensors"
    shutil.copy(straight / "checkpoints" / name, first / "checkpoints")
    os.symlink(f"checkpoints/{name}", first / "last")
    said = finish([f"-resume={first}", *flags], output=tmp_path / "log")
    assert "continuing after epoch 2, step 6" in said
    assert_same_end(first, straight)


@pytest.mark.parametrize(
    "number, status, step",
    [
        (signal.SIGTERM, 143, 1),
        (signal.SIGINT, 130, 4),
        (signal.SIGTERM, 143, 6),  # the end of an epoch: the average's evaluation follows
    ],
)
def test_a_signal_at_any_step_saves_and_the_run_goes_on(
    run_flags, straight, tmp_path, number, status, step
):
    folder = tmp_path / "run"
    flags = [*run_flags, "-opts", "SAVE_STEPS", "2"]
    got = stop_at(flags, folder, step, number, tmp_path)
    said = (tmp_path / "stopped.log").read_text()
    assert got == status, said
    stopped_at = step_of(folder)
    assert f"stopped by {signal.Signals(number).name} after epoch " in said
    assert load_checkpoint(str(folder / "last")).progress.step == stopped_at >= step
    assert "Traceback" not in said
    assert not [n for n in os.listdir(folder / "checkpoints") if "unfinished" in n]
    finish([*flags, f"-output={folder}", "-resume=auto"], output=tmp_path / "log")
    assert_same_end(folder, straight)


def test_a_signal_with_loader_workers_saves_too(run_flags, straight, tmp_path):
    folder = tmp_path / "run"
    flags = [*run_flags, "-opts", "DATA.NUM_WORKERS", "2"]
    assert stop_at(flags, folder, 5, signal.SIGTERM, tmp_path) == 143
    finish([*flags, f"-output={folder}", "-resume=auto"], output=tmp_path / "log")
    assert_same_end(folder, straight)


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on(run_flags, straight_on_two, tmp_path):
    """SIGTERM to the program alone, which hands it on."""
    folder = tmp_path / "run"
    flags = [*run_flags, "-batch_size=4", f"-output={folder}", "-opts", "DATA.NUM_WORKERS", "1"]
    run = LaunchedRun(
        [*flags, "-nproc=2"],
        output=tmp_path / "said",
        environment=customized(tmp_path, SIGNALLED_AFTER_STEP_4),
    )
    try:
        wait_for(lambda: step_of(folder) == 4 or not run.process.is_alive())
        run.send(signal.SIGTERM)
        status, said = run.wait(), run.text()
    finally:
        run.kill()
    assert not [noise for noise in PADDLES_OWN if noise in said], said
    check_stopped(status, 143, said, folder)
    finish_ranks([*flags, "-resume=auto"], folder=tmp_path)
    assert_same_end(folder, straight_on_two)


@pytest.mark.slow
def test_ctrl_c_stops_two_processes_together(run_flags, straight_on_two, tmp_path):
    """A terminal sends SIGINT to the whole group of the program."""
    folder = tmp_path / "run"
    flags = [*run_flags, "-batch_size=4", f"-output={folder}", "-opts", "DATA.NUM_WORKERS", "1"]
    process = start_really([*flags, "-nproc=2"], **customized(tmp_path, SIGNALLED_AFTER_STEP_4))
    try:
        wait_for(lambda: step_of(folder) == 4 or process.poll() is not None)
        os.killpg(process.pid, signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    check_stopped(process.returncode, 130, said, folder)
    finish_ranks([*flags, "-resume=auto"], folder=tmp_path)
    assert_same_end(folder, straight_on_two)


def check_stopped(got, status, said, folder) -> None:
    assert got == status, said
    # The launcher may pass on nothing any more: what the workers said is in their logs.
    said += (folder / "workers" / "workerlog.0").read_text()
    assert "stopped by SIG" in said, said
    assert load_checkpoint(str(folder / "last")).progress.step >= 4


def test_going_on_from_an_older_checkpoint_loses_neither_it_nor_what_follows(run_flags, tmp_path):
    """The way out of a run that diverged: an earlier checkpoint with another learning rate."""
    folder = tmp_path / "run"
    finish([*run_flags, f"-output={folder}", "-opts", "SAVE_FREQ", "1"], output=tmp_path / "log")
    flags = [*run_flags, "-opts", "TRAIN.BASE_LR", "1e-5", "SAVE_FREQ", "100", "SAVE_KEEP", "1"]
    old = folder / "checkpoints" / "epoch_0001_step_00000003.safetensors"
    run = Run(
        [*flags, f"-resume={old}"],
        output=tmp_path / "log",
        target=paused,
        environment={"PAUSE_AT": "7", "GO": str(tmp_path / "go")},
    )
    wait_for(lambda: step_of(folder) == 7 or not run.process.is_alive())  # 12 at first
    run.send(signal.SIGTERM)
    (tmp_path / "go").touch()
    assert run.wait() == 143, run.text()
    step = step_of(folder)
    assert 7 <= step < 12
    assert load_checkpoint(str(folder / "last")).progress.step == step
    newest = newest_whole_checkpoint(str(folder))
    assert load_checkpoint(newest).progress.step == step  # not step 12 of the run before


def test_resuming_into_the_folder_of_another_run_is_refused(run_flags, straight, tmp_path):
    other = tmp_path / "other"
    (other / "checkpoints").mkdir(parents=True)
    theirs = other / "checkpoints" / "epoch_0003_step_00000009.safetensors"
    theirs.write_bytes(b"theirs")
    said = finish(
        [*run_flags, f"-resume={straight}", f"-output={other}"],
        output=tmp_path / "log",
        status=2,
    )
    assert "holds the checkpoints of another run" in said
    assert theirs.read_bytes() == b"theirs" and os.listdir(other) == ["checkpoints"]


def test_resume_auto_passes_over_a_damaged_checkpoint(run_flags, straight, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(straight, folder, symlinks=True)
    for name, length in (("epoch_0004_step_00000012", 1000), ("epoch_0003_step_00000009", 0)):
        os.truncate(folder / "checkpoints" / f"{name}.safetensors", length)
    said = finish([*run_flags, f"-output={folder}", "-resume=auto"], output=tmp_path / "log")
    assert said.count("trying the one before it") == 2
    assert "continuing after epoch 2, step 6" in said
    assert_same_end(folder, straight)


def test_a_checkpoint_in_mid_epoch_needs_the_same_batches(run_flags, tmp_path):
    folder = tmp_path / "run"
    flags = [*run_flags, "-opts", "SAVE_STEPS", "1"]
    stop_at(flags, folder, 5, signal.SIGKILL, tmp_path)
    assert 4 in whole_steps(folder)
    paths = [p for p in checkpoints(str(folder)) if load_checkpoint(p).progress.batch]
    said = finish(
        [*run_flags, f"-output={folder}", f"-resume={paths[-1]}", "-batch_size=5"],
        output=tmp_path / "log",
        status=2,
    )
    assert re.search(r"stopped after \d of 6 batches of an epoch, which has 12 here", said), said


def test_a_finished_run_that_is_resumed_changes_nothing(run_flags, straight, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(straight, folder, symlinks=True)
    finish([*run_flags, f"-output={folder}", "-resume=auto"], output=tmp_path / "log")
    assert_same_end(folder, straight)


# ---- several processes


def frozen_step(arguments: list[str]) -> int:
    """One optimizer step on this process's share of a global batch of 8, batch norm frozen.

    Keeps the averaged gradients. To be run under the launcher, or as the forks of finish_ranks.
    """
    cfg, data_path, output = arguments
    import paddle

    from replknet_paddle.config import get_config, update_config
    from replknet_paddle.data.dataset import get_dataloader, get_dataset
    from replknet_paddle.engine.precision import Precision
    from replknet_paddle.engine.train import TrainState, train_epoch
    from replknet_paddle.model import build_replknet
    from replknet_paddle.optim.losses import LabelSmoothingCrossEntropy
    from replknet_paddle.runtime import processes

    class Flags:
        opts = ["DATA.DATA_PATH", data_path, "MODEL.DROPPATH", "0"]
        batch_size = None

    processes.init()
    Flags.batch_size = 8 // processes.world_size()
    config = update_config(get_config(cfg), Flags)
    paddle.seed(0)
    model = build_replknet(config)
    loader = get_dataloader(
        config, get_dataset(config, True), True,
        rank=processes.rank(), world_size=processes.world_size(),
    )  # fmt: skip
    train = model.train

    def train_but_batch_norm():
        train()
        for layer in model.sublayers():
            if isinstance(layer, paddle.nn.BatchNorm2D):
                layer.eval()

    model.train = train_but_batch_norm
    gradients = []

    class Recorder(paddle.optimizer.SGD):
        def step(self):
            gradients.append(
                {name: p.grad.numpy() for name, p in model.named_parameters() if p.trainable}
            )
            super().step()

    for _ in train_epoch(
        TrainState(
            model=model,
            criterion=LabelSmoothingCrossEntropy(0.1),
            optimizer=Recorder(parameters=model.parameters()),
            learning_rate=lambda step: 0.1,
            precision=Precision(),
        ),
        loader,
        accum_iter=2,
        seed=0,
        epoch=0,
    ):
        pass
    values = {f"{i}/{name}": g for i, step in enumerate(gradients) for name, g in step.items()}
    np.savez(f"{output}.{processes.world_size()}.{processes.rank()}.npz", **values)
    return 0


def test_gradients_of_two_ranks_are_those_of_one_with_twice_the_batch(
    tiny_config_file, tiny_data, tmp_path
):
    arguments = [str(tiny_config_file), str(tiny_data), str(tmp_path / "gradients")]
    finish(arguments, output=tmp_path / "log", target=frozen_step)
    finish_ranks(arguments, folder=tmp_path, target=frozen_step)
    alone, first, second = (
        dict(np.load(tmp_path / f"gradients.{name}.npz")) for name in ("1.0", "2.0", "2.1")
    )
    assert len({name.split("/")[0] for name in alone}) == 3
    for step in "012":
        keys = [name for name in alone if name.startswith(f"{step}/")]
        for ours in (first, second):
            error = sum(((ours[key] - alone[key]) ** 2).sum() for key in keys)
            assert error**0.5 <= 1e-6 * sum((alone[key] ** 2).sum() for key in keys) ** 0.5
        assert all(first[key].tobytes() == second[key].tobytes() for key in keys)


def all_ranks_states(arguments: list[str]) -> int:
    """A run whose every rank keeps, at its end, what it would save."""
    from processes import main_status

    from replknet_paddle.checkpoints.training import Checkpoint, save_checkpoint
    from replknet_paddle.engine import run as module
    from replknet_paddle.optim.optimizer import optimizer_state
    from replknet_paddle.runtime import processes

    *arguments, output = arguments
    train_epochs = module.Training.run

    def run_and_keep(self):
        result = train_epochs(self)
        path = f"{output}.{processes.rank()}.safetensors"
        save_checkpoint(
            path,
            Checkpoint(
                "",
                self.progress,
                module.float32_weights(self.state.model, self.state.optimizer),
                self.state.ema.state(),
                optimizer_state(self.state.optimizer, self.state.model),
            ),
        )
        return result

    module.Training.run = run_and_keep
    return main_status(arguments)


@pytest.mark.parametrize("recompute", [False, True])
def test_all_ranks_end_alike_with_recompute_and_without(
    run_flags, straight_on_two, tmp_path, recompute
):
    """Weights, averages, optimizer state and batch norm's buffers."""
    finish_ranks(
        [*run_flags, "-batch_size=4", f"-output={tmp_path / 'run'}",
         "-opts", "MODEL.RECOMPUTE", recompute, tmp_path / "rank"],
        folder=tmp_path, target=all_ranks_states,
    )  # fmt: skip
    ranks = [load_checkpoint(str(tmp_path / f"rank.{rank}.safetensors")) for rank in (0, 1)]
    assert any(name.endswith("_mean") for name in ranks[0].model)
    for part in ("model", "model_ema", "optimizer"):
        ours, theirs = (getattr(state, part) for state in ranks)
        assert ours.keys() == theirs.keys()
        assert not [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()]
    assert_same_end(tmp_path / "run", straight_on_two)


def test_recompute_in_one_process_changes_nothing(run_flags, straight, tmp_path):
    finish(
        [*run_flags, f"-output={tmp_path / 'run'}", "-opts", "MODEL.RECOMPUTE", "True"],
        output=tmp_path / "log",
    )
    assert_same_end(tmp_path / "run", straight)


@pytest.mark.slow
def test_two_machines_give_the_weights_of_one(run_flags, straight_on_two, tmp_path):
    """Two launchers over loopback, which share the run folder."""
    (port,) = free_ports(1)
    flags = [*run_flags, "-batch_size=4", f"-output={tmp_path / 'run'}"]
    nodes = [
        start_really(flags, NNODES="2", MASTER=f"127.0.0.1:{port}", NPROC_PER_NODE="1")
        for _ in range(2)
    ]
    try:
        said = [node.communicate(timeout=120)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], said
    assert_same_end(tmp_path / "run", straight_on_two)


def test_a_loss_that_is_no_number_ends_all_ranks_with_status_1(run_flags, tmp_path):
    said = finish_ranks(
        [*run_flags, "-batch_size=4", f"-output={tmp_path / 'run'}",
         "-opts", "TRAIN.BASE_LR", "1e30", "TRAIN.WARMUP_EPOCHS", "0"],
        folder=tmp_path, status=1,
    )  # fmt: skip
    for text in said:
        assert re.search(r"error: epoch \d, step \d+, loss (nan|inf|-inf), learning rate", text)
        assert "Traceback" not in text
