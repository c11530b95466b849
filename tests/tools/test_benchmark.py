"""The benchmark commands work and measure what they say; no timing decides a test."""

import json

import pytest
from PIL import Image

from analysis.timing import median_ratio, summarize, time_in_turn
from tools.benchmark import main


def test_alternatives_are_timed_in_turn_after_the_warmup():
    calls = []
    seconds = time_in_turn(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=2
    )
    assert calls == ["a", "b"] * 5
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
    assert all(value >= 0 for values in seconds.values() for value in values)


def test_summary_and_ratio():
    timing = summarize([0.003, 0.001, 0.002])
    assert (timing.median_seconds, timing.min_seconds, timing.max_seconds) == (0.002, 0.001, 0.003)
    assert str(timing) == "median 2.00 ms (1.00 to 3.00, n = 3)"
    # The machine slows down tenfold half-way: the ratio of neighbours does not care.
    assert median_ratio([2, 2, 20, 20], [1, 1, 10, 10]) == 2


def test_train_loop_prints_both_sides_and_their_ratio(tiny_config_file, capsys):
    status = main(["train_loop", "-cfg", str(tiny_config_file), "--steps", "2", "--rounds", "2"])
    out = capsys.readouterr().out
    assert status == 0
    assert "loop: median" in out and "bare: median" in out and "of the bare step's time" in out
    assert "Paddle" in out and "cores" in out


def test_bad_config_is_one_message(tmp_path, capsys):
    assert main(["train_loop", "-cfg", str(tmp_path / "none.yaml")]) == 2
    assert "no config file" in capsys.readouterr().err


def test_what_to_measure_must_be_named():
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2


def test_inference_times_each_backend_and_says_how_far_it_is_off(
    tiny_config_file, tmp_path, capsys
):
    files = ["--json", str(tmp_path / "b.json"), "--chart", str(tmp_path / "b.png")]
    flags = ["--backends", "dygraph", "paddle", "--batch_sizes", "1", "2", "--rounds", "1"]
    assert main(["inference", "-cfg", str(tiny_config_file), *flags, *files]) == 0
    out = capsys.readouterr().out
    assert "Paddle" in out and "x eager" in out and "images/s" in out
    content = json.loads((tmp_path / "b.json").read_text())
    rows = content["rows"]
    assert {row["batch"] for row in rows} == {1, 2}
    assert {row["backend"] for row in rows} == {"dygraph", "paddle"}
    for row in rows:
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"]
        if row["precision"] == "fp32":
            assert row["deviation"] < 1e-4
        assert row["images_per_second"] == pytest.approx(1e3 * row["batch"] / row["median_ms"])
    with Image.open(tmp_path / "b.png") as picture:
        assert picture.size[0] > 500
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.json", "b.png"]


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--backends", "tensorrt"], "allowed: dygraph paddle"),
        (["--rounds", "0"], "integers >= 1"),
        (["--batch_sizes", "1", "0"], "integers >= 1"),
        (["-opts", "MODEL.OUT_INDICES", "[3]"], "MODEL.OUT_INDICES"),
    ],
)
def test_bad_flags_of_inference_are_one_message(tiny_config_file, capsys, flags, says):
    assert main(["inference", "-cfg", str(tiny_config_file), *flags]) == 2
    assert says in capsys.readouterr().err


def test_inference_needs_a_configuration(capsys):
    assert main(["inference"]) == 2
    assert "-cfg" in capsys.readouterr().err
