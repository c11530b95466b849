"""What the page says about its model: its name, what it was trained on, its classes, examples."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from replknet_paddle.data.dataset import get_dataset
from replknet_paddle.data.lists import resolve
from replknet_paddle.deploy.predictor import Predictor
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.zoo import find_record

EXAMPLES = 6


@dataclass(frozen=True)
class Example:
    """A validation image and the name of its class."""

    path: str
    class_name: str


@dataclass(frozen=True)
class PageFacts:
    """What there is to say of a model.

    Attributes:
        name: of the model.
        trained_on: a sentence, or two.
        class_names: in their order.
        examples: images of the validation list; none where there is no list here.
    """

    name: str
    trained_on: str
    class_names: Sequence[str]
    examples: Sequence[Example] = ()


def page_facts(model: str, predictor: Predictor, network) -> PageFacts:
    """What is known of an open model.

    Args:
        model: as the user named it: a path, or the name of a published model.
        predictor: of the model.
        network: the same as `replknet.RepLKNet`; None for an export.
    """
    info = predictor.backend.info
    architecture, side = info.config.MODEL.NAME, info.config.DATA.IMAGE_SIZE
    inputs = f"It sees {side} x {side} pixels and tells {predictor.num_classes:,} classes apart."
    names = predictor.class_names
    if network is None:
        digest = info.source_sha256
        source = f"a checkpoint with SHA-256 {digest[:16]}..." if digest else "a network in memory"
        return PageFacts(f"{architecture} ({model})", f"Exported from {source}. {inputs}", names)
    if not os.path.exists(model):
        record = find_record(model)
        before = f"{record.pretrained_on}, then " if record.pretrained_on else ""
        data = "ImageNet-1K" if record.num_classes == 1000 else "ImageNet-22K"
        return PageFacts(record.name, f"Trained on {before}{data}. {inputs}", names)
    trained_on = f"Trained on the images of {network.config.DATA.DATA_PATH}. {inputs}"
    return PageFacts(
        f"{architecture} ({model})",
        trained_on,
        names,
        validation_examples(network.config, names, EXAMPLES),
    )


def validation_examples(config, class_names: Sequence[str], count: int) -> list[Example]:
    """At most `count` images of the validation list, evenly spread over it."""
    try:
        dataset = get_dataset(config, is_train=False)
    except (InputError, OSError):  # a model is shown without its data
        return []
    examples = []
    for index in np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int):
        path = dataset.path(int(index))
        try:
            full = resolve(dataset.root, path, allow_outside=dataset.allow_outside)
        except InputError:
            continue
        if os.path.isfile(full):
            examples.append(Example(full, class_names[dataset.labels[index]]))
    return examples
