"""The published RepLKNet models.

from replknet_paddle.zoo import get_model, list_models

list_models('*384*')
model = get_model('replknet-31b-1k-224', pretrained=True)  # downloaded once, then cached
model = get_model('replknet-31B_3rdparty_in1k', pretrained='my_weights.pth')
"""

import fnmatch
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from yacs.config import CfgNode

from replknet_paddle.config import (
    CONFIG_FOLDER,
    RANDOM,
    check_class_count,
    get_config,
    is_yaml,
    override,
)
from replknet_paddle.runtime.errors import InputError, did_you_mean
from replknet_paddle.runtime.files import searched_weights
from replknet_paddle.zoo.records import MODELS, PublishedModel

if TYPE_CHECKING:  # Paddle takes seconds, which `list_models` can do without
    from replknet_paddle.model import RepLKNet


def list_models(pattern: str = "*") -> list[str]:
    """Return the names of the published models.

    Args:
        pattern: shell pattern, such as '*384*', for the name or for mmpretrain's; case is ignored.
    """
    return [
        model.name
        for model in MODELS
        if any(fnmatch.fnmatch(name.lower(), pattern.lower()) for name in _names(model))
    ]


def get_model(
    name: str | os.PathLike[str] | CfgNode,
    *,
    pretrained: bool | str | os.PathLike[str] = False,
    num_classes: int | None = None,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
    drop_path_rate: float | None = None,
    weights: str = "auto",
    **overrides: Any,
) -> "RepLKNet":
    """Return a RepLKNet, with weights if asked for.

    Args:
        name: name of a published model, ours or mmpretrain's; a run folder, or a checkpoint file
            that carries its configuration; a YAML file; or a configuration from `get_config`.
        pretrained: False for fresh weights, or for those of a run folder or checkpoint; True for
            the published ones (downloaded on first use, from the cache afterwards); or a checkpoint
            file of any known format and layout.
        num_classes: size of the head. Where the weights have another one, the head stays freshly
            initialized, and a warning says so. 0 for no head: the network returns the features
            that are the head's input, (N, `num_features`).
        features_only: make a backbone without a head, which returns the maps of `out_indices`, or
            else of all four stages, as a tuple.
        out_indices: the stages, from 0 to 3, or the stage, of such a backbone.
        drop_path_rate: stochastic depth of the last block in training, in [0, 1).
        weights: 'model', 'model_ema' for the EMA weights of a training checkpoint, or 'auto' for
            those of the two that its run found better.
        overrides: keys of the configuration, as for `get_config`: `MODEL__DROPPATH=0.1`.

    Returns:
        A `RepLKNet` in evaluation mode; call `.train()` to train it. Its `feature_channels` and
        `feature_strides` describe the maps of `extract_feat`.

    Raises:
        FileNotFoundError: there is no such checkpoint file.
        InputError: no such model, wrong keys, or weights that are unavailable, cannot be read, or
            do not fit.
    """
    from replknet_paddle.model import build_replknet

    if features_only and out_indices is None:
        out_indices = (0, 1, 2, 3)
    given = {"NUM_CLASSES": num_classes, "OUT_INDICES": out_indices, "DROPPATH": drop_path_rate}
    overrides |= {f"MODEL__{key}": value for key, value in given.items() if value is not None}
    return open_network(
        name,
        pretrained=has_weights(name) if pretrained in (None, False) else pretrained,
        weights=weights,
        drop_head=num_classes is not None,
        build=build_replknet,
        **overrides,
    )


def open_network(
    source,
    *,
    pretrained: bool | str | os.PathLike = True,
    weights: str | None = None,
    drop_head: bool = False,
    build: Callable | None = None,
    **overrides: Any,
):
    """Return a network with its weights, in evaluation mode: what predicts, exports, merges, serves
    or measures opens one by this.

    It carries its configuration as `config`, and the names of its classes, where its checkpoint
    has them, as `class_names`.

    Args:
        source, overrides: as `name` and `overrides` of `get_model`.
        pretrained: True for the weights of `source` or, of a YAML file or configuration, those of
            its MODEL.PRETRAINED; False for fresh ones; or what `weights_file` takes.
        weights: as of `get_model`; None for MODEL.PRETRAINED_WEIGHTS.
        drop_head: a head of another size stays fresh.
        build: configuration -> network; None for classifiers alone.
    """
    # Here because they import Paddle.
    from replknet_paddle.checkpoints.checkpoint_file import CheckpointFile
    from replknet_paddle.checkpoints.load import load_pretrained
    from replknet_paddle.checkpoints.run_folder import config_of
    from replknet_paddle.model import build_replknet

    if not isinstance(pretrained, (bool, str, os.PathLike)):
        raise InputError(
            f"pretrained is {pretrained!r}; allowed: True, False, or the path of a checkpoint"
        )
    if not isinstance(source, (str, os.PathLike)):
        config = source
    elif has_weights(source):
        config = config_of(source)
    elif is_yaml(source):
        config = get_config(source)
    else:
        config = config_of_published(source)
    config = override(config, **overrides)
    # Of a segmentation network, `get_model` makes the backbone, for weights of a classifier.
    is_classifier = build is None or build is build_replknet and pretrained is True
    if is_classifier and config.MODEL.TYPE != "RepLKNet":
        raise InputError(
            f"{config.MODEL.NAME} is a segmentation network; `replknet segment predict` runs it"
        )
    if build is not build_replknet or config.MODEL.OUT_INDICES is None:
        check_class_count(config)
    if pretrained is True:
        has_own = isinstance(source, (str, os.PathLike)) and not is_yaml(source)
        pretrained = source if has_own else config.MODEL.PRETRAINED
        pretrained = False if pretrained == RANDOM else pretrained
    if pretrained is not False:
        path = weights_file(pretrained)
    model = (build or build_replknet)(config)
    model.class_names = None
    if pretrained is not False:
        file = CheckpointFile(path)
        weights = weights or config.MODEL.PRETRAINED_WEIGHTS
        load_pretrained(model, file, weights=weights, drop_head=drop_head)
        model.class_names = None if drop_head else file.classes.names_for(config)
    model.eval()
    return model


def weights_file(source: str | os.PathLike | None) -> str:
    """Return the checkpoint file of `source`: a published model, whose weights are downloaded where
    the cache has none; a run folder; or such a file."""
    from replknet_paddle.checkpoints.run_folder import checkpoint_path
    from replknet_paddle.zoo.download import fetch

    if source in (None, RANDOM):
        raise InputError(
            f"no weights: MODEL.PRETRAINED is {source}; name a checkpoint, a run folder, or one of "
            f"{', '.join(list_models())}"
        )
    if is_published(source):
        return os.fspath(fetch(find_record(str(source))))
    path = checkpoint_path(source)
    if not os.path.exists(path):
        raise FileNotFoundError(no_model(source))
    if os.path.isdir(path):
        raise InputError(
            f"{path} is a folder without a checkpoint; allowed: a run folder, a checkpoint file, "
            "or a published name (an export folder runs, but its weights cannot be loaded)"
        )
    return path


def config_of_published(name: str | os.PathLike):
    """Return the configuration of a published model."""
    return get_config(CONFIG_FOLDER / find_record(str(name)).config)


def has_weights(source) -> bool:
    """Return whether `source` is the path of a run folder or checkpoint file."""
    is_path = isinstance(source, (str, os.PathLike)) and os.path.exists(source)
    return is_path and not is_yaml(source) and not is_published(source)


def is_published(name) -> bool:
    """Return whether a model is published under this name, which goes before a file of it."""
    return _record(name) is not None


def find_record(name: str) -> PublishedModel:
    """Return the record of a published model, by its name or mmpretrain's; case is ignored."""
    record = _record(name)
    if record is None:
        raise InputError(
            f"{name} is not a published model; there are {', '.join(list_models())} "
            f"(and mmpretrain's names for the same){nearest(name)}"
        )
    return record


def no_model(source: str | os.PathLike) -> str:
    """Return the message on a model that is nowhere."""
    return (
        f"no model {searched_weights(source)}; allowed: a checkpoint file, a run folder, an export "
        f"folder, or one of {', '.join(list_models())}{nearest(source)}"
    )


def nearest(name: str | os.PathLike) -> str:
    """Return the end of a message about an unknown name: the published one that may be meant."""
    return did_you_mean(str(name), [known for model in MODELS for known in _names(model)])


def _record(name) -> PublishedModel | None:
    wanted = str(name).lower()
    return next((m for m in MODELS if wanted in map(str.lower, _names(m))), None)


def _names(model: PublishedModel) -> list[str]:
    return [model.name, model.alias] if model.alias else [model.name]
