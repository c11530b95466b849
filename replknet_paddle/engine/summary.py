"""What a finished training run says last: how it went, where its files are, what to do next."""

import logging
import os

from tqdm import tqdm

from replknet_paddle.checkpoints.checkpoint_file import WEIGHTS, CheckpointFile
from replknet_paddle.checkpoints.run_folder import NAME, Progress
from replknet_paddle.runtime.files import command_line
from replknet_paddle.runtime.processes import rank

logger = logging.getLogger(__name__)

# What `Progress.best_score` is, by MODEL.TYPE.
MEASURES = {"RepLKNet": "top-1", "UPerNet": "mIoU"}


def log_summary(config, progress: Progress, first_epoch: int, seconds: float) -> None:
    """Log how a training run went; on rank 0, which has its files."""
    if rank() == 0:
        for line in summary_lines(config, progress, first_epoch, seconds):
            logger.info("%s", line)


def summary_lines(config, progress: Progress, first_epoch: int, seconds: float) -> list[str]:
    """What `log_summary` says.

    Args:
        progress: at the end of the run.
        first_epoch: epochs that were done before this process began.
        seconds: that this process trained.
    """
    run_folder = config.SAVE
    trained = "no epoch was left to train"
    if progress.epoch > first_epoch:
        trained = (
            f"trained epochs {first_epoch + 1} to {progress.epoch} in "
            f"{tqdm.format_interval(seconds)}"
        )
    lines = [f"finished: {trained}"]
    best = os.path.join(run_folder, "best")
    match = NAME.fullmatch(progress.best_checkpoint)
    if match is None or not os.path.isfile(best):
        return lines
    lines.append(
        f"best: epoch {int(match.group(1))}, {WEIGHTS[CheckpointFile(best).ema_or_raw('auto')]}, "
        f"{MEASURES[config.MODEL.TYPE]} {progress.best_score:.2f} %, in {best}"
    )
    others = [
        name
        for name in ("last", "log.txt", "metrics.jsonl", "class_names.txt", "config.yaml")
        if os.path.isfile(os.path.join(run_folder, name))
    ]
    lines.append(f"in {run_folder}: {', '.join(others)}")
    folder = os.path.abspath(run_folder)  # the command can be typed anywhere
    words = ["eval", f"-pretrained={os.path.join(folder, 'best')}"]
    if config.MODEL.TYPE == "RepLKNet":
        words.append(f"-report={os.path.join(folder, 'report')}")
    lines.append(f"next: {command_line(*words)}")
    return lines
