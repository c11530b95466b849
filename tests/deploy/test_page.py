"""What the page shows, without the page: tests/tools/test_demo.py has that."""

import numpy as np
import pytest
from PIL import Image
from runs import make_run
from tiny import FIXTURES

from replknet_paddle.deploy.gradcam import grad_cam
from replknet_paddle.deploy.page import distinct, look
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
        classes, heat = look(predictor, model, PICTURE)
        assert list(classes) == [str(label) for label in expected]
        np.testing.assert_allclose(list(classes.values()), list(expected.values()), rtol=1e-4)
        assert (heat is None) == (model is None)


def test_the_heat_map_lies_over_what_the_network_sees(run_folder):
    network = open_network(run_folder)
    predictor = Predictor(network, backend="dygraph")
    heat = look(predictor, network, PICTURE)[1]
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
