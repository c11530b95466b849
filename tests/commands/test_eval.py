"""replknet eval --report: the same figures as the evaluation, in one process and in several."""

import os
import re
from unittest.mock import Mock

import numpy as np
import pytest
from harness import finish, finish_ranks, make_run, metrics
from tiny import command, make_data, rows_of, table

from replknet_paddle.checkpoints.files import write_safetensors
from replknet_paddle.checkpoints.load import load_state
from replknet_paddle.deploy import Predictor
from replknet_paddle.deploy.drawing import annotate
from replknet_paddle.deploy.page import look
from replknet_paddle.zoo import open_network

pytest_plugins = ["harness"]

TABLES = ("per_class.csv", "confusion_matrix.csv", "confusion_matrix.png")


@pytest.fixture(scope="module")
def reported(straight, tiny_data, tmp_path_factory):
    """The folder of a report made in one process."""
    folder = tmp_path_factory.mktemp("reported")
    said = finish(flags_of(straight, tiny_data, folder), output=folder / "log")
    assert f"report: {folder / 'report' / 'report.html'}" in said
    return folder


def flags_of(straight, tiny_data, folder) -> list[str]:
    return [
        *("-eval", f"-pretrained={straight / 'best'}", f"-data_path={tiny_data}"),
        *(f"-output={folder / 'eval'}", f"-report={folder / 'report'}"),
    ]


def test_the_tables_add_up_to_the_accuracy(reported):
    rows = table(reported / "report" / "per_class.csv")
    images, right = (sum(int(row[key]) for row in rows) for key in ("images", "right"))
    [record] = metrics(reported / "eval")
    assert images == 101 and 100 * right / images == pytest.approx(record["val_top1_percent"])
    assert [int(row["images"]) for row in rows] == [26, 25, 25, 25]
    _, *matrix = rows_of(reported / "report" / "confusion_matrix.csv")
    assert [int(row[1 + i]) for i, row in enumerate(matrix)] == [int(r["right"]) for r in rows]


@pytest.mark.parametrize("broken", ["zero", "nan"])
def test_a_head_whose_logits_tie_or_are_nan_has_one_accuracy(straight, tiny_data, tmp_path, broken):
    """The headline ranks labels, the tables count first classes."""
    weights = dict(load_state(straight / "best"))
    value = {"zero": 0.0, "nan": np.nan}[broken]
    for name in ("head.weight", "head.bias"):
        weights[name] = np.full_like(weights[name], value)
    write_safetensors(tmp_path / "broken.safetensors", weights, {})
    finish(
        [
            *("-eval", f"-pretrained={tmp_path / 'broken.safetensors'}"),
            *(f"-cfg={straight / 'config.yaml'}", f"-data_path={tiny_data}"),
            *(f"-output={tmp_path / 'eval'}", f"-report={tmp_path / 'report'}"),
        ],
        output=tmp_path / "log",
    )
    [record] = metrics(tmp_path / "eval")
    assert record["val_top1_percent"] == pytest.approx(2600 / 101 if broken == "zero" else 0)
    rows = table(tmp_path / "report" / "per_class.csv")
    right = [26, 0, 0, 0] if broken == "zero" else [0, 0, 0, 0]
    assert [int(row["right"]) for row in rows] == right


def test_mistakes_are_images_of_the_list(reported, tiny_data):
    page = (reported / "report" / "report.html").read_text()
    paths = re.findall(r"<bdi>(val/class \d/\d+\.jpg)</bdi>", page)
    assert paths and all((tiny_data / path).is_file() for path in paths)
    assert len(paths) == len(set(paths)) == len(os.listdir(reported / "report" / "mistakes"))


def test_two_processes_write_the_same_report(reported, straight, tiny_data, tmp_path):
    finish_ranks(flags_of(straight, tiny_data, tmp_path), folder=tmp_path)
    for name in TABLES:
        one, two = (folder / "report" / name for folder in (reported, tmp_path))
        assert one.read_bytes() == two.read_bytes(), name
    pictures = [sorted(os.listdir(f / "report" / "mistakes")) for f in (reported, tmp_path)]
    assert pictures[0] == pictures[1]


def test_mistakes_have_the_pages_heat_map_of_what_they_were_taken_for(tmp_path, monkeypatch):
    make_data(tmp_path, train=4, val=12)
    run, drawn = make_run(tmp_path, image_size=64), Mock(wraps=annotate)
    monkeypatch.setattr("replknet_paddle.deploy.report.annotate", drawn)
    flags = [str(run), f"-data_path={tmp_path}", "-nproc=1"]
    assert command("eval")([*flags, f"-report={tmp_path / 'report'}"]) == 0
    page = (tmp_path / "report" / "report.html").read_text()
    paths = re.findall(r"<bdi>(val/class \d/\d+\.jpg)</bdi>", page)
    assert len(paths) == drawn.call_count > 3
    predictor = Predictor(open_network(run), backend="eager")
    for call, path in zip(drawn.call_args_list, paths):
        looked, heat = look(predictor, tmp_path / path), call.kwargs["heat"]
        taken_for = next(iter(looked.classes))
        assert call.args[1][0] == taken_for != call.kwargs["truth"]
        assert looked.heat.tobytes() == heat.tobytes() and len(set(heat.getdata())) > 100
        assert f"; beside it, where the network looks for {taken_for}</bdi>" in page
    drawn.reset_mock()
    assert command("eval")([*flags, "-backend=paddle", f"-report={tmp_path / 'outputs'}"]) == 0
    assert drawn.call_count == len(paths)
    assert not any(call.kwargs["heat"] for call in drawn.call_args_list)


def test_other_backends_report_too(reported, straight, tiny_data, tmp_path):
    flags = flags_of(straight, tiny_data, tmp_path)
    finish([*flags, "-backend=paddle"], output=tmp_path / "log")
    for name in TABLES:
        one, two = (folder / "report" / name for folder in (reported, tmp_path))
        assert one.read_bytes() == two.read_bytes(), name
