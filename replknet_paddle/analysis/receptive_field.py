"""Effective receptive fields: how much each input pixel contributes to one output position.

The quantity of arXiv 2203.06717 (Figure 1), as the script of the official repository computes it:
in evaluation mode, the positive part of the gradient of one number by the input, summed over the
colours and averaged over images. The number is the sum over channels of the positive part of the
last stage's map, before the final norm, at its central position.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import paddle
from paddle import nn
from paddle.nn import functional as F

from replknet_paddle.runtime.errors import InputError, counted
from replknet_paddle.runtime.files import atomic_file

# Shares of the total contribution that the paper's table reports.
THRESHOLDS = (0.2, 0.3, 0.5, 0.99)


@dataclass
class Field:
    """An effective receptive field, and what it was computed from."""

    scores: np.ndarray  # (S, S) float64, mean over `images` of the contribution of each pixel
    images: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)  # images without finite scores
    network: str = ""  # digest of its weights; empty where unknown


class Area(NamedTuple):
    """The smallest centred square with more than `threshold` of the total contribution.

    `side_pixels` is odd; `ratio` is the square's share of the input's area. Both are None where no
    square around the centre has that much.
    """

    threshold: float
    side_pixels: int | None
    ratio: float | None


def contribution_scores(model: nn.Layer, image: np.ndarray) -> np.ndarray | None:
    """Return the contribution (S, S) of each pixel of a normalized image (C, S, S), in its type.

    The network is in evaluation mode. None where the image, a map or the gradient is not finite.
    """
    x = paddle.to_tensor(image[None], stop_gradient=False)
    maps = model.forward_stages(x)
    last = maps[-1]  # (1, C', H, W)
    center = F.relu(last[:, :, last.shape[2] // 2, last.shape[3] // 2]).sum()
    (gradient,) = paddle.grad(center, x)
    # Each is checked, because Paddle's ReLU turns NaN into 0, and so hides it from what follows.
    if not all(bool(paddle.isfinite(values).all()) for values in (x, *maps, gradient)):
        return None
    return F.relu(gradient).sum(axis=[0, 1]).numpy()


def measure(
    model: nn.Layer,
    names: Sequence[str],
    read: Callable[[str], np.ndarray],
    *,
    num_images: int,
    input_size: int,
    target: str,
    is_anew: bool = False,
    on_image: Callable[[str, bool, int], None] = lambda name, used, images_used: None,
) -> Field:
    """Return the effective receptive field of `model` over the first `num_images` usable images.

    `target` is replaced after each image, so a later call with the same arguments goes on where an
    earlier one was stopped, with the same result to the last bit; or begins `is_anew`.

    `read` gives the normalized image of a name, (3, input_size, input_size) float32. `on_image` is
    called after each image with its name, whether it was used, and how many were.
    """
    if model.training:
        raise ValueError("the network is in training mode; call its eval() first")
    result = Field(np.zeros((input_size, input_size)), network=network_digest(model))
    if os.path.exists(target) and not is_anew:
        before = load_field(target)
        _check_same(before, target, result, names, num_images)
        result = before
    done = len(result.images) + len(result.skipped)
    if len(names) - done < num_images - len(result.images):
        raise InputError(_too_few(result, names, num_images))
    trainable = [p for p in model.parameters() if not p.stop_gradient]
    for parameter in trainable:  # only the gradient by the input is needed
        parameter.stop_gradient = True
    try:
        for name in names[done:]:
            if len(result.images) == num_images:
                break
            scores = contribution_scores(model, read(name))
            if scores is not None:
                result.images.append(name)
                result.scores += (scores - result.scores) / len(result.images)
            else:
                result.skipped.append(name)
            save_field(target, result)
            on_image(name, scores is not None, len(result.images))
    finally:
        for parameter in trainable:
            parameter.stop_gradient = False
    if len(result.images) < num_images:
        raise InputError(_too_few(result, names, num_images))
    return result


def network_digest(model: nn.Layer) -> str:
    """Return the SHA-256 of names, shapes and values of all parameters and statistics."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        array = np.ascontiguousarray(value.numpy())
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _check_same(before: Field, target, wanted: Field, names, num_images: int) -> None:
    """Raise InputError where the file of an earlier call is not of the same measurement."""
    done, size = [*before.images, *before.skipped], len(before.scores)
    count, wanted_size = len(before.images), len(wanted.scores)
    for is_other, problem in (
        (not before.network, "it was not written by this program"),
        (before.network != wanted.network, "it is of a network with other weights"),
        (size != wanted_size, f"it is of {size} x {size} pixels, not {wanted_size}"),
        (set(done) != set(names[: len(done)]), "it is of other images"),
        (count > num_images, f"it holds {counted(count, 'image')}, more than {num_images}"),
    ):
        if is_other:
            raise InputError(
                f"cannot continue {target}: {problem}. Delete it, or name another file"
            )


def _too_few(result: Field, names: Sequence[str], num_images: int) -> str:
    text = f"there {'is' if len(names) == 1 else 'are'} {counted(len(names), 'image')}"
    if result.skipped:
        first = ", ".join(result.skipped[:5])
        text += f", and {len(result.skipped)} of them have no finite scores: {first}"
    return f"{text}; {num_images} are needed. Give more images, or ask for fewer"


def save_field(path: str | os.PathLike, result: Field) -> None:
    """Write a field as a `.npy` file, of which `numpy.load` reads the scores.

    A second array in it, the bytes of a JSON object, names the images and the network.
    """
    record = {"images": result.images, "skipped": result.skipped, "network": result.network}
    with atomic_file(path, "wb") as file:
        np.save(file, result.scores)
        np.save(file, np.frombuffer(json.dumps(record).encode(), np.uint8))


def load_field(path: str | os.PathLike) -> Field:
    """Return the field of a file of `save_field`, or of any `.npy` file with the array alone."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"no folder of images or .npy file {path}")
    try:
        with open(path, "rb") as file:
            scores = np.lib.format.read_array(file, allow_pickle=False)
            record = {}
            if file.peek(1):
                record = json.loads(np.lib.format.read_array(file, allow_pickle=False).tobytes())
        result = Field(scores.astype(np.float64), **record)
        lists = isinstance(result.images, list) and isinstance(result.skipped, list)
        texts = [*result.images, *result.skipped, result.network]
        if not lists or not all(isinstance(text, str) for text in texts):
            raise ValueError("its record is damaged")
    except (ValueError, TypeError, EOFError, MemoryError) as error:
        raise InputError(f"{path}: not a .npy file of contribution scores ({error})") from None
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1] or len(scores) < 3:
        raise InputError(f"{path}: its array is {scores.shape}; allowed: a square, 3 or more")
    if not np.isfinite(scores).all() or scores.min() < 0:
        raise InputError(f"{path}: it has values that are not finite or below 0")
    return result


def rescaled(scores: np.ndarray) -> np.ndarray:
    """Return log10(scores + 1) over its largest value, which table and picture are made of."""
    scores = np.log10(scores + 1)
    if not scores.max() > 0:
        raise InputError("no input pixel contributes: the field is 0 everywhere")
    return scores / scores.max()


def high_contribution_areas(scores: np.ndarray) -> list[Area]:
    """Return, for each of `THRESHOLDS`, the smallest centred square with more than that share.

    The shares are of `rescaled` scores (S, S). As in the official script, the sides are odd, from 3
    to S - 1, and the centre is position S // 2.
    """
    scores = rescaled(scores)
    size = len(scores)
    center = size // 2
    sums = np.zeros((size + 1, size + 1))
    np.cumsum(np.cumsum(scores, axis=0), axis=1, out=sums[1:, 1:])
    reach = np.arange(1, center)
    low, high = center - reach, center + reach + 1
    inside = sums[high, high] - sums[low, high] - sums[high, low] + sums[low, low]
    areas = []
    for threshold in THRESHOLDS:
        enough = np.flatnonzero(inside / sums[-1, -1] > threshold)
        side = 2 * int(reach[enough[0]]) + 1 if len(enough) else None
        areas.append(Area(threshold, side, None if side is None else (side / size) ** 2))
    return areas
