"""The file beside an exported model that says what it is: replknet.json.

It holds all that predicting needs and the model file does not: how images become the network's
input, what the classes are called, and which checkpoint the weights are from.
"""

import json
import math
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from replknet_paddle.data.transforms.pipelines import EvalTransform
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.files import file_sha256, write_text

FILE = "replknet.json"
FORMAT_VERSION = 1
FORMATS = ("paddle", "onnx")
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
AGAIN = "export it again, or copy the whole folder again"
INTERPOLATION = "bicubic"  # with antialiasing: the one that all published accuracies are for

# A sidecar with 21,841 class names takes half a megabyte.
MAX_BYTES = 1 << 26


@dataclass(frozen=True)
class Preprocessing:
    """From a picture to the network's input, as `transforms.evaluation` does it.

    Attributes:
        image_size: side of the network's input, pixels.
        crop_pct: in mode `short_crop`, crop size over resized short side.
        mode: `short_crop` or `warp`.
        mean, std: per RGB channel, in units of the [0, 1] scale.
        native_pixels: resize in compiled code, where there is a compiler; the bits are the same.
    """

    image_size: int
    crop_pct: float
    mode: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = INTERPOLATION
    native_pixels: bool = True


@dataclass(frozen=True)
class Sidecar:
    """What an exported model is.

    Attributes:
        architecture: MODEL.NAME of the configuration.
        format: of the model file, `paddle` or `onnx`.
        precision: `fp32`, `fp16`, `bf16` or `int8`.
        input_size: the only (height, width) that the model file takes; None for any.
        num_classes: length of the logits.
        segmentation: keys and values of the configuration's SEGMENTATION that inference needs, in
            lower case; None for a classifier.
        class_names: one per class, or None.
        source_sha256: of the checkpoint file; None for weights that came from no file.
        paddle_version: that wrote the export.
        files: SHA-256 of each other file of the export, by its name.
    """

    architecture: str
    format: str
    precision: str
    input_size: tuple[int, int] | None
    preprocessing: Preprocessing
    num_classes: int
    class_names: tuple[str, ...] | None = None
    segmentation: dict | None = None
    source_sha256: str | None = None
    paddle_version: str | None = None
    files: dict[str, str] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        config,
        *,
        format: str,
        precision: str = "fp32",
        fixed_size: bool = False,
        class_names: list[str] | None = None,
        source_sha256: str | None = None,
        paddle_version: str | None = None,
    ) -> "Sidecar":
        """That of the network which `config` describes.

        Args:
            fixed_size: the model file takes images of the preprocessing's size alone.

        Raises:
            InputError: not one class name for each class.
        """
        data = config.DATA
        sidecar = cls(
            architecture=config.MODEL.NAME,
            format=format,
            precision=precision,
            input_size=(data.IMAGE_SIZE, data.IMAGE_SIZE) if fixed_size else None,
            preprocessing=Preprocessing(
                image_size=data.IMAGE_SIZE,
                crop_pct=data.CROP_PCT,
                mode=data.RESIZE_MODE,
                mean=tuple(data.IMAGENET_MEAN),
                std=tuple(data.IMAGENET_STD),
            ),
            num_classes=config.MODEL.NUM_CLASSES,
            class_names=None if class_names is None else tuple(class_names),
            segmentation=segmentation_settings(config),
            source_sha256=source_sha256,
            paddle_version=paddle_version,
        )
        if class_names is not None and len(class_names) != sidecar.num_classes:
            raise InputError(
                f"{len(class_names)} class names for {sidecar.num_classes} classes "
                "(MODEL.NUM_CLASSES); allowed: one for each class, in their order"
            )
        return sidecar

    @classmethod
    def read(cls, folder: str | os.PathLike) -> "Sidecar":
        """That of an export folder.

        Raises:
            FileNotFoundError: no such folder.
            InputError: no sidecar there, or one that cannot be right.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            if not Path(folder).exists():
                raise FileNotFoundError(f"no export folder {folder}")
            raise InputError(
                f"{folder} is not an exported model: it has no {FILE}; "
                "replknet export writes one beside the model"
            )
        try:
            if path.stat().st_size > MAX_BYTES:
                raise ValueError(f"{path.stat().st_size} bytes, allowed: {MAX_BYTES}")
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} is not valid JSON: {error}; export the model again") from None
        if not isinstance(content, dict):
            raise InputError(f"{path} holds a {type(content).__name__}; allowed: an object")
        version = content.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise InputError(
                f"{path} has format_version {version!r}; this program reads {FORMAT_VERSION}. "
                "Export the model again, or use the program that wrote it"
            )
        content.setdefault("segmentation", None)  # version 0.1 wrote none
        if isinstance(content.get("preprocessing"), dict):  # exports of 0.1 do not have it
            content["preprocessing"].setdefault("native_pixels", True)
        problems = list(_problems(content))
        if problems:
            lines = "\n".join(f"{path}: {problem}" for problem in problems)
            raise InputError(f"{lines}\nExport the model again")
        preprocessing = dict(content["preprocessing"])
        for key in ("mean", "std"):
            preprocessing[key] = tuple(float(value) for value in preprocessing[key])
        for key in ("input_size", "class_names"):
            content[key] = None if content[key] is None else tuple(content[key])
        return cls(**{**content, "preprocessing": Preprocessing(**preprocessing)})

    def write(self, folder: str | os.PathLike) -> None:
        """Write the sidecar into an export folder whose other files are there already."""
        path = Path(folder) / FILE
        others = sorted(other for other in Path(folder).iterdir() if other != path)
        complete = replace(self, files={other.name: file_sha256(other) for other in others})
        text = json.dumps(
            {"format_version": FORMAT_VERSION, **asdict(complete)}, indent=2, ensure_ascii=False
        )
        write_text(path, text + "\n")

    def verify(self, folder: str | os.PathLike) -> None:
        """Check that the export's files are those that were written.

        Programs that read a damaged model file may end the process instead of saying so.

        Raises:
            InputError: one is missing or is another.
        """
        for name, digest in self.files.items():
            path = Path(folder) / name
            if not path.is_file():
                raise InputError(f"{folder} has no {name}, which its {FILE} promises; {AGAIN}")
            if file_sha256(path) != digest:
                raise InputError(f"{path} is not the file that {FILE} was written for; {AGAIN}")

    def build_eval_transform(self) -> EvalTransform:
        """PIL image -> float32 (3, H, W), the network's input."""
        given = self.preprocessing
        return EvalTransform(
            image_size=given.image_size,
            crop_pct=given.crop_pct,
            mode=given.mode,
            mean=given.mean,
            std=given.std,
        )


def segmentation_settings(config) -> dict | None:
    """`Sidecar.segmentation` of the network that `config` describes."""
    if config.MODEL.TYPE != "UPerNet":
        return None
    return {key: config.SEGMENTATION[key.upper()] for key in _SEGMENTATION_ENTRIES}


def _is_integer(value, low: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value < 2**31


def _is_number(value, low: float, high: float) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and low <= value <= high


def _are_numbers(value, low: float, high: float) -> bool:
    return (
        isinstance(value, list) and len(value) == 3 and all(_is_number(v, low, high) for v in value)
    )


def _is_text_or_none(value) -> bool:
    return value is None or isinstance(value, str)


def _is_size(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_integer(v) for v in value)


def _is_size_or_none(value) -> bool:
    return value is None or _is_size(value)


def _are_ratios(value) -> bool:
    return isinstance(value, list) and value and all(_is_number(v, 0.01, 100) for v in value)


def _are_names_or_none(value) -> bool:
    return value is None or (
        isinstance(value, list) and all(isinstance(name, str) for name in value)
    )


def _is_file_name(name: str) -> bool:
    return name not in ("", ".", "..") and not set(name) & set("/\\\0")


def _are_files(value) -> bool:
    return isinstance(value, dict) and all(
        _is_file_name(name) and isinstance(digest, str) for name, digest in value.items()
    )


# What each entry must be: the test and, for messages, what is allowed.
_ENTRIES = {
    "architecture": (lambda v: isinstance(v, str), "text"),
    "format": (lambda v: v in FORMATS, " or ".join(FORMATS)),
    "precision": (lambda v: v in PRECISIONS, " or ".join(PRECISIONS)),
    "input_size": (_is_size_or_none, "[height, width] in pixels, or null"),
    "preprocessing": (lambda v: isinstance(v, dict), "an object"),
    "num_classes": (_is_integer, "an integer >= 1"),
    "class_names": (_are_names_or_none, "a list of text, or null"),
    "segmentation": (lambda v: v is None or isinstance(v, dict), "an object, or null"),
    "source_sha256": (_is_text_or_none, "text, or null"),
    "paddle_version": (_is_text_or_none, "text, or null"),
    "files": (_are_files, "an object of file names of this folder and their SHA-256"),
}
_SEGMENTATION_ENTRIES = {
    "align_corners": (lambda v: isinstance(v, bool), "true or false"),
    "resize": (_is_size, "[longer side, shorter side] in pixels"),
    "slide_stride": (lambda v: v is None or _is_integer(v), "an integer >= 1, or null"),
    "eval_ratios": (_are_ratios, "a list of numbers from 0.01 to 100"),
    "eval_flip": (lambda v: isinstance(v, bool), "true or false"),
    "palette": (_is_text_or_none, "text, or null"),
}
_PREPROCESSING_ENTRIES = {
    "image_size": (_is_integer, "an integer >= 1"),
    "crop_pct": (lambda v: _is_number(v, 0.01, 1), "a number from 0.01 to 1"),
    "mode": (lambda v: v in ("short_crop", "warp"), "short_crop or warp"),
    "mean": (lambda v: _are_numbers(v, 0, 1), "3 numbers from 0 to 1"),
    "std": (lambda v: _are_numbers(v, 1e-6, 1), "3 numbers from 1e-06 to 1"),
    "interpolation": (lambda v: v == INTERPOLATION, INTERPOLATION),
    "native_pixels": (lambda v: isinstance(v, bool), "true or false"),
}


def _problems(content: dict):
    """What is wrong with the entries of a sidecar, a line each."""
    yield from _wrong_entries(content, _ENTRIES, "")
    preprocessing = content.get("preprocessing")
    if isinstance(preprocessing, dict):
        yield from _wrong_entries(preprocessing, _PREPROCESSING_ENTRIES, "preprocessing.")
    segmentation = content.get("segmentation")
    if isinstance(segmentation, dict):
        yield from _wrong_entries(segmentation, _SEGMENTATION_ENTRIES, "segmentation.")
    names, classes = content.get("class_names"), content.get("num_classes")
    if isinstance(names, list) and _is_integer(classes) and len(names) != classes:
        yield f"class_names holds {len(names)} names; allowed: num_classes, {classes}"


def _wrong_entries(entries: dict, rules: dict, prefix: str):
    for key in sorted(entries.keys() - rules.keys()):
        yield f"unknown entry {prefix}{key}"
    for key, (is_legal, allowed) in rules.items():
        if key not in entries:
            yield f"{prefix}{key} is missing; allowed: {allowed}"
            continue
        value = entries[key]
        try:
            legal = is_legal(value)
        except TypeError:  # a list where a name belongs
            legal = False
        if not legal:
            shown = json.dumps(value)
            shown = shown if len(shown) <= 100 else f"{shown[:100]}..."
            yield f"{prefix}{key} is {shown}; allowed: {allowed}"
