"""A checkpoint explains itself, and its checksum is verified wherever it is read."""

import json
import shutil

import numpy as np
import pytest
from harness import finish
from tiny import FIXTURES, TINY, command

from replknet_paddle.checkpoints.checkpoint_file import CheckpointFile
from replknet_paddle.checkpoints.files import write_safetensors
from replknet_paddle.checkpoints.load import load_pretrained, load_state
from replknet_paddle.checkpoints.run_folder import Checkpoint, Progress, save_checkpoint
from replknet_paddle.config import get_config
from replknet_paddle.deploy import Predictor
from replknet_paddle.model import build_replknet
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.zoo import get_model

DAMAGE = "is damaged: what it holds is not what was written"
NAMES = ("a", "é", "🐟", "d")


@pytest.fixture
def run_folder(tmp_path):
    """A run folder with a checkpoint."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(TINY)
    model = build_replknet(get_config(folder / "config.yaml"))
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    optimizer = {"head.weight.moment1": np.ones(1000, "float32")}
    checkpoint = Checkpoint(TINY, Progress(), state, {}, optimizer, class_names=NAMES)
    save_checkpoint(str(folder / "best"), checkpoint)
    return folder


@pytest.fixture
def damaged(run_folder):
    """The same, of which one bit of the optimizer's state has changed since."""
    path = run_folder / "best"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return run_folder


READERS = {
    "load_state": lambda path: load_state(path, weights="model"),
    "load_pretrained": lambda path: load_pretrained(build_replknet(config_of(path)), path),
    "get_model": lambda path: get_model(path.parent / "config.yaml", pretrained=path),
    "predictor": lambda path: Predictor(str(path), backend="eager"),
}


def config_of(path):
    return get_config(path.parent / "config.yaml")


@pytest.mark.parametrize("reader", READERS)
def test_one_changed_bit_is_found(damaged, reader):
    with pytest.raises(InputError, match=DAMAGE):
        READERS[reader](damaged / "best")


@pytest.mark.parametrize("name", ["export", "merge", "convert"])
def test_commands_refuse_it(damaged, tmp_path, capsys, name):
    source = str(damaged / "best")
    flags = {
        "export": ["-pretrained", source, str(tmp_path / "out")],
        "merge": ["-pretrained", source, str(tmp_path / "out.safetensors")],
        "convert": [source, str(tmp_path / "out.safetensors")],
    }[name]
    assert command(name)(flags) == 2
    assert DAMAGE in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("flags", [["-eval"], []])
def test_evaluation_and_fine_tuning_refuse_it(damaged, tiny_data, tmp_path, flags):
    said = finish(
        [
            *(f"-pretrained={damaged / 'best'}", f"-data_path={tiny_data}", *flags),
            f"-output={tmp_path / 'new'}",
        ],
        output=tmp_path / "log",
        status=2,
    )
    assert f"error: {damaged / 'best'} {DAMAGE}" in said
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["trained", "merged", "converted"])
def test_a_file_copied_out_of_its_run_folder_explains_itself(run_folder, tmp_path, name):
    copy = tmp_path / "elsewhere" / "copy.safetensors"
    copy.parent.mkdir()
    source = str(run_folder / "best")
    if name == "trained":
        shutil.copy(source, copy)
    elif name == "merged":
        assert command("merge")(["-pretrained", source, str(copy)]) == 0
    else:
        assert command("convert")([source, str(copy), "-to", "official"]) == 0
        assert CheckpointFile(copy).metadata["format"] == "pt"
    file = CheckpointFile(copy)
    assert file.config.MODEL.SMALL_KERNEL_MERGED == (name == "merged")
    assert file.config.MODEL.PRETRAINED is None
    assert file.classes.names == NAMES and file.classes.count == 4
    load_pretrained(build_replknet(file.config), file)


def test_files_of_other_programs_say_nothing():
    file = CheckpointFile(FIXTURES / "tiny31_official.pth")
    assert file.config is None and file.parts is None and file.metadata == {}
    assert file.classes.count is None and file.classes.names is None


@pytest.mark.parametrize(
    "metadata",
    [
        *({"class_names": text} for text in ("{", "{}", "[1]", "3")),
        *({"config": text} for text in ("a: [", "- 1", "3", "DATE: 2020-01-01", "1: {2: 3}")),
        {"class_names": "[" * 100_000},
        {"config": "[" * 10_000},
        {"config": "a: &a {b: 1}\nc: *a"},  # an alias, of which thirty make 2**30 sections
    ],
    ids=lambda metadata: str(metadata)[:40],
)
def test_damaged_metadata_of_weights_are_named(tmp_path, metadata):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"x": np.ones(1, "f4")}, metadata)
    with pytest.raises(InputError, match="is damaged: its metadata"):
        _ = CheckpointFile(path).classes


def test_a_configuration_of_a_later_version_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    metadata = {"config": "MODEL: {NUM_CLASSES: 3, SHAPE: round}", "class_names": json.dumps(NAMES)}
    write_safetensors(path, {"x": np.ones(1, "f4")}, metadata)
    file = CheckpointFile(path)
    assert file.classes.count == 3 and file.classes.names == NAMES
    with pytest.raises(InputError, match=f"{path}.*MODEL.SHAPE"):
        _ = file.config
