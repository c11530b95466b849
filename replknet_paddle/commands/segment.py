"""Semantic segmentation: `replknet segment train`, `eval` and `predict`."""

from replknet_paddle.commands import train
from replknet_paddle.commands.flags import (
    add_backend,
    add_model,
    add_output_flags,
    config_given,
)
from replknet_paddle.runtime.errors import InputError

add_segment_train_flags = train.add_train_flags
add_segment_eval_flags = train.add_eval_flags


def run_segment_train(args) -> int:
    r"""Train a segmentation network.

    The configurations are configs/upernet_*.yaml. docs/segmentation.md describes datasets, figures
    and exports.

    example: replknet segment train -cfg configs/upernet_nano_shapes.yaml -epochs 1 \
                 -data_path data/shapes -output output/shapes
    """
    check_task(args)
    return train.run_to_the_end(args)


def run_segment_eval(args) -> int:
    """Evaluate a segmentation network.

    example: replknet segment eval output/shapes -data_path data/shapes
    """
    args.eval = True
    check_task(args)
    return train.run_to_the_end(args)


def check_task(args) -> None:
    """Raise InputError for the configuration of a classifier."""
    config = train.read_config(args)
    if config.MODEL.TYPE != "UPerNet":
        raise InputError(
            f"MODEL.TYPE is {config.MODEL.TYPE}; allowed for segmentation: UPerNet "
            "(configs/upernet_*.yaml)"
        )


def add_segment_predict_flags(parser) -> None:
    add_model(parser, "YAML file, checkpoint file, run folder (output/RUN), or export folder")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="file, folder or pattern")
    add_output_flags(
        parser,
        "folder for the pictures",
        overwrite="write into a folder that is not empty, and replace files of the same names",
        metavar="DIR",
        required=True,
    )
    add_backend(parser)


def run_segment_predict(args) -> int:
    """Write the class of every pixel of pictures.

    example: replknet segment predict output/shapes photos -output predictions
    """
    config = config_given(args)

    from replknet_paddle.deploy.images import ImageFiles
    from replknet_paddle.runtime.files import check_new_folder, find_path
    from replknet_paddle.runtime.progress import Bar, print_above
    from replknet_paddle.segmentation.predict import SegmentationPredictor, predict_files

    check_new_folder(args.output, is_kept=args.overwrite)
    model = find_path(args.model)
    predictor = SegmentationPredictor(model, backend=args.backend, config=config)
    files, problems = ImageFiles(args.images, leave_out=[args.output]), 0
    with Bar("segmentation", total=files.count(), unit="images") as bar:
        for done, prediction in enumerate(predict_files(predictor, files, args.output), start=1):
            problems += prediction.problem is not None
            bar.show(done)
            print_above(prediction)
    print(f"wrote {args.output}")
    return 1 if problems else 0
