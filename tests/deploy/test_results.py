"""Files of results: read back by other means, and never half-written under their name."""

import csv
import json
import os

import pytest

from replknet_paddle.deploy.predictor import Prediction
from replknet_paddle.deploy.results import SUFFIXES, results_file
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.files import check_file_target

NAMES = ["cat", 'a "big", dog', "蛇"]
PREDICTIONS = [
    Prediction("a/x.png", labels=(2, 0), scores=(0.75, 0.25)),
    Prediction("a/no, image.txt", problem="not an image"),
    Prediction("new\nline.png", labels=(1, 2), scores=(0.5, 0.375)),
]


def write(path, predictions=PREDICTIONS):
    with results_file(str(path), NAMES, topk=2) as results:
        for prediction in predictions:
            results.write(prediction)


def test_json_lines(tmp_path):
    write(tmp_path / "r.jsonl")
    records = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert records == [
        {
            "path": "a/x.png",
            "pred_label": 2,
            "pred_class": "蛇",
            "pred_score": 0.75,
            "topk": [
                {"label": 2, "class": "蛇", "score": 0.75},
                {"label": 0, "class": "cat", "score": 0.25},
            ],
        },
        {"path": "a/no, image.txt", "problem": "not an image"},
        {
            "path": "new\nline.png",
            "pred_label": 1,
            "pred_class": 'a "big", dog',
            "pred_score": 0.5,
            "topk": [
                {"label": 1, "class": 'a "big", dog', "score": 0.5},
                {"label": 2, "class": "蛇", "score": 0.375},
            ],
        },
    ]


def test_csv(tmp_path):
    write(tmp_path / "r.CSV")
    with open(tmp_path / "r.CSV", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["path", "label_1", "class_1", "score_1", "label_2", "class_2", "score_2", "problem"],
        ["a/x.png", "2", "蛇", "0.75", "0", "cat", "0.25", ""],
        ["a/no, image.txt", "", "", "", "", "", "", "not an image"],
        ["new\nline.png", "1", 'a "big", dog', "0.5", "2", "蛇", "0.375", ""],
    ]


@pytest.mark.parametrize("name", ["r.jsonl", "r.csv"])
def test_names_that_are_no_text_come_back_as_the_bytes_they_were(tmp_path, name):
    path = os.fsdecode(b"\xff\xfe.png")
    write(tmp_path / name, [Prediction(path, labels=(0, 1), scores=(0.5, 0.5))])
    with open(tmp_path / name, encoding="utf-8", errors="surrogateescape", newline="") as file:
        if name == "r.csv":
            read = list(csv.reader(file))[1][0]
        else:
            read = json.loads(file.readline())["path"]
    assert os.fsencode(read) == b"\xff\xfe.png"


def test_the_file_has_its_name_when_it_is_whole_and_replaces_an_older_one(tmp_path):
    (tmp_path / "r.jsonl").write_text("older")
    with results_file(str(tmp_path / "r.jsonl"), NAMES, topk=2) as results:
        results.write(PREDICTIONS[0])
        assert (tmp_path / "r.jsonl").read_text() == "older"
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 1
    assert os.listdir(tmp_path) == ["r.jsonl"]


@pytest.mark.parametrize("name", ["r.jsonl", "r.csv"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, RuntimeError])
def test_an_interruption_leaves_the_older_file_and_keeps_what_there_is_beside_it(
    tmp_path, name, error
):
    (tmp_path / name).write_text("older")
    with pytest.raises(error), results_file(str(tmp_path / name), NAMES, topk=2) as results:
        results.write(PREDICTIONS[0])
        raise error
    assert (tmp_path / name).read_text() == "older"
    assert "a/x.png" in (tmp_path / f"{name}.unfinished").read_text()


@pytest.mark.parametrize("writes", [0, 1])
def test_without_a_result_nothing_stays(tmp_path, writes):
    """None written yet; or the input error that there was nothing but problems."""
    error = InputError if writes else KeyboardInterrupt
    with pytest.raises(error), results_file(str(tmp_path / "r.csv"), NAMES, topk=2) as results:
        for _ in range(writes):
            results.write(PREDICTIONS[1])
        raise error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "name, says",
    [
        ("r.txt", "must end in .jsonl or .csv"),
        ("r", "must end in .jsonl or .csv"),
        ("folder.csv", "is a folder"),
        ("no/r.csv", "no folder"),
    ],
)
def test_what_cannot_become_a_file_of_results_is_refused(tmp_path, name, says):
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises((InputError, FileNotFoundError), match=says):
        check_file_target(tmp_path / name, SUFFIXES)
