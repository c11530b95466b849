"""A checkpoint explains itself, and its checksum is verified wherever it is read."""

import json
import shutil

import numpy as np
import pytest
from harness import finish
from tiny import FIXTURES, TINY, command

from replknet_paddle.checkpoints.checkpoint_file import CheckpointFile
from replknet_paddle.checkpoints.files import write_safetensors
from replknet_paddle.checkpoints.load import load_pretrained
from replknet_paddle.checkpoints.run_folder import Checkpoint, Progress, save_checkpoint
from replknet_paddle.config import get_config
from replknet_paddle.deploy import Predictor
from replknet_paddle.model import build_replknet
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.zoo import get_model

DAMAGE = "is damaged: what it holds is not what was written"
# 2**30 sections
ALIASES = "x0: &x0 {y: 1}\n" + "".join(
    f"x{i}: &x{i} {{y: *x{i - 1}, z: *x{i - 1}}}\n" for i in range(1, 31)
)
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
    "load_pretrained": lambda folder: load_pretrained(
        build_replknet(get_config(folder / "config.yaml")), folder / "best"
    ),
    "get_model": lambda folder: get_model(folder / "config.yaml", pretrained=folder / "best"),
    "predictor": lambda folder: Predictor(str(folder / "best"), backend="eager"),
}


@pytest.mark.parametrize("reader", READERS)
def test_one_changed_bit_is_found(damaged, reader):
    with pytest.raises(InputError, match=DAMAGE):
        READERS[reader](damaged)


@pytest.mark.parametrize(
    "line",
    [
        "export {source} -output {out}",
        "merge {source} -output {out}.safetensors",
        "convert {source} -output {out}.safetensors",
    ],
)
def test_commands_refuse_it(damaged, tmp_path, capsys, line):
    name, *arguments = line.format(source=damaged / "best", out=tmp_path / "out").split()
    assert command(name)(arguments) == 2
    assert DAMAGE in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("flags", [["-eval"], []])
def test_evaluation_and_fine_tuning_refuse_it(damaged, tiny_data, tmp_path, flags):
    source = damaged / "best"
    arguments = [f"-pretrained={source}", f"-data_path={tiny_data}", f"-output={tmp_path / 'new'}"]
    said = finish([*arguments, *flags], output=tmp_path / "log", status=2)
    assert f"error: {source} {DAMAGE}" in said
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "line",
    ["merge {source} -output {copy}", "convert {source} -output {copy} -to official", None],
)
def test_a_file_copied_out_of_its_run_folder_explains_itself(run_folder, tmp_path, line):
    source, copy = run_folder / "best", tmp_path / "elsewhere" / "copy.safetensors"
    copy.parent.mkdir()
    if line is None:
        shutil.copy(source, copy)
    else:
        name, *arguments = line.format(source=source, copy=copy).split()
        assert command(name)(arguments) == 0
    file = CheckpointFile(copy)
    assert file.config.MODEL.SMALL_KERNEL_MERGED == ("merge" in str(line))
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
        {"config": ALIASES},
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
