"""The segmentation heads in numpy, written from the papers and the official configuration.

Nothing here calls Paddle: loops and sums over arrays in float64.
"""

import math

import numpy as np


def conv_norm_relu(state, name, x):
    """Convolution with "same" padding, batch norm in evaluation mode, ReLU: (C, H, W)."""
    y = convolution(x, state[f"{name}.conv.weight"])
    scale = state[f"{name}.norm.weight"] / np.sqrt(state[f"{name}.norm._variance"] + 1e-5)
    shift = state[f"{name}.norm.bias"] - state[f"{name}.norm._mean"] * scale
    return np.maximum(y * scale[:, None, None] + shift[:, None, None], 0)


def convolution(x, weight):
    size = weight.shape[-1]
    _, height, width = x.shape
    padded = np.pad(x, ((0, 0), (size // 2,) * 2, (size // 2,) * 2))
    result = np.zeros((len(weight), height, width))
    for row in range(size):
        for column in range(size):
            window = padded[:, row : row + height, column : column + width]
            result += np.einsum("oi,ihw->ohw", weight[:, :, row, column], window)
    return result


def bilinear(x, size, *, align_corners):
    """Interpolate (C, H, W) to (C, *size), pixel by pixel."""

    def places(new, old):
        if align_corners:
            return [i * (old - 1) / (new - 1) if new > 1 else 0.0 for i in range(new)]
        return [min(max((i + 0.5) * old / new - 0.5, 0.0), old - 1.0) for i in range(new)]

    result = np.zeros((len(x), *size))
    for i, row in enumerate(places(size[0], x.shape[1])):
        top, bottom = math.floor(row), min(math.floor(row) + 1, x.shape[1] - 1)
        for j, column in enumerate(places(size[1], x.shape[2])):
            left, right = math.floor(column), min(math.floor(column) + 1, x.shape[2] - 1)
            upper = x[:, top, left] + (x[:, top, right] - x[:, top, left]) * (column - left)
            lower = x[:, bottom, left] + (x[:, bottom, right] - x[:, bottom, left]) * (
                column - left
            )
            result[:, i, j] = upper + (lower - upper) * (row - top)
    return result


def grid_average(x, cells):
    """Averages of (C, H, W) over `cells` x `cells` overlapping cells that cover it."""
    result = np.zeros((len(x), cells, cells))
    for i in range(cells):
        rows = slice(i * x.shape[1] // cells, -(-(i + 1) * x.shape[1] // cells))
        for j in range(cells):
            columns = slice(j * x.shape[2] // cells, -(-(j + 1) * x.shape[2] // cells))
            result[:, i, j] = x[:, rows, columns].mean(axis=(1, 2))
    return result


def classify(state, x):
    bias = state["conv_seg.bias"][:, None, None]
    return convolution(x, state["conv_seg.weight"]) + bias


def uper_head(state, maps, *, align_corners):
    """Logits of UPerNet for one image: its four maps (C_i, H_i, W_i)."""

    def like(x, other):
        return bilinear(x, other.shape[1:], align_corners=align_corners)

    last = maps[3]
    pyramid = [last]
    for i, cells in enumerate((1, 2, 3, 6)):
        pooled = conv_norm_relu(state, f"psp_modules.{i}.1", grid_average(last, cells))
        pyramid.append(like(pooled, last))
    top = conv_norm_relu(state, "bottleneck", np.concatenate(pyramid))
    merged = [None, None, None, top]
    for i in (2, 1, 0):
        lateral = conv_norm_relu(state, f"lateral_convs.{i}", maps[i])
        merged[i] = lateral + like(merged[i + 1], lateral)
    outs = [conv_norm_relu(state, f"fpn_convs.{i}", merged[i]) for i in range(3)] + [top]
    stacked = np.concatenate([outs[0]] + [like(x, outs[0]) for x in outs[1:]])
    return classify(state, conv_norm_relu(state, "fpn_bottleneck", stacked))


def fcn_head(state, x):
    """Logits of the auxiliary head for one map (C, H, W)."""
    return classify(state, conv_norm_relu(state, "convs.0", x))
