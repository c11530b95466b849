"""What a run starts from: rank 0 decides, and the other ranks follow and check.

On a shared file system ranks may see different files for a while. Ranks that each chose the newest
checkpoint would then train different weights without an error.
"""

import json
import logging
import os
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import paddle

from replknet_paddle.checkpoints.convert import load_pretrained
from replknet_paddle.checkpoints.record import Classes, read_classes
from replknet_paddle.checkpoints.run_folder import weights_of
from replknet_paddle.checkpoints.training import (
    Checkpoint,
    load_checkpoint,
    newest_whole_checkpoint,
)
from replknet_paddle.config import RANDOM, config_changes, override
from replknet_paddle.engine.run_log import config_text
from replknet_paddle.runtime import processes
from replknet_paddle.runtime.errors import InputError, SystemFault
from replknet_paddle.runtime.files import file_sha256, searched_weights

logger = logging.getLogger(__name__)

# How long ranks wait until all see a file as rank 0 does. Network file systems cache folders for up
# to a minute.
FILE_WAIT_SECONDS = 120.0
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Start:
    """What a run starts from.

    Attributes:
        resumed: the checkpoint that it continues, if any.
        path: the file whose weights are loaded; None: fresh ones.
        classes: of that file, if its head is to be kept.
    """

    resumed: Checkpoint | None = None
    path: str | None = None
    classes: Classes = Classes()


def check_weights_are_named(config) -> None:
    """Raise InputError for an evaluation without weights that nobody asked for."""
    if config.EVAL and config.MODEL.PRETRAINED is None:
        raise InputError(
            "-eval without weights; name them by -pretrained. -pretrained=random evaluates a "
            "freshly initialized network"
        )


def find_start(config, *, is_opened: bool = False) -> Start:
    """What MODEL.RESUME and MODEL.PRETRAINED mean; the same on all ranks.

    Args:
        is_opened: something else opens MODEL.PRETRAINED, which may be a folder.

    Raises:
        FileNotFoundError: it does not exist.
        InputError: it cannot be read, or not be continued with this configuration.
        SystemFault: another rank does not see it.
    """
    resumed = find_resumed(config)
    if resumed is not None:
        return Start(resumed, resumed.path, read_classes(resumed.path))
    if config.MODEL.PRETRAINED in (None, RANDOM):
        return Start()
    path = from_rank_0(lambda: weights_of(config.MODEL.PRETRAINED))
    if is_opened and os.path.isdir(path):
        return Start()
    wait_for_file(path)
    classes = read_classes(path)
    has_new_head = config.MODEL.DROP_HEAD and not config.EVAL
    if has_new_head or classes.model_type not in (None, config.MODEL.TYPE):
        classes = Classes()
    return Start(None, path, classes)


def find_resumed(config) -> Checkpoint | None:
    """The checkpoint that MODEL.RESUME means, if any; the same on all ranks.

    Raises:
        FileNotFoundError: it does not exist.
        InputError: it cannot be read, or not be continued with this configuration.
        SystemFault: another rank does not see it.
    """
    path = from_rank_0(lambda: resumed_path(config))
    if not path:
        return None
    wait_for_file(path)
    checkpoint = load_checkpoint(path)
    progress = checkpoint.progress
    logger.info("resuming %s", path)
    if config.MODEL.NUM_CLASSES is None:
        config = override(config, MODEL__NUM_CLASSES=read_classes(path).count)
    for change in config_changes(checkpoint.config, config_text(config)):
        logger.warning("other than in the run resumed: %s", change)
    if config.TRAIN.LAST_EPOCH > progress.epoch:
        raise InputError(
            f"-last_epoch {config.TRAIN.LAST_EPOCH} contradicts {path}, which was "
            f"trained for {progress.epoch} epochs; leave -last_epoch out"
        )
    if config.TRAIN.MODEL_EMA != bool(checkpoint.model_ema):
        raise InputError(
            f"{path} was trained with TRAIN.MODEL_EMA {bool(checkpoint.model_ema)}; "
            f"got {config.TRAIN.MODEL_EMA}"
        )
    return checkpoint


def resumed_path(config) -> str:
    """The file that MODEL.RESUME means; empty: none."""
    path = config.MODEL.RESUME
    if path == "auto":
        path = newest_whole_checkpoint(config.SAVE)
        if path is None:
            logger.info("-resume auto: no checkpoint in %s, starting afresh", config.SAVE)
    elif path is not None:
        if os.path.isdir(path):
            path = os.path.join(path, "last")
        path = os.path.realpath(path)  # a link may lead somewhere else by the time it is read
    return path or ""


def load_start(model, config, load_weights: Callable, start: Start) -> None:
    """Load the weights of `start`, if there are any.

    Afterwards all ranks hold the same weights and statistics.

    Args:
        load_weights: (model, config, path of MODEL.PRETRAINED) -> None.

    Raises:
        OSError, InputError: the file cannot be read, or does not fit; or the ranks hold different
            weights.
    """
    if start.resumed is not None:
        load_pretrained(model, start.path, weights="model")
    elif start.path is not None:
        load_weights(model, config, start.path)
    check_same_weights(model)


def from_rank_0(decide: Callable[[], str]) -> str:
    """What `decide` returns on rank 0, on every rank; an error raised there is raised on all.

    Raises:
        InputError, OSError: as `decide`.
    """
    if processes.world_size() == 1:
        return decide()
    answer = {}
    if processes.rank() == 0:
        try:
            answer = {"decision": decide()}
        except InputError as error:
            answer = {"input_error": str(error)}
        except OSError as error:
            answer = {"os_error": str(error)}
    answer = json.loads(processes.text_of_rank_0(json.dumps(answer)))
    if "input_error" in answer:
        raise InputError(answer["input_error"])
    if "os_error" in answer:
        raise OSError(answer["os_error"])
    return answer["decision"]


def wait_for_file(path: str) -> None:
    """Wait until every rank sees the file `path` with the contents that rank 0 sees.

    Raises:
        OSError: on all ranks, if rank 0 cannot read it.
        SystemFault: on all ranks, if after `FILE_WAIT_SECONDS` some rank does not see it so.
    """
    if processes.world_size() == 1:
        return
    digest = from_rank_0(lambda: digest_of(path))
    deadline = time.monotonic() + FILE_WAIT_SECONDS
    while True:
        seen = has_digest(path, digest)
        ranks_seeing, ranks_out_of_time = processes.sum_over_ranks(
            [seen, time.monotonic() > deadline]
        )
        if ranks_seeing == processes.world_size():
            return
        if ranks_out_of_time:
            raise SystemFault(
                f"{path} is not on every rank what it is on rank 0 after {FILE_WAIT_SECONDS:g} "
                f"seconds ({int(ranks_seeing)} of {processes.world_size()} ranks see it); all "
                "machines must share the folder"
            )
        time.sleep(POLL_SECONDS)


def digest_of(path: str) -> str:
    """The SHA-256 of a file.

    Raises:
        FileNotFoundError: there is none.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"no checkpoint {searched_weights(path)}; docs/model_zoo.md says where the published "
            "ones are"
        )
    return file_sha256(path)


def has_digest(path: str, digest: str) -> bool:
    try:
        return digest_of(path) == digest
    except OSError:  # not there yet, or a stale handle
        return False


def check_same_weights(model: paddle.nn.Layer) -> None:
    """Check that all ranks hold the same weights and statistics.

    Raises:
        InputError: on all ranks, if they do not.
    """
    ranks = processes.world_size()
    if ranks == 1:
        return
    crc = 0
    for name, tensor in sorted(model.state_dict().items()):
        crc = zlib.crc32(np.ascontiguousarray(tensor.numpy()), zlib.crc32(name.encode(), crc))
    digests = np.zeros(ranks)
    digests[processes.rank()] = crc
    digests = processes.sum_over_ranks(digests)
    wrong = [rank for rank in range(ranks) if digests[rank] != digests[0]]
    if wrong:
        raise InputError(
            f"ranks {', '.join(map(str, wrong))} start with other weights than rank 0; all "
            "machines need the same files, the same kind of device and the same version of Paddle"
        )
