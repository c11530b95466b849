import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import command

from replknet_paddle.checkpoints.checkpoint_file import CheckpointFile
from replknet_paddle.checkpoints.files import read_checkpoint
from replknet_paddle.checkpoints.load import load_state

main = command("convert")

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
ROOT = FIXTURES.parent.parent

TINY31 = """
MODEL:
  NUM_CLASSES: 10
  LARGE_KERNEL_SIZES: [31, 29, 27, 13]
  LAYERS: [1, 1, 2, 1]
  CHANNELS: [8, 16, 24, 32]
"""


@pytest.fixture
def cfg(tmp_path):
    path = tmp_path / "tiny31.yaml"
    path.write_text(TINY31)
    return str(path)


@pytest.mark.parametrize(
    "source",
    ["official.pth", "official_ddp_fp16_legacy.pth", "mmpretrain.pth", "paddlevit.pdparams"],
)
@pytest.mark.parametrize(
    "options",
    [
        ["native.pdparams"],
        ["native.safetensors"],
        ["official.safetensors", "-to", "official"],
        ["mmpretrain.safetensors", "--to", "mmpretrain"],
    ],
)
def test_every_source_to_every_destination(source, options, cfg, tmp_path, capsys):
    source, destination = str(FIXTURES / f"tiny31_{source}"), str(tmp_path / options[0])
    assert main([source, destination, "-cfg", cfg, *options[1:]]) == 0
    assert "tensors" in capsys.readouterr().out
    found, wanted = load_state(destination), load_state(source)
    assert sorted(found) == sorted(wanted)
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name])


def test_names_and_framework_of_the_other_project(cfg, tmp_path):
    destination = str(tmp_path / "x.safetensors")
    main([str(FIXTURES / "tiny31_paddlevit.pdparams"), destination, "-cfg", cfg, "-to", "official"])
    original = read_checkpoint(FIXTURES / "tiny31_official.pth")
    converted = read_checkpoint(destination)
    assert {name: value.shape for name, value in converted.items()} == {
        name: value.shape for name, value in original.items()
    }
    assert CheckpointFile(destination).metadata["format"] == "pt"


def test_moving_average_and_other_keys(cfg, tmp_path):
    source, destination = FIXTURES / "tiny31_official_train_ckpt.pth", str(tmp_path / "x.pdparams")
    assert main([str(source), destination, "-cfg", cfg, "-weights", "model_ema"]) == 0
    np.testing.assert_array_equal(
        load_state(destination)["head.bias"], load_state(source, weights="model_ema")["head.bias"]
    )
    merged = str(FIXTURES / "tiny31_official_merged.pth")
    assert (
        main([merged, destination, "-cfg", cfg, "-opts", "MODEL.SMALL_KERNEL_MERGED", "True"]) == 0
    )


@pytest.mark.parametrize(
    "source, destination, options, words",
    [
        ("tiny31_official.pth", "x.pth", [], ["'.pth'", "allowed: .safetensors, .pdparams"]),
        ("tiny31_official.pth", "x.pdparams", ["-to", "official"], ["native names"]),
        ("tinyxl_official.pth", "x.pdparams", [], ["does not fit", "MODEL.DW_RATIO: 1.5"]),
        ("tiny31_official_merged.pth", "x.pdparams", [], ["MODEL.SMALL_KERNEL_MERGED: True"]),
        ("absent.pth", "x.pdparams", [], ["absent.pth", "no such file"]),
        ("tiny31_official.pth", "absent/x.pdparams", [], ["no folder", "absent"]),
        ("tiny31_official.pth", "x.pdparams", ["-opts", "MODEL.NAMES", "x"], ["MODEL.NAMES"]),
    ],
)
def test_mistakes_are_reported_in_one_message(
    source, destination, options, words, cfg, tmp_path, capsys
):
    status = main([str(FIXTURES / source), str(tmp_path / destination), "-cfg", cfg, *options])
    assert status == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    for word in words:
        assert word in error
    assert not (tmp_path / destination).exists()


def test_file_outside_a_run_folder_needs_a_config(tmp_path, capsys):
    assert main([str(FIXTURES / "tiny31_official.pth"), str(tmp_path / "x.pdparams")]) == 2
    assert "-cfg" in capsys.readouterr().err


def test_command_line_as_people_type_it(cfg, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "replknet_paddle",
            "convert",
            str(FIXTURES / "tiny31_official.pth"),
            str(tmp_path / "x.txt"),
            "-cfg",
            cfg,
        ],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and "error: " in done.stderr
