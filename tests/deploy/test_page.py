"""What the page shows, and what its command refuses; tests/commands/test_page_command.py has the
page itself."""

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from harness import free_ports, heat_map, make_run
from PIL import Image
from tiny import FIXTURES, command, make_data

from replknet_paddle.config import get_config, update_config
from replknet_paddle.data.transforms import build_eval_transform
from replknet_paddle.deploy.drawing import overlay
from replknet_paddle.deploy.export import ModelInfo, export_model
from replknet_paddle.deploy.images import decode
from replknet_paddle.deploy.page import (
    OwnRequestsOnly,
    describe,
    distinct,
    heat_html,
    look,
    make_upload_folder,
    validation_examples,
)
from replknet_paddle.deploy.predict import Predictor, inference_model
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.zoo import open_network

PICTURE = FIXTURES / "images" / "portrait_301x400.jpg"
main = command("page")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), image_size=64, classes=9)


@pytest.fixture
def network(run_folder):
    return open_network(run_folder)


@pytest.fixture
def predictor(network):
    return Predictor(network, backend="eager")


@pytest.fixture
def exported(network, tmp_path):
    export_model(network, tmp_path / "exported", ModelInfo(network.config))
    return Predictor(tmp_path / "exported", backend="paddle")


def test_the_classes_are_those_of_inference_model_with_and_without_a_heat_map(
    network, predictor, exported
):
    scores = inference_model(network, PICTURE)["pred_scores"]
    labels = np.argsort(-scores)[:5]
    for model in (predictor, exported):
        result = look(model, PICTURE)
        assert list(result.classes) == [str(label) for label in labels]
        np.testing.assert_allclose(list(result.classes.values()), scores[labels], rtol=1e-4)
        assert (result.heat is None) == (model is exported)


@pytest.mark.parametrize("size", [(640, 401), (401, 640)])
@pytest.mark.parametrize(
    "mode, crop_pct, is_cropped",
    [("short_crop", 0.875, True), ("short_crop", 1.25, True), ("warp", 0.875, False)],
)
def test_the_peak_of_the_map_lies_on_the_pixel_that_its_position_is_centred_on(
    predictor, monkeypatch, tmp_path, mode, crop_pct, is_cropped, size
):
    """Position (1, 2) of the map belongs to pixel (32, 64) of the network's input. So a dot that is
    painted where the map peaks over a plain picture is what the network sees at that pixel."""
    predictor.transform = replace(predictor.transform, image_size=160, mode=mode, crop_pct=crop_pct)
    heat = np.zeros((1, 5, 5), np.float32)
    heat[0, 1, 2] = 7
    monkeypatch.setattr(predictor, "scores_and_heat", lambda _: (np.zeros((1, 9)), heat))

    def looked(picture):
        picture.save(tmp_path / "picture.png")
        return look(predictor, tmp_path / "picture.png")

    result = looked(Image.new("RGB", size, (128, 128, 128)))
    assert result.heat.size == size and result.is_cropped == is_cropped
    hottest = np.asarray(overlay(Image.new("RGB", (1, 1), (128,) * 3), np.eye(1), np.eye(1) > 0))
    distance = np.abs(np.asarray(result.heat, int) - hottest.astype(int)).sum(axis=2)
    peak = np.unravel_index(distance.argmin(), distance.shape)
    dot = Image.new("RGB", size)
    dot.putpixel((int(peak[1]), int(peak[0])), (255, 255, 255))
    seen = looked(dot).seen.astype(int).sum(axis=2)
    assert seen.max() > 0 and np.argwhere(seen == seen.max()).tolist() == [[32, 64]]


@pytest.mark.parametrize("mode", ["short_crop", "warp"])
def test_what_the_crop_leaves_out_is_pale_and_nothing_else(predictor, monkeypatch, mode, tmp_path):
    """A network for 96 pixels sees the middle 87.5 % of the short side's length."""
    predictor.transform = replace(predictor.transform, image_size=98, mode=mode, crop_pct=0.875)
    cold = np.zeros((1, 9), np.float32), np.zeros((1, 4, 4), np.float32)
    monkeypatch.setattr(predictor, "scores_and_heat", lambda _: cold)
    Image.new("RGB", (800, 448)).save(tmp_path / "black.png")
    drawn = np.asarray(look(predictor, tmp_path / "black.png").heat).sum(axis=2)
    rows, columns = np.nonzero(drawn == 0)
    edges = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    # 448 rows become 112, of which 98 are kept: 7 rows of 4 pixels are cut off at each edge.
    side = 4 * 98
    kept = (28, 28 + side, (800 - side) // 2, (800 + side) // 2)
    assert edges == (kept if mode == "short_crop" else (0, 448, 0, 800))
    assert (drawn == 0).sum() == (edges[1] - edges[0]) * (edges[3] - edges[2])


def test_positions_of_the_map_are_centred_on_every_32nd_pixel(network):
    """65 pixels mirrored stay the same lattice 0, 32, 64, and with mirrored kernels, so does the
    map: it would not if a position were centred anywhere else."""
    for parameter in network.parameters():
        if parameter.ndim == 4:
            for axis in (2, 3):
                parameter.set_value((parameter + parameter.flip([axis])) / 2)
    image = np.random.default_rng(0).normal(0, 1, (1, 3, 65, 65)).astype("float32")
    maps = [heat_map(network, image, label) for label in range(9)]
    label = int(np.argmax([np.ptp(heat) for heat in maps]))
    heat = maps[label]
    assert heat.shape == (3, 3) and np.ptp(heat) > 0.01 * heat.max() > 0
    for axis in (0, 1):
        mirrored = heat_map(network, np.flip(image, axis + 2).copy(), label)
        np.testing.assert_allclose(np.flip(mirrored, axis), heat, rtol=1e-3)


@pytest.mark.parametrize("size, shown", [((30, 20), (384, 256)), ((2000, 1000), (1600, 800))])
def test_small_pictures_are_enlarged_and_huge_ones_reduced(predictor, tmp_path, size, shown):
    Image.effect_noise(size, 80).convert("RGB").save(tmp_path / "picture.png")
    assert look(predictor, tmp_path / "picture.png").heat.size == shown


def test_what_cannot_be_classified_is_an_input_error(network, predictor):
    with pytest.raises(InputError, match="cannot identify it as any of"):
        look(predictor, FIXTURES / "README.md")
    network.head.bias.set_value(np.full(9, np.nan, "float32"))
    with pytest.raises(InputError, match="eager are not finite"):
        look(predictor, PICTURE)


def test_classes_of_one_name_stay_apart_and_are_no_html(network, predictor):
    assert distinct(["crane", "kite", "crane"]) == ["crane (0)", "kite", "crane (2)"]
    predictor.class_names = ['<script>alert("x")</script>'] * 9
    shown = heat_html(look(predictor, PICTURE))
    assert "<script" not in shown and "&lt;script&gt;alert(&quot;x&quot;)" in shown


def test_what_is_said_of_a_model(run_folder, predictor, exported):
    name, origin = describe(str(run_folder), predictor)
    assert name == f"tiny ({run_folder})"
    assert origin.startswith("Trained on the images of ")
    assert origin.endswith("It sees 64 x 64 pixels and tells 9 classes apart.")
    _, origin = describe("exported", exported)
    assert origin.startswith("Exported from a network in memory. It sees")
    name, origin = describe("replknet-31B-1K-224", predictor)
    assert name == "replknet-31b-1k-224" and origin.startswith("Trained on ImageNet-1K.")


def test_examples_are_spread_over_the_validation_list(tmp_path):
    make_data(tmp_path, train=2, val=40)
    config = get_config(make_run(tmp_path, classes=4) / "config.yaml")
    config = update_config(config, argparse.Namespace(opts=["DATA.DATA_PATH", str(tmp_path)]))
    examples = validation_examples(config, "abcd", 5)
    numbers = [0, 9, 19, 29, 39]
    assert [(int(Path(path).stem), name) for path, name, _ in examples] == [
        (number, "abcd"[number % 4]) for number in numbers
    ]
    assert {small.size for *_, small in examples} == {(192, 192)}
    (tmp_path / "val_list.txt").write_text("../outside.jpg 0\n")
    assert validation_examples(config, "abcd", 5) == []


def test_examples_that_cannot_be_shown_are_left_out(tmp_path):
    """A missing file, a folder, no image, half of one, and names that are not UTF-8."""
    make_data(tmp_path, train=2, val=1)
    config = get_config(make_run(tmp_path, classes=4) / "config.yaml")
    config = update_config(config, argparse.Namespace(opts=["DATA.DATA_PATH", str(tmp_path)]))
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "text.jpg").write_text("not a picture")
    shutil.copyfile(PICTURE, tmp_path / "good.jpg")
    (tmp_path / "half.jpg").write_bytes(PICTURE.read_bytes()[:5000])
    shutil.copyfile(PICTURE, os.fsdecode(os.fsencode(tmp_path) + b"/gr\xfcn.jpg"))
    (tmp_path / "val_list.txt").write_bytes(
        b"missing.jpg 0\nfolder.jpg 0\ntext.jpg 1\nhalf.jpg 1\ngr\xfcn.jpg 1\ngood.jpg 2\n"
    )
    shown = validation_examples(config, "abcd", 6)
    assert [example[:2] for example in shown] == [(str(tmp_path / "good.jpg"), "c")]


def hold_uploads(folder, pipe):
    """A page without its server: its folder for uploads, held until it is told to end."""
    tempfile.tempdir = folder
    path = make_upload_folder()
    pipe.send(path)
    pipe.recv()


@contextlib.contextmanager
def holding(folder):
    """The uploads of a page in a process of its own, and a way to kill it."""
    context = multiprocessing.get_context("fork")
    pipe, other = context.Pipe()
    process = context.Process(target=hold_uploads, args=(str(folder), other))
    process.start()
    try:
        yield Path(pipe.recv()), process
    finally:
        process.kill()
        process.join()


def test_uploads_of_killed_pages_are_removed_by_the_next_and_no_others(tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "photo.jpg").touch()
    (tmp_path / "replknet-page-link-uploads").symlink_to(kept)
    (tmp_path / "replknet-page-old").mkdir()  # of version 0.2, which locked none
    with holding(tmp_path) as (living, _):
        with holding(tmp_path) as (killed, process):
            (killed / "photo.jpg").touch()
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        assert killed.exists() and living.exists()
        with holding(tmp_path) as (new, _):
            left = {"kept", "replknet-page-link-uploads", "replknet-page-old"}
            assert {path.name for path in tmp_path.iterdir()} == {living.name, new.name, *left}
            assert os.listdir(kept) == ["photo.jpg"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make a folder of another user")
def test_uploads_of_other_users_are_left_alone(tmp_path):
    other = tmp_path / "replknet-page-other-uploads"
    other.mkdir()
    os.chown(other, 65534, 65534)
    with holding(tmp_path) as (new, _):
        assert other.exists() and new.exists()


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize("path", ["/config", "/gradio_api/file=http://evil.example/x.jpg"])
@pytest.mark.parametrize(
    "headers, allowed",
    [
        ([(b"host", b"127.0.0.1:7860")], True),
        ([(b"host", b"LOCALHOST:7860"), (b"origin", b"http://localhost:7860")], True),
        ([], False),
        ([(b"host", b"127.0.0.1:7860"), (b"host", b"evil")], False),
        ([(b"host", b"127.0.0.1:7860"), (b"origin", b"https://127.0.0.1:7860")], False),
        ([(b"host", b"127.0.0.1:7860"), (b"origin", b"null")], False),
        ([(b"host", b"127.0.0.1.evil:7860")], False),
        ([(b"host", b"127.0.0.1:78600")], False),
    ],
)
def test_only_requests_of_this_page_come_through(kind, path, headers, allowed):
    pytest.importorskip("starlette", reason="requirements/page.txt")
    sent, passed = [], []

    async def app(*_):
        passed.append(True)

    async def send(message):
        sent.append(message.get("status"))

    scope = {"type": kind, "path": path, "headers": headers}
    asyncio.run(OwnRequestsOnly(app, 7860)(scope, None, send))
    allowed = allowed and "://" not in path
    assert (passed, sent[:1]) == (([True], []) if allowed else ([], [403]))


# ---- the command line


def test_a_port_in_use_is_reported_before_the_model_is_opened(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["no model", f"--port={port}"]) == 2
    assert capsys.readouterr().err.startswith(
        f"error: port {port} of 127.0.0.1 is not available (Address already in use)"
    )


def test_a_checkpoint_takes_a_configuration(monkeypatch, run_folder):
    pytest.importorskip("gradio", reason="requirements/page.txt")
    shown = []
    monkeypatch.setattr("replknet_paddle.deploy.page.serve", lambda *_: None)
    monkeypatch.setattr(
        "replknet_paddle.deploy.page.build_page", lambda *given: shown.append(given)
    )
    monkeypatch.setattr("replknet_paddle.commands.predict.signal.signal", lambda *_: None)
    flags = ["-cfg", str(run_folder / "config.yaml"), "-opts", "DATA.CROP_PCT", "0.5"]
    assert main([str(run_folder), *flags, f"--port={free_ports(1)[0]}"]) == 0
    ((_, predictor),) = shown
    config = predictor.backend.network.config
    assert config.DATA.CROP_PCT == 0.5
    expected = build_eval_transform(config)(decode(PICTURE))
    np.testing.assert_array_equal(predictor.preprocess(PICTURE), expected)
