"""Whole runs are the same for the same seed, over any processes, started in any way.

Most runs are forks of one process that has imported everything (harness.py); those that test how
processes are started are started as people start them.
"""

import re

import numpy as np
import paddle
import pytest
from epochs import freeze_batch_norm, sgd, train
from harness import assert_same_end, finish, finish_ranks, main_status
from tiny import flags, make_data

from replknet_paddle.checkpoints.run_folder import Checkpoint, load_checkpoint, save_checkpoint
from replknet_paddle.config import get_config, update_config
from replknet_paddle.data.dataset import get_dataloader, get_dataset
from replknet_paddle.engine import run
from replknet_paddle.engine.start import weigh_classes
from replknet_paddle.engine.task import CLASSIFICATION
from replknet_paddle.model import build_replknet
from replknet_paddle.optim.optimizer import freeze, optimizer_state
from replknet_paddle.runtime import processes

# What Paddle says of itself, its compilers and its launcher.
PADDLES_OWN = ("ccache", "Warning", "gloo", "LAUNCH", "Traceback")

# ---- the same seed


def test_same_seed_same_weights_another_seed_others(run_flags, straight, tmp_path):
    finish([*run_flags, f"-output={tmp_path / 'same'}"])
    assert_same_end(tmp_path / "same", straight)
    finish([*run_flags, f"-output={tmp_path / 'other'}", "-opts", "SEED", "1"])
    ours, theirs = (
        load_checkpoint(str(folder / "last")).model["head.weight"]
        for folder in (straight, tmp_path / "other")
    )
    assert not np.allclose(ours, theirs)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_started_as_people_start_it_is_the_same(
    run_flags, straight, straight_on_two, tmp_path, run_main, processes
):
    script = "main_single_gpu.py" if processes == 1 else "main_multi_gpu.py"
    more = [] if processes == 1 else ["-nproc=2", "-batch_size=4"]
    done = run_main(*run_flags, *more, f"-output={tmp_path / 'run'}", script=script)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert not [noise for noise in PADDLES_OWN if noise in said], said
    assert_same_end(tmp_path / "run", straight if processes == 1 else straight_on_two)


# ---- several processes


def frozen_step(arguments: list[str]) -> int:
    """An epoch on this process's share of global batches of 8, batch norm frozen, whose averaged
    gradients are kept."""
    cfg, data_path, output, *more = arguments
    processes.init()
    batch_size = 8 // processes.world_size()
    opts = ["DATA.DATA_PATH", data_path, "MODEL.DROPPATH", "0", "TRAIN.MIXUP_PROB", "0", *more]
    config = update_config(get_config(cfg), flags(batch_size=batch_size, opts=opts))
    paddle.seed(0)
    model = build_replknet(config)
    freeze_batch_norm(model)
    freeze(model, config.TRAIN.FREEZE or [])
    ranks = dict(rank=processes.rank(), world_size=processes.world_size())
    loader = get_dataloader(config, get_dataset(config, True), True, **ranks)
    recorder = sgd(model)
    criterion = CLASSIFICATION.criterion(config, weigh_classes(config, loader.dataset, None))
    train(model, loader, recorder, accum_iter=2, criterion=criterion, learning_rate=lambda _: 0.1)
    names = [name for name, p in model.named_parameters() if not p.stop_gradient]
    values = {
        f"{i}/{name}": gradient
        for i, gradients in enumerate(recorder.gradients)
        for name, gradient in zip(names, gradients)
    }
    np.savez(f"{output}.{processes.world_size()}.{processes.rank()}.npz", **values)
    return 0


UNEVEN = ["TRAIN.CLASS_WEIGHTS", "[1, 2, 0, 9]", "TRAIN.SAMPLER", "balanced"]
UNEVEN += ["TRAIN.FREEZE", "stem,stages.2"]


@pytest.mark.parametrize("more", [[], UNEVEN])
def test_gradients_of_two_ranks_are_those_of_one_with_twice_the_batch(
    tiny_config_file, tiny_data, tmp_path, more
):
    arguments = [str(tiny_config_file), str(tiny_data), str(tmp_path / "gradients"), *more]
    finish(arguments, target=frozen_step)
    finish_ranks(arguments, target=frozen_step)
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
    *arguments, output = arguments
    really_run = run.Training.run

    def run_and_keep(self):
        result = really_run(self)
        state = self.state
        checkpoint = Checkpoint(
            run.config_text(self.config),
            self.progress,
            run.float32_weights(state.model, state.optimizer),
            state.ema.state(),
            optimizer_state(state.optimizer, state.model),
        )
        save_checkpoint(f"{output}.{processes.rank()}.safetensors", checkpoint)
        return result

    run.Training.run = run_and_keep
    return main_status(arguments)


@pytest.mark.parametrize("recompute", [False, True])
def test_all_ranks_end_alike_with_recompute_and_without(
    run_flags, straight_on_two, tmp_path, recompute
):
    """Weights, averages, optimizer state and batch norm's buffers."""
    flags = [*run_flags, "-batch_size=4", f"-output={tmp_path / 'run'}"]
    flags += ["-opts", "MODEL.RECOMPUTE", recompute]
    finish_ranks([*flags, tmp_path / "rank"], target=all_ranks_states)
    ranks = [load_checkpoint(str(tmp_path / f"rank.{rank}.safetensors")) for rank in (0, 1)]
    assert any(name.endswith("_mean") for name in ranks[0].model)
    for part in ("model", "model_ema", "optimizer"):
        ours, theirs = (getattr(state, part) for state in ranks)
        assert ours.keys() == theirs.keys()
        assert not [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()]
    assert_same_end(tmp_path / "run", straight_on_two)


def test_a_loss_that_is_no_number_ends_all_ranks_with_status_1(run_flags, tmp_path):
    flags = [*run_flags, "-batch_size=4", f"-output={tmp_path / 'run'}"]
    flags += ["-opts", "TRAIN.BASE_LR", "1e30", "TRAIN.WARMUP_EPOCHS", "0"]
    said = finish_ranks(flags, status=1)
    for text in said:
        assert re.search(r"error: epoch \d, step \d+, loss (nan|inf|-inf), learning rate", text)
        assert "Traceback" not in text


# ---- steps of an epoch


def whole_steps_flags(tiny_config_file, folder, *, train: int) -> list[str]:
    """Flags of a run on few images, 5 of them in a batch and 3 batches in a step."""
    make_data(folder / "data", train=train, val=4)
    flags = [f"-cfg={tiny_config_file}", f"-data_path={folder / 'data'}", "-batch_size=5"]
    return [*flags, f"-output={folder / 'run'}", "-accum_iter=3", "-opts", "TRAIN.NUM_EPOCHS", "2"]


@pytest.mark.paddle_version
def test_a_run_makes_whole_steps_and_says_what_they_leave_out(tiny_config_file, tmp_path):
    flags = whole_steps_flags(tiny_config_file, tmp_path, train=47)
    said = finish(flags)
    assert "3 steps per epoch, 2 images left out" in said, said
    progress = load_checkpoint(str(tmp_path / "run" / "last")).progress
    assert (progress.step, progress.batches) == (6, 9)


@pytest.mark.paddle_version
def test_fewer_images_than_a_global_batch_are_bad_input(tiny_config_file, tmp_path):
    flags = whole_steps_flags(tiny_config_file, tmp_path, train=14)
    said = finish(flags, status=2)
    assert "14 images, fewer than one global batch" in said and "-accum_iter" in said, said
