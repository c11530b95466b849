"""Files for others: exports; merged, converted and calibrated checkpoints; compiled operators."""

import os
import sys
from dataclasses import replace

from replknet_paddle.commands.flags import (
    WEIGHTS_FORMS,
    add_backend,
    add_flag,
    add_model,
    add_output_flags,
    config_from,
)
from replknet_paddle.commands.train import task_of
from replknet_paddle.runtime.errors import InputError, counted
from replknet_paddle.runtime.files import check_file_target, file_sha256


def add_export_flags(parser) -> None:
    def flag(name, help_text, **options):
        add_flag(parser, name, help_text, **options)

    add_model(parser, WEIGHTS_FORMS)
    flag(
        "output",
        "folder to write; an earlier export there is replaced",
        metavar="DIR",
        required=True,
    )
    flag("format", "paddle or onnx (%(default)s)", default="paddle", metavar="NAME")
    flag("precision", "fp32, fp16, bf16 or int8 (%(default)s)", default="fp32", metavar="NAME")
    flag(
        "conv_impl",
        "large kernels as paddle's convolution or, for GPUs, as matmul, matrix products, which fix "
        "the image size (%(default)s)",
        default="paddle",
        metavar="NAME",
    )
    flag("class_names", "file of one class name a line, as DATA.CLASS_NAMES", metavar="FILE")
    flag("data_path", "INT8: folder of the images and their lists", metavar="DIR")
    flag("calibration", "INT8: list file; by default train_list.txt", metavar="FILE")
    flag(
        "calibration_images",
        "INT8: how many of the list, evenly spread (%(default)s)",
        type=int,
        default=128,
        metavar="N",
    )
    flag(
        "validation_images",
        "INT8: how many of val_list.txt to compare accuracies on (%(default)s)",
        type=int,
        default=1000,
        metavar="N",
    )


def run_export(args) -> int:
    r"""Write a network for fast inference.

    The folder is enough to predict with, and docs/deployment.md says what runs it. INT8 is
    calibrated on images of the training list, and its accuracy is compared on images of the
    validation list.

    examples: replknet export output/RUN -output exported
              replknet export output/RUN -output exported_int8 -format onnx -precision int8 \
                  -data_path data/digits
    """
    if args.class_names is not None:
        args.opts = [*(args.opts or ()), "DATA.CLASS_NAMES", args.class_names]
    config = config_from(args)

    from replknet_paddle.data.class_names import get_class_names
    from replknet_paddle.deploy.export import (
        ModelInfo,
        check_combination,
        check_target,
        export_model,
    )
    from replknet_paddle.deploy.quantize import calibration_set, spread_batches, validation_set
    from replknet_paddle.zoo import open_network, weights_file

    is_classifier = config.MODEL.TYPE == "RepLKNet"
    check_combination(args.format, args.precision, args.conv_impl, is_classifier=is_classifier)
    target = check_target(args.output)
    source = weights_file(config.MODEL.PRETRAINED)
    for name in ("calibration_images", "validation_images"):
        if getattr(args, name) < 1:
            raise InputError(f"-{name} {getattr(args, name)}; allowed: an integer >= 1")
    calibration, validation = (), None
    if args.precision == "int8":
        calibration = spread_batches(
            calibration_set(config, args.calibration),
            args.calibration_images,
            max_bad_images=config.DATA.MAX_BAD_IMAGES,
        )
        validation = validation_set(config)
    model = open_network(config, pretrained=source, build=task_of(config).network)
    names = get_class_names(config, model.class_names)
    info = ModelInfo(
        config,
        args.format,
        args.precision,
        fixed_size=args.conv_impl == "matmul",
        class_names=names and tuple(names),
        source_sha256=file_sha256(source),
    )
    export_model(model, target, info, calibration=(images for images, _ in calibration))
    size = sum(path.stat().st_size for path in target.iterdir())
    print(
        f"exported {source} ({os.path.getsize(source) / 1e6:.1f} MB) to {target} "
        f"({args.format}, {args.precision}, {size / 1e6:.1f} MB)"
    )
    compare_with_checkpoint(model, info, target, validation, args.validation_images)
    return 0


def compare_with_checkpoint(model, info, target, validation, count: int) -> None:
    """Print how far an export's outputs are from those of the network in Paddle's eager mode, and
    both accuracies on `count` images of the dataset `validation`, if there is one."""
    import numpy as np

    from replknet_paddle.deploy.backends import candidates, open_backend, open_eager
    from replknet_paddle.deploy.fold import largest_deviation, random_images
    from replknet_paddle.deploy.quantize import compare, spread_batches

    images = random_images(2, info.config.DATA.IMAGE_SIZE)
    try:
        backend = open_backend(target, candidates([info.format], info.precision)[0])
        outputs = backend.run(images)
        if not np.isfinite(outputs).all():
            raise InputError(f"outputs on {backend.name} are not finite numbers")
    except Exception as error:  # whatever a library says of a network that it cannot run
        reason = " ".join(str(error).split())[:300]
        print(f"not compared with the checkpoint, since it does not run here: {reason}")
        return
    deviation = largest_deviation(outputs, open_eager(model, info).run(images))
    what = "logits" if info.config.MODEL.NUM_CLASSES else "features"
    print(
        f"{what} on 2 random images are within {deviation:.2g} of the largest one of the "
        f"checkpoint's (backend {backend.name} against Paddle's eager mode)"
    )
    if validation is not None:
        before = open_backend(model, "paddle", config=info.config)
        limit = info.config.DATA.MAX_BAD_IMAGES
        result = compare(before, backend, spread_batches(validation, count, max_bad_images=limit))
        print(f"INT8 on images of {validation.list_file}: {result}")


def check_is_another(source: str, target: str) -> None:
    """Raise InputError where a checkpoint would be written over itself."""
    if os.path.exists(target) and os.path.samefile(source, target):
        raise InputError(f"{target} is the checkpoint itself; name another file")


def add_merge_flags(parser) -> None:
    add_model(parser, WEIGHTS_FORMS)
    add_output_flags(parser, ".safetensors file to write", metavar="FILE", required=True)


def run_merge(args) -> int:
    r"""Merge the small kernels into the large ones.

    The result carries its configuration and class names, so every command opens it. What folding
    every batch norm besides would give, as replknet export does, is reported too: sizes, and the
    largest deviation of the outputs on random images.

    example: replknet merge output/RUN -output merged.safetensors
    """
    check_file_target(args.output, [".safetensors"], must_be_new=not args.overwrite)
    config = config_from(args)

    from replknet_paddle.checkpoints.checkpoint_file import weights_metadata
    from replknet_paddle.checkpoints.files import write_safetensors
    from replknet_paddle.config import override
    from replknet_paddle.data.class_names import get_class_names
    from replknet_paddle.deploy.fold import compare_forms, random_images
    from replknet_paddle.zoo import open_network, weights_file

    source, target = weights_file(config.MODEL.PRETRAINED), args.output
    check_is_another(source, target)
    model = open_network(config, pretrained=source)
    # Two images of at most 224 pixels tell: convolutions do not depend on the size.
    forms = compare_forms(model, random_images(2, min(config.DATA.IMAGE_SIZE, 224)))
    model.structural_reparam()
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    config = override(config, MODEL__SMALL_KERNEL_MERGED=True)
    names = get_class_names(config, model.class_names)
    write_safetensors(target, state, weights_metadata(config, names))
    for form in forms:
        print(form)
    sizes = [os.path.getsize(path) / 1e6 for path in (source, target)]
    print(f"merged {source} ({sizes[0]:.1f} MB) into {target} ({sizes[1]:.1f} MB)")
    return 0


def add_convert_flags(parser) -> None:
    add_model(parser, WEIGHTS_FORMS)
    add_output_flags(
        parser, ".safetensors or .pdparams file to write", metavar="FILE", required=True
    )
    add_flag(
        parser,
        "to",
        "whose parameter names to write (%(default)s)",
        choices=("native", "official", "mmpretrain"),
        default="native",
    )
    add_flag(
        parser,
        "weights",
        "which weights to take from a training checkpoint; auto: those that its run found better "
        "(%(default)s)",
        choices=("auto", "model", "model_ema"),
        default="auto",
    )


def run_convert(args) -> int:
    """Convert weights to another format or naming.

    example: replknet convert output/RUN -output replknet.safetensors -to mmpretrain
    """
    suffixes = [".safetensors", ".pdparams"]
    check_file_target(args.output, suffixes, must_be_new=not args.overwrite)
    config = config_from(args)
    is_segmentation = config.MODEL.TYPE == "UPerNet"
    if is_segmentation and args.to == "mmpretrain":
        raise InputError("-to mmpretrain of a segmentation network; allowed: native, official")

    from replknet_paddle.checkpoints.load import convert_file
    from replknet_paddle.zoo import weights_file

    source = weights_file(config.MODEL.PRETRAINED)
    check_is_another(source, args.output)
    count = convert_file(
        source,
        args.output,
        config,
        weights=args.weights,
        layout={"native": "upernet", "official": "mmseg"}[args.to] if is_segmentation else args.to,
        build=task_of(config).network,
    )
    print(f"wrote {args.output}: {counted(count, 'tensor')} under {args.to} names")
    return 0


def add_calibrate_flags(parser) -> None:
    add_model(parser, WEIGHTS_FORMS)
    add_output_flags(parser, ".safetensors file to write", metavar="FILE", required=True)
    add_flag(parser, "data_path", "folder of val_list.txt and its images", metavar="DIR")
    add_backend(parser)


def run_calibrate(args) -> int:
    """Fit a temperature to validation images.

    The logits are divided by it before they become probabilities, of which the labels are then as
    likely as they can be. The result has the same weights with that MODEL.TEMPERATURE, which
    evaluation, predictions and exports follow. Runs in this process alone.

    example: replknet calibrate output/RUN -data_path data/digits -output calibrated.safetensors
    """
    check_file_target(args.output, [".safetensors"], must_be_new=not args.overwrite)
    args.eval = True
    config = config_from(args, reads_data=True)
    if config.MODEL.TYPE == "UPerNet":
        raise InputError("calibrate of a segmentation network; allowed: a classifier")

    import numpy as np

    from replknet_paddle.analysis.temperature import fit_temperature, statistics
    from replknet_paddle.checkpoints.load import convert_file
    from replknet_paddle.config import override
    from replknet_paddle.deploy.backends import open_for_evaluation
    from replknet_paddle.engine.run import run
    from replknet_paddle.zoo import weights_file

    source, logits, found = weights_file(config.MODEL.PRETRAINED), [], []
    check_is_another(source, args.output)

    def open_network(config):
        layer = open_for_evaluation(config, args.backend)
        layer.register_forward_post_hook(lambda *call: logits.append(call[-1].numpy()))
        return layer

    def keep(outcomes, *, config, **_):  # which has the number of classes by now
        found.extend([config, outcomes])

    run(override(config, SAVE=None), open_network=open_network, report=keep)
    (config, outcomes), logits = found, np.concatenate(logits)
    temperature = fit_temperature(logits, outcomes.labels)
    for when, each in (("before", config.MODEL.TEMPERATURE), ("after", temperature)):
        losses, *_, confidences = statistics(logits, outcomes.labels, each)
        error = replace(outcomes, scores=confidences[:, None]).calibration_error
        print(
            f"{when}: temperature {each:.6g}, negative log likelihood {losses.mean():.6f}, "
            f"expected calibration error {100 * error:.2f} %"
        )
    config = override(config, EVAL=False, MODEL__TEMPERATURE=temperature)
    convert_file(source, args.output, config, weights=config.MODEL.PRETRAINED_WEIGHTS)
    print(f"wrote {args.output}")
    return 0


def add_build_flags(parser) -> None:
    pass


def run_build(args) -> int:
    """Compile the fast operators, else built on first use.

    They go into the user's cache: ~/.cache/replknet_paddle, or the folder that
    REPLKNET_PADDLE_CACHE names. Nothing happens where they are up to date.

    example: replknet build
    """
    from replknet_paddle.data.transforms.pixels import pixels_library
    from replknet_paddle.ops.library import operators_library
    from replknet_paddle.runtime.compiler import BuildError

    status = 0
    for what, library in (
        ("convolution operators", operators_library),
        ("image operations", pixels_library),
    ):
        try:
            path, seconds = library().build()
        except BuildError as error:
            try:
                kept = library().find()
            except BuildError:
                kept = None
            if kept is None:
                status = 1
                print(f"no compiled {what}, so Paddle's or Pillow's are used: {error}")
            else:
                print(f"the {what} built before stay in use: {error}")
        else:
            if seconds:
                print(f"{what} built in {seconds:.0f} s: {path}", file=sys.stderr)
    return status
