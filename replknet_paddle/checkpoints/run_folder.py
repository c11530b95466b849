"""What a run folder says about its checkpoints: the configuration, and which weights are better."""

import os

from replknet_paddle.checkpoints.readers import is_safetensors
from replknet_paddle.checkpoints.record import read_body
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.places import find_path, tried_checkpoint

EXPORT_FILE = "export.json"  # in a folder with a config.yaml and a model for inference

# Which weights of a checkpoint to take, and what messages call them.
WEIGHTS = {"model": "weights", "model_ema": "EMA weights"}


def run_folder_of(path: str) -> str | None:
    """The run folder of a checkpoint, of a link to one, or of the folder itself, if any."""
    folder = os.path.dirname(os.path.realpath(path))
    for candidate in (path, os.path.dirname(path), os.path.dirname(folder)):
        if os.path.isfile(os.path.join(candidate, "config.yaml")):
            return candidate or "."
    return None


def is_same(folder: str | None, other: str) -> bool:
    """Whether two paths lead to one folder."""
    return folder is not None and os.path.realpath(folder) == os.path.realpath(other)


def run_config_file(path: str) -> str:
    """The configuration that a checkpoint in its run folder was trained with.

    Raises:
        InputError: the checkpoint does not lie in a run folder.
    """
    path = find_path(path)
    folder = run_folder_of(path)
    if folder is None:
        if not os.path.exists(path):
            raise FileNotFoundError(f"no checkpoint {tried_checkpoint(path)}")
        raise InputError(
            f"{path} does not lie in a run folder with a config.yaml; name its "
            "configuration by -cfg"
        )
    return os.path.join(folder, "config.yaml")


def weights_of(path: str | os.PathLike) -> str:
    """`path`, of an export too, or for a run folder its `best`, or `last` where that is missing.

    Raises:
        InputError: a run folder without either.
    """
    path = find_path(path)
    is_export = os.path.isfile(os.path.join(path, EXPORT_FILE))
    if is_export or not os.path.isfile(os.path.join(path, "config.yaml")):
        return path
    for name in ("best", "last"):
        if os.path.isfile(os.path.join(path, name)):
            return os.path.join(path, name)
    raise InputError(f"{path} is a run folder without a checkpoint: neither best nor last is there")


def chosen_weights(path: str | os.PathLike, weights: str) -> str:
    """Which of 'model' and 'model_ema' to take from a checkpoint file.

    Args:
        weights: one of these, or 'auto' for the ones that had the higher accuracy in the run's
            latest evaluation before the checkpoint: of RUN/best, those that made it the best. Files
            without that record, and checkpoints before the first evaluation, give 'model'.

    Raises:
        InputError: another value of `weights`, or a file that cannot be read.
    """
    if weights in WEIGHTS:
        return weights
    if weights != "auto":
        raise InputError(f"weights is {weights!r}; allowed: auto, {', '.join(WEIGHTS)}")
    if not os.path.isfile(path) or not is_safetensors(path):
        return "model"
    body = read_body(path) or {}
    try:
        better = body.get("progress", {}).get("better_weights", "model")
    except (TypeError, AttributeError):
        better = None
    if better not in WEIGHTS:
        raise InputError(f"{path} is damaged: its metadata is not what training writes")
    return better
