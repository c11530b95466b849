"""Draw docs/architecture.png: RepLKNet-31B, its blocks, and structural re-parameterization.

    python docs/draw_architecture.py docs/architecture.png

Sizes come from configs/replknet_31b.yaml. The background is white, so that the figure is legible on
dark pages too.
"""

import sys

from replknet_paddle.analysis.plots import new_figure, save_figure
from replknet_paddle.config import get_config

WIDTH, HEIGHT = 10.0, 6.4  # inches; coordinates below are in tenths of an inch
INK = "#1f2933"
LARGE, SMALL, POINTWISE, PLAIN = "#f4a261", "#8ecae6", "#d8e2dc", "#eef1f4"


def draw(config):
    """The figure of the network that `config` describes."""
    with new_figure(WIDTH, HEIGHT, []) as figure:
        axes = figure.subplots()
        axes.set(xlim=(0, 10 * WIDTH), ylim=(0, 10 * HEIGHT))
        axes.axis("off")
        draw_network(axes, config)
        draw_blocks(axes, config.MODEL)
        draw_merging(axes, config.MODEL)
    return figure


def box(axes, x, y, width, height, text, color) -> None:
    """A box around (x, y) with a text in it."""
    from matplotlib.patches import FancyBboxPatch

    style = "round,pad=0,rounding_size=0.8"
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(
        FancyBboxPatch(corner, width, height, boxstyle=style, facecolor=color, edgecolor=INK)
    )
    axes.text(x, y, text, ha="center", va="center", fontsize=9, color=INK, linespacing=1.35)


def arrow(axes, *points) -> None:
    """A line through points, with a head at its end."""
    *_, before, last = points
    axes.plot(*zip(*points[:-1]), color=INK, linewidth=1.2, solid_joinstyle="round")
    style = {"arrowstyle": "-|>", "color": INK, "shrinkA": 0, "shrinkB": 0, "linewidth": 1.2}
    axes.annotate("", xy=last, xytext=before, arrowprops=style)


def title(axes, x, y, text) -> None:
    axes.text(x, y, text, fontsize=11, fontweight="bold", color=INK, va="center")


def draw_network(axes, config) -> None:
    """The stem, four stages with a transition before all but the first, and the head."""
    model, size = config.MODEL, config.DATA.IMAGE_SIZE
    title(axes, 2, 61.5, f"RepLKNet-31B: maps for an image of {size} x {size} pixels")
    y = 53
    box(axes, 6.7, y, 10.4, 9, f"stem\n4 convolutions\n{size // 4} x {size // 4}", PLAIN)
    stages = zip(model.LARGE_KERNEL_SIZES, model.LAYERS, model.CHANNELS)
    for i, (kernel, pairs, channels) in enumerate(stages):
        x, side = 20.5 + 19.5 * i, size // (4 * 2**i)
        arrow(axes, (x - (8.6 if i == 0 else 13), y), (x - 6.5, y))
        text = (
            f"stage {i + 1}\n{kernel}x{kernel} kernels\n{pairs} x (RepLK block,\nConvFFN)\n"
            f"{channels} x {side} x {side}"
        )
        box(axes, x, y, 13, 12.5, text, LARGE)
        if i < 3:
            axes.text(x + 9.7, y + 1.5, "half\nsize", ha="center", fontsize=8, color=INK)
    arrow(axes, (85.5, y), (88.8, y))
    box(axes, 94, y, 10.4, 9, "norm, mean,\nlinear head", PLAIN)


def draw_blocks(axes, model) -> None:
    """The two kinds of block, each around a shortcut."""
    large, small = model.LARGE_KERNEL_SIZES[0], model.SMALL_KERNEL
    title(axes, 2, 42, "RepLK block")
    y = 33
    arrow(axes, (1.5, y), (4, y))
    box(axes, 6.5, y, 5, 5, "BN", PLAIN)
    arrow(axes, (9, y), (11, y))
    box(axes, 14.5, y, 7, 6, "1x1\nBN, ReLU", POINTWISE)
    for dy, kernel, color in ((4, large, LARGE), (-4, small, SMALL)):
        arrow(axes, (18, y), (20, y), (20, y + dy), (22, y + dy))
        box(axes, 28, y + dy, 12, 5.5, f"{kernel}x{kernel} depthwise\nBN", color)
        arrow(axes, (34, y + dy), (36.5, y + dy), (36.5, y + 1.6 * dy / 4))
    plus(axes, 36.5, y)
    arrow(axes, (38.1, y), (40, y))
    box(axes, 43, y, 6, 5, "ReLU", PLAIN)
    arrow(axes, (46, y), (48, y))
    box(axes, 51, y, 6, 6, "1x1\nBN", POINTWISE)
    arrow(axes, (54, y), (56.4, y))
    plus(axes, 58, y)
    arrow(axes, (2.5, y), (2.5, y - 8.5), (58, y - 8.5), (58, y - 1.6))
    arrow(axes, (59.6, y), (62, y))

    title(axes, 66, 42, "ConvFFN")
    arrow(axes, (64.5, y), (67, y))
    for x, text, color in (
        (69.5, "BN", PLAIN),
        (77, f"1x1, x{model.FFN_RATIO:g}\nBN, GELU", POINTWISE),
        (86, "1x1\nBN", POINTWISE),
    ):
        width = {"BN": 5, "1x1\nBN": 6}.get(text, 8)
        box(axes, x, y, width, 6 if width > 5 else 5, text, color)
    arrow(axes, (72, y), (73, y))
    arrow(axes, (81, y), (83, y))
    arrow(axes, (89, y), (92.4, y))
    plus(axes, 94, y)
    arrow(axes, (65.5, y), (65.5, y - 8.5), (94, y - 8.5), (94, y - 1.6))
    arrow(axes, (95.6, y), (98.5, y))


def plus(axes, x, y) -> None:
    from matplotlib.patches import Circle

    axes.add_patch(Circle((x, y), 1.6, facecolor="white", edgecolor=INK))
    axes.text(x, y, "+", ha="center", va="center", fontsize=11, color=INK)


def draw_merging(axes, model) -> None:
    """Kernels to scale: the large one, the small one amid zeros, and their sum."""
    from matplotlib.patches import Rectangle

    large, small = model.LARGE_KERNEL_SIZES[0], model.SMALL_KERNEL
    title(axes, 2, 20, "Structural re-parameterization")
    side, bottom = 13.0, 3.0
    inner = side * small / large
    middle = bottom + side / 2

    def kernel(x, outer_color, inner_color, text):
        axes.add_patch(Rectangle((x, bottom), side, side, facecolor=outer_color, edgecolor=INK))
        if inner_color is not None:
            corner = (x + (side - inner) / 2, middle - inner / 2)
            axes.add_patch(Rectangle(corner, inner, inner, facecolor=inner_color, edgecolor=INK))
        axes.text(x + side / 2, bottom - 1.6, text, ha="center", fontsize=9, color=INK)

    def sign(x, text):
        axes.text(x, middle, text, ha="center", va="center", fontsize=14, color=INK)

    kernel(2, LARGE, None, f"{large}x{large}, its BN folded in")
    sign(19, "+")
    kernel(23, "white", SMALL, f"{small}x{small}, its BN folded in, padded")
    sign(40, "=")
    kernel(44, LARGE, "#c1875a", f"one {large}x{large} kernel with bias")
    axes.text(
        63,
        middle,
        "Training has both kernels: the small one\nlearns patterns that are small.\n\n"
        "For inference, convolution is linear:\nthe sum of the two branches is one\n"
        "convolution, with the same outputs\nup to rounding.",
        va="center",
        fontsize=9.5,
        color=INK,
        linespacing=1.4,
    )


def main() -> None:
    save_figure(draw(get_config("configs/replknet_31b.yaml")), sys.argv[1])


if __name__ == "__main__":
    main()
