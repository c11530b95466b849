"""Entries for `paddle.hub`: the published models, each by the name of its file in configs/.

    import paddle

    paddle.hub.list("FOLDER", source="local")
    model = paddle.hub.load("FOLDER", "replknet_31b", source="local", pretrained=True)

FOLDER is a clone of this project.
"""

from pathlib import Path as _Path

# At import, because `paddle.hub` takes this folder off `sys.path` before it calls an entry.
from replknet_paddle.zoo import get_model as _get_model
from replknet_paddle.zoo.records import MODELS as _MODELS

dependencies = ["numpy", "PIL", "tqdm", "yacs", "yaml"]


def _entry(record):
    """The function that builds a published model."""

    def entry(pretrained=False, **options):
        return _get_model(record.name, pretrained=pretrained, **options)

    entry.__name__ = _Path(record.config).stem
    entry.__doc__ = f"""{record.name}: {record.num_classes} classes, {record.image_size} pixels.

    Args:
        pretrained: False for random weights; True for the published ones, downloaded once; or the
            path of a checkpoint in any layout that the project reads.
        options: further ones of `replknet_paddle.get_model`, such as num_classes or out_indices.

    Returns:
        The network in evaluation mode.
    """
    return entry


globals().update({entry.__name__: entry for entry in map(_entry, _MODELS)})
