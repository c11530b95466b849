"""`replknet segment`."""

from replknet_paddle.commands import train
from replknet_paddle.commands.flags import add_config_flags, add_flag, config_from
from replknet_paddle.runtime.errors import InputError


def add_segment_flags(parser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, text in {
        "train": "train a network, or with -eval evaluate one",
        "eval": "evaluate -pretrained: mIoU, pixel accuracy, IoU of each class",
    }.items():
        train.add_train_flags(actions.add_parser(name, help=text, allow_abbrev=False))
    predict = actions.add_parser(
        "predict", help="write overlays and label images of pictures", allow_abbrev=False
    )
    predict.add_argument(
        "model", metavar="MODEL", help="run folder, a checkpoint in one, or an export folder"
    )
    predict.add_argument(
        "images", metavar="IMAGE", nargs="+", help="files, folders, or quoted patterns"
    )
    add_flag(predict, "output", "folder to write; new or empty", metavar="DIR", required=True)
    add_flag(predict, "backend", "what runs the network (%(default)s)", default="auto")
    add_config_flags(predict)


def run_segment(args) -> int:
    r"""Semantic segmentation: train, evaluate, or predict the classes of every pixel.

    `train` and `eval` take the flags of `replknet train` and `replknet eval`, with a configuration
    of configs/upernet_*.yaml. docs/segmentation.md describes datasets, figures and exports.

    example: replknet segment train -cfg configs/upernet_nano_shapes.yaml -data_path data/shapes \
                 -output output/shapes
             replknet segment eval -pretrained output/shapes/best -data_path data/shapes
             replknet segment predict output/shapes/best photos -output predictions
    """
    if args.action == "predict":
        return run_predict(args)
    args.eval = args.eval or args.action == "eval"
    # For the processes that are started, by the command `train`.
    args.argv = [*(["-eval"] if args.eval else []), *args.argv[1:]]
    config = train.read_config(args)
    if config.MODEL.TYPE != "UPerNet":
        raise InputError(
            f"MODEL.TYPE is {config.MODEL.TYPE}; allowed for segmentation: UPerNet "
            "(configs/upernet_*.yaml)"
        )
    return train.run_train(args)


def run_predict(args) -> int:
    """Write the predictions; 1 if some images could not be read."""
    config = None
    if args.cfg is not None or args.opts is not None:
        config = config_from(args, args.model)

    from replknet_paddle.runtime.files import check_new_folder
    from replknet_paddle.segmentation.predict import SegmentationPredictor, predict_files

    check_new_folder(args.output)
    predictor = SegmentationPredictor(args.model, backend=args.backend, config=config)
    problems = 0
    for prediction in predict_files(predictor, args.images, args.output):
        problems += prediction.problem is not None
        print(prediction)
    return 1 if problems else 0
