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
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from harness import free_ports, make_run
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
    grad_cam,
    look,
    make_upload_folder,
    seen_html,
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


def test_the_heat_map_lies_over_what_the_network_sees(network, predictor):
    heat = look(predictor, PICTURE).heat
    with Image.open(PICTURE) as image:
        array, pixels = predictor.transform(image), predictor.transform.pixels(image)
    expected = overlay(pixels, grad_cam(network, array[None])[1])
    np.testing.assert_array_equal(np.asarray(heat), np.asarray(expected))


def test_what_cannot_be_classified_is_an_input_error(network, predictor):
    with pytest.raises(InputError, match="cannot identify it as any of"):
        look(predictor, FIXTURES / "README.md")
    network.head.bias.set_value(np.full(9, np.nan, "float32"))
    with pytest.raises(InputError, match="eager are not finite"):
        look(predictor, PICTURE)


def test_classes_of_one_name_stay_apart_and_are_no_html(network, predictor):
    assert distinct(["crane", "kite", "crane"]) == ["crane (0)", "kite", "crane (2)"]
    predictor.class_names = ['<script>alert("x")</script>'] * 9
    shown = seen_html(look(predictor, PICTURE))
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
    assert [(int(Path(path).stem), name) for path, name in examples] == [
        (number, "abcd"[number % 4]) for number in numbers
    ]
    (tmp_path / "val_list.txt").write_text("../outside.jpg 0\n")
    assert validation_examples(config, "abcd", 5) == []


def test_examples_that_cannot_be_shown_are_left_out(tmp_path):
    """A missing file, a folder, what is no image, and names that are not UTF-8."""
    make_data(tmp_path, train=2, val=1)
    config = get_config(make_run(tmp_path, classes=4) / "config.yaml")
    config = update_config(config, argparse.Namespace(opts=["DATA.DATA_PATH", str(tmp_path)]))
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "text.jpg").write_text("not a picture")
    shutil.copyfile(PICTURE, tmp_path / "good.jpg")
    shutil.copyfile(PICTURE, os.fsdecode(os.fsencode(tmp_path) + b"/gr\xfcn.jpg"))
    (tmp_path / "val_list.txt").write_bytes(
        b"missing.jpg 0\nfolder.jpg 0\ntext.jpg 1\ngr\xfcn.jpg 1\ngood.jpg 2\n"
    )
    assert validation_examples(config, "abcd", 5) == [(str(tmp_path / "good.jpg"), "c")]


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


def test_without_gradio_it_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main([str(tmp_path), f"--port={free_ports(1)[0]}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: this needs gradio") and "requirements/page.txt" in error


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
