"""Merging a checkpoint on the command line: right numbers out, and nothing out of bad input."""

import os
import subprocess
import sys

import numpy as np
import paddle
import pytest
from tiny import FIXTURES, ROOT, command

from replknet_paddle.checkpoints.convert import load_pretrained
from replknet_paddle.config import get_config, update_config
from replknet_paddle.model import build_replknet

pytestmark = pytest.mark.numbers

main = command("merge")

SOURCE = FIXTURES / "tiny31_paddlevit.pdparams"
CONFIG = """
DATA:
  IMAGE_SIZE: 64
MODEL:
  NUM_CLASSES: 10
  LAYERS: [1, 1, 2, 1]
  CHANNELS: [8, 16, 24, 32]
  LARGE_KERNEL_SIZES: [31, 29, 27, 13]
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "tiny31.yaml"
    path.write_text(CONFIG)
    return path


def merged_logits(config_file, weights):
    """What the merged network gives for the fixture's images."""
    opts = type("Arguments", (), {"opts": ["MODEL.SMALL_KERNEL_MERGED", "True"]})
    model = build_replknet(update_config(get_config(config_file), opts))
    load_pretrained(model, str(weights))
    model.eval()
    expected = np.load(FIXTURES / "tiny31_expected.npz")
    with paddle.no_grad():
        return model(paddle.to_tensor(expected["images"])).numpy(), expected["logits"]


@pytest.mark.parametrize("source", ["tiny31_paddlevit.pdparams", "tiny31_official.pth"])
def test_the_merged_file_gives_the_reference_logits(tmp_path, config_file, source, capsys):
    target = tmp_path / "merged.safetensors"
    status = main(["-cfg", str(config_file), "-pretrained", str(FIXTURES / source), str(target)])
    assert status == 0, capsys.readouterr().err
    assert str(target) in capsys.readouterr().out
    logits, expected = merged_logits(config_file, target)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged.safetensors", "tiny31.yaml"]


def test_the_merged_file_holds_the_merged_network_alone(tmp_path, config_file):
    from safetensors.numpy import load_file

    target = tmp_path / "merged.safetensors"
    assert main(["-cfg", str(config_file), "-pretrained", str(SOURCE), str(target)]) == 0
    tensors = load_file(target)
    assert not [name for name in tensors if "origin" in name or "small_kernel" in name]
    assert sum(name.endswith("large_kernel_reparam.weight") for name in tensors) == 5
    assert {value.dtype for value in tensors.values()} == {np.dtype("float32")}


def test_merged_weights_merge_again_to_the_same(tmp_path, config_file):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    assert main(["-cfg", str(config_file), "-pretrained", str(SOURCE), str(first)]) == 0
    again = ["-pretrained", str(first), str(second), "-opts", "MODEL.SMALL_KERNEL_MERGED", "True"]
    assert main(["-cfg", str(config_file), *again]) == 0
    assert np.array_equal(*(merged_logits(config_file, path)[0] for path in (first, second)))


def test_a_checkpoint_in_its_run_folder_needs_no_config(tmp_path, config_file):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(CONFIG)
    (run / "best").write_bytes(SOURCE.read_bytes())
    target = tmp_path / "merged.safetensors"
    assert main(["-pretrained", str(run / "best"), str(target)]) == 0
    logits, expected = merged_logits(config_file, target)
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.slow
def test_the_command_runs_from_the_shell(tmp_path, config_file):
    target = tmp_path / "merged.safetensors"
    done = subprocess.run(
        [sys.executable, "-m", "replknet_paddle", "merge", "--cfg", str(config_file)]
        + ["--pretrained", str(SOURCE), str(target)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert target.exists() and "Traceback" not in done.stderr


def bad_inputs(folder):
    """{what: (source, config, target, part of the message)}, with the files that they need."""
    good_config, good_target = folder / "tiny31.yaml", folder / "out.safetensors"
    (folder / "garbage.pdparams").write_bytes(os.urandom(4096))
    (folder / "empty.pdparams").write_bytes(b"")
    (folder / "cut.pdparams").write_bytes(SOURCE.read_bytes()[:20_000])
    (folder / "other.yaml").write_text(CONFIG.replace("24", "20"))
    (folder / "classes.yaml").write_text(CONFIG.replace("NUM_CLASSES: 10", "NUM_CLASSES: 7"))
    (folder / "wrong.yaml").write_text("MODLE: {NAME: x}")
    (folder / "occupied.safetensors").mkdir()
    (folder / "file").write_text("")
    return {
        "no checkpoint": (folder / "nowhere", good_config, good_target, "nowhere"),
        "no checkpoint, no config": (folder / "nowhere", None, good_target, "nowhere"),
        "no run folder": (SOURCE, None, good_target, "-cfg"),
        "no config": (SOURCE, folder / "no.yaml", good_target, "no.yaml"),
        "wrong config": (SOURCE, folder / "wrong.yaml", good_target, "MODEL.NAME"),
        "other channels": (SOURCE, folder / "other.yaml", good_target, "tiny31_paddlevit"),
        "other classes": (SOURCE, folder / "classes.yaml", good_target, "head"),
        "garbage": (folder / "garbage.pdparams", good_config, good_target, "garbage.pdparams"),
        "empty": (folder / "empty.pdparams", good_config, good_target, "empty.pdparams"),
        "cut short": (folder / "cut.pdparams", good_config, good_target, "cut.pdparams"),
        "a folder": (folder, good_config, good_target, str(folder)),
        "another network": (
            FIXTURES / "tinyxl_paddlevit.pdparams",
            good_config,
            good_target,
            "tinyxl_paddlevit",
        ),
        "no such folder": (SOURCE, good_config, folder / "nowhere" / "out", "nowhere"),
        "below a file": (SOURCE, good_config, folder / "file" / "out", "file"),
        "target is a folder": (
            SOURCE,
            good_config,
            folder / "occupied.safetensors",
            "occupied.safetensors",
        ),
        "target of another kind": (SOURCE, good_config, folder / "out.pdparams", ".safetensors"),
    }


WHAT = [
    "no checkpoint",
    "no checkpoint, no config",
    "no run folder",
    "no config",
    "wrong config",
    "other channels",
    "other classes",
    "garbage",
    "empty",
    "cut short",
    "a folder",
    "another network",
    "no such folder",
    "below a file",
    "target is a folder",
    "target of another kind",
]


@pytest.mark.parametrize("what", WHAT)
def test_bad_input_is_one_message_and_writes_nothing(tmp_path, config_file, capsys, what):
    inputs = bad_inputs(tmp_path)
    assert list(inputs) == WHAT
    source, config, target, says = inputs[what]
    before = sorted(path for path in tmp_path.rglob("*"))
    arguments = ["-pretrained", str(source), str(target)]
    if config is not None:
        arguments += ["-cfg", str(config)]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and says in captured.err
    assert captured.err.count("error: ") == 1 and "Traceback" not in captured.err
    assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["source.safetensors", "link.safetensors"])
def test_the_source_is_not_overwritten(tmp_path, config_file, capsys, name):
    source = tmp_path / "source.safetensors"
    assert main(["-cfg", str(config_file), "-pretrained", str(SOURCE), str(source)]) == 0
    os.link(source, tmp_path / "link.safetensors")
    before = source.read_bytes()
    merged = ["-opts", "MODEL.SMALL_KERNEL_MERGED", "True"]
    arguments = ["-cfg", str(config_file), "-pretrained", str(source), str(tmp_path / name)]
    assert main([*arguments, *merged]) == 2
    assert f"{tmp_path / name} is the checkpoint to merge" in capsys.readouterr().err
    assert source.read_bytes() == before


def test_bad_targets_are_reported_before_anything_is_computed(tmp_path, config_file, monkeypatch):
    monkeypatch.setattr(
        "replknet_paddle.deploy.backends.load_network", lambda *_: pytest.fail("computes")
    )
    for target in ("out.pdparams", "nowhere/out.safetensors", "."):
        flags = ["-cfg", str(config_file), "-pretrained", str(SOURCE)]
        assert main([*flags, str(tmp_path / target)]) == 2


def test_a_failed_merge_keeps_the_older_file(tmp_path, config_file):
    target = tmp_path / "merged.safetensors"
    target.write_bytes(b"precious")
    source = FIXTURES / "tinyxl_paddlevit.pdparams"
    assert main(["-cfg", str(config_file), "-pretrained", str(source), str(target)]) == 2
    assert target.read_bytes() == b"precious"
