"""Small networks with statistics and factors far from fresh ones, and images for them."""

import numpy as np
import paddle
from paddle import nn

from replknet_paddle.config import get_config
from replknet_paddle.model import build_replknet

FORMS = {
    "31B": "  SMALL_KERNEL: 5",
    "XL": "  SMALL_KERNEL: null\n  DW_RATIO: 1.5",
}
CONFIG = """
DATA:
  IMAGE_SIZE: 32
  CROP_PCT: 0.9
MODEL:
  NAME: small
  NUM_CLASSES: 5
  LARGE_KERNEL_SIZES: [13, 11, 9, 7]
  LAYERS: [1, 1, 2, 1]
  CHANNELS: [4, 6, 8, 10]
"""


def small_config(folder, form="31B", extra=""):
    """The configuration of one of `FORMS`, from a file in `folder`."""
    path = folder / "small.yaml"
    path.write_text(f"{CONFIG}{FORMS[form]}\n{extra}")
    return get_config(path)


def small_network(config, seed=0):
    """The network in evaluation mode, its norms' factors random and statistics calibrated."""
    paddle.seed(seed)
    rng = np.random.default_rng(seed)
    model = build_replknet(config)
    norms = [layer for layer in model.sublayers() if hasattr(layer, "_mean")]
    for norm in norms:
        norm.weight.set_value(rng.uniform(0.5, 1.5, norm.weight.shape).astype("float32"))
        norm.bias.set_value(rng.normal(0, 0.3, norm.bias.shape).astype("float32"))
        norm._mean.set_value(rng.normal(0, 0.3, norm._mean.shape).astype("float32"))
        norm._momentum = 0.0  # the next batch's statistics replace those before
    model.train()
    with paddle.no_grad():
        model(paddle.to_tensor(images(32, seed=1)))
    model.eval()
    for norm in norms:
        assert not np.allclose(norm._mean.numpy(), 0, atol=1e-3)
        norm._momentum = 0.9
    return model


def images(count, size=32, seed=0):
    """Noise, float32 (count, 3, size, size)."""
    return np.random.default_rng(seed).normal(size=(count, 3, size, size)).astype("float32")


@paddle.no_grad()
def logits(model, batch):
    """What the network gives in Paddle's eager mode; of a backbone, all maps in one array."""
    outputs = model(paddle.to_tensor(batch))
    if isinstance(outputs, paddle.Tensor):
        return outputs.numpy()
    return np.concatenate([output.numpy().ravel() for output in outputs])


def double_precision(model):
    """The network with its weights and statistics in float64, in evaluation mode."""
    paddle.set_default_dtype("float64")
    try:
        result = build_replknet(model.config)
    finally:
        paddle.set_default_dtype("float32")
    for name, value in model.state_dict().items():
        result.state_dict()[name].set_value(value.numpy().astype("float64"))
    result.eval()
    return result


def float32_tolerance(model) -> float:
    """How far float32 outputs may be off, relative to the largest output.

    A sum of n products, each rounded and added with another rounding, is off by about sqrt(n)
    times the precision, in whatever order, and the errors of all layers add up at worst. The order
    depends on the processor and the library; this bound does not.
    """
    terms = []
    for layer in model.sublayers():
        if isinstance(layer, nn.Conv2D):
            terms.append(np.prod(layer.weight.shape[1:]))
        elif isinstance(layer, nn.Linear):
            terms.append(layer.weight.shape[0])
        elif hasattr(layer, "_mean"):
            terms.append(4)  # two operations for each of scale and shift
    return float(np.finfo("float32").eps * np.sqrt(terms).sum())


def assert_same(outputs, reference, tolerance=1e-4):
    """Within `tolerance` of the largest of `reference`, which is not all zeros."""
    largest = np.abs(reference).max()
    assert largest > 0.1
    assert outputs.shape == reference.shape and outputs.dtype == np.float32
    assert np.abs(outputs - reference).max() <= tolerance * largest
