"""Robustness benchmarks, each evaluated as its authors define it: see docs/robustness.md."""

import os
import re
from array import array
from collections import Counter
from collections.abc import Callable

import numpy as np
import paddle
from paddle.nn import functional as F

from replknet_paddle.config import CONFIG_FOLDER, override
from replknet_paddle.data.dataset import ListDataset
from replknet_paddle.data.make_lists import class_folders
from replknet_paddle.data.transforms import build_eval_transform
from replknet_paddle.engine.evaluate import label_ranks
from replknet_paddle.engine.task import ClassificationTask
from replknet_paddle.runtime.errors import InputError, did_you_mean
from replknet_paddle.runtime.processes import sum_over_ranks

CLASSES = 1000  # of the network
MASKED = -1e30  # logit of a class that is masked: its probability is 0 at any temperature
MARKS = {"imagenet-a": "a", "imagenet-r": "r"}  # of their classes in imagenet1k_synsets.txt
PROTOCOLS = ("imagenet-v2", "imagenet-sketch", *MARKS, "imagenet-c", "cue-conflict")


def read_words(name: str) -> list[list[str]]:
    """Return the words of each line of a file in configs/, without its comments."""
    lines = (CONFIG_FOLDER / name).read_text(encoding="ascii").splitlines()
    return [line.split() for line in lines if not line.startswith("#")]


# AlexNet's top-1 error, in [0, 1], for each of the 15 corruptions of ImageNet-C; its folders.
ALEXNET_ERRORS = {name: float(x) for name, x in read_words("imagenet_c_alexnet_errors.txt")}
CORRUPTED = [f"{name}/{severity}" for name in ALEXNET_ERRORS for severity in range(1, 6)]


def folders_of(protocol: str) -> dict[str, list[int]]:
    """Return the names of a benchmark's class folders and the classes of the network that each
    stands for: one, or for cue-conflict those of a category, in alphabetical order."""
    if protocol == "imagenet-v2":  # numbers, whose order as text is another
        return {str(number): [number] for number in range(CLASSES)}
    folders: dict[str, list[int]] = {}
    for number, (synset, *marks) in enumerate(read_words("imagenet1k_synsets.txt")):
        if protocol == "cue-conflict":
            for category in set(marks) - set(MARKS.values()):
                folders.setdefault(category, []).append(number)
        elif MARKS.get(protocol) in (None, *marks):
            folders[synset] = [number]
    return dict(sorted(folders.items()))


class FolderDataset(ListDataset):
    """The pictures in the folders of a benchmark's classes, below `root`.

    `labels` are classes of the network, or the places of shapes among cue-conflict's categories.
    The sums get `codes`, label + CLASSES * other, where `other` counts ImageNet-C's corruptions and
    severities, or is the category of a texture. FileNotFoundError, InputError: other folders.
    """

    def __init__(self, protocol: str, root: str, transform: Callable, *, allow_outside: bool):
        paddle.io.Dataset.__init__(self)
        self.list_file = self.root = root
        self.transform, self.allow_outside = transform, allow_outside
        self.seed, self.failures = 0, []
        is_cue, parts = protocol == "cue-conflict", CORRUPTED if protocol == "imagenet-c" else [""]
        folders = folders_of(protocol)
        labels = {name: i if is_cue else folders[name][0] for i, name in enumerate(folders)}
        paths, ends, codes = bytearray(), array("q"), array("q")
        for place, part in enumerate(parts):
            found = class_folders(root, part, Counter())
            missing = [name for name in labels if not found.get(name)]
            unknown = [name for name in found if name not in labels]
            if missing or unknown:
                raise InputError(
                    f"{os.path.join(root, part)}: not {protocol} (docs/robustness.md), "
                    f"{len(missing)} of {len(labels)} folders are missing or without a picture "
                    f"{missing[:3]}, {len(unknown)} are unknown {unknown[:3]}"
                )
            for name, pictures in found.items():
                for path in pictures:
                    other = labels[texture(root, name, path, labels)] if is_cue else place
                    if not is_cue or other != labels[name]:  # else there is no conflict
                        paths += os.fsencode(path)
                        ends.append(len(paths))
                        codes.append(labels[name] + CLASSES * other)
        self._paths, self._ends, self.codes = paths, np.array(ends), np.array(codes)
        self._labels = self.codes % CLASSES

    def where(self, index: int) -> str:
        return self.root

    def read_sample(self, epoch: int, index: int):
        return self.read(epoch, index, self.transform.raw), self.codes[index]


def texture(root: str, shape: str, path: str, categories) -> str:
    """Return the category of a cue-conflict picture's texture, by its name: cat/cat7-bear1.png."""
    match = re.fullmatch(rf"{shape}/{shape}\d+-([a-z]+)\d+\.\w+", path)
    if not match or match[1] not in categories:
        raise InputError(
            f"{os.path.join(root, path)}: not of cue-conflict; allowed: {shape}1-TEXTURE1.png"
            f" with any numbers, TEXTURE one of {', '.join(categories)}"
        )
    return match[1]


class ProtocolTask(ClassificationTask):
    """Evaluates a classifier by a protocol. InputError: there is none of that name, or the network
    of `config` has other classes than ImageNet-1K's."""

    def __init__(self, name: str, config, *, flip: bool = False):
        super().__init__(flip=flip)
        if name not in PROTOCOLS:
            near = did_you_mean(name, PROTOCOLS)
            raise InputError(f"-protocol {name}; allowed: {', '.join(PROTOCOLS)}{near}")
        kind, count = config.MODEL.TYPE, config.MODEL.NUM_CLASSES
        if kind != "RepLKNet" or count != CLASSES:
            raise InputError(
                f"-protocol {name} with MODEL.TYPE {kind} and MODEL.NUM_CLASSES {count}; allowed: "
                "RepLKNet and 1000, ImageNet-1K's (a head of ImageNet-22K's classes has others)"
            )
        self.name, self.prefix = name, name.replace("-", "_")
        self.figures = {"imagenet-c": corruption_figures, "cue-conflict": cue_figures}.get(name)

    def dataset(self, config, is_train: bool) -> FolderDataset:
        """Return the pictures as in validation, or whole where they were made of 224 pixels."""
        if self.figures:
            config = override(config, DATA__CROP_PCT=1.0)
        data, transform = config.DATA, build_eval_transform(config)
        return FolderDataset(self.name, data.DATA_PATH, transform, allow_outside=data.ALLOW_OUTSIDE)

    def inference(self, config, model: Callable) -> Callable:
        """Return the function from images to logits, the lowest ones for classes that the benchmark
        has not, or to the mean probability of each category of cue-conflict."""
        folders = folders_of(self.name)
        weights = np.zeros((CLASSES, len(folders)))
        for place, classes in enumerate(folders.values()):
            weights[classes, place] = 1 / len(classes)
        if self.name == "cue-conflict":
            means, infer = paddle.to_tensor(weights), super().inference(config, model)
            return lambda images: F.softmax(infer(images).astype("float64")) @ means
        is_kept, nothing = paddle.to_tensor(weights.any(axis=1)), paddle.full([1], MASKED)

        def masked(images: paddle.Tensor) -> paddle.Tensor:
            return paddle.where(is_kept, model(images).astype("float32"), nothing)

        return super().inference(config, masked)

    def metric_sums(self, config, loader=None):
        """Return empty sums: for the protocol's own figures, or those of any classifier."""
        return FigureSums(self.figures) if self.figures else super().metric_sums(config, loader)


class FigureSums:
    """Sums over the batches of one process; `total` adds up the processes. The row `other` of
    `counts` has the images, those decided for the label, and those for `other`."""

    def __init__(self, figures: Callable[[np.ndarray], dict[str, float]]):
        self.figures = figures
        self.counts = np.zeros((len(CORRUPTED), 3))

    def add(self, scores: paddle.Tensor, codes: paddle.Tensor) -> None:
        """Count a batch: scores (N, classes), codes (N,) of a `FolderDataset`."""
        labels, other = codes % CLASSES, codes // CLASSES
        decided = [label_ranks(scores, numbers).numpy() < 1 for numbers in (labels, other)]
        np.add.at(self.counts, other.numpy(), np.stack([np.ones(len(codes)), *decided], axis=1))

    def total(self) -> "FigureSums":
        """Return the sums over all processes, with what an evaluation is asked for."""
        self.counts = sum_over_ranks(self.counts)
        self.images = int(self.counts[:, 0].sum())
        return self

    def record(self, prefix: str) -> dict[str, float]:
        """Return the figures for metrics.jsonl; each key begins with `prefix`."""
        return {f"{prefix}_{name}": value for name, value in self.figures(self.counts).items()}

    def __str__(self) -> str:
        return "\n".join(f"{name} {x:.6g}" for name, x in self.figures(self.counts).items())


def corruption_figures(counts: np.ndarray) -> dict[str, float]:
    """Return mean corruption error, top-1, and the corruption errors CE: that summed over the
    severities by AlexNet's. Source: arXiv 1903.12261, section 4."""
    top1 = (counts[:, 1] / counts[:, 0]).reshape(len(ALEXNET_ERRORS), -1).mean(axis=1)
    errors = {name: 100 * (1 - t) / e for t, (name, e) in zip(top1, ALEXNET_ERRORS.items())}
    means = {"mce_percent": np.mean([*errors.values()]), "top1_percent": 100 * np.mean(top1)}
    return means | {f"{name}_ce_percent": error for name, error in errors.items()}


def cue_figures(counts: np.ndarray) -> dict[str, float]:
    """Return the share of shape among the decisions for shape or texture, NaN where there is none,
    and how many of all images are decided for either. Source: README of texture-vs-shape."""
    images, shape, texture = counts.sum(axis=0)
    return {
        "shape_bias": shape / (shape + texture) if shape + texture else np.nan,
        "shape_percent": 100 * shape / images,
        "texture_percent": 100 * texture / images,
    }
