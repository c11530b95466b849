"""-eval -backend NAME: the metrics of the evaluation loop, whatever runs the network."""

import json
import shutil

import pytest
from tiny import command

from replknet_paddle.bench.inference import set_statistics
from replknet_paddle.checkpoints.files import write_safetensors
from replknet_paddle.config import get_config
from replknet_paddle.deploy.backends import BACKENDS
from replknet_paddle.deploy.export import ModelInfo, export_model
from replknet_paddle.deploy.fold import random_images
from replknet_paddle.model import build_replknet

main = command("train")


@pytest.fixture(scope="module")
def weights(tiny_config_file, tmp_path_factory):
    """A checkpoint file, and an export folder of the same network."""
    folder = tmp_path_factory.mktemp("weights")
    config = get_config(tiny_config_file)
    model = build_replknet(config)
    set_statistics(model, random_images(64, 32))
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    write_safetensors(folder / "file", tensors, {})
    export_model(model, folder / "export", ModelInfo(config))
    return folder


def evaluation(config_file, data, folder):
    """A function that evaluates weights, into `folder`; its `metrics` returns the figures."""

    def run(weights, *flags):
        flags = [f"-cfg={config_file}", f"-data_path={data}", *flags]
        return main(["-eval", f"-pretrained={weights}", f"-output={folder / 'run'}", *flags])

    def metrics(weights, *flags):
        assert run(weights, *flags) == 0
        record = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])
        return record["val_top1_percent"], record["val_top5_percent"], record["val_loss"]

    run.metrics = metrics
    return run


@pytest.fixture
def evaluate(tiny_config_file, tiny_data, tmp_path):
    return evaluation(tiny_config_file, tiny_data, tmp_path)


@pytest.fixture(scope="module")
def expected(tiny_config_file, tiny_data, weights, tmp_path_factory):
    """The metrics of the checkpoint in Paddle's eager mode."""
    folder = tmp_path_factory.mktemp("expected")
    return evaluation(tiny_config_file, tiny_data, folder).metrics(weights / "file")


@pytest.mark.parametrize("name", [*BACKENDS, "auto"])
def test_metrics_do_not_depend_on_the_backend(evaluate, weights, expected, name):
    for package in BACKENDS[name].packages if name in BACKENDS else ():
        pytest.importorskip(package)
    given = evaluate.metrics(weights / "file", f"-backend={name}")
    assert given[:2] == expected[:2]
    assert given[2] == pytest.approx(expected[2], rel=1e-4)


def test_an_export_folder_is_evaluated(evaluate, weights, expected):
    for flags in (["-backend=auto"], []):  # an export needs no -backend
        given = evaluate.metrics(weights / "export", *flags)
        assert given[:2] == expected[:2]
        assert given[2] == pytest.approx(expected[2], rel=1e-4)


def test_a_run_folder_is_evaluated(evaluate, weights, expected, tiny_config_file, tmp_path):
    run = tmp_path / "trained"
    run.mkdir()
    shutil.copy(tiny_config_file, run / "config.yaml")
    shutil.copy(weights / "file", run / "best")
    assert evaluate.metrics(run) == expected


def test_an_export_brings_its_configuration(weights, tiny_data, tmp_path, expected):
    run = tmp_path / "run"
    flags = [f"-pretrained={weights / 'export'}", f"-data_path={tiny_data}", f"-output={run}"]
    assert main(["-eval", *flags]) == 0
    record = json.loads((run / "metrics.jsonl").read_text())
    assert record["val_top1_percent"] == expected[0]
