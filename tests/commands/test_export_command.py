"""export, merge and convert: right numbers out, and nothing out of bad input."""

import os
import re
import subprocess
import sys

import numpy as np
import paddle
import pytest
from tiny import FIXTURES, ROOT, TINY, TINY31, command

from replknet_paddle.checkpoints.checkpoint_file import CheckpointFile
from replknet_paddle.checkpoints.files import read_checkpoint, write_safetensors
from replknet_paddle.checkpoints.load import load_pretrained, load_state
from replknet_paddle.config import get_config
from replknet_paddle.deploy import open_backend
from replknet_paddle.deploy.backends import BACKENDS
from replknet_paddle.deploy.export import read_export
from replknet_paddle.model import build_replknet
from replknet_paddle.runtime.files import file_sha256

pytestmark = pytest.mark.numbers

export, merge, convert = command("export"), command("merge"), command("convert")

SOURCE = FIXTURES / "tiny31_paddlevit.pdparams"
MERGED = ["-opts", "MODEL.SMALL_KERNEL_MERGED", "True"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run folder whose checkpoint is a fresh network's weights."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text(TINY)
    model = build_replknet(get_config(folder / "config.yaml"))
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    write_safetensors(folder / "best", weights, {})
    return folder


@pytest.fixture
def cfg(tmp_path):
    """The flag that names the configuration of the fixtures."""
    path = tmp_path / "tiny31.yaml"
    path.write_text(TINY31)
    return f"-cfg={path}"


# ---- export


@pytest.mark.parametrize("format", ["paddle", "onnx"])
def test_a_checkpoint_in_its_run_folder_becomes_a_folder_that_predicts(
    tmp_path, run_folder, capsys, format
):
    if format == "onnx":
        pytest.importorskip("onnx")
    target = tmp_path / "dst"
    names = tmp_path / "names.txt"
    names.write_text("zero\none\ntwo\nthree\n")
    arguments = ["-format", format, "-class_names", str(names), "-output", str(target)]
    assert export([str(run_folder / "best"), *arguments]) == 0
    out = capsys.readouterr().out
    assert f"exported {run_folder / 'best'}" in out and f"({format}, fp32, " in out
    if format == "paddle":
        assert re.search(r"within [0-9.e-]+ of the largest .* \(backend paddle", out)
        images = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype("float32")
        outputs = open_backend(target).run(images)
        expected = open_backend(run_folder, "eager").run(images)
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
    assert export([str(run_folder), *flags, "-output", str(target)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"top-1 [0-9.]+ % \(\d+/30\) before, [0-9.]+ % \(\d+/30\) after", out), out
    assert "of 30 get the same label" in out
    assert read_export(target).precision == "int8"


def test_a_network_that_no_backend_runs_is_exported_all_the_same(
    tmp_path, run_folder, monkeypatch, capsys
):
    """As OpenVINO refuses a UPerNet on processors of SSE4 alone, when it computes."""

    def broken(*_):
        raise RuntimeError("bad\n combination")

    monkeypatch.setitem(BACKENDS, "paddle", BACKENDS["paddle"]._replace(opener=lambda *_: broken))
    assert export([str(run_folder), "-output", str(tmp_path / "dst")]) == 0
    out = capsys.readouterr().out
    assert re.search("since it does not run here: .*: bad combination; export it again", out)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["head.weight", "stages.0.blocks.0.pw_conv_1.norm._variance"])
@pytest.mark.parametrize(
    "line",
    [
        "export -output {t}/dst",
        "export -format onnx -output {t}/dst",
        "export -format onnx -precision int8 -data_path={data} -output {t}/dst",
        "merge -output {t}/dst.safetensors",
        "benchmark inference -output {t}/dst.json",
    ],
)
def test_broken_weights_are_refused_before_anything_is_written(
    tmp_path, run_folder, tiny_data, capsys, line, name, value
):
    if "onnx" in line:
        pytest.importorskip("onnx")
    if "int8" in line:
        pytest.importorskip("onnxruntime")
    weights = dict(load_state(run_folder / "best"))
    weights[name] = np.array(weights[name])
    weights[name].flat[-1] = value
    write_safetensors(tmp_path / "broken", weights, {})
    (tmp_path / "config.yaml").write_text(TINY)
    before = sorted(tmp_path.iterdir())
    command_name, *words = line.format(t=tmp_path, data=tiny_data).split()
    flags = [f"-cfg={tmp_path / 'config.yaml'}", str(tmp_path / "broken")]
    assert command(command_name)([*words, *flags]) == 2
    error = capsys.readouterr().err
    assert "weights are broken" in error and "values that are not finite numbers" in error
    assert sorted(tmp_path.iterdir()) == before


def test_weights_that_half_precision_cannot_hold_are_refused(tmp_path, run_folder, capsys):
    pytest.importorskip("onnx")
    weights = dict(load_state(run_folder / "best"))
    weights["head.weight"] = np.full_like(weights["head.weight"], 1e5)
    write_safetensors(tmp_path / "large", weights, {})
    (tmp_path / "config.yaml").write_text(TINY)
    flags = [f"-cfg={tmp_path / 'config.yaml'}", str(tmp_path / "large")]
    flags += ["-format=onnx", f"-output={tmp_path / 'dst'}"]
    assert export([*flags, "-precision=fp16"]) == 2
    assert "head.weight is too large for FLOAT16; allowed: fp32, bf16" in capsys.readouterr().err
    assert not (tmp_path / "dst").exists()


# ---- merge


def merged_logits(weights):
    """What the merged network gives for the fixture's images, and what the reference gives."""
    path = os.path.join(os.path.dirname(weights), "tiny31.yaml")
    model = build_replknet(get_config(path, MODEL__SMALL_KERNEL_MERGED=True))
    load_pretrained(model, str(weights))
    model.eval()
    expected = np.load(FIXTURES / "tiny31_expected.npz")
    with paddle.no_grad():
        return model(paddle.to_tensor(expected["images"])).numpy(), expected["logits"]


@pytest.mark.parametrize("source", ["tiny31_paddlevit.pdparams", "tiny31_official.pth"])
def test_the_merged_file_gives_the_reference_logits(tmp_path, cfg, source, capsys):
    target = tmp_path / "merged.safetensors"
    assert merge([cfg, str(FIXTURES / source), "-output", str(target)]) == 0
    out = capsys.readouterr().out
    assert str(target) in out
    assert re.search(r"folded: [0-9,]+ numbers, .*; outputs differ by at most \d", out)
    logits, expected = merged_logits(target)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged.safetensors", "tiny31.yaml"]
    tensors = read_checkpoint(target)
    assert not [name for name in tensors if "origin" in name or "small_kernel" in name]
    assert sum(name.endswith("large_kernel_reparam.weight") for name in tensors) == 5
    assert {value.dtype for value in tensors.values()} == {np.dtype("float32")}


def test_merged_weights_merge_again_to_the_same(tmp_path, cfg):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    assert merge([cfg, str(SOURCE), "-output", str(first)]) == 0
    assert merge([cfg, str(first), "-output", str(second), *MERGED]) == 0
    assert np.array_equal(*(merged_logits(path)[0] for path in (first, second)))


def test_a_checkpoint_in_its_run_folder_needs_no_config(tmp_path, cfg):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(TINY31)
    (tmp_path / "run" / "best").write_bytes(SOURCE.read_bytes())
    target = tmp_path / "merged.safetensors"
    assert merge([str(tmp_path / "run" / "best"), "-output", str(target)]) == 0
    np.testing.assert_allclose(*merged_logits(target), atol=1e-4)


@pytest.mark.parametrize("name", ["source.safetensors", "link.safetensors"])
def test_the_source_is_not_overwritten(tmp_path, cfg, capsys, name):
    source = tmp_path / "source.safetensors"
    assert merge([cfg, str(SOURCE), "-output", str(source)]) == 0
    os.link(source, tmp_path / "link.safetensors")
    before = source.read_bytes()
    assert merge([cfg, str(source), "-output", str(tmp_path / name), "-overwrite", *MERGED]) == 2
    assert f"{tmp_path / name} is the checkpoint itself" in capsys.readouterr().err
    assert source.read_bytes() == before


def test_bad_targets_are_reported_before_anything_is_computed(tmp_path, cfg, monkeypatch):
    monkeypatch.setattr(
        "replknet_paddle.zoo.open_network", lambda *_, **__: pytest.fail("computes")
    )
    for target in ("out.pdparams", "nowhere/out.safetensors", "."):
        assert merge([cfg, str(SOURCE), "-output", str(tmp_path / target)]) == 2


# ---- convert


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
    assert convert([source, "-output", destination, cfg, *options[1:]]) == 0
    assert "tensors" in capsys.readouterr().out
    found, wanted = load_state(destination), load_state(source)
    assert sorted(found) == sorted(wanted)
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name])


def test_names_and_framework_of_the_other_project(cfg, tmp_path):
    destination = str(tmp_path / "x.safetensors")
    convert([str(SOURCE), "-output", destination, cfg, "-to", "official"])
    original = read_checkpoint(FIXTURES / "tiny31_official.pth")
    converted = read_checkpoint(destination)
    assert {name: value.shape for name, value in converted.items()} == {
        name: value.shape for name, value in original.items()
    }
    assert CheckpointFile(destination).metadata["format"] == "pt"


def test_ema_weights_and_other_keys(cfg, tmp_path):
    source, destination = FIXTURES / "tiny31_official_train_ckpt.pth", str(tmp_path / "x.pdparams")
    assert convert([str(source), "-output", destination, cfg, "-weights", "model_ema"]) == 0
    np.testing.assert_array_equal(
        load_state(destination)["head.bias"], load_state(source, weights="model_ema")["head.bias"]
    )
    merged = str(FIXTURES / "tiny31_official_merged.pth")
    assert convert([merged, "-output", destination, "-overwrite", cfg, *MERGED]) == 0


# ---- from the shell


@pytest.mark.parametrize(
    "line, status",
    [
        pytest.param("merge {source} {cfg} -output {t}/x.safetensors", 0, marks=pytest.mark.slow),
        ("export {run} --format onnx --output {t}/dst", 0),
        ("convert {source} -o {t}/x.txt {cfg}", 2),
    ],
)
def test_the_commands_run_from_the_shell(run_folder, cfg, tmp_path, line, status):
    if "onnx" in line:
        pytest.importorskip("onnx")
    line = line.format(cfg=cfg, source=SOURCE, run=run_folder, t=tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "replknet_paddle", *line.split()],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr and ("error: " in done.stderr) == (status == 2)
