"""Probabilities: `replknet calibrate`, -tta flip and -reject, against numpy on the logits."""

import contextlib
import io
import json
import re

import numpy as np
import paddle
import pytest
from harness import finish_ranks, make_run, metrics
from scipy import special
from tiny import PICTURES, command, table

from replknet_paddle.checkpoints.load import load_state
from replknet_paddle.checkpoints.run_folder import config_of
from replknet_paddle.config import get_config, override
from replknet_paddle.data.dataset import get_dataset
from replknet_paddle.deploy.backends import BACKENDS
from replknet_paddle.deploy.page import look
from replknet_paddle.deploy.predict import Predictor, inference_model
from replknet_paddle.engine.task import ClassificationTask
from replknet_paddle.zoo import open_network

predict = command("predict")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def calibrated(run_folder, tiny_data, tmp_path_factory):
    """The weights with their temperature, and what the command has printed."""
    file, said = tmp_path_factory.mktemp("calibrated") / "c.safetensors", io.StringIO()
    flags = [f"-data_path={tiny_data}", "-backend=eager", f"-output={file}"]
    with contextlib.redirect_stdout(said):
        assert command("calibrate")([str(run_folder), *flags]) == 0
    return file, said.getvalue()


def shares_of(network, images, temperature, *, flip=False) -> np.ndarray:
    """Probabilities (N, classes), float64, of images or, to `flip`, their mean over both views."""
    views = []
    for view in (images, images[..., ::-1])[: 1 + flip]:
        with paddle.no_grad():
            logits = network(paddle.to_tensor(np.ascontiguousarray(view))).numpy()
        views.append(special.softmax(logits.astype("f8") / temperature, axis=1))
    return np.mean(views, axis=0)


@pytest.fixture(scope="module")
def validation(run_folder, tiny_data):
    """The network with the validation images, and their labels."""
    network = open_network(run_folder)
    dataset = get_dataset(override(network.config, DATA__DATA_PATH=str(tiny_data)), False)
    return network, np.stack([dataset[0, i][0] for i in range(len(dataset))]), dataset.labels


def loss_of(shares, labels) -> float:
    return -np.log(shares[np.arange(len(labels)), labels]).mean()


def test_the_file_has_the_weights_and_the_best_temperature(run_folder, calibrated, validation):
    (file, said), (network, images, labels) = calibrated, validation
    for name, value in load_state(run_folder / "best").items():
        np.testing.assert_array_equal(load_state(file)[name], value)
    config = config_of(file)
    best = config.MODEL.TEMPERATURE
    shares = {t: shares_of(network, images, t) for t in (1, best, 1.01 * best, best / 1.01)}
    losses = {t: loss_of(shares[t], labels) for t in shares}
    assert not config.EVAL and best != 1 and min(losses, key=losses.get) == best
    before, after = re.findall(r"likelihood ([\d.]+), expected calibration error ([\d.]+) %", said)
    assert float(before[0]) == pytest.approx(losses[1], abs=1e-5)
    assert float(after[0]) == pytest.approx(losses[best], abs=1e-5)
    assert float(after[1]) < float(before[1])


@pytest.mark.parametrize("name", ["merge", "convert", "export"])
def test_what_is_made_of_the_file_keeps_the_temperature(
    name, run_folder, calibrated, tiny_data, tmp_path, capsys
):
    target = tmp_path / ("folder" if name == "export" else "new.safetensors")
    assert command(name)([str(calibrated[0]), f"-output={target}"]) == 0
    assert config_of(target).MODEL.TEMPERATURE == config_of(calibrated[0]).MODEL.TEMPERATURE
    if name == "export":  # is never evaluated at another one
        flags = [f"-cfg={run_folder / 'config.yaml'}", f"-data_path={tiny_data}", "-nproc=1"]
        assert command("eval")([str(target), *flags]) == 2
        assert "MODEL.TEMPERATURE is " in capsys.readouterr().err


@pytest.mark.parametrize("name", BACKENDS)
def test_probabilities_are_softmax_of_logits_over_the_temperature(
    name, calibrated, validation, tiny_data, tmp_path
):
    """Of both views, to flip, their mean; on each backend, in predictions and in evaluation."""
    for package in BACKENDS[name].packages:
        pytest.importorskip(package)
    (file, _), (network, _, labels) = calibrated, validation
    temperature = config_of(file).MODEL.TEMPERATURE
    for flip in (False, True):
        predictor = Predictor(file, backend=name, flip=flip)
        images = np.stack([predictor.preprocess(path) for path in PICTURES])
        wanted = shares_of(network, images, temperature, flip=flip)
        scores = predictor.scores(images)
        np.testing.assert_allclose(scores, wanted, rtol=1e-4, atol=1e-6)
        if flip:  # a picture and its mirror image are one
            np.testing.assert_array_equal(predictor.scores(images[..., ::-1]), scores)
        else:
            assert list(look(predictor, PICTURES[0]).classes.values()) == pytest.approx(
                sorted(wanted[0], reverse=True), rel=1e-4
            )
    flags = [f"-data_path={tiny_data}", f"-backend={name}", "-tta=flip", "-amp", "-nproc=1"]
    assert command("eval")([str(file), *flags, f"-output={tmp_path / 'out'}"]) == 0
    shares = shares_of(network, validation[1], temperature, flip=True)
    (record,), right = metrics(tmp_path / "out"), shares.argmax(axis=1) == labels
    assert record["val_top1_percent"] == pytest.approx(100 * right.mean())
    assert record["val_loss"] == pytest.approx(loss_of(shares, labels), rel=1e-4)


@pytest.mark.parametrize("flip", [False, True])
def test_logits_that_differ_by_hundreds_keep_their_order(flip):
    """By which AUC and the first five classes are found."""
    logits = np.random.default_rng(0).normal(0, 300, (50, 8)).astype("float32")
    config = get_config(MODEL__TEMPERATURE=0.1)
    infer = ClassificationTask(flip=flip).inference(config, lambda images: images[:, :, 0, 0])
    found = infer(paddle.to_tensor(logits[:, :, None, None])).numpy()
    np.testing.assert_allclose(np.diff(found), 10 * np.diff(logits), rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_processes_give_the_same_digits(calibrated, tiny_data, tmp_path):
    flags = ["-eval", f"-pretrained={calibrated[0]}", f"-data_path={tiny_data}", "-tta=flip"]
    said = [finish_ranks(flags, folder=tmp_path, ranks=ranks)[0] for ranks in (1, 2, 3)]
    assert len({re.search("top-1 .*", text)[0] for text in said}) == 1


def test_training_from_calibrated_weights_is_as_from_the_others(
    run_folder, calibrated, tiny_data, tmp_path
):
    """Same bits, and no temperature that was fitted to other weights."""
    for model, out in ((run_folder / "best", "plain"), (calibrated[0], "calibrated")):
        flags = [f"-pretrained={model}", f"-data_path={tiny_data}", f"-output={tmp_path / out}"]
        assert command("train")([*flags, "-nproc=1", "-epochs=1"]) == 0
    assert config_of(tmp_path / "calibrated").MODEL.TEMPERATURE == 1
    assert "MODEL.TEMPERATURE is 1 from here on" in (tmp_path / "calibrated/log.txt").read_text()
    plain, other = (metrics(tmp_path / name)[-1] for name in ("plain", "calibrated"))
    assert plain["val_loss"] == other["val_loss"] and plain["train_loss"] == other["train_loss"]


def test_pictures_below_the_probability_are_rejected(run_folder, tmp_path, capsys):
    scores = sorted(r["pred_score"] for r in inference_model(open_network(run_folder), PICTURES))
    flags, limit = [str(run_folder), *PICTURES, "-backend=eager"], scores[len(scores) // 2]
    rejected = sum(score < limit for score in scores)  # not the one that has it
    assert 0 < rejected < len(scores)
    for name in ("r.jsonl", "r.csv"):
        assert predict([*flags, f"-reject={limit}", f"-output={tmp_path / name}"]) == 0
        assert f"rejected {rejected} below {100 * limit:g} %" in capsys.readouterr().err
    in_rows = [row["rejected"] for row in table(tmp_path / "r.csv")]
    records = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [json.dumps(record["rejected"]) for record in records] == in_rows
    assert sum(record["rejected"] for record in records) == rejected
    assert all(record["pred_score"] < limit for record in records if record["rejected"])
    assert predict([*flags, f"-reject={limit}"]) == 0
    assert capsys.readouterr().out.count(": rejected: ") == rejected
