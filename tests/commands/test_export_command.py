"""Exporting on the command line: a folder that is enough, figures in the report, bad input."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from tiny import ROOT, TINY, command

from replknet_paddle.checkpoints.writers import write_safetensors
from replknet_paddle.config import get_config
from replknet_paddle.deploy import open_backend
from replknet_paddle.deploy.export import read_export
from replknet_paddle.model import build_replknet
from replknet_paddle.runtime.files import file_sha256

main = command("export")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run folder whose checkpoint is a fresh network's weights."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text(TINY)
    model = build_replknet(get_config(folder / "config.yaml"))
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    write_safetensors(folder / "best", weights, {})
    return folder


def eager_logits(folder, images):
    return open_backend(folder, "dygraph").run(images)


@pytest.mark.parametrize("format", ["paddle", "onnx"])
def test_a_checkpoint_in_its_run_folder_becomes_a_folder_that_predicts(
    tmp_path, run_folder, capsys, format
):
    if format == "onnx":
        pytest.importorskip("onnx")
    target = tmp_path / "dst"
    names = tmp_path / "names.txt"
    names.write_text("zero\none\ntwo\nthree\n")
    arguments = ["-format", format, "-class_names", str(names), str(target)]
    assert main(["-pretrained", str(run_folder / "best"), *arguments]) == 0
    out = capsys.readouterr().out
    assert f"exported {run_folder / 'best'}" in out and f"({format}, fp32, " in out
    if format == "paddle":
        assert re.search(r"within [0-9.e-]+ of the largest .* \(backend paddle", out)
        images = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype("float32")
        outputs, expected = open_backend(target).run(images), eager_logits(run_folder, images)
        assert np.abs(outputs - expected).max() <= 1e-4 * np.abs(expected).max()
    info = read_export(target)
    assert info.config == get_config(run_folder / "config.yaml")
    assert info.class_names == ("zero", "one", "two", "three")
    assert info.source_sha256 == file_sha256(run_folder / "best")


def test_int8_is_calibrated_on_a_list_and_its_accuracy_reported(
    tmp_path, run_folder, tiny_data, capsys
):
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package)
    target = tmp_path / "dst"
    flags = ["-format", "onnx", "-precision", "int8", f"-data_path={tiny_data}"]
    flags += ["-calibration_images", "12", "-validation_images", "30"]
    assert main(["-pretrained", str(run_folder), *flags, str(target)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"top-1 [0-9.]+ % \(\d+/30\) before, [0-9.]+ % \(\d+/30\) after", out), out
    assert "of 30 get the same label" in out
    assert read_export(target).precision == "int8"


def bad_inputs(folder, run):
    """{what: (flags, target, part of the message)}."""
    good = ["-pretrained", str(run / "best")]
    (folder / "occupied").mkdir()
    (folder / "occupied" / "precious").write_text("")
    (folder / "names.txt").write_text("only\nthree\nnames\n")
    (folder / "latin.txt").write_bytes(b"\xe4\n")
    (folder / "other.yaml").write_text(TINY.replace("10]", "12]"))
    (folder / "empty_run").mkdir()
    (folder / "empty_run" / "config.yaml").write_text(TINY)
    int8 = [*good, "-format", "onnx", "-precision", "int8"]
    return {
        "format": ([*good, "-format", "tflite"], "dst", "allowed: paddle, onnx"),
        "precision": ([*good, "-precision", "fp8"], "dst", "allowed: fp32, fp16, bf16, int8"),
        "int8 paddle": ([*good, "-precision", "int8"], "dst", "allowed: -format onnx"),
        "no checkpoint": (["-pretrained", str(folder / "nowhere")], "dst", "nowhere"),
        "no weights in the run": (["-pretrained", str(folder / "empty_run")], "dst", "neither"),
        "another network": ([*good, "-cfg", str(folder / "other.yaml")], "dst", "does not fit"),
        "occupied": (good, "occupied", "not an earlier export"),
        "no parent": (good, "no/where", "no folder"),
        "three names": ([*good, "-class_names", str(folder / "names.txt")], "dst", "has 3 lines"),
        "names": ([*good, "-class_names", str(folder / "latin.txt")], "dst", "UTF-8"),
        "no names": ([*good, "-class_names", str(folder / "none.txt")], "dst", "none.txt"),
        "no data": ([*int8, "-data_path", str(folder / "no_data")], "dst", "no_data"),
        "no image": ([*int8, "-calibration_images", "0"], "dst", "calibration_images 0"),
        "no validation": ([*int8, "-validation_images", "0"], "dst", "-validation_images 0; al"),
        "less than none": ([*good, "-validation_images", "-1"], "dst", "-validation_images -1"),
    }


WHAT = [
    "format", "precision", "int8 paddle", "no checkpoint", "no weights in the run",
    "another network", "occupied", "no parent", "three names", "names", "no names", "no data",
    "no image", "no validation", "less than none",
]  # fmt: skip


@pytest.mark.parametrize("what", WHAT)
def test_bad_input_is_one_message_and_writes_nothing(tmp_path, run_folder, capsys, what):
    inputs = bad_inputs(tmp_path, run_folder)
    assert list(inputs) == WHAT
    flags, target, says = inputs[what]
    before = sorted(tmp_path.rglob("*"))
    assert main([*flags, str(tmp_path / target)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and says in captured.err
    assert "Traceback" not in captured.err
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_runs_from_the_shell(tmp_path, run_folder):
    pytest.importorskip("onnx")  # quickly written
    done = subprocess.run(
        [sys.executable, "-m", "replknet_paddle", "export", "--format", "onnx"]
        + ["--pretrained", str(run_folder / "best"), str(tmp_path / "dst")],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "dst").exists() and "Traceback" not in done.stderr
