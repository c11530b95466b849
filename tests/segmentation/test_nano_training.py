"""The nano recipe on the shapes that the tool writes, to the mIoU that the documentation states."""

import json

import pytest
from processes import finish
from tiny import ROOT

from replknet_paddle.commands import main


@pytest.mark.slow
def test_the_nano_network_learns_the_shapes(tmp_path):
    data, run = tmp_path / "shapes", tmp_path / "run"
    assert main(["make-shapes", str(data)]) == 0
    config = ROOT / "configs" / "upernet_nano_shapes.yaml"
    flags = ["-cfg", config, "-data_path", data, "-output", run]
    finish(flags, output=tmp_path / "out.txt", timeout=1200)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["val_miou_percent"] > 90
    assert min(last["val_class_iou_percent"]) > 80


def test_the_tool_writes_the_same_images_every_time(tmp_path):
    for folder in ("one", "two"):
        assert main(["make-shapes", str(tmp_path / folder), "-count", "10"]) == 0
    names = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert len(names) == 10 * 2 + 3
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_tool_refuses_too_few_images(tmp_path, capsys):
    assert main(["make-shapes", str(tmp_path), "-count", "4"]) == 2
    assert "-count is 4; allowed: an integer >= 5" in capsys.readouterr().err
