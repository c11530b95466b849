"""Effective receptive fields: against the official script, by hand, and interrupted."""

import copy

import numpy as np
import pytest
from tiny import FIXTURES

from replknet_paddle.analysis.receptive_field import (
    Field,
    contribution_scores,
    high_contribution_areas,
    load_field,
    measure,
    rescaled,
    save_field,
)
from replknet_paddle.checkpoints.load import load_pretrained
from replknet_paddle.ops import use_fast_depthwise_conv
from replknet_paddle.runtime.errors import InputError

pytestmark = [pytest.mark.numbers, pytest.mark.paddle_version]

# By the functions `get_input_grad` and `get_rectangle` of the official repository's erf/ scripts,
# PyTorch 2.13, on the official network with tiny31_official.pth: `scores` (2, 64, 64) of the images
# in tiny31_expected.npz, and `sides` of their mean at the four thresholds, 0 for none. In float64,
# because a gradient jumps where rounding moves the input of a ReLU past 0: PyTorch's own float32
# scores differ from these by 2 % of the largest.
OFFICIAL = np.load(FIXTURES / "tiny31_erf.npz")
IMAGES = np.load(FIXTURES / "tiny31_expected.npz")["images"]


@pytest.fixture(scope="module")
def tiny31(network):
    model = network("tiny31")
    load_pretrained(model, FIXTURES / "tiny31_official.pth")
    return model


@pytest.fixture
def double(tiny31):
    """The same network in float64."""
    return copy.deepcopy(tiny31).to(dtype="float64")


def sides(scores):
    return [area.side_pixels for area in high_contribution_areas(scores)]


@pytest.mark.parametrize("merged", [False, True])
def test_scores_are_those_of_the_official_script(double, merged):
    if merged:
        double.structural_reparam()
    for image, expected in zip(IMAGES.astype(np.float64), OFFICIAL["scores"]):
        scores = contribution_scores(double, image)
        assert scores.shape == (64, 64) and scores.min() >= 0
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-8 * expected.max())


@pytest.mark.parametrize("impl", ["direct", "fft", "matmul"])
def test_scores_by_our_operators_differ_by_rounding(impl, tiny31, operators):
    model = copy.deepcopy(tiny31)
    assert use_fast_depthwise_conv(model, impl) > 0
    scores, expected = contribution_scores(model, IMAGES[0]), OFFICIAL["scores"][0]
    assert np.linalg.norm(scores - expected) < 0.02 * np.linalg.norm(expected)


def test_sides_are_those_of_the_official_script():
    expected = [side or None for side in OFFICIAL["sides"].tolist()]
    assert expected[-1] is None  # no centred square leaves out row 0 and has 99 %
    assert sides(OFFICIAL["scores"].mean(axis=0)) == expected
    y, x = np.mgrid[:256, :256] - 128
    assert sides(np.exp(-(x**2 + y**2) / 1800)) == [39, 49, 69, 173]


def test_rescaled_takes_the_logarithm_and_the_largest_as_one():
    np.testing.assert_allclose(rescaled(np.array([[0.0, 9.0], [99.0, 0.0]])), [[0, 0.5], [1, 0]])
    with pytest.raises(InputError, match="0 everywhere"):
        rescaled(np.zeros((4, 4)))


NAMES = [f"{i}.png" for i in range(6)]


def read(name):
    """The image of a name: noise, whose seed is the name's number."""
    seed = int(name.split(".")[0])
    return np.random.default_rng(seed).standard_normal((3, 64, 64)).astype(np.float32)


def measured(model, target, *, names=NAMES, read=read, num_images=4, **options):
    return measure(
        model, names, read, num_images=num_images, input_size=64, target=str(target), **options
    )


def read_with_nan(name):
    image = read(name)
    if name == "1.png":
        image[0, 5, 5] = np.nan
    if name == "2.png":
        image *= 3e37  # overflows in the first stage, and no later map shows it
    return image


def test_the_field_is_the_mean_over_images_with_a_finite_gradient(tiny31, tmp_path):
    reports, target = [], tmp_path / "erf.npy"
    field = measured(
        tiny31, target, read=read_with_nan, on_image=lambda *report: reports.append(report)
    )
    assert field.images == load_field(target).images == ["0.png", "3.png", "4.png", "5.png"]
    assert field.skipped == load_field(target).skipped == ["1.png", "2.png"]
    assert reports[:3] == [("0.png", True, 1), ("1.png", False, 1), ("2.png", False, 1)]
    each = [contribution_scores(tiny31, read(name)).astype(np.float64) for name in field.images]
    np.testing.assert_allclose(field.scores, np.mean(each, axis=0), rtol=1e-12)
    np.testing.assert_array_equal(np.load(target), field.scores)
    assert not any(p.stop_gradient for n, p in tiny31.named_parameters() if "conv.weight" in n)


def test_too_few_images_are_reported(tiny31, tmp_path):
    with pytest.raises(InputError, match="there are 6 images; 7 are needed"):
        measured(tiny31, tmp_path / "a.npy", num_images=7)
    assert not (tmp_path / "a.npy").exists()  # before anything is computed
    with pytest.raises(InputError, match="6 images, and 2 of them .* 1.png, 2.png; 5 are needed"):
        measured(tiny31, tmp_path / "b.npy", num_images=5, read=read_with_nan)
    # What could be computed is kept: asking for fewer is answered at once.
    assert len(measured(tiny31, tmp_path / "b.npy", read=None).images) == 4


def test_a_file_of_something_else_is_not_continued(tiny31, network, tmp_path):
    target = tmp_path / "erf.npy"
    measured(tiny31, target)
    before = target.read_bytes()
    for options, problem in (
        (dict(model=network("tiny31")), "other weights"),
        (dict(names=["other.png", *NAMES]), "other images"),
        (dict(num_images=3), "4 images, more than 3"),
    ):
        with pytest.raises(InputError, match=f"cannot continue .*{problem}"):
            measured(options.pop("model", tiny31), target, **options)
    with pytest.raises(InputError, match="64 x 64 pixels, not 32"):
        measure(tiny31, NAMES, read, num_images=4, input_size=32, target=str(target))
    np.save(target, np.ones((64, 64)))
    with pytest.raises(InputError, match="not written by this program"):
        measured(tiny31, target)
    assert target.read_bytes() != before


def test_files_that_are_no_fields_are_refused(tmp_path):
    path = tmp_path / "x.npy"
    with pytest.raises(FileNotFoundError):
        load_field(path)
    for array, problem in (
        (np.ones((4, 5)), "square"),
        (np.ones(16), "square"),
        (-np.ones((4, 4)), "below 0"),
        (np.full((4, 4), np.nan), "not finite"),
        (np.array([[None] * 4] * 4), "not a .npy file"),  # a pickle inside
    ):
        np.save(path, array)
        with pytest.raises(InputError, match=problem):
            load_field(path)
    save_field(path, Field(np.ones((4, 4)), ["a"], [], "digest"))
    whole = path.read_bytes()
    assert load_field(path).images == ["a"]
    start = whole[: whole.rindex(b"\x93NUMPY")]  # without the record
    huge = whole.replace(b"(4, 4)", b"(999999999, 999999999)")
    for content in (b"", b"text", whole[:60], whole[:-5], start + b"more", huge):
        path.write_bytes(content)
        with pytest.raises(InputError, match="not a .npy file"):
            load_field(path)
    for record in (
        *(b"[1]", b"nonsense", b'{"images": 1}', b'{"images": "a"}', b'{"skipped": [2]}'),
        b'{"other": ""}',
    ):
        path.write_bytes(start)
        with open(path, "ab") as file:
            np.save(file, np.frombuffer(record, np.uint8))
        with pytest.raises(InputError, match="not a .npy file"):
            load_field(path)


def test_a_network_in_training_mode_is_refused(double, tmp_path):
    double.train()
    with pytest.raises(ValueError, match="training mode"):
        measured(double, tmp_path / "erf.npy")
