"""The merged form of a checkpoint, written as a checkpoint."""

import os

from replknet_paddle.checkpoints.checkpoint_file import weights_metadata
from replknet_paddle.checkpoints.files import write_safetensors
from replknet_paddle.config import override
from replknet_paddle.deploy.backends import load_network
from replknet_paddle.deploy.fold import Form, compare_forms, random_images
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.files import check_file_target

# Two images of at most this size tell: convolutions do not depend on it.
CHECKED_PIXELS = 224


def merge_checkpoint(config, source: str, target: str) -> list[Form]:
    """Write the merged form of the weights in `source` to the safetensors file `target`.

    Returns:
        The forms of the network, compared on random images.

    Raises:
        InputError: `target` is another kind of file, a folder, or the source itself.
        FileNotFoundError: there is no folder to write it into.
    """
    check_file_target(target, [".safetensors"])
    if os.path.exists(target) and os.path.samefile(source, target):
        raise InputError(f"{target} is the checkpoint to merge; name another file")
    model, config = load_network(source, config)
    size = min(config.DATA.IMAGE_SIZE, CHECKED_PIXELS)
    images = random_images(2, size)
    forms = compare_forms(model, images)
    model.structural_reparam()
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    config = override(config, MODEL__SMALL_KERNEL_MERGED=True)
    write_safetensors(target, state, weights_metadata(config, model.class_names))
    return forms
