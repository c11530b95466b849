import pytest
from tiny_training import make_model

from replknet_paddle.model import RepLKNet
from replknet_paddle.optim.optimizer import layer_id, num_layer_groups, parameter_groups

LAYERS_31B = [2, 2, 18, 2]

# Group of each part of RepLKNet-31B, spelled out from the official fine-tuning code.
PARTS_31B = {
    **{"stem": 0, "stages.0": 1, "transitions.0": 1, "stages.1": 2, "transitions.1": 2},
    **{"transitions.2": 11, "stages.3": 12, "norm": 13, "head": 13},
}
FIRST_BLOCKS = {3: 0, 4: 4, 5: 8, 6: 12, 7: 16, 8: 20, 9: 24, 10: 28, 11: 32}  # of four each
for group, first_block in FIRST_BLOCKS.items():
    for block in range(first_block, first_block + 4):
        PARTS_31B[f"stages.2.blocks.{block}"] = group


def groups_of(model, **kwargs):
    return parameter_groups(model, **{"weight_decay": 0.05, "layers": LAYERS_31B, **kwargs})


@pytest.fixture(scope="module")
def model_31b():
    """RepLKNet-31B's layers, and so its parameter names, with few channels and small kernels."""
    return RepLKNet(
        large_kernel_sizes=[5, 5, 5, 5],
        layers=LAYERS_31B,
        channels=[4, 4, 4, 4],
        small_kernel=3,
        num_classes=3,
    )


def test_31b_has_the_official_14_layer_groups(model_31b):
    groups = groups_of(model_31b)
    assert num_layer_groups(LAYERS_31B) == 14
    assert sorted({group.layer_id for group in groups}) == list(range(14))
    for group in groups:
        for name in group.names:
            (part,) = (part for part in PARTS_31B if name.startswith(part + "."))
            assert group.layer_id == PARTS_31B[part], name


def test_groups_partition_the_trainable_parameters(model_31b):
    groups = groups_of(model_31b, layer_decay=0.7)
    trainable = {
        name: param for name, param in model_31b.named_parameters() if not param.stop_gradient
    }
    names = [name for group in groups for name in group.names]
    assert sorted(names) == sorted(trainable)
    for group in groups:
        for name, param in zip(group.names, group.params, strict=True):
            assert trainable[name] is param
    assert not any(name.endswith(("._mean", "._variance")) for name in names)


def test_all_decay_but_1d_parameters_and_biases(model_31b):
    decay_of = {name: group.weight_decay for group in groups_of(model_31b) for name in group.names}
    exempt = {name for name, decay in decay_of.items() if decay == 0.0}
    expected = {
        name
        for name, param in model_31b.named_parameters()
        if not param.stop_gradient and (len(param.shape) == 1 or name.endswith("bias"))
    }
    assert exempt == expected
    assert {decay_of[name] for name in decay_of if name not in exempt} == {0.05}
    assert {"stem.0.conv.weight", "head.weight"} <= decay_of.keys() - exempt


@pytest.mark.parametrize("layer_decay", [None, 0.7])
def test_layer_decay_scales_the_rate_down_towards_the_stem(model_31b, layer_decay):
    for group in groups_of(model_31b, layer_decay=layer_decay):
        scale = (layer_decay or 1.0) ** (13 - group.layer_id)
        assert group.lr_scale == pytest.approx(scale, rel=1e-12)


def test_frozen_parameters_are_left_out():
    model = make_model()
    model.head.weight.stop_gradient = True
    groups = groups_of(model, layers=[1, 1, 3, 1])
    assert "head.weight" not in [name for group in groups for name in group.names]


@pytest.mark.parametrize(
    "layers, groups, last_block",
    [([2, 2, 18, 2], 14, 35), ([1, 1, 1, 1], 6, 1), ([2, 2, 2, 2], 6, 3), ([2, 2, 3, 2], 7, 5)],
)
def test_stage_2_has_a_group_for_every_4_blocks(layers, groups, last_block):
    assert num_layer_groups(layers) == groups
    assert layer_id("stages.2.blocks.0.pre_large_kernel_bn.weight", layers) == 3
    assert layer_id(f"stages.2.blocks.{last_block}.pre_ffn_bn.weight", layers) == groups - 3
    assert layer_id("transitions.2.0.conv.weight", layers) == groups - 3
    assert layer_id("stages.3.blocks.0.pre_large_kernel_bn.weight", layers) == groups - 2
    assert layer_id("head.bias", layers) == groups - 1
    # A stage's norm belongs to its end.
    norms = [layer_id(f"stages.{stage}.norm.weight", layers) for stage in range(4)]
    assert norms == [1, 2, groups - 3, groups - 2]


@pytest.mark.parametrize(
    "name",
    [
        "neck.weight",
        "stages.4.blocks.0.x",
        "stages.2.blocks.36.x",
        "transitions.3.0.conv.weight",
        "stages.2.extra.weight",
        "_layers.stem.0.conv.weight",
    ],
)
def test_a_name_without_a_layer_group_is_refused(name):
    with pytest.raises(ValueError, match="no layer group"):
        layer_id(name, LAYERS_31B)


def test_a_parameter_that_no_group_covers_is_refused():
    model = make_model()
    model.extra = model.create_parameter([3])
    with pytest.raises(ValueError, match="'extra' has no layer group"):
        groups_of(model, layers=[1, 1, 3, 1])
