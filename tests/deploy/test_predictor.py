"""Predictions against the network itself on what evaluation would have fed it, and their files."""

import csv
import itertools
import json
import os
import threading
from pathlib import Path

import numpy as np
import paddle
import pytest
from harness import make_run
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import FIXTURES, PICTURES

from replknet_paddle import deploy
from replknet_paddle.config import get_config
from replknet_paddle.data.dataset import get_dataset
from replknet_paddle.data.transforms.image import FORMATS
from replknet_paddle.deploy.export import ModelInfo
from replknet_paddle.deploy.predict import (
    Prediction,
    Predictor,
    predict_files,
    results_file,
    softmax,
)
from replknet_paddle.model import RepLKNet
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.zoo import get_model, open_network


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), classes=9)


@pytest.fixture(scope="module")
def network(run_folder):
    return open_network(run_folder)


@pytest.fixture(scope="module")
def predictor(network):
    return Predictor(network, backend="eager")


@pytest.fixture(scope="module")
def expected(run_folder, network, tmp_path_factory):
    """Probabilities (pictures, classes) of PICTURES, by way of evaluation's data set."""
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for i, path in enumerate(PICTURES):
        (folder / f"{i}").write_bytes(Path(path).read_bytes())
        lines.append(f"{i} 0\n")
    (folder / "val_list.txt").write_text("".join(lines))
    config = get_config(run_folder / "config.yaml").clone()
    config.defrost()
    config.DATA.DATA_PATH = str(folder)
    dataset = get_dataset(config, is_train=False)
    images = np.stack([dataset[0, i][0] for i in range(len(dataset))])
    with paddle.no_grad():
        logits = network(paddle.to_tensor(images)).numpy().astype("float64")
    exponentials = np.exp(logits)
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def test_images_are_preprocessed_as_in_evaluation_bit_for_bit(run_folder, predictor, tmp_path):
    config = get_config(run_folder / "config.yaml").clone()
    config.defrost()
    config.DATA.DATA_PATH = str(tmp_path)
    for path in PICTURES:
        (tmp_path / "picture").write_bytes(Path(path).read_bytes())
        (tmp_path / "val_list.txt").write_text("picture 0\n")
        evaluated = get_dataset(config, is_train=False)[0, 0][0]
        np.testing.assert_array_equal(predictor.preprocess(path), evaluated)


def test_the_result_has_mmpretrains_names_and_types(network, expected):
    result = deploy.inference_model(network, PICTURES[0])
    assert set(result) == {"pred_label", "pred_score", "pred_scores", "pred_class"}
    assert type(result["pred_label"]) is int and type(result["pred_score"]) is float
    assert type(result["pred_class"]) is str
    scores = result["pred_scores"]
    assert type(scores) is np.ndarray and scores.dtype == np.float32 and scores.shape == (9,)
    np.testing.assert_allclose(scores, expected[0], rtol=1e-4, atol=1e-7)
    assert result["pred_label"] == int(expected[0].argmax())
    assert result["pred_score"] == scores.max()
    assert result["pred_class"] == str(result["pred_label"])


def test_a_list_gives_a_list_in_its_order_over_several_batches(network, expected):
    assert len({int(scores.argmax()) for scores in expected}) > 1
    images = list(itertools.islice(itertools.cycle(PICTURES), 19))
    results = deploy.inference_model(network, images)
    assert len(results) == 19
    for i, result in enumerate(results):
        np.testing.assert_allclose(
            result["pred_scores"], expected[i % len(PICTURES)], rtol=1e-4, atol=1e-6
        )
    assert deploy.inference_model(network, []) == []


def test_paths_arrays_and_pillow_images_of_a_picture_give_the_same(network):
    path = str(FIXTURES / "images" / "portrait_301x400.jpg")
    with Image.open(path) as image:
        forms = [path, FIXTURES / "images" / "portrait_301x400.jpg", np.asarray(image), image]
        results = [deploy.inference_model(network, form) for form in forms]
    for result in results[1:]:
        np.testing.assert_array_equal(result["pred_scores"], results[0]["pred_scores"])


def test_a_model_may_be_a_network_a_folder_a_checkpoint_an_export_or_open(
    run_folder, network, predictor, tmp_path
):
    config = network.config
    deploy.export_model(network, tmp_path / "export", ModelInfo(config))
    backend = deploy.open_backend(network, "eager", config=config)
    result = deploy.inference_model(network, PICTURES[2])
    models = [
        get_model(config, pretrained=run_folder / "best"),
        str(run_folder / "best"),
        Predictor(str(run_folder), backend="eager"),
        Predictor(run_folder, backend="eager"),
        tmp_path / "export",
        backend,
        predictor,
    ]
    for model in models:
        other = deploy.inference_model(model, PICTURES[2])
        assert other["pred_label"] == result["pred_label"]
        np.testing.assert_allclose(
            other["pred_scores"], result["pred_scores"], rtol=1e-3, atol=1e-5
        )


def test_class_names_come_from_the_model_and_are_text(network):
    names = ["\ud800", *(f"class {letter}" for letter in "bcdefghi")]
    backend = deploy.open_backend(network, "eager", config=network.config, class_names=names)
    result = deploy.inference_model(backend, PICTURES[0])
    assert result["pred_class"] == ["?", *names[1:]][result["pred_label"]]
    assert Predictor(backend).class_names == ["?", *names[1:]]


@pytest.mark.parametrize(
    "image", ["README.md", np.zeros((3, 8, 8), "uint8")], ids=["file", "array"]
)
def test_an_image_that_cannot_be_read_is_named(network, image):
    image = str(FIXTURES / image) if isinstance(image, str) else image
    name = image if isinstance(image, str) else r"1 \(from 0\)"
    with pytest.raises(InputError, match=f"cannot read image {name}: "):
        deploy.inference_model(network, [PICTURES[0], image])


def test_a_network_without_its_configuration_is_refused():
    bare = RepLKNet(large_kernel_sizes=[5] * 4, layers=[1] * 4, channels=[2] * 4)
    with pytest.raises(InputError, match=r"build_replknet\(config\)"):
        deploy.inference_model(bare, PICTURES[0])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_outputs_that_are_no_numbers_are_an_error(predictor, monkeypatch, value):
    monkeypatch.setattr(predictor.backend, "run", lambda images: np.full((1, 9), value))
    with pytest.raises(InputError, match="eager are not finite"):
        predictor.scores(np.zeros((1, 3, 32, 32), "float32"))


def test_a_run_trained_with_the_operator_is_predicted_where_there_is_none(monkeypatch, tmp_path):
    """What the compiled operator is for is eager mode alone."""

    def missing(*_, **__):
        raise InputError("not compiled here")

    monkeypatch.setattr("replknet_paddle.deploy.backends.build_convolutions", missing)
    run = make_run(tmp_path, classes=9)
    config = get_config(run / "config.yaml").clone()
    config.defrost()
    config.MODEL.CONV_IMPL = "direct"
    config.freeze()
    (run / "config.yaml").write_text(config.dump())
    result = deploy.inference_model(Predictor(run, backend="paddle"), PICTURES[0])
    assert set(result) == {"pred_label", "pred_score", "pred_scores", "pred_class"}
    with pytest.raises(InputError, match="not compiled here"):
        Predictor(run, backend="eager")


def test_softmax_of_large_logits_is_finite_and_sums_to_one():
    scores = softmax(np.array([[1e4, 1e4 - 1, -1e4], [0, 0, 0]], "float32"))
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(scores[0], [1 / (1 + np.exp(-1)), 1 / (1 + np.e), 0], rtol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_a_stream_keeps_the_order_and_tells_problems_in_their_place(
    predictor, expected, tmp_path, batch_size
):
    (tmp_path / "bad.jpg").write_text("no picture")
    files = [("closed", "cannot list the folder"), *((path, None) for path in PICTURES)]
    files.insert(4, (str(tmp_path / "bad.jpg"), None))
    predictions = list(predict_files(predictor, iter(files), topk=3, batch_size=batch_size))
    assert [prediction.path for prediction in predictions] == [path for path, _ in files]
    assert [(i, p.problem) for i, p in enumerate(predictions) if p.problem] == [
        (0, "cannot list the folder"),
        (4, f"cannot identify it as any of {', '.join(FORMATS)}"),
    ]
    good = [prediction for prediction in predictions if prediction.problem is None]
    for prediction, scores in zip(good, expected):
        order = np.argsort(-scores)[:3]
        assert prediction.labels == tuple(order)
        np.testing.assert_allclose(prediction.scores, scores[order], rtol=1e-3)
        assert prediction.picture is None


def test_a_stream_of_nothing_is_nothing_and_of_problems_only_those(predictor):
    assert list(predict_files(predictor, [], topk=1)) == []
    problems = list(predict_files(predictor, [("a", "x"), ("b", "y")], topk=1))
    assert problems == [Prediction("a", problem="x"), Prediction("b", problem="y")]


def test_an_endless_stream_is_read_no_further_than_it_is_used(predictor):
    read = []

    def endless():
        while True:
            read.append(len(read))
            yield PICTURES[len(read) % len(PICTURES)], None

    predictions = predict_files(predictor, endless(), topk=1, batch_size=4)
    for taken in (1, 100):
        for _ in range(taken):
            next(predictions)
    predictions.close()
    assert 101 <= len(read) <= 101 + 3 * (4 + 8)
    assert not [t.name for t in threading.enumerate() if t.name.startswith("decode")]


def test_pictures_are_kept_as_large_as_asked(predictor):
    predictions = list(
        predict_files(predictor, [(path, None) for path in PICTURES], topk=1, picture_pixels=100)
    )
    for prediction in predictions:
        with Image.open(prediction.path) as image:
            assert prediction.picture.mode == "RGB"
            expected = min(100, max(image.size))
            assert max(prediction.picture.size) == expected


def test_decoding_goes_on_while_the_network_runs(predictor, monkeypatch):
    """While the first batch is in the network, pictures of the second are decoded."""
    decoded, second = [], threading.Event()
    transform, run = predictor.transform, predictor.backend.run

    def note(image):
        decoded.append(image)
        if len(decoded) > 8:
            second.set()
        return transform(image)

    def wait(images):
        assert second.wait(30), "nothing is decoded while the network runs"
        return run(images)

    monkeypatch.setattr("replknet_paddle.deploy.predict.MAX_DECODERS", 2)
    monkeypatch.setattr(predictor, "transform", note)
    monkeypatch.setattr(predictor.backend, "run", wait)
    files = [(PICTURES[0], None)] * 20
    assert len(list(predict_files(predictor, files, topk=1, batch_size=8))) == 20


# ---- files of results

NAMES = ["cat", 'a "big", dog', "蛇"]
PREDICTIONS = [
    Prediction("a/x.png", labels=(2, 0), scores=(0.75, 0.25)),
    Prediction("a/no, image.txt", problem="not an image"),
    Prediction("new\nline.png", labels=(1, 2), scores=(0.5, 0.375)),
]


def write(path, predictions=PREDICTIONS):
    with results_file(str(path), NAMES, topk=2) as write_one:
        for prediction in predictions:
            write_one(prediction)


NAMES_OF_FILES = st.binary(min_size=1).map(os.fsdecode)  # any bytes, as Linux has it


@settings(max_examples=50, deadline=None)
@example([("new\r\nline", [0, 1, 2], True)])
@given(st.lists(st.tuples(NAMES_OF_FILES, st.permutations(range(3)), st.booleans()), min_size=1))
@pytest.mark.parametrize("suffix", [".jsonl", ".CSV"])
def test_results_are_read_back_as_they_were_whatever_the_names(tmp_path_factory, suffix, answers):
    file = tmp_path_factory.mktemp("results") / f"r{suffix}"
    predictions = [
        Prediction(path, labels=tuple(labels[:2]), scores=(0.75, 0.125), truth=labels[1])
        if is_image
        else Prediction(path, problem="no, image", truth=labels[0] or None)
        for path, labels, is_image in answers
    ]
    write(file, predictions)
    with open(file, encoding="utf-8", errors="surrogateescape", newline="") as text:
        read = list(csv.DictReader(text) if suffix == ".CSV" else map(json.loads, text))
    expected = []
    for answer in predictions:
        classes = [
            {"label": label, "class": NAMES[label], "score": score}
            for label, score in zip(answer.labels, answer.scores)
        ]
        if suffix == ".CSV":
            row = {"path": answer.path, "problem": answer.problem or ""}
            for i, one in enumerate(
                classes or [dict.fromkeys(("label", "class", "score"), "")] * 2
            ):
                row |= {f"{key}_{i + 1}": str(value) for key, value in one.items()}
        elif answer.problem:
            row = {"path": answer.path, "problem": answer.problem}
        else:
            row = {"path": answer.path, "topk": classes}
            row |= {f"pred_{key}": value for key, value in classes[0].items()}
        if answer.truth is not None:
            label = str(answer.truth) if suffix == ".CSV" else answer.truth
            row |= {"true_label": label, "true_class": NAMES[answer.truth]}
        elif suffix == ".CSV":
            row |= {"true_label": "", "true_class": ""}
        expected.append(row)
    assert read == expected


@pytest.mark.parametrize("name", ["r.jsonl", "r.csv"])
def test_letters_are_themselves_and_scores_have_six_digits(tmp_path, name):
    score = float(np.float32(1 / 3))  # whose neighbours are 3e-8 away
    write(tmp_path / name, [Prediction("Äpfel/猫.png", labels=(2, 0), scores=(score, 1.234567e-5))])
    text = (tmp_path / name).read_text("utf-8")
    assert "Äpfel/猫.png" in text and "蛇" in text
    assert "0.333333" in text and "0.3333333" not in text and "1.23457e-05" in text


def test_a_line_of_json_is_one_line_of_utf_8_for_any_reader(tmp_path):
    path = os.fsdecode(b"gr\xfcn\xe2\x80\xa8\xc2\x85.png")  # no UTF-8, U+2028 and U+0085
    write(tmp_path / "r.jsonl", [Prediction(path, labels=(0, 1), scores=(1.0, 0.0))])
    (line,) = (tmp_path / "r.jsonl").read_bytes().decode("utf-8").splitlines()
    assert json.loads(line)["path"] == path


def test_the_file_has_its_name_when_it_is_whole_and_replaces_an_older_one(tmp_path):
    (tmp_path / "r.jsonl").write_text("older")
    with results_file(str(tmp_path / "r.jsonl"), NAMES, topk=2) as write_one:
        write_one(PREDICTIONS[0])
        assert (tmp_path / "r.jsonl").read_text() == "older"
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 1
    assert os.listdir(tmp_path) == ["r.jsonl"]


@pytest.mark.parametrize("name", ["r.jsonl", "r.csv"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, RuntimeError])
def test_an_interruption_leaves_the_older_file_and_keeps_what_there_is_beside_it(
    tmp_path, name, error
):
    (tmp_path / name).write_text("older")
    with pytest.raises(error), results_file(str(tmp_path / name), NAMES, topk=2) as write_one:
        write_one(PREDICTIONS[0])
        raise error
    assert (tmp_path / name).read_text() == "older"
    assert "a/x.png" in (tmp_path / f"{name}.unfinished").read_text()


@pytest.mark.parametrize("writes", [0, 1])
def test_without_a_result_nothing_stays(tmp_path, writes):
    """None written yet; or the input error that there was nothing but problems."""
    error = InputError if writes else KeyboardInterrupt
    with pytest.raises(error), results_file(str(tmp_path / "r.csv"), NAMES, topk=2) as write_one:
        for _ in range(writes):
            write_one(PREDICTIONS[1])
        raise error
    assert os.listdir(tmp_path) == []
