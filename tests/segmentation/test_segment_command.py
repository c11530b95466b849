"""Prediction, exports and backends of segmentation, on a network that looks at its input."""

import json
import os
import resource
from pathlib import Path

import numpy as np
import paddle
import pytest
import yaml
from harness import finish
from PIL import Image

from replknet_paddle.checkpoints.load import load_pretrained
from replknet_paddle.commands import main
from replknet_paddle.config import get_config, override
from replknet_paddle.deploy.backends import open_backend
from replknet_paddle.deploy.export import ModelInfo, export_model, write_record
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.segmentation.pictures import legend_rows, palette_of, with_legend
from replknet_paddle.segmentation.predict import SegmentationPredictor
from replknet_paddle.segmentation.upernet import build_upernet


def network_of(run_folder):
    network = build_upernet(get_config(run_folder / "config.yaml"))
    load_pretrained(network, run_folder / "best")
    network.eval()
    return network


@pytest.mark.parametrize(
    "backend, align_corners",
    [
        ("eager", False),
        pytest.param("paddle", False, marks=pytest.mark.slow),
        ("paddle", True),
        ("onnxruntime", False),
        ("onnxruntime", True),
        ("openvino", False),
    ],
)
def test_every_backend_gives_the_networks_logits_at_any_size(run_folder, backend, align_corners):
    """Corners are where the dataset wants them."""
    network = network_of(run_folder)
    network.decode_head.align_corners = align_corners
    opened = open_backend(network, backend, config=network.config)
    rng = np.random.default_rng(0)
    for size in ((64, 64), (45, 83), (33, 32)):
        images = rng.normal(size=(1, 3, *size)).astype("float32")
        with paddle.no_grad():
            wanted = network(paddle.to_tensor(images)).numpy()
        got = opened.run(images)
        assert got.shape == (1, 4, *size)
        assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max()
    opened.close()


@pytest.mark.parametrize(
    "format, precision", [("paddle", "fp32"), ("onnx", "fp32"), ("onnx", "fp16")]
)
def test_an_export_predicts_as_its_checkpoint(
    run_folder, shapes, tmp_path, format, precision, capsys
):
    exported = tmp_path / "exported"
    flags = ["-pretrained", str(run_folder / "best"), "-format", format, "-precision", precision]
    assert main(["export", *flags, str(exported)]) == 0
    assert "within" in capsys.readouterr().out
    assert get_config(exported / "config.yaml").SEGMENTATION.SLIDE_STRIDE == 21
    image = shapes / "images" / "0003.png"
    wanted = SegmentationPredictor(run_folder / "best", backend="eager").labels(image)
    got = SegmentationPredictor(exported).labels(image)
    assert got.shape == wanted.shape == (64, 64) and len(np.unique(wanted)) > 1
    assert (got == wanted).mean() > (0.999 if precision == "fp32" else 0.99)


def test_evaluating_on_a_backend_or_an_export_gives_the_same_counts(run_folder, shapes, tmp_path):
    exported = str(tmp_path / "exported")
    assert main(["export", str(run_folder), "-format", "onnx", "-output", exported]) == 0
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    config["MODEL"]["PRETRAINED"] = str(run_folder / "best")
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
    records = {}
    for name, flags in {
        "eager": ["-pretrained", str(run_folder / "best")],
        "file": [str(run_folder / "best")],
        "folder": [str(run_folder)],
        "yaml": [str(tmp_path / "own.yaml")],
        "backend": [str(run_folder / "best"), "-backend", "onnxruntime"],
        "export": [exported],
    }.items():
        folder = tmp_path / name
        flags += ["-data_path", str(shapes), "-output", str(folder)]
        assert main(["segment", "eval", *flags]) == 0
        records[name] = json.loads((folder / "metrics.jsonl").read_text())["val_class_iou_percent"]
    assert any(iou for iou in records["eager"])
    assert records["eager"] == records["file"] == records["folder"] == records["yaml"]
    for name in ("backend", "export"):
        assert records[name] == pytest.approx(records["eager"], abs=0.1)


def test_predict_writes_overlays_in_the_datasets_palette(run_folder, shapes, tmp_path, capsys):
    out = tmp_path / "out"
    (tmp_path / "broken.png").write_bytes(b"no image")
    inputs = [str(shapes / "images" / "0001.png"), str(tmp_path / "broken.png")]
    status = main(["segment", "predict", str(run_folder), *inputs, "-output", str(out)])
    captured = capsys.readouterr()
    assert status == 1 and "cannot identify" in captured.out
    assert sorted(path.name for path in out.iterdir()) == [
        "000001_0001.png",
        "000001_0001_labels.png",
    ]
    labels = Image.open(out / "000001_0001_labels.png")
    palette = np.array(labels.getpalette()[:12]).reshape(4, 3)
    assert labels.mode == "P" and palette.tolist()[1] == [0xE6, 0x19, 0x4B]
    pixels = np.array(Image.open(inputs[0])).astype(float)
    drawn = np.array(Image.open(out / "000001_0001.png"))
    overlay, legend = drawn[:64, :64], drawn[:, 64:]
    wanted = (pixels + palette[np.array(labels)]) / 2
    assert np.abs(overlay - wanted).max() <= 0.5
    rows = [np.flatnonzero((legend == colour).all(axis=-1).any(axis=1)) for colour in palette]
    counts = np.bincount(np.array(labels).ravel(), minlength=4)
    assert np.count_nonzero(counts) > 1
    assert [len(found) > 0 for found in rows] == [count > 0 for count in counts]
    order = [i for i in np.argsort(-counts, kind="stable") if counts[i]]
    tops = [rows[i].min() for i in order]
    assert tops == sorted(tops)  # the largest share on top
    wanted_labels = SegmentationPredictor(run_folder, backend="eager").labels(inputs[0])
    assert (np.array(labels) == wanted_labels).mean() > 0.999


def main_in_little_memory(arguments):
    """The command, with 500 MB more than are taken when it starts."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 500 * 10**6,) * 2)
    return main(arguments)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux")
def test_a_picture_that_memory_does_not_hold_is_skipped(run_folder, shapes, tmp_path):
    """Its values alone are 288 MB, twice."""
    Image.new("RGB", (6000, 4000)).save(tmp_path / "large.jpg")
    inputs = [tmp_path / "large.jpg", shapes / "images" / "0001.png"]
    flags = ["-output", tmp_path / "out", "-backend", "eager"]
    arguments = ["segment", "predict", run_folder, *inputs, *flags]
    said = finish([str(a) for a in arguments], target=main_in_little_memory, status=1)
    assert f"{tmp_path}/large.jpg: out of memory\n" in said and "0001.png: " in said
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"000002_0001.png", "000002_0001_labels.png"}


def test_wrong_models_are_one_message(run_folder, shapes, tmp_path, capsys):
    image, out = str(shapes / "images" / "0001.png"), str(tmp_path / "out")
    assert main(["segment", "predict", str(tmp_path / "none"), image, "-output", out]) == 2
    assert "no model" in capsys.readouterr().err
    assert main(["predict", str(run_folder), image]) == 2
    assert "replknet segment predict" in capsys.readouterr().err
    nano = "configs/replknet_nano.yaml"
    assert main(["segment", "train", "-cfg", nano, "-data_path", str(shapes)]) == 2
    assert "MODEL.TYPE is RepLKNet; allowed for segmentation: UPerNet" in capsys.readouterr().err
    flags = ["-pretrained", str(run_folder), "-format", "onnx", "-precision", "int8"]
    assert main(["export", *flags, "-data_path", str(shapes), out]) == 2
    assert "allowed here: fp32, fp16, bf16" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_computed_colours_differ():
    palette = palette_of(None, 150)
    assert len(np.unique(palette, axis=0)) > 140 and palette.dtype == np.uint8


def test_a_legend_names_what_is_there_by_its_share():
    names, palette = ["sky", "sea", "Gebäude", "path"], palette_of(None, 4)
    shares = np.array([[0.25, 0.5], [0, 0], [0.7496, 0.5], [0.0004, 0]])
    assert legend_rows(shares, names, palette) == [
        ("Gebäude", palette[2].tolist(), "75.0 / 50.0 %"),
        ("sky", palette[0].tolist(), "25.0 / 50.0 %"),
        ("path", palette[3].tolist(), "0.0 / 0.0 %"),
    ]


@pytest.mark.parametrize("size", [(1, 1), (64, 64), (40, 3000), (3000, 40), (1500, 1000)])
def test_a_legend_of_many_classes_has_a_row_for_the_rest(size):
    count = 50
    shares = np.full((count, 1), 1 / count)
    rows = legend_rows(shares, ["a long name of a class" * 5] * count, palette_of(None, count))
    assert len(rows) == 20 and rows[-1] == ("31 others", None, "62.0 %")
    drawn = with_legend(Image.new("RGB", size, "red"), rows)
    pixels = np.asarray(drawn)
    assert (pixels[: size[1], : size[0]] == (255, 0, 0)).all()
    assert (pixels[size[1] :, : size[0]] == 255).all() and (pixels[:, -3:] == 255).all()
    if min(size) >= 450:
        assert drawn.height == size[1]  # nothing is higher than the picture


@pytest.mark.parametrize("format", ["paddle", "onnx"])
def test_broken_weights_are_not_exported(run_folder, tmp_path, format):
    if format == "onnx":
        pytest.importorskip("onnx")
    network = network_of(run_folder)
    weight = network.decode_head.conv_seg.weight
    weight.set_value(np.full(weight.shape, np.nan, "float32"))
    with pytest.raises(InputError, match="decode_head.conv_seg.weight has values that are not fin"):
        export_model(network, tmp_path / "dst", ModelInfo(network.config, format))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("classes", [3, 5, 255])
def test_the_model_decides_on_its_classes(run_folder, tmp_path, classes):
    network = network_of(run_folder)
    export_model(network, tmp_path / "dst", ModelInfo(network.config))
    changes = {"MODEL__NUM_CLASSES": classes, "SEGMENTATION__PALETTE": None}
    write_record(ModelInfo(override(network.config, **changes)), tmp_path / "dst")
    with pytest.raises(InputError, match=rf"\(1, 4, 32, 32\), .* MODEL.NUM_CLASSES {classes}; exp"):
        SegmentationPredictor(tmp_path / "dst")
