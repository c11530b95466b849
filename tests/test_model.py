"""The network against reference implementations, its merging, and its training."""

import numpy as np
import paddle
import pytest
from paddle import nn
from tiny import FIXTURES

from replknet_paddle.config import get_config
from replknet_paddle.model import RepLKNet, build_replknet
from replknet_paddle.ops import use_large_kernel_ops
from replknet_paddle.segmentation.upernet import build_upernet

pytestmark = [pytest.mark.numbers, pytest.mark.paddle_version]

REFERENCES = ("tiny31", "tinyxl")
SIZES = {"large_kernel_sizes": [7, 7, 5, 5], "layers": [1, 1, 2, 1], "channels": [4, 8, 8, 12]}


@pytest.fixture
def reference(network):
    """A network with the weights of a fixture as the README loads them, images, and what is
    expected of them."""

    def load(name, **keys):
        model = network(name, **keys)
        model.set_state_dict(paddle.load(str(FIXTURES / f"{name}_paddlevit.pdparams")))
        expected = np.load(FIXTURES / f"{name}_expected.npz")
        return model, paddle.to_tensor(expected["images"]), expected

    return load


def randomize_statistics(model, seed=0):
    """Give every batch norm statistics and factors far from its fresh 0 and 1."""
    rng = np.random.default_rng(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith("._mean") or name.endswith(".bias"):
            tensor.set_value(rng.normal(0, 0.3, tensor.shape).astype("float32"))
        elif name.endswith("._variance") or ".norm.weight" in name or "_bn.weight" in name:
            tensor.set_value(rng.uniform(0.5, 1.5, tensor.shape).astype("float32"))


@pytest.mark.parametrize("impl", ["paddle", "auto", "direct", "fft"])
@pytest.mark.parametrize("name", REFERENCES)
def test_logits_and_every_stage_map_equal_the_reference(name, impl, reference, operators):
    model, images, expected = reference(name)
    said = use_large_kernel_ops(model, impl)
    assert said.count("by the compiled operator") == (0 if impl == "paddle" else 2)
    with paddle.no_grad():
        logits, maps = model(images), model.extract_feat(images)
    np.testing.assert_allclose(logits.numpy(), expected["logits"], atol=1e-4)
    assert isinstance(maps, tuple) and len(maps) == 4
    for i, stage_map in enumerate(maps):
        np.testing.assert_allclose(stage_map.numpy(), expected[f"stage{i}"], atol=1e-4)


@pytest.mark.parametrize("indices", [[0], [3], [1, 2], [0, 1, 2, 3], [3, 0]])
@pytest.mark.parametrize("name", REFERENCES)
def test_out_indices_give_the_listed_stages_in_order(name, indices, reference):
    model, images, expected = reference(name, OUT_INDICES=indices)
    with paddle.no_grad():
        maps = model(images)
    assert len(maps) == len(indices)
    for index, stage_map in zip(indices, maps):
        np.testing.assert_allclose(stage_map.numpy(), expected[f"stage{index}"], atol=1e-4)


@pytest.mark.parametrize("name", REFERENCES)
def test_features_and_head_are_the_two_halves_of_a_classifier(name, reference):
    model, images, expected = reference(name)
    weight, bias = model.head.weight.numpy(), model.head.bias.numpy()
    for _ in ("train form", "merged"):
        with paddle.no_grad():
            maps, logits = model.forward_features(images), model(images).numpy()
            pooled = model.forward_head(maps, pre_logits=True).numpy()
            assert np.array_equal(model.forward_head(maps).numpy(), logits)
            normalized = model.norm(paddle.to_tensor(expected["stage3"]))
        np.testing.assert_allclose(maps.numpy(), normalized.numpy(), atol=1e-4)
        np.testing.assert_allclose(pooled, maps.numpy().mean((2, 3)), atol=1e-5)
        np.testing.assert_allclose(pooled @ weight + bias, expected["logits"], atol=1e-4)
        assert pooled.shape == (len(images), model.num_features)
        model.structural_reparam()


def state_of(model):
    return {name: value.numpy() for name, value in model.state_dict().items()}


def test_a_network_of_no_classes_is_the_classifier_without_its_head():
    paddle.seed(0)
    with_head = RepLKNet(**SIZES, num_classes=10)
    randomize_statistics(with_head)
    without = RepLKNet(**SIZES, num_classes=0)
    assert with_head.num_features == without.num_features == SIZES["channels"][-1]
    state = with_head.state_dict()
    assert [*without.state_dict()] == [n for n in state if n not in ("head.weight", "head.bias")]
    without.set_state_dict({name: state[name] for name in without.state_dict()})
    images = paddle.randn([2, 3, 32, 32])
    for mode in ("train", "eval"):
        getattr(with_head, mode)(), getattr(without, mode)()
        pooled = with_head.forward_head(with_head.forward_features(images), pre_logits=True)
        assert np.array_equal(without(images).numpy(), pooled.numpy())


@pytest.mark.parametrize("before, after", [(10, 0), (10, 3), (0, 3)])
def test_a_head_is_replaced_and_nothing_else(before, after):
    keys = {name.upper(): value for name, value in SIZES.items()} | {"NUM_CLASSES": before}
    config = get_config(None, **{f"MODEL__{name}": value for name, value in keys.items()})
    model = build_replknet(config)
    old = state_of(model)
    model.class_names = ["some"]
    model.reset_classifier(after)
    new = state_of(model)
    assert [value.shape for name, value in new.items() if name.startswith("head.")] == (
        [(12, after), (after,)] if after else []
    )
    assert model(paddle.zeros([1, 3, 32, 32])).shape == [1, after or 12]
    for name in old.keys() | new.keys():
        assert name.startswith("head.") or np.array_equal(old[name], new[name])
    assert (config.MODEL.NUM_CLASSES, model.config.MODEL.NUM_CLASSES) == (before, after)
    assert model.config.is_frozen() and model.class_names is None


def test_a_backbone_has_no_head_to_replace():
    with pytest.raises(ValueError, match="a backbone has no head"):
        RepLKNet(**SIZES, out_indices=[3]).reset_classifier(3)


@pytest.mark.parametrize("keys", [{}, {"num_classes": 0}, {"out_indices": [0, 3]}], ids=str)
@pytest.mark.parametrize("merge", [False, True])
def test_a_captured_program_computes_the_same(keys, merge):
    model = RepLKNet(**SIZES, **keys)
    randomize_statistics(model)
    model.eval()
    if merge:
        model.structural_reparam()
    images = paddle.randn([2, 3, 32, 32])
    with paddle.no_grad():
        wanted = model(images)
        found = paddle.jit.to_static(model, full_graph=True)(images)
    for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (wanted, found))):
        np.testing.assert_allclose(one.numpy(), other.numpy(), atol=1e-5)


def test_backbone_has_no_head_and_its_maps_their_own_norms():
    model = RepLKNet(**SIZES, out_indices=[0, 2], norm_inter_features=True)
    names = set(model.state_dict())
    assert not {name for name in names if name.startswith(("head.", "norm."))}
    model.eval()
    randomize_statistics(model)
    norm = model.stages[2].norm
    with paddle.no_grad():
        images = paddle.randn([1, 3, 32, 32])
        plain, normalized = model.forward_stages(images)[2], model(images)[1]
        np.testing.assert_allclose(normalized.numpy(), norm(plain).numpy(), rtol=1e-6)
        assert not np.allclose(normalized.numpy(), plain.numpy())


@pytest.mark.parametrize("indices", [[0], [0, 2], [2, 1], [1, 2, 3], [0, 1, 2, 3]])
def test_every_parameter_that_a_backbone_trains_gets_a_gradient(indices):
    model = RepLKNet(**SIZES, out_indices=indices, norm_inter_features=True)
    sum(stage_map.sum() for stage_map in model(paddle.randn([2, 3, 64, 64]))).backward()
    trained = {name: p for name, p in model.named_parameters() if not p.stop_gradient}
    assert [name for name, parameter in trained.items() if parameter.grad is None] == []
    last = max(indices)
    assert f"stages.{last}.norm.weight" in trained and "stem.0.conv.weight" in trained
    frozen = {p.name for p in model.parameters() if p.stop_gradient and "batch_norm" not in p.name}
    assert bool(frozen) == (last < 3)


@pytest.mark.parametrize("small_kernel, dw_ratio", [(5, 1.0), (3, 1.5), (None, 1.5)])
def test_merging_keeps_logits_and_a_second_merge_changes_nothing(small_kernel, dw_ratio):
    model = RepLKNet(**SIZES, small_kernel=small_kernel, dw_ratio=dw_ratio, num_classes=10)
    randomize_statistics(model)
    model.eval()
    with paddle.no_grad():
        images = paddle.randn([2, 3, 64, 64])
        before = model(images).numpy()
        model.structural_reparam()
        merged = model(images).numpy()
        state = {name: value.numpy() for name, value in model.state_dict().items()}
        model.switch_to_deploy()
    assert np.abs(merged - before).max() < 1e-5 * np.abs(before).max()
    again = model.state_dict()
    assert state.keys() == again.keys()
    assert all(np.array_equal(value, again[name].numpy()) for name, value in state.items())
    assert not [name for name in state if "small_kernel_conv" in name or "origin" in name]


def test_merged_weights_load_into_a_network_built_merged():
    model = RepLKNet(**SIZES)
    randomize_statistics(model)
    model.eval()
    model.structural_reparam()
    built = RepLKNet(**SIZES, small_kernel_merged=True)
    assert list(built.state_dict()) == list(model.state_dict())
    built.set_state_dict(model.state_dict())
    built.eval()
    with paddle.no_grad():
        images = paddle.randn([1, 3, 32, 32])
        assert np.array_equal(built(images).numpy(), model(images).numpy())


@pytest.mark.parametrize("height, width", [(224, 224), (97, 61), (32, 32)])
def test_maps_have_strides_4_to_32(height, width):
    model = RepLKNet(**SIZES)
    model.eval()
    with paddle.no_grad():
        maps = model.extract_feat(paddle.zeros([1, 3, height, width]))
    for i, stage_map in enumerate(maps):
        rows, columns = (-(-size // 2 ** (i + 2)) for size in (height, width))
        assert stage_map.shape == [1, SIZES["channels"][i], rows, columns]


def test_initial_weights_are_uniform_in_the_range_of_the_fan_in():
    model = RepLKNet(
        large_kernel_sizes=[31, 29, 27, 13], layers=[1, 1, 1, 1], channels=[32, 64, 64, 64]
    )
    for layer, fan_in in (
        (model.stem[0].conv, 27),
        (model.stages[1].blocks[1].pw_conv_2.conv, 256),
        (model.stages[0].blocks[0].large_kernel.large_kernel_origin.conv, 961),
        (model.head, 64),
    ):
        weight, bound = layer.weight.numpy(), fan_in**-0.5
        assert 0.97 * bound < np.abs(weight).max() <= bound
        assert weight.std() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_stochastic_depth_grows_linearly_and_both_blocks_of_a_pair_share_it():
    model = RepLKNet(
        large_kernel_sizes=[7, 7, 5, 5],
        layers=[2, 1, 1, 1],
        channels=[4, 4, 4, 4],
        drop_path_rate=0.4,
    )
    rates = [block.drop_path.rate for stage in model.stages for block in stage.blocks]
    np.testing.assert_allclose(rates, np.repeat([0, 0.1, 0.2, 0.3, 0.4], 2))


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean():
    paddle.seed(0)
    drop_path = RepLKNet(**SIZES, drop_path_rate=0.25).stages[3].blocks[0].drop_path
    out = drop_path(paddle.ones([4000, 2, 3, 3])).numpy()
    assert set(np.unique(out)) == {np.float32(0), np.float32(1 / 0.75)}
    assert (out == out[:, :1, :1, :1]).all()
    assert out.mean() == pytest.approx(1, abs=0.05)
    drop_path.eval()
    assert (drop_path(paddle.ones([10, 2, 3, 3])).numpy() == 1).all()


FROZEN = {
    "nothing": (),
    "stem": ("stem.",),
    "stem and stage 0": ("stem.", "stages.0."),
    "all but the head": ("stem.", "stages.", "transitions.", "norm."),
}


@pytest.mark.parametrize("frozen", FROZEN)
def test_recompute_gives_the_same_gradients_and_statistics(frozen):
    results = []
    for recompute in (False, True):
        paddle.seed(3)
        model = RepLKNet(**SIZES, recompute=recompute, drop_path_rate=0.5)
        for name, param in model.named_parameters():
            param.stop_gradient = param.stop_gradient or name.startswith(FROZEN[frozen])
        images = paddle.to_tensor(np.random.default_rng(0).normal(size=(4, 3, 32, 32)), "float32")
        paddle.seed(4)
        model(images).square().sum().backward()
        trained = {name: p.grad for name, p in model.named_parameters() if not p.stop_gradient}
        statistics = {n: value for n, value in model.state_dict().items() if value.stop_gradient}
        results.append({n: value.numpy() for n, value in (trained | statistics).items()})
    plain, recomputed = results
    assert plain.keys() == recomputed.keys()
    for name, value in plain.items():
        assert np.array_equal(recomputed[name], value), name


@pytest.mark.parametrize("build", [build_replknet, build_upernet])
def test_norms_over_all_devices_have_the_same_parameters_and_settings(build):
    keys = {"OUT_INDICES": [0, 1, 2, 3], "NUM_CLASSES": 4, "NORM_INTER_FEATURES": True}
    keys |= {name.upper(): value for name, value in SIZES.items()}
    config = get_config(None, **{f"MODEL__{name}": value for name, value in keys.items()})
    paddle.seed(0)
    plain = build(config)
    paddle.seed(0)
    synchronized = build(config, sync_bn=True)
    state = synchronized.state_dict()
    assert list(state) == list(plain.state_dict())
    assert all(np.array_equal(state[n].numpy(), v.numpy()) for n, v in plain.state_dict().items())
    norms = [x for x in synchronized.sublayers() if hasattr(x, "_momentum")]
    assert len(norms) == sum(hasattr(x, "_momentum") for x in plain.sublayers()) > 40
    for norm in norms:
        assert type(norm) is nn.SyncBatchNorm and (norm._momentum, norm._epsilon) == (0.9, 1e-5)
