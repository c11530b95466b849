"""Training and evaluation of segmentation on the engine, in processes of their own."""

import shutil
import signal

import numpy as np
import pytest
from harness import Run, assert_same_end, finish, finish_ranks, metrics
from PIL import Image
from tiny import same_bits

from replknet_paddle.checkpoints.files import write_safetensors
from replknet_paddle.checkpoints.load import load_state
from replknet_paddle.checkpoints.run_folder import load_checkpoint
from replknet_paddle.commands import main
from replknet_paddle.config import get_config
from replknet_paddle.segmentation.upernet import build_upernet


@pytest.fixture(scope="module")
def trained(tiny_upernet_file, shapes, tmp_path_factory):
    """An uninterrupted run of three epochs."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    finish(flags(tiny_upernet_file, shapes, folder), output=folder.with_name("out.txt"))
    return folder


def flags(config, data, output, *more):
    return ["-cfg", config, "-data_path", data, "-output", output, *more]


def test_a_run_leaves_what_a_classifiers_run_leaves(trained):
    names = {path.name for path in trained.iterdir()}
    assert {"config.yaml", "log.txt", "metrics.jsonl", "last", "best", "checkpoints"} <= names
    records = metrics(trained)
    assert [record["step"] for record in records] == [4, 8, 12]
    for record in records:
        ious = [iou for iou in record["val_class_iou_percent"] if iou is not None]
        assert record["val_miou_percent"] == pytest.approx(np.mean(ious))
        assert 0 <= record["val_ema_pixel_accuracy_percent"] <= 100
    best = max(max(r["val_miou_percent"], r["val_ema_miou_percent"]) for r in records)
    assert load_checkpoint(str(trained / "best")).progress.best_score == best
    log = (trained / "log.txt").read_text()
    assert "mIoU" in log and "triangle" in log


def test_the_rate_warms_up_and_falls_to_zero_by_step(trained):
    rates = [record["learning_rate"] for record in metrics(trained)]
    # Steps 3, 7 and 11 of 12, counted from 0.
    assert rates == pytest.approx([1e-3 * 9 / 12, 1e-3 * 5 / 12, 1e-3 * 1 / 12])


def test_resuming_gives_the_same_bits(trained, tiny_upernet_file, shapes, tmp_path):
    """Stopped in mid-epoch by a signal, with workers; then resumed without any."""
    folder = tmp_path / "run"
    options = ("-opts", "DATA.NUM_WORKERS", "1")
    run = Run(flags(tiny_upernet_file, shapes, folder, *options), output=tmp_path / "first.txt")
    run.wait_for_step(folder, 5)
    run.send(signal.SIGTERM)
    assert run.wait() in (0, 143), run.text()
    assert load_checkpoint(str(folder / "last")).progress.step >= 5
    again = ["-resume", "auto", "-data_path", shapes, "-output", folder]
    finish(again, output=tmp_path / "second.txt")
    assert_same_end(folder, trained)


def test_processes_find_the_confusion_matrix_of_one(trained, shapes, tmp_path):
    """Four images over three processes: one has two of them."""
    evaluated = []
    for ranks in (1, 2, 3):
        folder = tmp_path / f"of{ranks}"
        arguments = ["-eval", "-pretrained", trained / "last", "-data_path", shapes]
        arguments += ["-output", folder, "-opts", "SEGMENTATION.EVAL_FLIP", "True"]
        if ranks == 1:
            finish(arguments, output=tmp_path / "one.txt")
        else:
            finish_ranks(arguments, folder=tmp_path, ranks=ranks)
        evaluated.append((metrics(folder), confusion_in((folder / "log.txt").read_text())))
    assert evaluated[0] == evaluated[1] == evaluated[2]


def confusion_in(log: str) -> list[str]:
    """The lines of the last evaluation: mIoU, accuracy, images, and each class."""
    lines = log.splitlines()
    start = max(i for i, line in enumerate(lines) if "mIoU" in line)
    return [lines[start].split("mIoU", 1)[1], *lines[start + 1 : start + 6]]


def test_classifier_weights_start_the_backbone(tiny_upernet_file, shapes, tmp_path):
    """A classifier's file fills the backbone; evaluation needs a whole segmentation network."""
    backbone = build_upernet(get_config(tiny_upernet_file)).backbone
    state = {name: value.numpy() for name, value in backbone.state_dict().items()}
    rng = np.random.default_rng(0)
    state |= {"head.weight": rng.random((10, 7), "float32"), "head.bias": np.zeros(7, "float32")}
    ones = np.ones(10, "float32")
    state |= {f"norm.{name}": ones for name in ("weight", "bias", "_mean", "_variance")}
    classifier = tmp_path / "classifier.safetensors"
    write_safetensors(classifier, state, {})
    folder = tmp_path / "run"
    start = ["-pretrained", classifier, "-opts", "TRAIN.NUM_EPOCHS", "1"]
    start += ["TRAIN.BASE_LR", "1e-12", "TRAIN.WARMUP_START_LR", "1e-18"]
    finish(flags(tiny_upernet_file, shapes, folder, *start), output=tmp_path / "out.txt")
    trained = load_state(folder / "last")
    for name, value in state.items():
        if name.endswith(".weight") and not name.startswith(("norm", "head")):
            np.testing.assert_allclose(trained[f"backbone.{name}"], value, atol=1e-6)
    evaluation = ["-cfg", tiny_upernet_file, "-eval", "-pretrained", classifier]
    evaluation += ["-data_path", shapes]
    text = finish(evaluation, output=tmp_path / "eval.txt", status=2)
    assert "missing from the file" in text and "decode_head" in text


def test_a_frozen_backbone_keeps_its_bits_and_the_heads_train(
    trained, tiny_upernet_file, shapes, tmp_path
):
    start = ["-freeze=backbone", "-epochs=1", "-opts", "MODEL.PRETRAINED_WEIGHTS", "model"]
    start = [f"-pretrained={trained / 'last'}", *start]
    finish(flags(tiny_upernet_file, shapes, tmp_path / "run", *start))
    before = load_state(trained / "last", weights="model")
    for kind in ("model", "model_ema"):
        after = load_state(tmp_path / "run" / "last", weights=kind)
        assert same_bits(before, after) == {n for n in before if n.startswith("backbone.")}


def test_masks_of_0_and_255_are_not_two_classes(tiny_upernet_file, shapes, tmp_path):
    """The second class never occurs, so that 100 % mIoU would mean nothing."""
    data = tmp_path / "data"
    shutil.copytree(shapes, data)
    (data / "class_names.txt").unlink()
    for name in ("train", "val"):
        for line in (data / f"{name}_list.txt").read_text().splitlines():
            path = data / line.split()[1]
            inside = np.array(Image.open(path)) > 0
            Image.fromarray((255 * inside).astype("uint8")).save(path)
    more = ("-opts", "MODEL.NUM_CLASSES", "2", "TRAIN.NUM_EPOCHS", "1")
    command = flags(tiny_upernet_file, data, tmp_path / "run", *more)
    said = finish(command, output=tmp_path / "one.txt")
    for name in ("train_list.txt", "val_list.txt"):
        assert f"{data / name} has no label of 1 of the 2 classes (MODEL.NUM_CLASSES): 1" in said
    # Two processes, each of which sees a part of the labels: four steps of two images on each.
    command = flags(tiny_upernet_file, data, tmp_path / "two", *more, "TRAIN.ACCUM_ITER", "1")
    texts = finish_ranks(command, folder=tmp_path)
    assert texts[0].count("has no label of 1 of the 2 classes") == 2
    (record,) = metrics(tmp_path / "two")
    assert record["step"] == 4 and np.isfinite(record["train_loss"])
    assert load_checkpoint(str(tmp_path / "two" / "last")).progress.batch_size == 4


@pytest.mark.parametrize("count", ["1", "None", "256"])
def test_a_number_of_classes_that_cannot_be(tiny_upernet_file, capsys, count):
    arguments = ["-cfg", str(tiny_upernet_file), "-opts", "MODEL.NUM_CLASSES", count]
    assert main(["segment", "train", *arguments]) == 2
    said = f"MODEL.NUM_CLASSES is {count}; allowed with MODEL.TYPE UPerNet: 2 to 255"
    assert said in capsys.readouterr().err
