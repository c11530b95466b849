"""What the page shows, without the page: tests/commands/test_page_command.py has that."""

import argparse
import asyncio
from pathlib import Path

import numpy as np
import pytest
from harness import make_run
from PIL import Image
from tiny import FIXTURES, make_data

from replknet_paddle.config import get_config, update_config
from replknet_paddle.deploy.gradcam import grad_cam
from replknet_paddle.deploy.page import distinct, look, seen_html
from replknet_paddle.deploy.page_facts import page_facts, validation_examples
from replknet_paddle.deploy.page_server import ThisMachineOnly
from replknet_paddle.deploy.pictures import overlay
from replknet_paddle.deploy.predictor import Predictor, inference_model, open_network
from replknet_paddle.runtime.errors import InputError

PICTURE = FIXTURES / "images" / "portrait_301x400.jpg"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), image_size=64, classes=9)


def test_the_classes_are_those_of_inference_model(run_folder):
    network = open_network(run_folder)
    predictor = Predictor(network, backend="dygraph")
    result = inference_model(network, PICTURE)
    expected = dict(
        sorted(enumerate(result["pred_scores"]), key=lambda item: item[1], reverse=True)[:5]
    )
    for model in (network, None):  # with and without a heat map
        result = look(predictor, model, PICTURE)
        classes, heat = result.classes, result.heat
        assert list(classes) == [str(label) for label in expected]
        np.testing.assert_allclose(list(classes.values()), list(expected.values()), rtol=1e-4)
        assert (heat is None) == (model is None)


def test_the_heat_map_lies_over_what_the_network_sees(run_folder):
    network = open_network(run_folder)
    predictor = Predictor(network, backend="dygraph")
    heat = look(predictor, network, PICTURE).heat
    with Image.open(PICTURE) as image:
        array, pixels = predictor.transform(image), predictor.transform.pixels(image)
    expected = overlay(pixels, grad_cam(network, array[None])[1])
    np.testing.assert_array_equal(np.asarray(heat), np.asarray(expected))


def test_what_is_no_picture_is_an_input_error(run_folder):
    network = open_network(run_folder)
    with pytest.raises(InputError, match="cannot identify it as any of"):
        look(Predictor(network, backend="dygraph"), network, FIXTURES / "README.md")


def test_outputs_that_are_no_numbers_are_an_input_error(run_folder):
    network = open_network(run_folder)
    network.head.bias.set_value(np.full(9, np.nan, "float32"))
    for model in (network, None):  # with and without a heat map
        with pytest.raises(InputError, match="dygraph are not finite"):
            look(Predictor(network, backend="dygraph"), model, PICTURE)


def test_classes_of_one_name_stay_apart():
    assert distinct(["crane", "kite", "crane"]) == ["crane (0)", "kite", "crane (2)"]


def test_text_of_a_user_is_no_html(run_folder):
    network = open_network(run_folder)
    predictor = Predictor(network, backend="dygraph")
    predictor.class_names = ['<script>alert("x")</script>'] * 9
    shown = seen_html(look(predictor, network, PICTURE))
    assert "<script" not in shown and "&lt;script&gt;alert(&quot;x&quot;)" in shown


def test_what_is_known_of_a_model(run_folder):
    network = open_network(run_folder)
    predictor = Predictor(network, backend="dygraph")
    facts = page_facts(str(run_folder), predictor, network)
    assert facts.name == f"tiny ({run_folder})" and facts.examples == []
    assert facts.trained_on.endswith("It sees 64 x 64 pixels and tells 9 classes apart.")
    exported = page_facts("exported", predictor, None)
    assert exported.trained_on.startswith("Exported from a network in memory.")


def test_examples_are_spread_over_the_validation_list(tmp_path):
    make_data(tmp_path, train=2, val=40)
    config = get_config(make_run(tmp_path, classes=4) / "config.yaml")
    config = update_config(config, argparse.Namespace(opts=["DATA.DATA_PATH", str(tmp_path)]))
    examples = validation_examples(config, ["a", "b", "c", "d"], 5)
    numbers = [int(Path(example.path).stem) for example in examples]
    assert numbers == [0, 9, 19, 29, 39]
    assert [example.class_name for example in examples] == ["abcd"[n % 4] for n in numbers]
    (tmp_path / "val_list.txt").write_text("../outside.jpg 0\n")
    assert validation_examples(config, ["a", "b", "c", "d"], 5) == []


@pytest.mark.parametrize(
    "headers, allowed",
    [
        ([(b"host", b"127.0.0.1:7860")], True),
        ([(b"Host", b"LOCALHOST:7860"), (b"Origin", b"http://localhost:7860")], True),
        ([], False),
        ([(b"host", b"127.0.0.1:7860"), (b"host", b"evil")], False),
        ([(b"host", b"127.0.0.1:7860"), (b"origin", b"https://127.0.0.1:7860")], False),
        ([(b"host", b"127.0.0.1.evil:7860")], False),
        ([(b"host", b"127.0.0.1:78600")], False),
    ],
)
def test_requests_of_this_page_alone_are_its_own(headers, allowed):
    assert ThisMachineOnly(None, 7860).is_own(headers) is allowed


def test_a_foreign_websocket_is_closed():
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "websocket", "headers": [(b"host", b"evil")]}
    asyncio.run(ThisMachineOnly(None, 7860)(scope, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]
