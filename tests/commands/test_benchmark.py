"""The benchmark commands work and measure what they say; no timing decides a test."""

import functools
import json

import pytest
from tiny import FIXTURES, command

from replknet_paddle.bench import conv, data, inference, network
from replknet_paddle.bench.conv import ConvCase
from replknet_paddle.bench.timing import median_ratio, summarize, time_in_turn
from replknet_paddle.ops import matmul_conv
from replknet_paddle.ops.matmul_plan import make_plan
from replknet_paddle.runtime.processes import supports_bfloat16

main = command("benchmark")


def test_alternatives_are_timed_in_turn_after_the_warmup():
    calls = []
    alternatives = {name: functools.partial(calls.append, name) for name in ("a", "b")}
    seconds = time_in_turn(alternatives, rounds=3)
    assert calls == ["a", "b"] * 4
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
    assert all(value >= 0 for values in seconds.values() for value in values)


def test_summary_and_ratio():
    timing = summarize([0.003, 0.001, 0.002])
    assert (timing.median_seconds, timing.min_seconds, timing.max_seconds) == (0.002, 0.001, 0.003)
    assert str(timing) == "median 2.00 ms (1.00 to 3.00, n = 3)"
    # The machine slows down tenfold half-way: the ratio of neighbours does not care.
    assert median_ratio([2, 2, 20, 20], [1, 1, 10, 10]) == 2


def test_train_loop_prints_both_sides_and_their_ratio(tiny_config_file, capsys):
    status = main(["train_loop", str(tiny_config_file), "-steps", "2", "-rounds", "2"])
    out = capsys.readouterr().out
    assert status == 0
    assert "loop: median" in out and "bare: median" in out and "of the bare step's time" in out
    assert "Paddle" in out and "cores" in out


def test_data_prints_each_pipeline_beside_plain_decoding(capsys):
    photograph = str(FIXTURES / "images" / "landscape_499x375.jpg")
    arguments = ["data", photograph, "-rounds", "1", "-epochs", "1", "-workers", "1"]
    assert main([*arguments, "-opts", "DATA.IMAGE_SIZE", "32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "photographs of 500x375 pixels, quality 90" in lines[1]
    plain = next(line for line in lines if line.startswith("plain Pillow decoding"))
    assert plain.split()[-1] == "1.000"
    for name in ("evaluation, 8 bits", "training, normalized and erased", "1 worker(s)"):
        assert any(line.startswith(name) for line in lines)


def conv_rows(out):
    """Shape, kernel, pass and implementation, and the columns after them, of each row."""
    rows = {}
    for line in out.splitlines():
        if line.lstrip().startswith("1x"):
            shape, kernel = line.split()[:2]
            rows[shape, kernel, line[21:37].strip(), line[38:52].strip()] = line[52:].split()
    return rows


def test_conv_prints_every_pass_and_implementation(operators, capsys, monkeypatch):
    monkeypatch.setattr(conv, "STAGES", ((4, 9, 5), (3, 6, 13)))
    assert main(["conv", "-shapes", "stages", "-rounds", "1"]) == 0
    out = capsys.readouterr().out
    rows = conv_rows(out)
    # Forward has two layers with frozen weights besides.
    assert len(rows) == 2 * (4 + 4 + 4 + 4 + 2)
    assert "Paddle" in out and "peak" in out and any("(auto)" in impl for *_, impl in rows)
    plan = make_plan("convolution", (1, 3, 6, 6, 13), 4, 2**29)
    columns = rows["1x3x6x6", "K13", "forward", "matmul"]
    assert columns[3:5] == [f"{plan.flops / 1e9:.2f}", f"{plan.bytes_moved / 1e6:.1f}"]


def test_conv_on_a_gpu_prints_shares_of_its_measured_rates(capsys, monkeypatch):
    """The device is faked: rates are given, and its tensors are on the CPU."""
    monkeypatch.setattr(conv, "STAGES", ((3, 6, 13),))
    monkeypatch.setattr(conv.paddle.device, "get_device", lambda: "gpu:0")
    monkeypatch.setattr(conv.paddle.device, "synchronize", lambda: None)
    monkeypatch.setattr(conv.paddle.device.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(matmul_conv, "_default_memory_bytes", lambda device: 2**29)
    monkeypatch.setattr(conv, "device_rates", lambda dtype: (1e9, 1e12))
    assert main(["conv", "-shapes", "stages", "-rounds", "1", "-dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert "bfloat16, Some GPU: a copy moves 1 GB/s, a product of matrices does 1.0 TFLOP/s" in out
    rows = conv_rows(out)
    assert {impl for *_, impl in rows} == {"paddle", "matmul", "matmul, kept"}
    plan = make_plan("weight gradient", (1, 3, 6, 6, 13), 2, 2**29)
    columns = rows["1x3x6x6", "K13", "weight gradient", "matmul"]
    share = plan.bytes_moved / (float(columns[0]) / 1e3) / 1e9
    assert float(columns[6]) == pytest.approx(share, abs=0.02, rel=0.02)


def test_useful_work_leaves_taps_outside_the_map_out():
    # 1x1 maps see the middle tap alone; 3x3 maps under a 3x3 kernel 4 to 9 taps of each output.
    assert ConvCase(2, 5, 1, 31).useful_flops == 2 * 2 * 5
    assert ConvCase(1, 1, 3, 3).useful_flops == 2 * (4 * 4 + 4 * 6 + 9)


def test_network_prints_both_sides_and_the_parts(operators, tiny_config_file, capsys):
    status = main(["network", str(tiny_config_file), "-rounds", "1", "-step_batch", "2"])
    out = capsys.readouterr().out
    assert status == 0
    for words in ("forward, batch 1, operators: median", "training step, batch 2, Paddle's own"):
        assert words in out
    for part in ("7x7 depthwise convolution", "1x1 convolution", "BatchNorm2D", "backward"):
        assert f"    {part} " in out


@pytest.mark.slow
def test_inference_times_each_backend_and_says_how_far_it_is_off(
    tiny_config_file, tmp_path, capsys
):
    files = ["-output", str(tmp_path / "b.json")]
    flags = ["-backends", "dygraph", "paddle", "-batch_sizes", "1", "2", "-rounds", "1"]
    assert main(["inference", str(tiny_config_file), *flags, *files]) == 0
    out = capsys.readouterr().out
    assert "Paddle" in out and "x eager" in out and "images/s" in out
    content = json.loads((tmp_path / "b.json").read_text())
    rows = content["rows"]
    assert {row["batch"] for row in rows} == {1, 2}
    assert {row["backend"] for row in rows} == {"eager", "paddle"}
    assert {row["network"] for row in rows} == {"trained", "folded"} and "left out" not in out
    assert ("paddle", "trained") in {(row["backend"], row["network"]) for row in rows}
    assert ("bf16" in {row["precision"] for row in rows}) == supports_bfloat16("cpu")
    for row in rows:
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"]
        if row["precision"] == "fp32":
            assert row["deviation"] < 1e-4
        assert row["images_per_second"] == pytest.approx(1e3 * row["batch"] / row["median_ms"])
    assert [path.name for path in tmp_path.iterdir()] == ["b.json"]


@pytest.mark.parametrize(
    "flags, says",
    [
        (["train_loop", "none.yaml"], "no config file none.yaml"),
        (["data", "photo.jpg", "-rounds", "0"], "-rounds 0"),
        (["conv", "-rounds", "0"], "-rounds 0"),
        (["conv", "-dtype", "float16"], "-dtype float16 on CPU; allowed: float32"),
        (["network", "-rounds", "0"], "-rounds 0"),
        (["inference"], "no MODEL"),
        *(
            (["inference", "TINY", *flags], says)
            for flags, says in (
                (["-backends", "tensorrt"], "allowed: eager paddle"),
                (["-precisions", "fp8"], "-precisions fp8; allowed: fp32 fp16 bf16 int8"),
                (["-rounds", "0"], "integers >= 1"),
                (["-batch_sizes", "1", "0"], "integers >= 1"),
                (["-opts", "MODEL.OUT_INDICES", "[3]"], "MODEL.OUT_INDICES"),
                (["-output", "b.txt"], "b.txt: the name must end in .json"),
                (["-output", "nowhere/b.json"], "no folder nowhere"),
            )
        ),
    ],
)
def test_bad_flags_are_one_message_before_anything_is_measured(
    tiny_config_file, tmp_path, monkeypatch, capsys, flags, says
):
    monkeypatch.chdir(tmp_path)
    for module in (conv, inference, network, data):
        monkeypatch.setattr(module, "time_in_turn", lambda *_, **__: pytest.fail("measures"))
    assert main([str(tiny_config_file) if word == "TINY" else word for word in flags]) == 2
    assert says in capsys.readouterr().err


def test_a_candidate_that_fails_is_reported_and_the_others_are_written(
    tiny_config_file, tmp_path, capsys, monkeypatch
):
    """openvino fails when it is opened for bf16, and onnxruntime when it runs two images."""
    for package in ("onnx", "onnxruntime", "openvino"):
        pytest.importorskip(package)
    real = inference.open_backend

    def open_backend(model, name, **options):
        if options.get("precision") == "bf16":
            raise RuntimeError("no such\nkernel")
        backend = real(model, name, **options)
        run = backend.run

        def failing(images):
            if name == "onnxruntime" and len(images) == 2:
                raise RuntimeError("out of registers")
            return run(images)

        backend.run = failing
        return backend

    monkeypatch.setattr(inference, "open_backend", open_backend)
    flags = ["-backends", "onnxruntime", "openvino", "-precisions", "fp32", "bf16"]
    flags += ["-batch_sizes", "1", "2", "-rounds", "1", "-output", str(tmp_path / "b.json")]
    assert main(["inference", str(tiny_config_file), *flags]) == 0
    out = capsys.readouterr().out
    assert "left out: openvino in bf16: no such kernel" in out
    assert "left out: onnxruntime in fp32 at batch 2: out of registers" in out
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    measured = {(r["backend"], r["network"], r["batch"]) for r in rows}
    assert measured == {
        *(("eager", "trained", batch) for batch in (1, 2)),
        *(("openvino", "folded", batch) for batch in (1, 2)),
        ("onnxruntime", "folded", 1),
    }
    assert {r["precision"] for r in rows} == {"fp32"}


def test_what_was_measured_is_written_if_a_later_batch_is_interrupted(
    tiny_config_file, tmp_path, monkeypatch
):
    real = inference.time_batch

    def time_batch(eager, opened, batch, *rest):
        if batch == 2:
            raise KeyboardInterrupt
        return real(eager, opened, batch, *rest)

    monkeypatch.setattr(inference, "time_batch", time_batch)
    flags = ["-backends", "eager", "-batch_sizes", "1", "2", "-rounds", "1"]
    flags += ["-output", str(tmp_path / "b.json")]
    assert main(["inference", str(tiny_config_file), *flags]) == 130
    assert [r["batch"] for r in json.loads((tmp_path / "b.json").read_text())["rows"]] == [1]
