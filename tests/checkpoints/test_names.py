"""Files that do not fit a network: the message says what they are and what to change."""

import functools
from collections.abc import Mapping
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
from tiny import FIXTURES, ROOT

from replknet_paddle.checkpoints import checkpoint_file
from replknet_paddle.checkpoints.load import load_pretrained, load_state, parameter_shapes
from replknet_paddle.checkpoints.names import LAYOUTS, from_native
from replknet_paddle.config import get_config
from replknet_paddle.runtime.errors import InputError

pytestmark = pytest.mark.paddle_version


@functools.cache
def shapes(config_name: str, **keys) -> Mapping[str, tuple]:
    overrides = {
        f"MODEL__{key}": list(value) if isinstance(value, tuple) else value
        for key, value in keys.items()
    }
    config = get_config(ROOT / "configs" / f"{config_name}.yaml", **overrides)
    return MappingProxyType(parameter_shapes(config))


def zeros(shapes: Mapping[str, tuple]) -> dict[str, np.ndarray]:
    """Tensors of full size that take no memory."""
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


@pytest.fixture
def misfit(monkeypatch):
    """The message when a file of one state is loaded into a network of given shapes."""

    def load(state: dict, network_shapes: Mapping, **options) -> str:
        path = FIXTURES / "tiny31_official.pth"
        monkeypatch.setattr(checkpoint_file, "read_file", lambda path: (state, {}))
        network = SimpleNamespace(state_dict=lambda: zeros(network_shapes))
        with pytest.raises(InputError) as caught:
            load_pretrained(network, path, **options)
        assert str(caught.value).startswith(f"{path}: ")
        return str(caught.value)

    return load


# The file's config and what differs from it, what differs from 31B in the network, and words of the
# message.
PAIRS = {
    "XL into 31B": ("replknet_xl", {}, {}, [
        "the file is RepLKNet-XL (train form, 1,000 classes)",
        "the network is RepLKNet-31B",
        "MODEL.CHANNELS: [256, 512, 1024, 2048]",
        "MODEL.DW_RATIO: 1.5",
        "MODEL.SMALL_KERNEL: None",
        "MODEL.LARGE_KERNEL_SIZES: [27, 27, 27, 13]",
        "120 missing from the file",
        "24 x stages.*.blocks.*.large_kernel.small_kernel_conv.conv.weight",
    ]),
    "31L into 31B": ("replknet_31l_22k1k_384", {}, {}, [
        "the file is RepLKNet-31L",
        "MODEL.CHANNELS: [192, 384, 768, 1536]",
        "4 x stem.*.conv.weight, the first: file (192, 3, 3, 3), network (128, 3, 3, 3)",
    ]),
    "22K head into 1K": ("replknet_31b_22k", {}, {}, [
        "21,841 classes",
        "set MODEL.NUM_CLASSES: 21841",
        "set MODEL.DROP_HEAD: True",
        "2 of another shape",
        "2 x head.{weight, bias}, the first: file (1024, 21841), network (1024, 1000)",
    ]),
    "merged into train form": ("replknet_31b", {"SMALL_KERNEL_MERGED": True}, {}, [
        "RepLKNet-31B (merged", "set MODEL.SMALL_KERNEL_MERGED: True", "48 unexpected in the file",
    ]),
    "train form into merged": ("replknet_31b", {}, {"SMALL_KERNEL_MERGED": True}, [
        "RepLKNet-31B (train form", "set MODEL.SMALL_KERNEL_MERGED: False", "merge the network",
    ]),
    "small kernel": ("replknet_31b", {"SMALL_KERNEL": 7}, {}, ["MODEL.SMALL_KERNEL: 7"]),
    "ffn ratio": ("replknet_31b", {"FFN_RATIO": 2.0}, {}, ["MODEL.FFN_RATIO: 2.0"]),
    "layers": ("replknet_31b", {"LAYERS": (2, 2, 6, 2)}, {}, ["MODEL.LAYERS: [2, 2, 6, 2]"]),
    "no head": ("replknet_31b", {"OUT_INDICES": (3,)}, {}, [
        "no head", "6 missing from the file", "2 x head.{weight, bias}",
    ]),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pair", PAIRS)
def test_wrong_pairs_say_what_the_file_is_and_what_to_change(pair, layout, misfit):
    config_name, file_keys, network_keys, words = PAIRS[pair]
    state = from_native(zeros(shapes(config_name, **file_keys)), layout)
    message = misfit(state, shapes("replknet_31b", **network_keys))
    for word in words:
        assert word in message
    assert len(message.splitlines()) < 100


def test_unrelated_network(misfit):
    state = {
        name: np.zeros(3, "f4")
        for name in ("conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "fc.weight")
    }
    message = misfit(state, shapes("replknet_31b"))
    assert "is no RepLKNet" in message and "conv1.weight, bn1.running_mean" in message
    assert "is no RepLKNet" in misfit({}, shapes("replknet_31b"))


def test_every_wrong_name_is_listed(misfit):
    wanted = shapes("replknet_31b")
    state = zeros(wanted)
    state["stages.2.blocks.9.extra"] = state.pop("stages.2.blocks.9.pw_conv_2.norm._mean")
    state["stem.0.conv.weight"] = state["stem.0.conv.weight"][:5]
    message = misfit(state, wanted)
    assert "1 missing from the file:\n    stages.2.blocks.9.pw_conv_2.norm._mean\n" in message
    assert "1 unexpected in the file:\n    stages.2.blocks.9.extra\n" in message
    assert "1 of another shape:\n    stem.0.conv.weight: file (5, 3, 3, 3), network" in message


def test_things_that_are_not_tensors(misfit):
    wanted = shapes("replknet_31b")
    state = zeros(wanted)
    assert "is a list, not a tensor" in misfit({**state, "head.bias": [1]}, wanted)
    assert "holds int64" in misfit({**state, "head.bias": np.zeros(1000, "i8")}, wanted)
    assert "both stem.0.norm.weight" in misfit(
        {**from_native(state, "official"), "stem.0.norm.weight": np.zeros(3, "f4")}, wanted
    )
    assert "holds a list" in misfit([1], wanted)
    for content in ({1: 2}, {"model": {1: np.zeros(3, "f4")}}, {(1, "x"): 2}):
        assert "under numbers, not tensors by name" in misfit(content, wanted)


def test_weights_that_the_file_does_not_have(misfit):
    wanted = shapes("replknet_31b")
    assert "no EMA weights" in misfit(zeros(wanted), wanted, weights="model_ema")
    assert "holds no model_ema; it holds model, epoch" in misfit(
        {"model": {}, "epoch": 3}, wanted, weights="model_ema"
    )
    with pytest.raises(InputError, match="allowed: auto, model, model_ema"):
        load_state(FIXTURES / "tiny31_official.pth", weights="ema")
