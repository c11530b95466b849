"""A checkpoint's run folder, which has the configuration that it was trained with."""

import os

from replknet_paddle.runtime.errors import InputError


def run_folder_of(path: str) -> str | None:
    """The run folder that a checkpoint, a link to one, or the folder itself belongs to, if any."""
    folder = os.path.dirname(os.path.realpath(path))
    for candidate in (path, os.path.dirname(path), os.path.dirname(folder)):
        if os.path.isfile(os.path.join(candidate, "config.yaml")):
            return candidate or "."
    return None


def run_config_file(path: str) -> str:
    """The configuration that a checkpoint in its run folder was trained with.

    Raises:
        InputError: the checkpoint does not lie in a run folder.
    """
    folder = run_folder_of(path)
    if folder is None:
        if not os.path.exists(path):
            raise FileNotFoundError(f"no checkpoint {path}")
        raise InputError(
            f"{path} does not lie in a run folder with a config.yaml; name its "
            "configuration by -cfg"
        )
    return os.path.join(folder, "config.yaml")


def weights_of(path: str | os.PathLike) -> str:
    """The checkpoint meant by `path`: of a run folder its `best`, or `last` where that is missing.

    Raises:
        InputError: a run folder without either.
    """
    path = os.fspath(path)
    if not os.path.isfile(os.path.join(path, "config.yaml")):
        return path
    for name in ("best", "last"):
        if os.path.isfile(os.path.join(path, name)):
            return os.path.join(path, name)
    raise InputError(f"{path} is a run folder without a checkpoint: neither best nor last is there")
