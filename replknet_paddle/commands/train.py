"""The command line of both mains: PaddleViT's flags, each with a --double-dash twin.

    python main_multi_gpu.py -cfg=./configs/replknet_31b.yaml -data_path=/dataset/imagenet \\
        -batch_size=256 -eval -pretrained=./replknet_31b.pdparams -amp
"""

import argparse
import os
import re
import socket
import sys
import time
from collections.abc import Callable
from functools import partial

from replknet_paddle.config import get_config, update_config
from replknet_paddle.data.dataset import get_dataset
from replknet_paddle.runtime.processes import another_failed, is_launched, launch, leave_status, visible_devices
from replknet_paddle.engine.run import run
from replknet_paddle.engine.run_log import check_run_folder
from replknet_paddle.engine.signals import Stopped
from replknet_paddle.engine.train import DivergedError
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.checkpoints.run_folder import run_config_file, run_folder_of


def build_parser(prog: str) -> argparse.ArgumentParser:
    """The flags. A flag that is not given leaves the configuration's value."""
    parser = argparse.ArgumentParser(
        prog=prog,
        allow_abbrev=False,
        usage=f"{prog} -cfg=FILE [FLAGS] [-opts KEY VALUE ...]",
        description="Train or evaluate RepLKNet.",
        epilog=f"example: python {prog} -cfg=./configs/replknet_31b.yaml "
        "-data_path=/dataset/imagenet -batch_size=256 -eval "
        "-pretrained=./replknet_31b.pdparams -amp",
    )

    def flag(group, name, help_text, **options):
        group.add_argument(f"-{name}", f"--{name}", help=help_text, **options)

    flag(
        parser,
        "cfg",
        "YAML file of configs/; not needed for a checkpoint in its run folder",
        metavar="FILE",
    )
    flag(
        parser,
        "print_config",
        "print the configuration that all this amounts to, and stop",
        action="store_true",
    )
    flag(
        parser,
        "opts",
        "any other keys, e.g. -opts TRAIN.BASE_LR 1e-3 SEED 1",
        nargs="+",
        metavar="KEY VALUE",
    )

    data = parser.add_argument_group("data")
    flag(data, "dataset", "kind of data set: imagenet2012, list files", metavar="NAME")
    flag(data, "data_path", "folder of train_list.txt and val_list.txt", metavar="DIR")
    flag(data, "batch_size", "images per process, in training and in evaluation", metavar="N")
    flag(data, "batch_size_eval", "images per process in evaluation", metavar="N")
    flag(data, "image_size", "side of the network input, pixels", metavar="N")

    what = parser.add_argument_group("what to do")
    flag(what, "eval", "evaluate -pretrained and stop", action="store_true")
    flag(what, "pretrained", "weights to evaluate, or to start training from", metavar="FILE")
    flag(
        what,
        "resume",
        "checkpoint or run folder to go on from; auto: the newest whole checkpoint of -output",
        metavar="PATH",
    )
    flag(what, "last_epoch", "epochs that -pretrained weights have behind them", metavar="N")
    flag(
        what,
        "output",
        "run folder; default that of -resume, or output/NAME-train-TIME, or output/NAME-eval-TIME",
        metavar="DIR",
    )

    flag(
        what,
        "backend",
        "with -eval: what runs the network, auto for the fastest here; docs/deployment.md names "
        "them. -pretrained may then be an export folder",
        metavar="NAME",
    )

    how = parser.add_argument_group("how")
    flag(how, "accum_iter", "forward passes per optimizer step", metavar="N")
    flag(how, "amp", "automatic mixed precision", action="store_true")
    return parser


def main(
    argv: list[str] | None = None,
    *,
    script: str,
    multi: bool,
    open_network: Callable | None = None,
) -> int:
    """Run a command line.

    Args:
        argv: the arguments; None for those of this process.
        script: the file that was started, which the launcher starts again in each process.
        multi: use every visible device, and offer -nproc.
        open_network: (config, backend name) -> what `-eval -backend NAME` evaluates.

    Returns:
        Exit status: 0; 2 for bad input; 1 for a run that diverged; 143 or 130 for one that saved
        and stopped at a SIGTERM or SIGINT.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser(os.path.basename(script))
    if multi:
        parser.add_argument(
            "-nproc",
            "--nproc",
            type=int,
            default=None,
            metavar="N",
            help="processes on this machine; default one per visible GPU, or one on CPU",
        )
    status, message = run_command_line(
        parser.parse_args(argv), argv, script=script, multi=multi, open_network=open_network
    )
    if message:
        print(message, file=sys.stderr)
    leave_status(status, message)
    return status


def run_command_line(
    args, argv: list[str], *, script: str, multi: bool, open_network: Callable | None
) -> tuple[int, str]:
    """Do what the flags say; the exit status of `main`, and what to say of it."""
    try:
        config = read_config(args)
        if args.print_config:
            print(config.dump(), end="")
            return 0, ""
        if args.backend is not None and not config.EVAL:
            raise InputError(f"-backend {args.backend} without -eval; allowed: with -eval")
        if config.SAVE is None:
            args.output = default_run_folder(config)
            config = update_config(config, args)
        if multi and not is_launched():
            nodes, master, processes = places(args.nproc)
            if nodes * processes > 1:
                check_inputs(config)
                return launch(
                    script,
                    [*argv, f"-output={config.SAVE}"],
                    processes=processes,
                    log_dir=worker_log_dir(config.SAVE, nodes),
                    nodes=nodes,
                    master=master,
                ), ""
        run(
            config,
            open_network=(
                None if args.backend is None else partial(open_network, name=args.backend)
            ),
        )
    except (InputError, OSError) as error:
        return 2, f"error: {error}"
    except DivergedError as error:
        return 1, f"error: {error}"
    except Stopped as stop:
        return 128 + stop.number, ""
    except RuntimeError:
        if not another_failed():
            raise
        # What a collective raises when another process has ended, which has said why.
        return 1, ""
    return 0, ""


def read_config(args):
    """The configuration that the flags amount to."""
    if args.cfg is None:
        checkpoint = args.output if args.resume == "auto" else args.resume or args.pretrained
        if checkpoint is None:
            raise InputError(
                "no configuration; give one by -cfg, e.g. -cfg=configs/replknet_31b.yaml"
            )
        args.cfg = run_config_file(checkpoint)
    return update_config(get_config(args.cfg), args)


def default_run_folder(config) -> str:
    """The run folder of MODEL.RESUME, or output/NAME-train-TIME, or output/NAME-eval-TIME."""
    if config.MODEL.RESUME is not None:  # not auto, which needs SAVE
        folder = run_folder_of(config.MODEL.RESUME)
        if folder is not None:
            return folder
    kind = "eval" if config.EVAL else "train"
    return os.path.join("output", f"{config.MODEL.NAME}-{kind}-{time.strftime('%Y%m%d-%H%M%S')}")


def places(nproc: int | None) -> tuple[int, str | None, int]:
    """Machines, address of their master, and processes on this one.

    From the environment: NNODES, MASTER (HOST:PORT of one of the machines) and NPROC_PER_NODE; by
    default this machine alone, with one process for each visible GPU, or one on CPU.
    """
    nodes = positive_integer("NNODES", os.environ.get("NNODES", 1))
    master = os.environ.get("MASTER")
    if nodes > 1 and not re.fullmatch(r"[^:]+:[0-9]{1,5}", master or ""):
        raise InputError(
            f"NNODES is {nodes}; MASTER must be HOST:PORT of one of these machines, got {master}"
        )
    devices = visible_devices()
    if nproc is not None:
        processes = positive_integer("-nproc", nproc)
    else:
        processes = positive_integer(
            "NPROC_PER_NODE", os.environ.get("NPROC_PER_NODE", max(devices, 1))
        )
    if 0 < devices < processes:
        raise InputError(f"{processes} processes for {devices} visible GPUs; allowed: one each")
    return nodes, master, processes


def positive_integer(name: str, value: str | int) -> int:
    """`value` as an integer of at least 1, or an InputError that names it."""
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1:
        raise InputError(f"{name} is {value}; allowed: an integer >= 1")
    return number


def worker_log_dir(run_folder: str, nodes: int) -> str:
    """Where this machine's processes write; machines that share the folder keep apart."""
    folder = os.path.join(run_folder, "workers")
    return folder if nodes == 1 else os.path.join(folder, f"{socket.gethostname()}-{os.getpid()}")


def check_inputs(config) -> None:
    """Find the usual mistakes once, before they become the same message from every process."""
    path = config.MODEL.RESUME or config.MODEL.PRETRAINED
    if path not in (None, "auto") and not os.path.exists(path):
        raise FileNotFoundError(
            f"no checkpoint {path}; docs/model_zoo.md says where the published ones are"
        )
    for is_train in [False] if config.EVAL else [True, False]:
        get_dataset(config, is_train)
    check_run_folder(config.SAVE, resume=config.MODEL.RESUME)
