"""Measure and draw the effective receptive field of a network.

With a folder of images: compute the contribution of each input pixel, averaged over images, into a
.npy file, which the same command continues after an interruption; print the table; draw the heat
map. With .npy files of earlier runs: print one table and draw them side by side.
"""

import os
import sys

from replknet_paddle.commands.flags import add_config_flags, add_flag, config_from

EXAMPLES = """\
examples:
  replknet erf images -cfg configs/replknet_31b.yaml -pretrained replknet_31b.pdparams -out 31b.npy
  replknet erf 31b.npy 13.npy -out both.png

In the table, "side" is that of the smallest centred square, in pixels, which has more than the
given share of the total contribution, and r is the square's share of the input's area.
"""


def add_arguments(parser) -> None:
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="a folder of images, or .npy files of earlier runs"
    )
    add_config_flags(parser)
    add_flag(parser, "pretrained", "trained weights, in any known layout", metavar="FILE")
    add_flag(
        parser,
        "num_images",
        "images to average, in the order of their paths (%(default)s)",
        type=int,
        default=50,
        metavar="N",
    )
    add_flag(
        parser,
        "input_size",
        "images are resized to this many pixels in both directions (%(default)s)",
        type=int,
        default=1024,
        metavar="N",
    )
    add_flag(
        parser,
        "out",
        "with a folder, the .npy file to write or continue, and the name of the picture beside it "
        "(erf.npy); with .npy files, the picture (erf.png)",
        metavar="FILE",
    )


def run(args) -> int:
    from replknet_paddle.analysis.figures import check_figure_target, save_figure
    from replknet_paddle.analysis.heat_maps import draw_heat_maps
    from replknet_paddle.analysis.receptive_field import load_field, rescaled

    if len(args.paths) == 1 and os.path.isdir(args.paths[0]):
        out = args.out or "erf.npy"
        picture = os.path.splitext(out)[0] + ".png"
        check_figure_target(picture)
        fields = {out: measure_folder(args, out)}
    else:
        picture = args.out or "erf.png"
        check_figure_target(picture)
        fields = {path: load_field(path) for path in args.paths}
    names = [os.path.splitext(os.path.basename(path))[0] for path in fields]
    if len(set(names)) < len(names):
        names = list(fields)
    print_table(dict(zip(names, fields.values())))
    maps = {name: rescaled(field.scores) for name, field in zip(names, fields.values())}
    save_figure(draw_heat_maps(maps, label="log10(contribution + 1) / its maximum"), picture)
    print(f"wrote {picture}")
    return 0


def measure_folder(args, out: str):
    """The field over the images of the folder, by the network of the flags."""
    from tqdm import tqdm

    from replknet_paddle.data.transforms.pipelines import EvalTransform
    from replknet_paddle.deploy.images import ImageFiles, decode
    from replknet_paddle.runtime.errors import InputError
    from replknet_paddle.runtime.files import check_file_target

    check_file_target(out, (".npy",))
    for flag, value, least in (
        ("num_images", args.num_images, 1),
        ("input_size", args.input_size, 32),
    ):
        if value < least:
            raise InputError(f"-{flag} is {value}; allowed: an integer >= {least}")
    if args.pretrained is None:
        raise InputError("-pretrained is missing; give trained weights")
    (folder,) = args.paths
    files = ImageFiles([folder])
    files.count()  # raises where there is no image
    names = sorted(os.path.relpath(path, folder) for path, problem in files if problem is None)
    config = config_from(args, args.pretrained)

    from replknet_paddle.analysis.receptive_field import measure
    from replknet_paddle.deploy.backends import use_fast_convolutions
    from replknet_paddle.zoo import get_model

    transform = EvalTransform(
        image_size=args.input_size,
        crop_pct=1.0,
        mode="warp",
        mean=config.DATA.IMAGENET_MEAN,
        std=config.DATA.IMAGENET_STD,
    )

    def read(name):
        path = os.path.join(folder, name)
        try:
            return transform(decode(path))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    model = get_model(config, pretrained=args.pretrained)
    use_fast_convolutions(model, config)
    with tqdm(total=args.num_images, unit="images", disable=None) as bar:

        def on_image(name, used, images_used):
            bar.update(images_used - bar.n)
            if not used:
                tqdm.write(f"skipped {name}: its scores are not finite", file=sys.stderr)

        return measure(
            model,
            names,
            read,
            num_images=args.num_images,
            input_size=args.input_size,
            target=out,
            on_image=on_image,
        )


def print_table(fields) -> None:
    from replknet_paddle.analysis.receptive_field import THRESHOLDS, high_contribution_areas

    width = max(8, *map(len, fields))
    shares = "".join(f"{threshold:>12.0%}" for threshold in THRESHOLDS)
    print(f"{'':{width}}{'images':>8}{'skipped':>9}{shares}")
    print(f"{'':{width}}{'':17}" + f"{'side  r':>12}" * len(THRESHOLDS))
    for name, field in fields.items():
        cells = []
        for area in high_contribution_areas(field.scores):
            found = area.side_pixels is not None
            cells.append(f"{area.side_pixels}  {area.ratio:.1%}" if found else "none")
        known = field.network != ""  # else a file that another program wrote
        counts = (
            f"{len(field.images) if known else '-':>8}{len(field.skipped) if known else '-':>9}"
        )
        print(f"{name:{width}}{counts}" + "".join(f"{cell:>12}" for cell in cells))
