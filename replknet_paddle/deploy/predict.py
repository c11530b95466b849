"""From a picture to classes and their probabilities: mmpretrain's `inference_model`, streams of
files, and files of results.

Pictures are preprocessed as in evaluation, bit for bit, by the pipeline that the model names.
"""

import contextlib
import csv
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypedDict, TypeVar, overload

import numpy as np
from numpy.typing import NDArray
from paddle import nn
from PIL import Image
from yacs.config import CfgNode

from replknet_paddle.data.transforms import build_eval_transform
from replknet_paddle.data.transforms.image import to_rgb
from replknet_paddle.deploy.backends import Backend, open_backend
from replknet_paddle.deploy.gradcam import grad_cam, heat_over, last_features
from replknet_paddle.deploy.images import Found, Frame, decode
from replknet_paddle.model import RepLKNet
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.files import atomic_file, check_file_target, json_text

BATCH_SIZE = 8  # of a list of images; larger ones gain nothing on a CPU
MAX_DECODERS = 8  # threads
RESULTS_SUFFIXES = (".jsonl", ".csv")

Openable = str | os.PathLike[str] | nn.Layer | Backend
Picture = str | os.PathLike[str] | NDArray[np.uint8] | Image.Image
EachPicture = TypeVar("EachPicture", bound=Picture)


@dataclass(frozen=True)
class Prediction:
    """The network's answer for one file, or why there is none.

    Attributes:
        path: the file; or a folder that could not be listed.
        labels: the most probable classes, the first one first.
        scores: their probabilities.
        picture: the picture, RGB, reduced to fit the size that was asked for, if one was.
        heat: this picture with the heat map of the first class over it, if one was asked for.
        problem: why there is no prediction; None where there is one.
        truth: the class that a list gives; else the one that the file's folder is named as, where
            the model brings class names.
        features: what a network without a head gives, (num_features,), in place of classes.
        rejected: whether the first score is too low; None where that was not asked.
    """

    path: str
    labels: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    picture: Image.Image | None = None
    heat: Image.Image | None = None
    problem: str | None = None
    truth: int | None = None
    features: NDArray[np.float32] | None = None
    rejected: bool | None = None

    @property
    def is_right(self) -> bool | None:
        """Return whether the most probable class is the true one; None where it is not known."""
        return None if self.truth is None or not self.labels else self.labels[0] == self.truth


class Classification(TypedDict):
    """What `inference_model` returns for an image."""

    pred_scores: NDArray[np.float32]  # the probabilities of all classes (num_classes,)
    pred_label: int  # the number of the most probable one
    pred_score: float  # its probability
    pred_class: str  # its name, or its number as text where the model brings no names


class Predictor:
    """An open model with what goes before and after it.

    Args:
        model: an export folder, a run folder, a checkpoint in one, or the name of a published
            model; a network of `build_replknet(config)` or `zoo.get_model`; or an open
            `Backend`.
        backend: the name of one, or `auto` for the fastest that is installed.
        config: of a checkpoint, instead of that of its run folder.
        batch_size: images that the network will get at once, for `auto` to measure with.
        has_head: whether the network must give classes, or features instead.
        flip: give the mean of the probabilities of each picture and of its mirror image.

    Attributes:
        backend: the open one.
        class_names: text for each class; their numbers where the model brings no names.
        labels_by_name: the class of each name that the model brings, if only one has it.

    Raises:
        FileNotFoundError: there is no such model.
        InputError: it cannot be opened.
    """

    def __init__(
        self,
        model: Openable,
        *,
        backend: str = "auto",
        config: CfgNode | None = None,
        batch_size: int = 1,
        has_head: bool = True,
        flip: bool = False,
    ) -> None:
        self.flip = flip
        if isinstance(model, Backend):
            self.backend = model
        else:
            self.backend = open_backend(model, backend, config=config, batch_size=batch_size)
        info = self.backend.info
        if info.config.MODEL.TYPE != "RepLKNet":
            raise InputError(
                f"{model} is a segmentation network; `replknet segment predict` runs it"
            )
        self.transform = build_eval_transform(info.config)
        self.num_classes: int = info.config.MODEL.NUM_CLASSES
        if self.num_classes and not has_head:
            raise InputError(
                f"{model} has a head and gives no features; its checkpoint does, and so does an "
                "export of that by replknet export -opts MODEL.NUM_CLASSES 0"
            )
        if self.num_classes == 0 and has_head:
            raise InputError(
                "a network without a head (MODEL.NUM_CLASSES is 0) gives features, not classes; "
                "open_backend(model).run(images) returns them"
            )
        names = info.class_names or map(str, range(self.num_classes))
        # JSON has text that no file can hold: halves of letters.
        self.class_names = [name.encode("utf-8", "replace").decode() for name in names]
        counts = Counter(info.class_names or ())
        self.labels_by_name = {
            name: label for label, name in enumerate(info.class_names or ()) if counts[name] == 1
        }

    def preprocess(self, image: Picture) -> NDArray[np.float32]:
        """Return an image of any kind as the network's input, float32 (3, size, size); InputError:
        it cannot be decoded or preprocessed."""
        return self.transform(decode(image))

    def scores(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the probabilities (N, num_classes), float32, of preprocessed images (N, 3, H, W);
        InputError: the network's outputs are not finite."""
        views = [images, images[..., ::-1]] if self.flip else [images]
        return np.mean([probabilities(self.backend.run(x), self.backend) for x in views], axis=0)

    def scores_and_heat(self, images: NDArray[np.float32]) -> tuple[np.ndarray, np.ndarray]:
        """Return what `scores` returns, and the maps of `grad_cam`, (N, H / 32, W / 32), of each
        image's most probable class; on the backend `eager` alone."""
        network = self.backend.network
        with last_features(network) as features:
            scores = self.scores(images)
        return scores, grad_cam(network, features[0], scores.argmax(axis=1))


def probabilities(logits: np.ndarray, backend: Backend) -> np.ndarray:
    """Return the `softmax`, at MODEL.TEMPERATURE, of logits of `backend`, if they are finite."""
    if not np.isfinite(logits).all():
        raise InputError(
            f"the network's outputs on {backend.name} are not finite numbers: its weights are "
            "broken, or too large for its precision"
        )
    return softmax(logits / backend.info.config.MODEL.TEMPERATURE)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return the probabilities (N, classes) of logits (N, classes), float32."""
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True), dtype=np.float32)
    return exponentials / exponentials.sum(axis=1, keepdims=True)


@overload
def inference_model(model: Openable | Predictor, image: Picture) -> Classification: ...
@overload
def inference_model(
    model: Openable | Predictor, image: list[EachPicture] | tuple[EachPicture, ...]
) -> list[Classification]: ...
def inference_model(
    model: Openable | Predictor, image: Picture | list[EachPicture] | tuple[EachPicture, ...]
) -> Classification | list[Classification]:
    """Classify an image, or a list of them: mmpretrain's function of this name.

    Args:
        model: a `Predictor`, or what it takes. A network runs in Paddle's eager mode; it keeps its
            mode and its numbers, and from then on computes by the compiled operators where
            MODEL.CONV_IMPL says so. What is given by its path or name is opened in each call, so
            make a `Predictor` of it for several.
        image: a path, an array (H, W, 3) uint8 in RGB, a Pillow image, or a list of these.

    Returns:
        A dict with the keys of `Classification`, or for a list a list of them.

    Raises:
        FileNotFoundError, InputError: the model cannot be opened, or an image cannot be decoded.
    """
    if isinstance(model, RepLKNet):
        # Exporting it for a faster backend would take longer than most lists of images.
        predictor = Predictor(model, backend="eager")
    else:
        predictor = model if isinstance(model, Predictor) else Predictor(model)
    several = isinstance(image, (list, tuple))
    images = image if several else [image]
    results: list[Classification] = []
    for start in range(0, len(images), BATCH_SIZE):
        arrays = []
        for i, one in enumerate(images[start : start + BATCH_SIZE], start):
            try:
                arrays.append(predictor.preprocess(one))
            except InputError as error:
                raise InputError(f"cannot read image {_name(one, i)}: {error}") from None
        for scores in predictor.scores(np.stack(arrays)):
            label = int(scores.argmax())
            results.append(
                {
                    "pred_scores": scores,
                    "pred_label": label,
                    "pred_score": float(scores[label]),
                    "pred_class": predictor.class_names[label],
                }
            )
    return results if several else results[0]


def _name(image, position: int) -> str:
    """Return the name of an image in a message."""
    return str(image) if isinstance(image, (str, os.PathLike)) else f"{position} (from 0)"


def predict_files(
    predictor: Predictor,
    files: Iterable[Found],
    *,
    topk: int,
    batch_size: int = BATCH_SIZE,
    picture_pixels: int = 0,
    heat_maps: bool = False,
    reject: float | None = None,
) -> Iterator[Prediction]:
    """Yield a `Prediction` of the first `topk` classes, or of features, for each of any number of
    `ImageFiles`, in their order and in constant memory, with a `problem` for what cannot be read.

    Threads decode the next files (Pillow lets go of Python's lock) while the network runs. Pictures
    are kept with sides of at most `picture_pixels`, 0 for none; `heat_maps` over them need `eager`.
    Those whose first score is below `reject` are rejected.
    """

    def read(file: Found):
        path, problem, *label = (file.path, None) if isinstance(file, Frame) else file
        truth = label[0] if label else None
        if problem is not None:
            return Prediction(path, problem=problem, truth=truth), None
        if not label:
            truth = predictor.labels_by_name.get(os.path.basename(os.path.dirname(path)))
        try:
            image = decode(file.pixels if isinstance(file, Frame) else path)
            array = predictor.transform(image)
            picture = _reduced(image, picture_pixels) if picture_pixels else None
        except (InputError, MemoryError) as error:
            return Prediction(path, problem=str(error) or "out of memory", truth=truth), None
        return Prediction(path, picture=picture, truth=truth), array

    def results(batch: list) -> Iterator[Prediction]:
        arrays = [array for _, array in batch if array is not None]
        outputs, maps = (), ()
        if arrays and heat_maps:
            outputs, maps = predictor.scores_and_heat(np.stack(arrays))
        elif arrays:
            run = predictor.scores if predictor.num_classes else predictor.backend.run
            outputs = run(np.stack(arrays))
        outputs, maps = iter(outputs), iter(maps)
        for prediction, array in batch:
            if array is None:
                yield prediction
                continue
            of_image, heat = next(outputs), None
            if predictor.num_classes == 0:
                yield replace(prediction, features=of_image)
                continue
            if heat_maps:
                heat = heat_over(prediction.picture, next(maps), predictor.transform)
            labels = np.argsort(-of_image, kind="stable")[:topk]
            yield replace(
                prediction,
                labels=tuple(int(label) for label in labels),
                scores=tuple(float(of_image[label]) for label in labels),
                heat=heat,
                rejected=None if reject is None else bool(of_image.max() < np.float32(reject)),
            )

    threads = min(os.cpu_count() or 1, MAX_DECODERS)
    at_once = batch_size * -(-threads // batch_size)  # whole batches that occupy all threads
    files = iter(files)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    try:
        ahead = pool.map(read, islice(files, at_once))
        while decoded := list(ahead):
            ahead = pool.map(read, islice(files, at_once))
            for start in range(0, len(decoded), batch_size):
                yield from results(decoded[start : start + batch_size])
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _reduced(image: Image.Image, pixels: int) -> Image.Image:
    """Return a copy of `image`, RGB, whose sides are at most `pixels` long."""
    image = to_rgb(image)
    scale = min(1, pixels / max(image.size))
    size = tuple(max(1, round(side * scale)) for side in image.size)
    return image.resize(size, Image.Resampling.BICUBIC)


@contextlib.contextmanager
def results_file(
    path: str, class_names: Sequence[str], topk: int, *, rejects: bool = False
) -> Iterator[Callable[[Prediction], None]]:
    """Open a file of predictions, and yield the function that writes one of them.

    Lines of JSON are objects: path, pred_label, pred_class, pred_score, and topk, a list of objects
    with label, class and score; or path and problem; and where the true class is known, true_label
    and true_class. CSV has a row a file: path, label_1, class_1, score_1, and so on to the k-th;
    true_label, true_class and problem. Where it `rejects`, both have `rejected` as well, true or
    false. Scores have 6 significant digits, as many as float32 is good for.

    The file gets the name `path` when the block is left. If an exception leaves the block, `path`
    stays as it was, and what was written until then is in `path`.unfinished; not so if nothing was,
    or if the exception is an InputError.
    """
    check_file_target(path, RESULTS_SUFFIXES)
    started = 0

    def is_worth_keeping(error: BaseException) -> bool:
        return os.path.getsize(partial) > started and not isinstance(error, InputError)

    def write_json(prediction: Prediction) -> None:
        record = {"path": prediction.path}
        if prediction.problem is not None:
            record["problem"] = prediction.problem
        else:
            classes = [
                {"label": label, "class": class_names[label], "score": rounded(score)}
                for label, score in zip(prediction.labels, prediction.scores)
            ]
            record |= {f"pred_{key}": value for key, value in classes[0].items()}
            record["topk"] = classes
            record |= {"rejected": prediction.rejected} if rejects else {}
        if prediction.truth is not None:
            truth = prediction.truth
            record |= {"true_label": truth, "true_class": class_names[truth]}
        file.write(json_text(record) + "\n")

    def write_row(prediction: Prediction) -> None:
        values = [""] * (3 * topk)
        if prediction.problem is None:
            values = [
                value
                for label, score in zip(prediction.labels, prediction.scores)
                for value in (label, class_names[label], rounded(score))
            ]
        truth = prediction.truth
        rest = ["", ""] if truth is None else [truth, class_names[truth]]
        # Python's csv quotes a carriage return only where lines end in one.
        rows = quoted if "\r" in prediction.path else plain
        if rejects:
            rest.append("" if prediction.rejected is None else str(prediction.rejected).lower())
        rows.writerow([prediction.path, *values, *rest, prediction.problem or ""])

    def rounded(score: float) -> float:
        return float(f"{score:.6g}")

    # Names of files are bytes: CSV has those that are not UTF-8 as they are, JSON has them escaped.
    with atomic_file(
        path, keep_partial=is_worth_keeping, errors="surrogateescape", newline=""
    ) as file:
        partial = file.name
        if path.lower().endswith(".csv"):
            plain = csv.writer(file, lineterminator="\n")
            quoted = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
            columns = [f"{w}_{i}" for i in range(1, topk + 1) for w in ("label", "class", "score")]
            columns += ["true_label", "true_class", *(["rejected"] if rejects else [])]
            plain.writerow(["path", *columns, "problem"])
            started = file.tell()
            yield write_row
        else:
            yield write_json
