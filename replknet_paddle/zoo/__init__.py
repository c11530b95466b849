"""The published RepLKNet models.

from replknet_paddle.zoo import get_model, list_models

list_models('*384*')
model = get_model('replknet-31b-1k-224', pretrained=True)  # downloaded once, then cached
model = get_model('replknet-31B_3rdparty_in1k', pretrained='my_weights.pth')
"""

import fnmatch
import os
from pathlib import Path

from replknet_paddle.runtime.errors import InputError
from replknet_paddle.zoo.records import MODELS, PublishedModel


def list_models(pattern: str = "*") -> list[str]:
    """Names of the published models.

    Args:
        pattern: shell pattern, such as '*384*', for the name or for mmpretrain's; case is ignored.
    """
    return [
        model.name
        for model in MODELS
        if any(fnmatch.fnmatch(name.lower(), pattern.lower()) for name in _names(model))
    ]


def get_model(name, pretrained: bool | str | os.PathLike = False, *, weights: str = "model"):
    """Build a RepLKNet, with weights if asked for.

    Args:
        name: name of a published model, ours or mmpretrain's; or a YAML file; or a configuration
            from `config.get_config`.
        pretrained: False for fresh weights, True for the published ones (downloaded on first use,
            from the cache afterwards), or a checkpoint file of any known format and layout.
        weights: 'model', or 'model_ema' for the moving average in a training checkpoint.

    Returns:
        A `replknet.RepLKNet` in evaluation mode; call `.train()` to train it.

    Raises:
        FileNotFoundError: there is no such checkpoint file.
        InputError: no such model, or weights that cannot be had, read, or fitted to it.
    """
    # Here because they import Paddle, which takes seconds that `list_models` can do without.
    from replknet_paddle.checkpoints.convert import load_pretrained
    from replknet_paddle.config import CONFIG_FOLDER, get_config
    from replknet_paddle.model import build_replknet
    from replknet_paddle.zoo.download import fetch

    record = None
    if not isinstance(name, (str, os.PathLike)):
        config = name
    elif Path(name).suffix in (".yaml", ".yml"):
        config = get_config(str(name))
    else:
        record = find_record(str(name))
        config = get_config(CONFIG_FOLDER / record.config)
    if pretrained is True:
        if record is None:
            raise InputError(
                "pretrained=True is for the published models, by name; give the "
                f"checkpoint file instead. Published: {', '.join(list_models())}"
            )
        pretrained = fetch(record)
    model = build_replknet(config)
    if pretrained is not False and pretrained is not None:
        load_pretrained(model, pretrained, weights=weights)
    model.eval()
    return model


def find_record(name: str) -> PublishedModel:
    """The record of a published model, by its name or mmpretrain's; case is ignored.

    Raises:
        InputError: there is none.
    """
    for model in MODELS:
        if name.lower() in (known.lower() for known in _names(model)):
            return model
    raise InputError(
        f"{name} is not a published model; there are {', '.join(list_models())} "
        "(and mmpretrain's names for the same)"
    )


def _names(model: PublishedModel) -> list[str]:
    return [model.name, model.alias] if model.alias else [model.name]
