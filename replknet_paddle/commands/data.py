"""Datasets: their lists, their faults, and three to try things on."""

import os
import sys

from replknet_paddle.commands.flags import add_config_flags, add_flag, add_output_flags
from replknet_paddle.runtime.errors import InputError, SystemFault, counted
from replknet_paddle.runtime.files import (
    atomic_file,
    check_file_target,
    check_new_folder,
    json_text,
)
from replknet_paddle.runtime.machines import available_cores
from replknet_paddle.runtime.terminal import printable


def add_make_lists_flags(parser) -> None:
    parser.add_argument("data_path", metavar="DIR", help="folder of the dataset")
    add_flag(
        parser,
        "train",
        "folder in DIR with a folder for each class (train; with -folds or a share: DIR itself)",
        metavar="NAME",
    )
    add_flag(
        parser,
        "val",
        "likewise, or the validation images that -devkit labels, or the share of each class that "
        "goes to validation, such as 0.1 (%(default)s)",
        default="val",
        metavar="NAME|SHARE",
    )
    add_flag(
        parser,
        "seed",
        "with -folds or a share: of the choice (%(default)s)",
        type=int,
        default=0,
        metavar="N",
    )
    add_flag(
        parser,
        "devkit",
        "ImageNet's development kit, with the validation ground truth",
        metavar="DIR",
    )
    text = "write K pairs of lists, train_list_1.txt, val_list_1.txt and so on, for -fold to read"
    add_flag(parser, "folds", text, type=int, metavar="K")
    add_flag(parser, "overwrite", "replace existing lists", action="store_true")


def run_make_lists(args) -> int:
    """Write the list files of a dataset from its folders.

    Classes are folders, numbered in the sorted order of their names, as the published weights have
    ImageNet's synsets. Training and validation images are in folders of their own (`-val NAME`), or
    one set of class folders is split (`-val 0.1`): a tenth of each class goes to validation, chosen
    by -seed, and identical files never end up on both sides. With `-folds 5` each image goes to
    validation in one of five pairs of lists.

    examples:
      replknet make-lists photos -val 0.1         photos/CLASS/...: a tenth to validation
      replknet make-lists data/flowers            data/flowers/train/CLASS/..., val/CLASS/...
      replknet make-lists /dataset/imagenet -devkit /dataset/ILSVRC2012_devkit_t12
    """
    from replknet_paddle.data.make_lists import make_lists, split_lists

    share = read_share(args)
    if args.folds is not None and (args.val != "val" or args.devkit is not None):
        raise InputError("-folds validates on each image of one set; leave -val and -devkit out")
    if share is None and args.folds is None:
        written = make_lists(
            args.data_path,
            train=args.train or "train",
            val=args.val,
            devkit=args.devkit,
            overwrite=args.overwrite,
        )
    else:
        written = split_lists(
            args.data_path,
            folder=args.train or ".",
            share=share,
            folds=args.folds,
            seed=args.seed,
            overwrite=args.overwrite,
        )
    for name, count in written.items():
        print(f"wrote {printable(os.path.join(args.data_path, name))}: {counted(count, 'line')}")
    return 0


def read_share(args) -> float | None:
    """Return the share that -val gives; None where it names a folder."""
    try:
        share = float(args.val)
    except ValueError:
        return None
    if os.path.isdir(os.path.join(args.data_path, args.val)):
        return None
    if not 0 < share < 1:
        raise InputError(
            f"-val {args.val}; allowed: a folder in {args.data_path}, or a share between 0 and 1"
        )
    if args.devkit is not None:
        raise InputError("-devkit goes with a folder of validation images; leave -val out")
    return share


SHOWN = 20  # problems on the console; the report has them all


def add_check_data_flags(parser) -> None:
    parser.add_argument("data_path", metavar="DIR", help="folder of train_list.txt, val_list.txt")
    add_config_flags(parser, "without one, the defaults and what the data say")
    add_flag(parser, "fold", "check train_list_N.txt and val_list_N.txt instead", metavar="N")
    add_flag(
        parser,
        "num_classes",
        "labels must be below N; default: by -cfg, class_names.txt or the labels of the lists",
        type=int,
        metavar="N",
    )
    add_flag(
        parser,
        "workers",
        "processes that decode (%(default)s)",
        type=int,
        default=available_cores(),
        metavar="N",
    )
    add_flag(
        parser,
        "allow_outside",
        "paths may lead out of DIR, as with DATA.ALLOW_OUTSIDE",
        action="store_true",
    )
    add_output_flags(parser, ".json file for everything that is found", metavar="FILE")


def run_check_data(args) -> int:
    """Read a whole dataset and report what is wrong with it.

    Exit status: 0 if nothing is, 1 if something is, 2 if it could not be checked.

    example: replknet check-data data/digits -output report.json
    """
    import replknet_paddle.segmentation.data as segmentation
    from replknet_paddle.config import get_config, override, update_config
    from replknet_paddle.data import dataset
    from replknet_paddle.data.check_data import check_data, lists_pairs
    from replknet_paddle.runtime.progress import Bar

    for name in ("num_classes", "workers"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"-{name} is {getattr(args, name)}; allowed: at least 1")
    if args.output:  # before hours of reading
        check_file_target(args.output, must_be_new=not args.overwrite)
    if args.cfg is None:
        # Any number of images makes a batch.
        config = get_config(MODEL__NUM_CLASSES=None, DATA__BATCH_SIZE=1, TRAIN__ACCUM_ITER=1)
    else:
        config = get_config(args.cfg)
    config = override(update_config(config, args), DATA__NUM_WORKERS=0)
    are_pairs = lists_pairs(config) if args.cfg is None else config.MODEL.TYPE == "UPerNet"
    if args.num_classes is not None:
        config = override(config, MODEL__NUM_CLASSES=args.num_classes)
    if args.allow_outside:
        config = override(config, DATA__ALLOW_OUTSIDE=True)
    try:
        report = check_data(
            config,
            (segmentation if are_pairs else dataset).get_dataset,
            workers=args.workers,
            progress=lambda found, total: Bar("check", total=total, unit="files").over(found),
        )
    except SystemFault as error:
        print(f"error: {error}", file=sys.stderr)
        return 2  # 1 is for problems of the data
    _print(report)
    if args.output:
        with atomic_file(args.output) as file:
            file.write(json_text(report, indent=1) + "\n")
        print(f"wrote {printable(args.output)}")
    return 1 if report["problems"] else 0


def _print(report: dict) -> None:
    from replknet_paddle.data.check_data import KINDS

    for name, part in report["lists"].items():
        classes = counted(report["num_classes"], "class")
        line = f"{name}: {counted(part['images'], 'image')} of {classes}"
        if "images_per_class" in part:
            fewest, most = min(part["images_per_class"]), max(part["images_per_class"])
            line += f", {fewest} of each" if fewest == most else f", {fewest} to {most} of each"
        print(line)
    for problem in report["problems"][:SHOWN]:
        place = f"{problem['list']}, line {problem['line']}: " if problem["line"] else ""
        print(f"{place}{problem['message']}")
    if len(report["problems"]) > SHOWN:
        print(f"and {len(report['problems']) - SHOWN} more")
    for kind, count in report["counts"].items():
        if count:
            print(f"{KINDS[kind]}: {count}")
    found = sum(report["counts"].values())
    print(f"Problems found: {found}" if found else "No problems found")


def add_new_dataset_flags(parser) -> None:
    parser.add_argument("folder", metavar="DIR", help="folder of the dataset, new or empty")
    add_flag(parser, "overwrite", "write into a folder that is not empty", action="store_true")


add_make_digits_flags = add_new_dataset_flags


def run_make_digits(args) -> int:
    """Write a small dataset: handwritten digits.

    1,797 grey scans of 8x8 pixels (UCI "Optical Recognition of Handwritten Digits", CC BY 4.0),
    which scikit-learn carries, so nothing is downloaded. Every fifth goes to validation: 1,437 /
    360.

    example: replknet make-digits data/digits
    """
    from replknet_paddle.data.make_lists import make_digits

    check_new_folder(args.folder, is_kept=args.overwrite)
    make_digits(args.folder)
    print(f"wrote {printable(args.folder)}: 1,437 images to train on, 360 to validate with")
    return 0


add_make_solar_cells_flags = add_new_dataset_flags


def run_make_solar_cells(args) -> int:
    """Write a dataset of photographs of solar cells.

    2,624 grey electroluminescence images of 300 x 300 pixels, 31 % of them of defective cells, from
    the package elpv-dataset (images: CC BY-NC-SA 4.0): 1,640 to train on, 328 to validate with, and
    656 below DIR/test, stratified by probability of a defect and type of cell. The package does
    not say which of its 44 modules a cell is from, so cells of one module are in all three parts,
    and figures are better than they would be on other modules.

    example: replknet make-solar-cells data/cells
    """
    from replknet_paddle.data.make_lists import make_solar_cells

    check_new_folder(args.folder, is_kept=args.overwrite)
    make_solar_cells(args.folder)
    where = printable(args.folder)
    print(f"wrote {where}: 1,640 images to train on, 328 to validate with, 656 to test with")
    return 0


def add_make_shapes_flags(parser) -> None:
    add_new_dataset_flags(parser)
    add_flag(parser, "count", "images (%(default)s)", type=int, default=200, metavar="N")


def run_make_shapes(args) -> int:
    """Write a small segmentation dataset: drawn shapes.

    Images of 64 x 64 pixels with circles, squares and triangles; every fifth goes to validation.

    example: replknet make-shapes data/shapes
    """
    from replknet_paddle.data.make_lists import VAL_EVERY, make_shapes

    if args.count < VAL_EVERY:
        raise InputError(f"-count is {args.count}; allowed: an integer >= {VAL_EVERY}")
    check_new_folder(args.folder, is_kept=args.overwrite)
    make_shapes(args.folder, count=args.count)
    print(f"wrote {printable(args.folder)}: {counted(args.count, 'image')} and their labels")
    return 0
