"""Counts against the exact figures of the official code, and against counting by hand."""

import numpy as np
import paddle
import pytest
from paddle import nn
from shapes_only import without_values
from tiny import ROOT

from replknet_paddle.analysis.costs import count_macs, count_parameters
from replknet_paddle.config import get_config
from replknet_paddle.model import RepLKNet, build_replknet

pytestmark = pytest.mark.paddle_version

# Of the official code. config: parameters, merged parameters, {image size: (MACs, merged MACs)}
COUNTS = {
    "replknet_31b": (
        79_864_168,
        79_527_272,
        {224: (15_431_298_048, 15_353_525_248), 384: (45_347_135_488, 45_118_578_688)},
    ),
    "replknet_31l_22k1k_384": (
        172_671_016,
        172_165_672,
        {384: (96_332_255_232, 95_989_420_032)},
    ),
    "replknet_xl": (335_435_752, 335_399_656, {320: (128_730_316_800, 128_730_316_800)}),
    "replknet_31b_22k": (101_226_193, 100_889_297, {224: (15_452_639_232, 15_374_866_432)}),
    "replknet_31l_22k_384": (
        204_703_633,
        204_198_289,
        {384: (96_364_267_008, 96_021_431_808)},
    ),
}
SIZES = {"large_kernel_sizes": [7, 7, 5, 5], "layers": [1, 1, 2, 1], "channels": [4, 8, 8, 12]}


@pytest.mark.parametrize("name", COUNTS)
def test_published_networks_have_the_official_counts_to_the_unit(name):
    parameters, merged_parameters, macs = COUNTS[name]
    model = without_values(build_replknet, get_config(ROOT / "configs" / f"{name}.yaml"))
    before, after = ({size: pair[i] for size, pair in macs.items()} for i in (0, 1))
    assert count_parameters(model) == parameters
    assert {size: count_macs(model, size) for size in macs} == before
    model.structural_reparam()
    assert count_parameters(model) == merged_parameters
    assert {size: count_macs(model, size) for size in macs} == after


def test_every_published_row_has_one_of_these_counts():
    def size(config):
        return config.MODEL.CHANNELS[0], config.MODEL.NUM_CLASSES

    published = map(get_config, (ROOT / "configs").glob("replknet_[3x]*.yaml"))
    # Where it is None, it is left to the data.
    sizes = {size(config) for config in published if config.MODEL.NUM_CLASSES is not None}
    assert sizes == {size(get_config(ROOT / "configs" / f"{name}.yaml")) for name in COUNTS}


def hand_made():
    return nn.Sequential(
        nn.Conv2D(3, 8, 3, stride=2, padding=1),  # 9 -> 5: 8 x 3 x 9 weights, 25 places
        nn.BatchNorm2D(8),
        nn.Conv2D(8, 8, 5, padding=2, groups=8, bias_attr=False),  # 8 x 25 weights, 25 places
        nn.Conv2D(8, 4, 2, stride=3),  # 5 -> 2: 4 x 8 x 4 weights, 4 places
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def test_counts_by_hand():
    model = hand_made()
    assert count_macs(model, 9) == 216 * 25 + 200 * 25 + 128 * 4 + 160
    assert count_parameters(model) == (216 + 8) + 16 + 200 + (128 + 4) + (160 + 10)
    model[5].weight.stop_gradient = True  # frozen ones do not count
    assert count_parameters(model) == count_parameters(hand_made()) - 160


@pytest.mark.parametrize(
    "options, macs",
    [
        ({"dilation": 2}, 27 * 25),
        ({"stride": [1, 2]}, 27 * 7 * 4),
    ],
)
def test_convolutions_of_any_geometry_are_counted_right_or_refused(options, macs):
    """A number is worse than no number where it is wrong."""
    model = nn.Conv2D(3, 1, 3, **options)
    assert list(model(paddle.zeros([1, 3, 9, 9])).shape[2:])  # Paddle takes it
    try:
        counted = count_macs(model, 9)
    except (ValueError, NotImplementedError):
        return
    assert counted == macs


class Failing(nn.Layer):
    def forward(self, x):
        raise OverflowError("too far")


@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("merged", [True, False])
def test_counting_leaves_the_model_as_it_was(merged, fails):
    """Some norms are in evaluation mode inside a model that trains, as fine-tuning has them."""
    model = RepLKNet(**SIZES, num_classes=10)
    if merged:
        model.structural_reparam()
    network = nn.Sequential(model, Failing()) if fails else model
    model.stages[1].eval()
    modes = [layer.training for layer in network.sublayers(include_self=True)]
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    if fails:
        with pytest.raises(OverflowError):
            count_macs(network, 32)
    else:
        assert count_macs(model, 32) == count_macs(model, 32) > 0
    layers = network.sublayers(include_self=True)
    assert [layer.training for layer in layers] == modes and set(modes) == {True, False}
    assert all(np.array_equal(value, state[name]) for name, value in model.state_dict().items())
    assert all("forward" not in vars(layer) for layer in layers)
    model(paddle.randn([2, 3, 32, 32])).sum().backward()  # counting has switched no gradient off
    assert model.stem[0].conv.weight.grad is not None


def test_a_backbone_counts_without_a_head():
    classifier = RepLKNet(**SIZES, num_classes=10)
    backbone = RepLKNet(**SIZES, out_indices=[3])
    assert count_macs(classifier, 64) - count_macs(backbone, 64) == 12 * 10
    assert count_parameters(classifier) - count_parameters(backbone) == 12 * 10 + 10 + 24
