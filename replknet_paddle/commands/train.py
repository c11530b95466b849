"""Training and evaluation: `replknet train` and `replknet eval`."""

import contextlib
import os
import re
import shutil
import socket
import sys
import tempfile
import time
import traceback
from functools import partial

from replknet_paddle.commands.flags import add_config_flags, add_flag, add_model, config_from
from replknet_paddle.config import RANDOM, update_config
from replknet_paddle.runtime.errors import OUT_OF_MEMORY, InputError, PeerLost, SystemFault
from replknet_paddle.runtime.files import check_new_folder, check_place_is_writable, command_line
from replknet_paddle.runtime.launch import (
    LaunchedRun,
    another_failed,
    end_with_parent,
    leave_status,
    run_with_restarts,
    wait_to_be_ended,
)
from replknet_paddle.runtime.machines import STOPPED, is_launched

# What runs in each process, in the same environment.
PROGRAM = (sys.executable, "-u", "-m", "replknet_paddle")

CHOICES = {"tta": ("flip",)}  # of flags that have a few

OF_EVALUATION = "of an evaluation: "  # begins the texts of flags that go with -eval alone

# By their groups in the help: name, what stands for the value (None: a switch), what it does.
FLAGS = {
    None: [("print_config", None, "print the configuration that all this amounts to, and stop")],
    "data": [
        ("dataset", "NAME", "kind of dataset: imagenet2012, list files"),
        ("data_path", "DIR", "folder of train_list.txt and val_list.txt"),
        ("batch_size", "N", "images per process, in training and in evaluation"),
        ("batch_size_eval", "N", "images per process in evaluation"),
        ("image_size", "N", "side of the network input, pixels"),
        ("workers", "N", "processes that read images, for each process of the run"),
        ("fold", "N", "train_list_N.txt and val_list_N.txt instead, of make-lists -folds"),
    ],
    "training": [
        ("epochs", "N", "epochs of the whole run"),
        ("lr", "RATE", "peak learning rate"),
        ("seed", "N", "of weights, order and augmentation"),
        ("accum_iter", "N", "forward passes per optimizer step"),
        (
            "freeze",
            "NAMES",
            "parts that keep their weights: backbone, or what names of parameters begin with, such "
            "as stem,stages.0",
        ),
        ("patience", "N", "epochs without a better checkpoint, after which the run ends"),
        (
            "resume",
            "PATH",
            "checkpoint or run folder to continue; auto: the newest whole checkpoint of -output",
        ),
        ("last_epoch", "N", "epochs that the -pretrained weights were trained for"),
        ("best_by", "FIGURE", "by which best is chosen: top1, macro_f1, ...; docs/training.md"),
        ("eval", None, "evaluate -pretrained and stop"),
    ],
    "weights and results": [
        (
            "pretrained",
            "MODEL",
            "weights to start training from, or to evaluate: a published name, checkpoint or run "
            "folder; in evaluation also an export folder, or random for fresh ones",
        ),
        (
            "output",
            "DIR",
            "run folder, by default a new one in output/; of an evaluation, a folder for its log "
            "and figures, which are not kept without it",
        ),
        (
            "report",
            "DIR",
            f"{OF_EVALUATION}new folder for a report: accuracy or IoU of each class, confusion "
            "matrix, mistakes",
        ),
        ("overwrite", None, "replace an earlier report in -report"),
        (
            "backend",
            "NAME",
            f"{OF_EVALUATION}what runs the network, auto for the fastest here; "
            "docs/deployment.md names them",
        ),
        (
            "tta",
            "flip",
            f"{OF_EVALUATION}flip averages the probabilities of image and mirror image",
        ),
        ("protocol", "NAME", f"{OF_EVALUATION}robustness benchmark; docs/robustness.md"),
    ],
    "how": [
        ("amp", None, "automatic mixed precision"),
        ("nproc", "N", "processes on this machine; default one per visible GPU, or one on CPU"),
    ],
}


# What the others mean in an evaluation, where that is not all that they mean.
EVAL_TEXTS = {
    "batch_size": "images per process",
    "batch_size_eval": "the same",
    "pretrained": "the same as MODEL; random for fresh weights",
    "output": "folder for the log and the figures, which are not kept without it",
}


def add_train_flags(parser) -> None:
    """Add the flags. A flag that is not given leaves the configuration's value."""
    add_config_flags(parser, "not needed for a checkpoint that carries its configuration")
    add_groups(parser, FLAGS)


def add_eval_flags(parser) -> None:
    """Add the flags of `add_train_flags` that an evaluation uses."""
    add_model(parser, is_optional=True)
    groups = {
        title: [
            (name, value, EVAL_TEXTS.get(name, text.removeprefix(OF_EVALUATION)))
            for name, value, text in rows
        ]
        for title, rows in FLAGS.items()
        if title != "training"
    }
    add_groups(parser, groups)
    parser.set_defaults(resume=None)


def add_groups(parser, groups: dict) -> None:
    for title, rows in groups.items():
        group = parser if title is None else parser.add_argument_group(title)
        for name, value, text in rows:
            options = {"metavar": value, "choices": CHOICES.get(name)}
            add_flag(group, name, text, **{"action": "store_true"} if value is None else options)


def run_train(args) -> int:
    r"""Train a network, or with -eval evaluate one.

    The flags are PaddleViT's. `main_multi_gpu.py` is this command.

    example: python main_multi_gpu.py -cfg=configs/replknet_nano.yaml -data_path=data/digits \
                 -epochs=2 -output=output/digits
    """
    return run_to_the_end(args)


def run_eval(args) -> int:
    """Evaluate a classifier, each image exactly once.

    `-pretrained MODEL` says the same as MODEL, as `main_multi_gpu.py -eval` has it.

    example: replknet eval output/RUN -data_path data/digits -report report
    """
    args.eval = True
    return run_to_the_end(args)


def run_to_the_end(args) -> int:
    """Train or evaluate; print what ends it, leave it to the process that started this one, and
    return the exit status."""
    if is_launched():  # before Paddle is imported, which takes seconds
        end_with_parent()
    status, message = 1, ""
    try:
        status, message = train_or_evaluate(args)
    except (InputError, OSError) as error:
        status, message = 2, f"error: {error}"
    except SystemFault as error:
        message = f"error: {error}"
    except MemoryError:
        message = f"error: {OUT_OF_MEMORY}"
    except Exception:
        message = traceback.format_exc()
    if message:
        print(message.rstrip(), file=sys.stderr)
    leave_status(status, message)
    return status


def train_or_evaluate(args) -> tuple[int, str]:
    """Run in this process, in several, or again after failures; the status and what to report."""
    config = read_config(args)
    if args.print_config:
        print(config.dump(), end="")
        return 0, ""
    if config.SAVE is None:
        args.output = default_run_folder(config)
        config = update_config(config, args)
    if config.SAVE is not None:
        check_place_is_writable(config.SAVE)
    restarts = whole_number("MAX_RESTARTS", os.environ.get("MAX_RESTARTS", 0))
    check_flags(args, config)
    folder = [] if config.SAVE is None else [f"-output={config.SAVE}"]
    command = [*PROGRAM, *args.command, *folder, *args.words]
    if is_launched():
        return run_here(args, config)
    if restarts and not config.EVAL:
        is_resuming = config.MODEL.RESUME is not None
        return run_with_restarts(
            command, restarts=restarts, run_folder=config.SAVE, is_resuming=is_resuming
        ), ""
    where = processes_from_environment(args.nproc)
    if where["nodes"] * where["processes"] > 1:
        check_inputs(config, args.protocol)
        return run_in_processes(command, config, where)
    return run_here(args, config)


def check_flags(args, config) -> None:
    """Raise InputError for flags that go with -eval alone, and for an evaluation of weights that
    nobody has named."""
    if config.EVAL and config.MODEL.PRETRAINED is None:
        raise InputError(
            "evaluation without weights; name them by MODEL or -pretrained. -pretrained=random "
            "evaluates a freshly initialized network"
        )
    for name in ("backend", "report", "overwrite", "tta", "protocol"):
        value = getattr(args, name)
        if value and not config.EVAL:
            given = f"-{name}" if value is True else f"-{name} {value}"
            raise InputError(f"{given} without -eval; allowed: with -eval")
    if args.tta and config.MODEL.TYPE == "UPerNet":
        key = "SEGMENTATION.EVAL_FLIP"
        raise InputError(f"-tta {args.tta} of a segmentation network; allowed: -opts {key} True")
    if args.report is not None:
        if args.protocol in ("imagenet-c", "cue-conflict"):
            raise InputError(f"-report with -protocol {args.protocol}; allowed: the others")
        replaces = None
        if args.overwrite:
            # Here because it imports Paddle, which the process that starts others does without.
            from replknet_paddle.deploy.report import REPORT_FILES as replaces
        check_new_folder(args.report, replaces=replaces)


def run_in_processes(command: list[str], config, where: dict) -> tuple[int, str]:
    """Run the command in several processes of this machine, and maybe of others."""
    from replknet_paddle.engine.run_log import LAUNCHER, RunLock, append_to_log

    with contextlib.ExitStack() as stack:
        folder = config.SAVE or tempfile.mkdtemp(prefix="replknet-")
        if config.SAVE is None:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        log_dir = os.path.join(folder, "workers")
        if where["nodes"] > 1:  # the machine of rank 0 locks the folder, and each has its own logs
            log_dir = os.path.join(log_dir, f"{socket.gethostname()}-{os.getpid()}")
        elif config.SAVE is not None:
            lock = RunLock(folder, LAUNCHER, resume=config.MODEL.RESUME)
            stack.callback(lock.release)
        launched = LaunchedRun(command, log_dir=log_dir, **where)
        status, message = launched.wait(partial(append_to_log, folder))
        if config.SAVE is None and folder in message:  # which says where the output is
            stack.pop_all()
    if status in STOPPED and not message:
        message = how_to_resume(config, where["processes"])
    return status, message


def run_here(args, config) -> tuple[int, str]:
    """Run in this process: the only one, or one of several."""
    # Paddle is imported once the configuration is known to be right.
    from replknet_paddle.deploy.backends import open_for_evaluation
    from replknet_paddle.deploy.export import is_export
    from replknet_paddle.engine.run import run as run_config
    from replknet_paddle.engine.run_log import append_to_log
    from replknet_paddle.engine.signals import Stopped
    from replknet_paddle.engine.train import DivergedError
    from replknet_paddle.runtime.processes import rank

    open_network, backend = None, args.backend
    task = task_of(config, flip=args.tta == "flip", protocol=args.protocol)
    if backend is None and config.EVAL and config.MODEL.PRETRAINED is not None:
        backend = "auto" if is_export(config.MODEL.PRETRAINED) else None
    if backend is not None:
        open_network = partial(open_for_evaluation, name=backend, build=task.network)
    report = None if args.report is None else partial(write_evaluation, args.report, args.overwrite)
    try:
        run_config(config, task=task, open_network=open_network, report=report)
    except PeerLost as error:
        if another_failed():  # and has said why
            return 1, ""
        wait_to_be_ended()
        if rank() == 0 and config.SAVE is not None:
            append_to_log(config.SAVE, f"error: {error}")
        raise
    except DivergedError as error:
        return 1, f"error: {error}"
    except Stopped as stop:
        return 128 + stop.number, "" if is_launched() else how_to_resume(config, 1)
    return 0, ""


def task_of(config, *, flip: bool = False, protocol: str | None = None):
    """Return the task that MODEL.TYPE names, or a robustness benchmark; a classifier's evaluation
    sees mirror images too, to `flip`."""
    if protocol is not None:
        from replknet_paddle.engine.protocols import ProtocolTask

        return ProtocolTask(protocol, config, flip=flip)
    if config.MODEL.TYPE == "UPerNet":
        from replknet_paddle.segmentation.task import SEGMENTATION

        return SEGMENTATION
    from replknet_paddle.engine.task import ClassificationTask

    return ClassificationTask(flip=flip)


def write_evaluation(
    folder: str, overwrite: bool, outcomes, *, config, class_names, dataset, infer, network
) -> None:
    """Write the report of an evaluation, whose `outcomes` have the answers image by image."""
    if config.MODEL.TYPE == "UPerNet":
        from replknet_paddle.segmentation.report import write_segmentation_report

        evaluation = dict(config=config, class_names=class_names, dataset=dataset, infer=infer)
        return write_segmentation_report(folder, outcomes, overwrite=overwrite, **evaluation)

    from replknet_paddle.data.transforms.image import to_rgb
    from replknet_paddle.deploy.gradcam import LAST_STRIDE, grad_cam, heat_over, last_features
    from replknet_paddle.deploy.report import Evaluated, write_report
    from replknet_paddle.model import RepLKNet

    def heat(index: int, picture):
        """Return the picture with what speaks for the class that it was taken for."""
        with last_features(network) as features:
            infer(dataset.transform.pixels(picture))
        (strengths,) = grad_cam(network, features[0], outcomes.classes[index, :1])
        return heat_over(picture, strengths, dataset.transform)

    has_maps = isinstance(network, RepLKNet) and config.DATA.IMAGE_SIZE > LAST_STRIDE
    evaluated = Evaluated(
        model=config.MODEL.NAME,
        weights=config.MODEL.PRETRAINED,
        data=dataset.list_file,
        metrics=str(outcomes),
        class_names=class_names or list(map(str, range(config.MODEL.NUM_CLASSES))),
        outcomes=outcomes,
        path=dataset.path,
        picture=lambda index: dataset.read(0, index, lambda image, _: to_rgb(image).copy()),
        heat=heat if has_maps else None,
    )
    write_report(folder, evaluated, overwrite=overwrite)


def how_to_resume(config, processes: int) -> str:
    """Return the command that continues a stopped training run, if there is a checkpoint."""
    from replknet_paddle.checkpoints.run_folder import checkpoints

    if config.EVAL or not checkpoints(config.SAVE):
        return ""
    flags = [f"-nproc={processes}"] if processes > 1 else []
    folder = os.path.abspath(config.SAVE)
    return f"to continue: {command_line('train', f'-resume={folder}', *flags)}"


def read_config(args):
    """Return the configuration that the flags amount to.

    A run must not start afresh by the configuration of its run folder, which does not say what it
    started from.
    """
    if args.cfg is None and args.resume == "auto" and args.output is not None:
        from replknet_paddle.checkpoints.run_folder import checkpoints

        if os.path.isdir(args.output) and not checkpoints(args.output):
            raise InputError(
                f"{args.output} has no checkpoint to resume; start the run again with -cfg and "
                "the other flags that it was started with"
            )
    checkpoint = args.output if args.resume == "auto" else args.resume or args.pretrained
    if checkpoint == RANDOM:
        checkpoint = None
    return config_from(args, checkpoint, reads_data=True)


def default_run_folder(config) -> str | None:
    """Return the run folder of MODEL.RESUME, or a new one, whose process id keeps apart runs that
    start in the same second; None for an evaluation. Several machines, whose clocks and processes
    differ, need -output."""
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
    if config.EVAL:
        return None
    now = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    return os.path.join("output", f"{config.MODEL.NAME}-train-{now}")


def processes_from_environment(nproc: str | None) -> dict:
    """Return the processes, nodes, master and on_gpu of a `LaunchedRun`, from -nproc and NNODES,
    MASTER (HOST:PORT of one of the machines) and NPROC_PER_NODE in the environment; by default only
    this machine, with one process for each visible GPU, or one on CPU."""
    nodes = whole_number("NNODES", os.environ.get("NNODES", 1), 1)
    master = os.environ.get("MASTER")
    named = re.fullmatch(r"[^:]+:([0-9]{1,5})", master or "")
    if nodes > 1 and not (named and 1 <= int(named[1]) <= 65535):
        raise InputError(
            f"NNODES is {nodes}; MASTER must be HOST:PORT of one of these machines, got {master}"
        )
    from replknet_paddle.runtime.processes import visible_devices

    devices = visible_devices()
    name, value = "-nproc", nproc
    if nproc is None:
        name, value = "NPROC_PER_NODE", os.environ.get("NPROC_PER_NODE", max(devices, 1))
    processes = whole_number(name, value, 1)
    if 0 < devices < processes:
        raise InputError(f"{processes} processes for {devices} visible GPUs; allowed: one each")
    return dict(nodes=nodes, master=master, processes=processes, on_gpu=devices > 0)


def whole_number(name: str, value: str | int, least: int = 0) -> int:
    """Return `value` as an integer of at least `least`; an InputError names any other."""
    try:
        number = int(value)
    except ValueError:
        number = least - 1
    if number < least:
        raise InputError(f"{name} is {value}; allowed: an integer >= {least}")
    return number


def check_inputs(config, protocol: str | None) -> None:
    """Check the input once, so that not every process reports the same mistake."""
    from replknet_paddle.zoo import is_published, no_model

    path = config.MODEL.RESUME or config.MODEL.PRETRAINED
    if path not in (None, "auto", RANDOM) and not (os.path.exists(path) or is_published(path)):
        raise FileNotFoundError(no_model(path))
    for is_train in [False] if config.EVAL else [True, False]:
        task_of(config, protocol=protocol).dataset(config, is_train)
