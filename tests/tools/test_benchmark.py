"""The benchmark commands work and measure what they say; no timing decides a test."""

import pytest

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


def test_data_prints_each_pipeline_beside_plain_decoding(capsys):
    arguments = ["data", "--rounds", "2", "--epochs", "1", "--workers", "1"]
    assert main([*arguments, "-opts", "DATA.IMAGE_SIZE", "32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "photographs of 500x375 pixels, quality 90" in lines[1]
    plain = next(line for line in lines if line.startswith("plain Pillow decoding"))
    assert plain.split()[-1] == "1.000"
    for name in ("evaluation, 8 bits", "training, normalized and erased", "training loader, 1"):
        assert any(line.startswith(name) for line in lines)


def test_data_refuses_rounds_below_one(capsys):
    assert main(["data", "--rounds", "0"]) == 2
    assert "--rounds at least 1" in capsys.readouterr().err
