"""The compiled operations and Pillow's, which must not differ in a single bit."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from properties import same_examples

from replknet_paddle.data.transforms.pixels import PillowPixels, get_pixels

IMAGES = Path(__file__).parents[2] / "fixtures" / "images"
PILLOW_MAJOR = int(Image.__version__.split(".")[0])
SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module")
def native():
    px = get_pixels()
    if isinstance(px, PillowPixels):
        pytest.skip("no C++ compiler here")
    return px


def noise(rng: np.random.Generator, least: int = 1, most: int = 70) -> np.ndarray:
    """An image of extreme values, which overshoot, of random size."""
    shape = (*rng.integers(least, most, 2), 3)
    return rng.choice([0, 1, 128, 254, 255], shape).astype(np.uint8)


@same_examples
@given(SEEDS)
def test_resizing_equals_pillow(native, seed):
    rng = np.random.default_rng(seed)
    image = Image.fromarray(noise(rng))
    size = tuple(int(side) for side in rng.integers(1, 90, 2))
    expected = PillowPixels().resize(image, size)
    np.testing.assert_array_equal(native.resize(image, size), expected)
    if PILLOW_MAJOR >= 13:  # older ones never make the rows first
        np.testing.assert_array_equal(expected, np.array(image.resize(size, Image.BICUBIC)))


@same_examples
@given(SEEDS, st.booleans())
def test_resizing_parts_equals_pillow(native, seed, flip):
    rng = np.random.default_rng(seed)
    image = Image.fromarray(noise(rng, least=8))
    left, top = (int(edge) for edge in rng.integers(0, 4, 2))
    crop = (left, top, image.width - 1, image.height - 2)
    width, height = crop[2] - left, crop[3] - top
    box = (0.5, 0.25, width - rng.integers(0, 4) / 4, height - 0.125)
    size = tuple(int(side) for side in rng.integers(10, 60, 2))
    keep = (3, 2, size[0] - 1, size[1])
    for part in ({"crop": crop}, {"box": box, "crop": crop}, {"keep": keep}):
        expected = PillowPixels().resize(image, size, **part, flip=flip)
        np.testing.assert_array_equal(native.resize(image, size, **part, flip=flip), expected)


MATRICES = [
    (1, 0.27, 0, 0, 1, 0),
    (1, 0, 0, -0.3, 1, 0),
    (1, 0, 7.3, 0, 1, 0),
    (1, 0, 0, 0, 1, -5.5),
    (1, 0, -3, 0, 1, 4),
    (0.9, 0.4, -3.7, -0.4, 0.9, 8.1),
    (1.7, -0.2, 0, 0.3, 0.4, 1),
    (0, 1, 0, 1, 0, 0),
]


@same_examples
@given(SEEDS, st.sampled_from(MATRICES), st.sampled_from([-0.4, 0.0, 0.1, 0.7, 1.0, 1.9]))
def test_other_operations_equal_pillow(native, seed, matrix, factor):
    rng = np.random.default_rng(seed)
    image = noise(rng)
    other = rng.integers(0, 256, image.shape, dtype=np.uint8)
    table = rng.integers(0, 256, (3, 256), dtype=np.uint8)
    for name, arguments in {
        "affine": (image, matrix, (124, 116, 104)),
        "grey": (other,),
        "smooth": (other,),
        "histogram": (image,),
        "lookup": (image, table),
        "blend": (image, other, factor),
    }.items():
        expected = getattr(PillowPixels(), name)(*arguments)
        np.testing.assert_array_equal(getattr(native, name)(*arguments), expected, err_msg=name)
    np.testing.assert_array_equal(native.lookup(image, table[0]), table[0][image])


def test_inputs_stay_as_they_are_whatever_their_layout(native):
    image = noise(np.random.default_rng(3), least=20)
    view = image[::2, ::-1]
    before = image.copy()
    for px in (native, PillowPixels()):
        np.testing.assert_array_equal(px.smooth(view), native.smooth(view.copy()))
        px.affine(view, MATRICES[0], (0, 0, 0))
    np.testing.assert_array_equal(image, before)


def test_an_image_that_pillow_cannot_lend_is_copied(native, monkeypatch):
    """As before Pillow 11.2."""
    image = Image.open(IMAGES / "landscape_499x375.jpg")
    image.load()
    expected = native.resize(image, (100, 80))
    monkeypatch.delattr(Image.Image, "__arrow_c_array__", raising=False)
    np.testing.assert_array_equal(native.resize(image, (100, 80)), expected)


def test_workers_that_are_started_afresh_get_the_same(native):
    assert pickle.loads(pickle.dumps(native)) is get_pixels()


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_pillow_does_it_and_says_so(monkeypatch, caplog, tmp_path, compiler):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("REPLKNET_PADDLE_CACHE", str(tmp_path))
    assert isinstance(get_pixels.__wrapped__(), PillowPixels)
    assert "no compiled image operations" in caplog.text and "CXX" in caplog.text
    assert not list(tmp_path.rglob("*.so"))
