"""Run folders as training leaves them, with a tiny network whose outputs depend on its input."""

import numpy as np
import paddle
import yaml
from PIL import Image
from tiny import FIXTURES, TINY

from replknet_paddle.checkpoints.files import write_safetensors
from replknet_paddle.config import get_config
from replknet_paddle.data.transforms import build_eval_transform
from replknet_paddle.model import build_replknet


def make_run(folder, *, image_size=32, classes=4):
    """Write config.yaml and best below `folder`; returns it."""
    settings = yaml.safe_load(TINY)
    settings["DATA"] |= {"IMAGE_SIZE": image_size, "CROP_PCT": 0.9}
    settings["MODEL"] |= {"NUM_CLASSES": classes}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    write_safetensors(
        folder / "best",
        {name: value.numpy() for name, value in calibrated(folder).state_dict().items()},
        metadata={},
    )
    return folder


def calibrated(folder):
    """A network whose running statistics fit photographs, so that it tells them apart."""
    paddle.seed(0)
    network = build_replknet(get_config(folder / "config.yaml"))
    rng = np.random.default_rng(0)
    network.train()
    pictures = sorted((FIXTURES / "images").glob("[!eR]*"))
    transform = build_eval_transform(network.config)
    images = np.stack([transform(Image.open(path)) for path in pictures])
    for layer in network.sublayers():
        if hasattr(layer, "_momentum"):
            layer._momentum = 0.0  # the statistics of these pictures, in one pass
    network(paddle.to_tensor(images))
    network.head.weight.set_value(rng.normal(0, 1, network.head.weight.shape).astype("float32"))
    network.eval()
    return network
