"""Train a network, or with -eval evaluate one, on every visible device.

The flags are PaddleViT's, each with a --double-dash twin. `main_multi_gpu.py` is this command.
"""

import os
import re
import signal
import socket
import sys
import time
import traceback
from functools import partial

from replknet_paddle.commands.flags import add_config_flags, add_flag, config_from
from replknet_paddle.config import RANDOM, update_config
from replknet_paddle.runtime.errors import InputError, SystemFault
from replknet_paddle.runtime.files import check_new_folder, check_place_is_writable
from replknet_paddle.runtime.parent import end_with_parent
from replknet_paddle.runtime.places import command_line, tried_checkpoint
from replknet_paddle.runtime.restarts import run_with_restarts

EXAMPLES = """\
example: python main_multi_gpu.py -cfg=./configs/replknet_31b.yaml -data_path=/dataset/imagenet \\
             -batch_size=256 -eval -pretrained=./replknet_31b.pdparams -amp
"""

STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)

# What runs in each process, in the same environment.
PROGRAM = (sys.executable, "-u", "-m", "replknet_paddle", "train")


def add_arguments(parser) -> None:
    """The flags. A flag that is not given leaves the configuration's value."""
    flag = add_flag
    add_config_flags(parser)
    flag(
        parser,
        "print_config",
        "print the configuration that all this amounts to, and stop",
        action="store_true",
    )

    data = parser.add_argument_group("data")
    flag(data, "dataset", "kind of dataset: imagenet2012, list files", metavar="NAME")
    flag(data, "data_path", "folder of train_list.txt and val_list.txt", metavar="DIR")
    flag(data, "batch_size", "images per process, in training and in evaluation", metavar="N")
    flag(data, "batch_size_eval", "images per process in evaluation", metavar="N")
    flag(data, "image_size", "side of the network input, pixels", metavar="N")

    what = parser.add_argument_group("what to do")
    flag(what, "eval", "evaluate -pretrained and stop", action="store_true")
    flag(
        what,
        "pretrained",
        "weights to evaluate, or to start training from; with -eval, random for none",
        metavar="FILE",
    )
    flag(
        what,
        "resume",
        "checkpoint or run folder to continue; auto: the newest whole checkpoint of -output",
        metavar="PATH",
    )
    flag(what, "last_epoch", "epochs that the -pretrained weights were trained for", metavar="N")
    flag(
        what,
        "output",
        "run folder; default that of -resume, or output/NAME-train-TIME-PID or "
        "output/NAME-eval-TIME-PID",
        metavar="DIR",
    )
    flag(
        what,
        "report",
        "with -eval: new folder for a report: accuracy of each class, confusion matrix, mistakes",
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
    flag(
        how,
        "nproc",
        "processes on this machine; default one per visible GPU, or one on CPU",
        type=int,
        metavar="N",
    )


def run(args) -> int:
    """Do what the flags say.

    Returns:
        0; 2 for bad input; 1 for a run that diverged, or that the system failed while it was under
        way; 128 + the number of a signal: 143 or 130 for a run that saved and stopped at a SIGTERM
        or SIGINT, others for one with a process that was killed.
    """
    if "PADDLE_TRAINERS_NUM" in os.environ:  # before Paddle is imported, which takes seconds
        end_with_parent()
    status, message = 1, ""
    try:
        status, message = train_or_evaluate(args)
    except Exception:
        message = traceback.format_exc()
    if message:
        print(message.rstrip(), file=sys.stderr)
    if "PADDLE_TRAINERS_NUM" in os.environ:
        from replknet_paddle.runtime.launch import leave_status

        leave_status(status, message)
    return status


def train_or_evaluate(args) -> tuple[int, str]:
    """The exit status of `run`, and what to report."""
    try:
        config = read_config(args)
        if args.print_config:
            print(config.dump(), end="")
            return 0, ""
        if config.SAVE is None:
            args.output = default_run_folder(config)
            config = update_config(config, args)
        check_place_is_writable(config.SAVE)
        restarts = whole_number("MAX_RESTARTS", os.environ.get("MAX_RESTARTS", 0))
    except (InputError, OSError) as error:
        return 2, f"error: {error}"
    command = [*PROGRAM, *args.argv, f"-output={config.SAVE}"]
    if restarts and not config.EVAL and "PADDLE_TRAINERS_NUM" not in os.environ:
        is_resuming = config.MODEL.RESUME is not None
        return run_with_restarts(
            command, restarts=restarts, run_folder=config.SAVE, is_resuming=is_resuming
        ), ""

    try:
        # Paddle is imported once the configuration is known to be right.
        from replknet_paddle.deploy.backends import is_export, open_for_evaluation
        from replknet_paddle.engine.run import run as run_config
        from replknet_paddle.engine.run_log import LAUNCHER, RunLock, append_to_log
        from replknet_paddle.engine.signals import Stopped
        from replknet_paddle.engine.train import DivergedError
        from replknet_paddle.runtime.launch import (
            PeerLost,
            another_failed,
            launch,
            wait_to_be_ended,
        )
        from replknet_paddle.runtime.processes import is_launched, rank

        if args.backend is not None and not config.EVAL:
            raise InputError(f"-backend {args.backend} without -eval; allowed: with -eval")
        if args.report is not None:
            if not config.EVAL:
                raise InputError(f"-report {args.report} without -eval; allowed: with -eval")
            if config.MODEL.TYPE != "RepLKNet":
                raise InputError(
                    f"-report for MODEL.TYPE {config.MODEL.TYPE}; allowed: for classifiers"
                )
            check_new_folder(args.report)
        if not is_launched():
            nodes, master, processes = places(args.nproc)
            if nodes * processes > 1:
                check_inputs(config)
                lock = None
                if nodes == 1:  # of several machines, only that of rank 0 locks the folder
                    lock = RunLock(config.SAVE, LAUNCHER, resume=config.MODEL.RESUME)
                status, message = launch(
                    command,
                    processes=processes,
                    log_dir=worker_log_dir(config.SAVE, nodes),
                    nodes=nodes,
                    master=master,
                    note=partial(append_to_log, config.SAVE),
                )
                if lock is not None:
                    lock.release()
                if status in STOPPED and not message:
                    message = how_to_resume(config, processes)
                return status, message
        open_network = None
        backend = args.backend
        if backend is None and config.EVAL and config.MODEL.PRETRAINED is not None:
            backend = "auto" if is_export(config.MODEL.PRETRAINED) else None
        if backend is not None:
            build = task_of(config).network
            open_network = partial(open_for_evaluation, name=backend, build=build)
        report = None if args.report is None else partial(write_evaluation, args.report)
        run_config(config, task=task_of(config), open_network=open_network, report=report)
    except (InputError, OSError) as error:
        return 2, f"error: {error}"
    except PeerLost as error:
        if another_failed():  # and has said why
            return 1, ""
        wait_to_be_ended()
        if rank() == 0:
            append_to_log(config.SAVE, f"error: {error}")
        return 1, f"error: {error}"
    except (DivergedError, SystemFault) as error:
        return 1, f"error: {error}"
    except Stopped as stop:
        return 128 + stop.number, "" if is_launched() else how_to_resume(config, 1)
    return 0, ""


def task_of(config):
    """What MODEL.TYPE says the run is about."""
    if config.MODEL.TYPE == "UPerNet":
        from replknet_paddle.segmentation.task import SEGMENTATION

        return SEGMENTATION
    from replknet_paddle.engine.task import CLASSIFICATION

    return CLASSIFICATION


def write_evaluation(folder: str, outcomes, *, config, class_names, dataset) -> None:
    """Write the report of an evaluation, whose `outcomes` have the answers image by image."""
    from replknet_paddle.data.transforms.image import to_rgb
    from replknet_paddle.deploy.report import Evaluated, write_report

    evaluated = Evaluated(
        model=config.MODEL.NAME,
        weights=config.MODEL.PRETRAINED,
        data=dataset.list_file,
        metrics=str(outcomes),
        class_names=class_names or list(map(str, range(config.MODEL.NUM_CLASSES))),
        outcomes=outcomes,
        path=dataset.path,
        picture=lambda index: dataset.read(0, index, lambda image, _: to_rgb(image).copy()),
    )
    write_report(folder, evaluated)


def how_to_resume(config, processes: int) -> str:
    """The command that continues a stopped training run, if there is anything to continue."""
    from replknet_paddle.checkpoints.training import checkpoints

    if config.EVAL or not checkpoints(config.SAVE):
        return ""
    flags = [f"-nproc={processes}"] if processes > 1 else []
    folder = os.path.abspath(config.SAVE)
    return f"to continue: {command_line('train', f'-resume={folder}', *flags)}"


def read_config(args):
    """The configuration that the flags amount to.

    Raises:
        InputError: as `config_from`; or a run would start afresh by the configuration of its run
            folder, which does not say what it started from.
    """
    if args.cfg is None and args.resume == "auto" and args.output is not None:
        from replknet_paddle.checkpoints.training import checkpoints

        if os.path.isdir(args.output) and not checkpoints(args.output):
            raise InputError(
                f"{args.output} has no checkpoint to resume; start the run again with -cfg and "
                "the other flags that it was started with"
            )
    checkpoint = args.output if args.resume == "auto" else args.resume or args.pretrained
    if checkpoint == RANDOM:
        checkpoint = None
    return config_from(args, checkpoint, reads_data=True)


def default_run_folder(config) -> str:
    """The run folder of MODEL.RESUME, or output/NAME-train-TIME-PID or output/NAME-eval-TIME-PID.

    PID is the number of this process: runs may start in the same second.

    Raises:
        InputError: several machines, whose clocks and processes differ.
    """
    from replknet_paddle.checkpoints.run_folder import run_folder_of

    if config.MODEL.RESUME is not None:  # not auto, which needs SAVE
        folder = run_folder_of(config.MODEL.RESUME)
        if folder is not None:
            return folder
    nodes = os.environ.get("NNODES", "1")
    if nodes != "1":
        raise InputError(
            f"NNODES is {nodes} and there is no -output; give it on each machine, a folder that "
            "they share"
        )
    kind = "eval" if config.EVAL else "train"
    now = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    return os.path.join("output", f"{config.MODEL.NAME}-{kind}-{now}")


def places(nproc: int | None) -> tuple[int, str | None, int]:
    """The number of machines, the address of their master, and the processes on this machine.

    From the environment: NNODES, MASTER (HOST:PORT of one of the machines) and NPROC_PER_NODE; by
    default only this machine, with one process for each visible GPU, or one on CPU.
    """
    nodes = whole_number("NNODES", os.environ.get("NNODES", 1), 1)
    master = os.environ.get("MASTER")
    named = re.fullmatch(r"[^:]+:([0-9]{1,5})", master or "")
    if nodes > 1 and not (named and 1 <= int(named[1]) <= 65535):
        raise InputError(
            f"NNODES is {nodes}; MASTER must be HOST:PORT of one of these machines, got {master}"
        )
    from replknet_paddle.runtime.processes import visible_devices

    devices = visible_devices()
    if nproc is not None:
        processes = whole_number("-nproc", nproc, 1)
    else:
        processes = whole_number(
            "NPROC_PER_NODE", os.environ.get("NPROC_PER_NODE", max(devices, 1)), 1
        )
    if 0 < devices < processes:
        raise InputError(f"{processes} processes for {devices} visible GPUs; allowed: one each")
    return nodes, master, processes


def whole_number(name: str, value: str | int, least: int = 0) -> int:
    """`value` as an integer of at least `least`, or an InputError that names it."""
    try:
        number = int(value)
    except ValueError:
        number = least - 1
    if number < least:
        raise InputError(f"{name} is {value}; allowed: an integer >= {least}")
    return number


def worker_log_dir(run_folder: str, nodes: int) -> str:
    """The log folder of this machine's processes; machines that share RUN have one each."""
    folder = os.path.join(run_folder, "workers")
    return folder if nodes == 1 else os.path.join(folder, f"{socket.gethostname()}-{os.getpid()}")


def check_inputs(config) -> None:
    """Check the input once, so that not every process reports the same mistake."""
    from replknet_paddle.engine.start import check_weights_are_named

    check_weights_are_named(config)
    path = config.MODEL.RESUME or config.MODEL.PRETRAINED
    if path not in (None, "auto", RANDOM) and not os.path.exists(path):
        raise FileNotFoundError(
            f"no checkpoint {tried_checkpoint(path)}; docs/model_zoo.md says where the published "
            "ones are"
        )
    for is_train in [False] if config.EVAL else [True, False]:
        task_of(config).dataset(config, is_train)
