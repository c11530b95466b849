"""Draw how strong each position of the large kernels is, by stage, from weights alone.

Kernels are merged first, so a picture shows what the network computes with: the large kernel and
its parallel small one, each scaled by its batch norm. A value is the mean absolute weight over
channels and blocks, relative to the largest of its stage.
"""

from replknet_paddle.commands.flags import add_config_flags, add_flag, config_from

EXAMPLES = "example: replknet kernels -pretrained output/RUN/best -out kernels.png"


def add_arguments(parser) -> None:
    add_config_flags(parser)
    add_flag(parser, "pretrained", "weights, in any known layout", metavar="FILE", required=True)
    add_flag(parser, "out", "picture (%(default)s)", metavar="FILE", default="kernels.png")


def run(args) -> int:
    from replknet_paddle.analysis.plots import (
        check_figure_target,
        draw_heat_maps,
        kernel_magnitudes,
        save_figure,
    )

    check_figure_target(args.out)
    config = config_from(args, args.pretrained)  # before Paddle is imported, which takes longer

    from replknet_paddle.zoo import get_model

    model = get_model(config, pretrained=args.pretrained)
    model.structural_reparam()
    maps = {
        f"stage {i}, {len(values)} x {len(values)}": values
        for i, values in enumerate(kernel_magnitudes(model), start=1)
    }
    save_figure(draw_heat_maps(maps, label="mean |weight| / its maximum"), args.out)
    print(f"wrote {args.out}")
    return 0
