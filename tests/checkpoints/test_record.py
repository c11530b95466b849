"""The checksum of our own checkpoints is verified wherever they are read."""

from pathlib import Path

import numpy as np
import pytest
from harness import finish
from tiny import TINY, command

from replknet_paddle.checkpoints.convert import load_pretrained, load_state
from replknet_paddle.checkpoints.readers import read_safetensors_metadata
from replknet_paddle.checkpoints.record import class_names_metadata, read_classes
from replknet_paddle.checkpoints.training import Checkpoint, Progress, save_checkpoint
from replknet_paddle.config import get_config
from replknet_paddle.deploy import Predictor
from replknet_paddle.model import build_replknet
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.zoo import get_model

DAMAGE = "is damaged: what it holds is not what was written"


@pytest.fixture
def run_folder(tmp_path):
    """A run folder with a checkpoint, of which one bit of the weights has changed since."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(TINY)
    model = build_replknet(get_config(folder / "config.yaml"))
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    optimizer = {"head.weight.moment1": np.ones(1000, "float32")}
    path = folder / "best"
    save_checkpoint(str(path), Checkpoint(TINY, Progress(), state, {}, optimizer))
    content = bytearray(path.read_bytes())
    place = content.index(state["head.weight"].tobytes()) + 2
    content[place] ^= 1
    path.write_bytes(content)
    return folder


def readers_of(path):
    model = build_replknet(get_config(path.parent / "config.yaml"))
    return {
        "load_state": lambda: load_state(path),
        "load_pretrained": lambda: load_pretrained(model, path),
        "get_model": lambda: get_model(path.parent / "config.yaml", pretrained=path),
        "predictor": lambda: Predictor(str(path), backend="dygraph"),
    }


@pytest.mark.parametrize("reader", ["load_state", "load_pretrained", "get_model", "predictor"])
def test_one_changed_bit_is_found(run_folder, reader):
    with pytest.raises(InputError, match=DAMAGE):
        readers_of(run_folder / "best")[reader]()


def test_so_it_is_in_parts_that_are_not_loaded(run_folder):
    path = run_folder / "best"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=DAMAGE):
        load_state(path, weights="model")


@pytest.mark.parametrize("name", ["export", "merge", "convert"])
def test_commands_refuse_it(run_folder, tmp_path, capsys, name):
    source = str(run_folder / "best")
    flags = {
        "export": ["-pretrained", source, str(tmp_path / "out")],
        "merge": ["-pretrained", source, str(tmp_path / "out.safetensors")],
        "convert": [source, str(tmp_path / "out.safetensors")],
    }[name]
    assert command(name)(flags) == 2
    assert DAMAGE in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("flags", [["-eval"], []])
def test_evaluation_and_fine_tuning_refuse_it(run_folder, tiny_data, tmp_path, flags):
    said = finish(
        [
            *(f"-pretrained={run_folder / 'best'}", f"-data_path={tiny_data}", *flags),
            f"-output={tmp_path / 'new'}",
        ],
        output=tmp_path / "log",
        status=2,
    )
    assert f"error: {run_folder / 'best'} {DAMAGE}" in said
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_without_names(tmp_path):
    path = tmp_path / "old.safetensors"
    save_checkpoint(str(path), Checkpoint(TINY, Progress(), {"head.bias": np.zeros(4, "f4")}))
    assert read_classes(path).count == 4 and read_classes(path).names is None
    assert class_names_metadata(path) == {}


def test_converted_files_keep_the_names(tmp_path):
    names = ("a", "é", "🐟", "d")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(TINY)
    model = build_replknet(get_config(folder / "config.yaml"))
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    checkpoint = Checkpoint(TINY, Progress(), state, class_names=names)
    save_checkpoint(str(folder / "best"), checkpoint)
    target = Path(tmp_path / "out.safetensors")
    assert command("convert")([str(folder / "best"), str(target)]) == 0
    assert read_classes(target).names == names
    assert read_safetensors_metadata(target)["format"] == "pd"
