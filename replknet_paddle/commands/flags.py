"""Flags that several commands share, each declared here once, and what they amount to."""

import argparse
import os


def add_flag(parser, name: str, help_text: str, **options) -> None:
    """Add a flag in PaddleViT's style, -NAME, with its twin --NAME."""
    parser.add_argument(f"-{name}", f"--{name}", help=help_text, **options)


def add_config_flags(
    parser: argparse.ArgumentParser,
    *,
    required=False,
    default=None,
    without="not needed for a checkpoint in its run folder",
) -> None:
    """Add -cfg and -opts, which describe a network; -cfg is `required` where no checkpoint could
    have the configuration. `without` says what holds without it."""
    text = "YAML file of the network"
    if not required and default is None:
        text += f"; {without}"
    elif default is not None:
        text += " (%(default)s)"
    add_flag(parser, "cfg", text, metavar="FILE", required=required, default=default)
    add_flag(
        parser,
        "opts",
        "any other keys, e.g. -opts TRAIN.BASE_LR 1e-3 SEED 1",
        nargs="+",
        action="extend",
        metavar="KEY VALUE",
    )


def config_from(
    args: argparse.Namespace, checkpoint: str | None = None, *, reads_data: bool = False
):
    """Return the configuration of -cfg, or else of the checkpoint, with -opts over it;
    MODEL.NUM_CLASSES may be None for what `reads_data`."""
    from replknet_paddle.checkpoints.run_folder import EXPORT_FILE_OF_0_2, config_of
    from replknet_paddle.config import check_class_count, get_config, update_config
    from replknet_paddle.runtime.errors import InputError

    if args.cfg is None and checkpoint is None:
        raise InputError("no configuration; give one by -cfg, e.g. -cfg=configs/replknet_31b.yaml")
    if args.cfg is not None:
        config = get_config(args.cfg)
    elif os.path.isfile(os.path.join(checkpoint, EXPORT_FILE_OF_0_2)):
        from replknet_paddle.deploy.export import read_export

        config = read_export(checkpoint).config
    else:
        config = config_of(checkpoint)
    config = update_config(config, args)
    if not reads_data:
        check_class_count(config)
    return config
