"""Where the network looks: Grad-CAM (arXiv 1610.02391) on the output of the last stage.

Grad-CAM weighs each channel of a map by the mean, over positions, of the gradient of a class's
logit, sums the channels and keeps what is positive (equations 1 and 2 of the paper). Behind the
last stage there are only batch norm, a mean over positions and a linear layer here, so these
gradients are the same for every image and are known: for channel k of a map of h x w positions,

    head.weight[k, class] * norm.weight[k] / sqrt(norm._variance[k] + epsilon) / (h * w)

No backward pass is needed, and the map costs no more than the prediction.
"""

import numpy as np
import paddle

from replknet_paddle.deploy.backends import evaluation_mode
from replknet_paddle.model import RepLKNet


@paddle.no_grad()
def grad_cam(
    network: RepLKNet, image: np.ndarray, label: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Logits of one image, and what speaks for a class where.

    Args:
        network: a classifier; it is used in evaluation mode, and left in the mode it was in.
        image: (1, 3, H, W) float32, preprocessed.
        label: the class, in [0, num_classes); None for the one with the largest logit.

    Returns:
        Logits (num_classes,), and the map (H / 32, W / 32), rounded up: float32, >= 0, in units of
        the logit; all zeros where nothing speaks for the class.
    """
    with evaluation_mode(network):
        features = network.forward_stages(paddle.to_tensor(image))[-1]  # (1, C, h, w)
        logits = network.head(network.norm(features).mean(axis=[2, 3]))[0]
    label = int(logits.argmax()) if label is None else label
    norm = network.norm
    scale = norm.weight / paddle.sqrt(norm._variance + norm._epsilon)
    positions = features.shape[2] * features.shape[3]
    weights = network.head.weight[:, label] * scale / positions  # (C,)
    heat = paddle.nn.functional.relu((features[0] * weights.reshape([-1, 1, 1])).sum(axis=0))
    return logits.numpy(), heat.numpy()
