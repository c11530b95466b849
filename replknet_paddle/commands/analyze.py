"""Figures of networks and of training runs."""

import os
import sys

from replknet_paddle.commands.flags import (
    WEIGHTS_FORMS,
    add_flag,
    add_model,
    add_output_flags,
    config_from,
)
from replknet_paddle.commands.train import task_of
from replknet_paddle.runtime.errors import InputError, counted


def add_model_info_flags(parser) -> None:
    add_model(parser, weights=False)


def run_model_info(args) -> int:
    """Print the parameters and multiply-adds of a network.

    example: replknet model-info replknet-xl-73m1k-320
    """
    config = config_from(args)  # before Paddle is imported, which takes longer

    from replknet_paddle.analysis.costs import count_macs, count_parameters

    size = config.DATA.IMAGE_SIZE
    model = task_of(config).network(config)
    print(f"{config.MODEL.NAME}: {size}x{size}, {counted(config.MODEL.NUM_CLASSES, 'class')}")
    print(f"{'form':8}{'parameters':>16}{'multiply-adds':>20}")
    forms = [] if config.MODEL.SMALL_KERNEL_MERGED else ["train"]
    for form in [*forms, "merged"]:
        if form == "merged":
            model.structural_reparam()
        print(f"{form:8}{count_parameters(model):16,}{count_macs(model, size):20,}", flush=True)
    return 0


def add_plot_flags(parser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    add_output_flags(
        parser, "picture to write (%(default)s)", default="metrics.png", metavar="FILE"
    )


def run_plot(args) -> int:
    """Draw the loss and accuracy curves of training runs.

    example: replknet plot output/a output/b -output curves.png
    """
    from replknet_paddle.analysis.plots import check_figure_target, plot_metrics

    check_figure_target(args.output, must_be_new=not args.overwrite)
    plot_metrics(args.runs, args.output)
    print(f"wrote {args.output}")
    return 0


def add_erf_flags(parser) -> None:
    add_model(parser, f"{WEIGHTS_FORMS}; or a .npy file, with others, to compare them")
    parser.add_argument(
        "images", nargs="*", metavar="DIR", help="folder of images; or more .npy files"
    )
    add_output_flags(
        parser,
        "the .npy file to write or continue, and the name of the picture beside it (erf.npy); with "
        ".npy files, the picture (erf.png)",
        overwrite="replace what -output names; a .npy file is begun anew",
        metavar="FILE",
    )
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
        "image_size",
        "images are resized to this many pixels in both directions (%(default)s)",
        type=int,
        default=1024,
        dest="input_size",  # not DATA.IMAGE_SIZE
        metavar="N",
    )


def run_erf(args) -> int:
    r"""Measure and draw the effective receptive field.

    With a folder of images: compute the contribution of each input pixel, averaged over images,
    into a .npy file, which the same command continues after an interruption; print the table; draw
    the heat map. With .npy files of earlier runs: print one table and draw them side by side.

    examples:
      replknet erf output/RUN photos -output run.npy -num_images 2 -image_size 256
      replknet erf run.npy other.npy -output both.png

    In the table, "side" is that of the smallest centred square, in pixels, which has more than the
    given share of the total contribution, and r is the square's share of the input's area.
    """
    from replknet_paddle.analysis.plots import check_figure_target, draw_heat_maps, save_figure
    from replknet_paddle.analysis.receptive_field import load_field, rescaled

    words, written = [args.model, *args.images], []
    if all(word.endswith(".npy") for word in words):
        picture = args.output or "erf.png"
        check_figure_target(picture, must_be_new=not args.overwrite)
        fields = {path: load_field(path) for path in words}
    else:
        output = args.output or "erf.npy"
        picture = os.path.splitext(output)[0] + ".png"
        written = [output]
        is_begun = os.path.exists(output)  # and so is its picture
        check_figure_target(picture, must_be_new=not (is_begun or args.overwrite))
        fields = {output: measure_folder(args, output)}
    names = [os.path.splitext(os.path.basename(path))[0] for path in fields]
    if len(set(names)) < len(names):
        names = list(fields)
    print_table(dict(zip(names, fields.values())))
    maps = {name: rescaled(field.scores) for name, field in zip(names, fields.values())}
    save_figure(draw_heat_maps(maps, label="log10(contribution + 1) / its maximum"), picture)
    print(f"wrote {', '.join([*written, picture])}")
    return 0


def measure_folder(args, output: str):
    """Return the field of MODEL over the images of the folder."""
    from replknet_paddle.data.transforms.pipelines import EvalTransform
    from replknet_paddle.deploy.images import ImageFiles, decode
    from replknet_paddle.runtime.files import check_file_target
    from replknet_paddle.runtime.progress import Bar, print_above

    check_file_target(output, (".npy",))
    for flag, value, least in (
        ("num_images", args.num_images, 1),
        ("image_size", args.input_size, 32),
    ):
        if value < least:
            raise InputError(f"-{flag} is {value}; allowed: an integer >= {least}")
    if len(args.images) != 1:
        raise InputError(f"{counted(len(args.images), 'folder')} of images; allowed: one")
    (folder,) = args.images
    files = ImageFiles([folder])
    files.count()  # raises where there is no image
    names = sorted(os.path.relpath(path, folder) for path, problem in files if problem is None)
    config = config_from(args)

    from replknet_paddle.analysis.receptive_field import measure
    from replknet_paddle.ops import build_convolutions
    from replknet_paddle.zoo import get_model, weights_file

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

    model = get_model(config, pretrained=weights_file(config.MODEL.PRETRAINED))
    build_convolutions(model, config)
    with Bar("receptive field", total=args.num_images, unit="images") as bar:

        def on_image(name, used, images_used):
            bar.show(images_used)
            if not used:
                print_above(f"skipped {name}: its scores are not finite", sys.stderr)

        return measure(
            model,
            names,
            read,
            num_images=args.num_images,
            input_size=args.input_size,
            target=output,
            is_anew=args.overwrite,
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


def add_probe_flags(parser) -> None:
    parser.add_argument("train", metavar="TRAIN.npy", help="features to learn from")
    parser.add_argument("val", metavar="VAL.npy", help="features to judge by")
    add_flag(parser, "k", "neighbours that vote (%(default)s)", type=int, default=20, metavar="N")


def run_probe(args) -> int:
    """Measure how well features tell classes apart.

    Two classifiers learn from one file of `replknet embed` and are judged by another: logistic
    regression (C = 1) on features of mean 0 and variance 1, and the vote of the k nearest pictures
    by the cosine. Balanced accuracy is the mean of the accuracies of the classes.

    example: replknet probe train.npy val.npy -k 5
    """
    from replknet_paddle.analysis.probe import load_features, probe

    found = probe(load_features(args.train), load_features(args.val), k=args.k)
    for name, (top1, balanced) in found.items():
        print(f"{name}: top-1 {100 * top1:.2f} %, balanced accuracy {100 * balanced:.2f} %")
    return 0


def add_kernels_flags(parser) -> None:
    add_model(parser, WEIGHTS_FORMS)
    add_output_flags(
        parser, "picture to write (%(default)s)", metavar="FILE", default="kernels.png"
    )


def run_kernels(args) -> int:
    """Draw how strong each position of the kernels is.

    Kernels are merged first, so a picture shows what the network computes with: the large kernel
    and its parallel small one, each scaled by its batch norm. A value is the mean absolute weight
    over channels and blocks, relative to the largest of its stage.

    example: replknet kernels output/RUN -output kernels.png
    """
    from replknet_paddle.analysis.plots import check_figure_target, save_figure

    check_figure_target(args.output, must_be_new=not args.overwrite)
    config = config_from(args)  # before Paddle is imported, which takes longer

    from replknet_paddle.analysis.plots import draw_heat_maps, kernel_magnitudes
    from replknet_paddle.zoo import get_model, weights_file

    model = get_model(config, pretrained=weights_file(config.MODEL.PRETRAINED))
    model.structural_reparam()
    maps = {
        f"stage {i}, {len(values)} x {len(values)}": values
        for i, values in enumerate(kernel_magnitudes(model), start=1)
    }
    save_figure(draw_heat_maps(maps, label="mean |weight| / its maximum"), args.output)
    print(f"wrote {args.output}")
    return 0
