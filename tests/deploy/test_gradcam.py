"""The heat map against gradients of two other kinds: finite differences, and Paddle's own."""

import numpy as np
import paddle
import pytest
from harness import heat_map

from replknet_paddle.deploy.gradcam import grad_cam, last_features
from replknet_paddle.model import RepLKNet

pytestmark = pytest.mark.paddle_version

CLASSES = 5


@pytest.fixture(scope="module", params=["train form", "merged"])
def network(request):
    """A tiny network whose statistics are those of no fresh one."""
    paddle.seed(3)
    model = RepLKNet(
        large_kernel_sizes=[7, 7, 5, 5],
        layers=[1, 1, 1, 1],
        channels=[4, 6, 8, 10],
        num_classes=CLASSES,
    )
    rng = np.random.default_rng(3)
    for name, value in model.state_dict().items():
        if name.endswith("_variance"):
            value.set_value(rng.uniform(0.1, 1, value.shape).astype("float32"))
        elif name.endswith(("norm.weight", "bn.weight")):
            value.set_value(rng.normal(0, 2, value.shape).astype("float32"))
        elif name.endswith(("norm.bias", "bn.bias", "_mean")):
            value.set_value(rng.normal(0, 0.5, value.shape).astype("float32"))
    model.eval()
    if request.param == "merged":
        model.structural_reparam()
    return model


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(4).normal(0, 1, (1, 3, 96, 64)).astype("float32")


def head(network, features):
    """What the network does after its last stage."""
    return network.head(network.norm(features).mean(axis=[2, 3]))


def assert_same_maps(network, image, expected):
    """`expected`: a map for each class."""
    assert sum(one.max() > 0 for one in expected) >= 2
    assert any(np.ptp(one) > 0.1 * one.max() > 0 for one in expected)
    for label, one in enumerate(expected):
        heat = heat_map(network, image, label)
        assert heat.shape == (3, 2) and heat.dtype == np.float32
        np.testing.assert_allclose(heat, one, rtol=1e-3, atol=1e-5 * one.max())


def test_it_is_grad_cam_by_paddles_gradients(network, image):
    maps = [by_paddles_gradients(network, image, label) for label in range(CLASSES)]
    assert_same_maps(network, image, maps)


def by_paddles_gradients(network, image, label):
    features = network.forward_stages(paddle.to_tensor(image))[-1].detach()
    features.stop_gradient = False
    (gradient,) = paddle.grad(head(network, features)[0, label], features)
    weights = gradient.mean(axis=[2, 3], keepdim=True)
    return paddle.nn.functional.relu((weights * features).sum(axis=1))[0].numpy()


def test_its_weights_are_finite_differences_of_the_logit(network, image):
    """A step along each channel at each position, in float64; of one, for the head is linear."""
    features = network.forward_stages(paddle.to_tensor(image))[-1].numpy().astype("float64")
    double = {name: v.numpy().astype("float64") for name, v in network.norm.state_dict().items()}
    weight = network.head.weight.numpy().astype("float64")

    def logits(maps):
        scaled = (maps[0].transpose(1, 2, 0) - double["_mean"]) / np.sqrt(
            double["_variance"] + network.norm._epsilon
        )
        return (scaled * double["weight"] + double["bias"]).mean(axis=(0, 1)) @ weight

    gradients = np.empty((*features[0].shape, CLASSES))
    for index in np.ndindex(*features[0].shape):
        moved = features.copy()
        moved[(0, *index)] += 1
        gradients[index] = logits(moved) - logits(features)
    alphas = gradients.mean(axis=(1, 2))  # (C, classes)
    maps = np.einsum("ck,chw->khw", alphas, features[0])
    assert_same_maps(network, image, np.maximum(maps, 0))


def test_maps_of_a_batch_are_those_of_its_images_each_of_its_own_class(network, image):
    images = np.concatenate([image, -image, image[..., ::-1]])
    with last_features(network) as features:
        network(paddle.to_tensor(images))
    network(paddle.to_tensor(image))  # which it no longer sees
    assert len(features) == 1
    labels = np.array([4, 0, 4])
    maps = grad_cam(network, features[0], labels)
    assert maps.shape == (3, 3, 2) and maps[0].max() > 0 and not np.allclose(maps[0], maps[2])
    for one, alone, label in zip(maps, images, labels):
        np.testing.assert_allclose(one, heat_map(network, alone[None], label), rtol=1e-4, atol=1e-6)
    halved = grad_cam(network, features[0].astype("bfloat16"), labels)  # as AMP has them
    np.testing.assert_allclose(halved, maps, rtol=0.05, atol=0.05 * maps.max())


def test_a_class_that_nothing_speaks_for_has_a_map_of_zeros(network, image):
    weight = network.head.weight.numpy()
    features = network.forward_stages(paddle.to_tensor(image))[-1][0].numpy()
    sign = np.sign(features[:, 0, 0])
    one_sign = np.all(np.sign(features) == sign[:, None, None], axis=(1, 2))
    assert one_sign.any()
    against = weight.copy()
    against[:, 2] = -sign * one_sign * np.sign(network.norm.weight.numpy())
    network.head.weight.set_value(against)
    try:
        assert np.array_equal(heat_map(network, image, 2), np.zeros((3, 2), "float32"))
    finally:
        network.head.weight.set_value(weight)
