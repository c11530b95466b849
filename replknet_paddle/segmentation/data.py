"""Datasets of images and label images, their dataloaders, and their training pipeline.

Training, as the official configurations have it: random scale, a crop that no category fills, flip,
photometric distortion, normalization, padding. Only what lies in the crop is resized. Images are
resized bilinearly without antialiasing (the official code's OpenCV), labels to the nearest. The
last two steps are left to `FinishBatch`, on the device. Every random number comes from the
generator given with the image. Lists of images and labels: `replknet_paddle.data.lists`.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image

from replknet_paddle.data.dataset import EvalBatches, ListedFiles, StepBatches, make_loader
from replknet_paddle.data.lists import (
    IGNORED,
    PAIRS_LAYOUT,
    Line,
    get_list_path,
    parse_pair,
)
from replknet_paddle.data.loader import Loader
from replknet_paddle.data.transforms.finish import RawSample
from replknet_paddle.data.transforms.image import asks_for_a_quarter_turn, load, to_rgb
from replknet_paddle.runtime import processes
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.machines import available_cores
from replknet_paddle.runtime.terminal import printable

SCALE_RANGE = (0.5, 2.0)
MAX_CATEGORY_SHARE = 0.75
MAX_CROP_TRIES = 10
FLIP_PROB = 0.5

LABEL_MODES = ("L", "P", "1")
LABELS_AT_ONCE = 64

Box = tuple[int, int, int, int]  # top, left, bottom, right


class SegmentationDataset(ListedFiles):
    """The images and label images of a list file, as `ListDataset` has images and labels.

    The transform is (image (H, W, 3), label map (H, W), random generator) -> raw sample and map.
    """

    layout = PAIRS_LAYOUT

    def __init__(
        self, list_file: str, root: str, transform: Callable, *, zero_is_ignored=False, **options
    ):
        super().__init__(list_file, root, transform, **options)
        self._read_labels = partial(
            read_labels, num_classes=self.num_classes, zero_is_ignored=zero_is_ignored
        )

    def parse(self, line: bytes) -> Line:
        """Return the two paths of a line."""
        return parse_pair(line, allow_outside=self.allow_outside)

    def files(self, index: int) -> list[str]:
        """Return the paths of image and labels `index`."""
        return self.path(index).split("\t")

    def describe(self, index: int) -> str:
        """Return the paths of image and labels `index`, and the line that names them."""
        image, labels = map(printable, self.files(index))
        return f"image {image} with labels {labels} ({self.list_file}, line {self._lines[index]})"

    def read_sample(self, epoch: int, index: int) -> tuple[RawSample, np.ndarray]:
        """Return raw sample (epoch, index), and its label map (H, W) uint8."""

        def pixels_and_turn(image: Image.Image) -> tuple[np.ndarray, bool]:
            load(image)
            return np.array(to_rgb(image)), asks_for_a_quarter_turn(image)

        path, labels_path = self.files(index)
        pixels, is_turned = self.read_file(index, path, pixels_and_turn)
        read = partial(self._read_labels, size=pixels.shape[1::-1], is_turned=is_turned)
        classes = self.read_file(index, labels_path, read)
        return self.transform(pixels, classes, self.rng(epoch, index))

    def absent_classes(self, count: int, *, rank: int = 0, world_size: int = 1) -> list[int]:
        """Return the classes in [0, count) that no label image of a rank's share has.

        Those that cannot be read are passed over, for training reports them.
        """
        absent = set(range(count))
        own = range(rank, len(self), world_size)
        with ThreadPoolExecutor(available_cores()) as pool:
            for start in range(0, len(own), LABELS_AT_ONCE):
                for present in pool.map(self._classes_in, own[start : start + LABELS_AT_ONCE]):
                    absent.difference_update(present)
                if not absent:
                    break
        return sorted(absent)

    def _classes_in(self, index: int) -> list[int]:
        """Return the numbers in label image `index`; none where it cannot be read."""
        try:
            with self.open(self.files(index)[1]) as labels:
                return np.unique(self._read_labels(labels, size=labels.size)).tolist()
        except (OSError, InputError):
            return []


def get_dataset(
    config, is_train: bool, *, problems: list[Line] | None = None
) -> SegmentationDataset:
    """Return the training or the validation set that `config` names, by its good lines where the
    bad ones go to `problems`."""
    settings = config.SEGMENTATION
    transform = whole_image
    if is_train:
        transform = TrainCrop(crop_size=config.DATA.IMAGE_SIZE, scale=settings.RESIZE)
    return SegmentationDataset(
        get_list_path(config, is_train),
        config.DATA.DATA_PATH,
        transform,
        num_classes=config.MODEL.NUM_CLASSES,
        zero_is_ignored=settings.ZERO_IS_IGNORED,
        seed=config.SEED,
        allow_outside=config.DATA.ALLOW_OUTSIDE,
        problems=problems,
    )


def get_dataloader(config, is_train: bool) -> Loader:
    """Return this process's loader: images (N, 3, H, W) float32, label maps (N, H, W) uint8.

    Training images are crops, whose padding is zero after normalization, as in the official code;
    in evaluation a batch is one image at its own size.
    """
    dataset = get_dataset(config, is_train)
    places = {"rank": processes.rank(), "world_size": processes.world_size()}
    if not is_train:
        batches = EvalBatches(len(dataset), 1, **places)
        # A larger image takes the slower way from its worker.
        return make_loader(config, dataset, batches, image_pixels=4 * config.DATA.IMAGE_SIZE**2)
    batches = StepBatches(
        len(dataset),
        config.DATA.BATCH_SIZE,
        **places,
        seed=config.SEED,
        batches=config.SEGMENTATION.EPOCH_STEPS * config.TRAIN.ACCUM_ITER,
    )
    return make_loader(config, dataset, batches)


def read_labels(
    labels: Image.Image,
    size: tuple[int, int],
    *,
    num_classes: int,
    zero_is_ignored: bool,
    is_turned: bool = False,
) -> np.ndarray:
    """Return the label map (H, W) uint8 of an opened label image: classes from 0, and `IGNORED`.

    It belongs to an image of `size` (width, height), which may ask to be shown turned by a quarter.
    With `zero_is_ignored`, the file counts classes from 1, and its 0 is ignored (ADE20K).
    """
    if labels.mode not in LABEL_MODES:
        raise InputError(
            f"the label image has mode {labels.mode!r}; allowed: one 8-bit number per pixel "
            f"(modes {', '.join(LABEL_MODES)})"
        )
    if labels.size != size:
        turned = ""
        if labels.size == size[::-1] and is_turned:
            turned = (
                ". The labels are those of the upright picture: the image file asks to be turned "
                "(its EXIF orientation), and is read as it is; turn the pixels themselves, for "
                "instance with exiftran -ai"
            )
        raise InputError(
            f"the label image has {labels.width} x {labels.height} pixels and its image "
            f"{size[0]} x {size[1]}; allowed: the same size{turned}"
        )
    step = _grey_step(labels)
    load(labels)
    classes = np.array(labels, np.uint8)
    if step > 1:
        classes //= np.uint8(step)
    if zero_is_ignored:
        # 0 wraps around to 255, and 255 stays.
        classes = np.where(classes == IGNORED, IGNORED, classes - np.uint8(1))
    wrong = classes[(classes >= num_classes) & (classes != IGNORED)]
    if wrong.size:
        first = int(wrong[0]) + zero_is_ignored
        allowed = f"1 to {num_classes}" if zero_is_ignored else f"0 to {num_classes - 1}"
        raise InputError(
            f"{wrong.size} label pixels are of no class, the first is {first}; allowed: {allowed} "
            f"(MODEL.NUM_CLASSES), and {'0 or ' if zero_is_ignored else ''}{IGNORED} for pixels "
            "that do not count"
        )
    return classes


def _grey_step(labels: Image.Image) -> int:
    """Return the factor by which Pillow multiplies the numbers of a grey image of 2 or 4 bits."""
    how = labels.tile[0][3] if getattr(labels, "tile", None) else None
    how = how[0] if isinstance(how, tuple) and how else how  # with details, in a TIFF
    return {"L;2": 255 // 3, "L;4": 255 // 15}.get(how, 1) if labels.mode == "L" else 1


def resized_size(
    size: tuple[int, int], scale: Sequence[int], ratio: float = 1.0
) -> tuple[int, int]:
    """Return the size (height, width) that an image of `size` gets, its shape kept, to fit `ratio`
    times `scale`: the most pixels that its longer and its shorter side may have."""
    most = [int(ratio * edge) for edge in scale]  # as in the official code
    factor = min(max(most) / max(size), min(most) / min(size))
    return tuple(max(1, int(side * factor + 0.5)) for side in size)


def source_places(axis: int, size: tuple, new_size: tuple, box: Box) -> np.ndarray:
    """Return where rows (axis 0) or columns (1) of a resized image, those of `box`, lie in the
    original: their centres, in [-0.5, size - 0.5]."""
    return (np.arange(box[axis], box[axis + 2]) + 0.5) * (size[axis] / new_size[axis]) - 0.5


def resize_window(pixels: np.ndarray, new_size: tuple[int, int], box: Box) -> np.ndarray:
    """Return what resizing (H, W, 3) uint8 to `new_size` bilinearly gives within `box`."""
    window = pixels
    for axis, columns in ((0, (-1, 1, 1)), (1, (-1, 1))):
        last = pixels.shape[axis] - 1
        places = np.clip(source_places(axis, pixels.shape, new_size, box), 0, last)
        first = np.minimum(places.astype(np.int64), max(last - 1, 0))
        low = window.take(first, axis).astype(np.float32)
        high = window.take(np.minimum(first + 1, last), axis)
        window = low + (high - low) * (places - first).astype(np.float32).reshape(columns)
    return (window + np.float32(0.5)).astype(np.uint8)


def nearest_window(labels: np.ndarray, new_size: tuple[int, int], box: Box) -> np.ndarray:
    """Return what resizing (H, W) to `new_size` to the nearest pixel gives within `box`."""
    places = (source_places(axis, labels.shape, new_size, box) for axis in (0, 1))
    rows, columns = (np.floor(place + 0.5).astype(np.int64) for place in places)
    return labels[np.ix_(rows, columns)]


def fullest_share(labels: np.ndarray) -> float:
    """Return the most frequent category's share of the pixels that count; 1 where none does."""
    counts = np.bincount(labels.ravel(), minlength=IGNORED + 1)[:IGNORED]
    return float(counts.max() / counts.sum()) if counts.any() else 1.0


def distort(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Distort the colours (as SSD, arXiv 1512.02325) of (H, W, 3) uint8; each step by chance.

    Brightness by up to 32 of 255, contrast and saturation by a factor from 0.5 to 1.5, and hue by
    up to 36 degrees, which is the 18 of OpenCV's half circle. Contrast comes before or after
    saturation and hue.
    """

    def chance() -> bool:
        return rng.random() < 0.5

    brightness = rng.uniform(-32, 32) if chance() else 0.0
    contrast_first = chance()
    contrast = rng.uniform(0.5, 1.5) if chance() else 1.0
    saturation = rng.uniform(0.5, 1.5) if chance() else 1.0
    hue = rng.uniform(-36, 36) if chance() else 0.0
    pixels = linear(pixels, 1.0, brightness)
    if contrast_first:
        pixels = linear(pixels, contrast, 0.0)
    pixels = saturate_and_turn(pixels, saturation, hue)
    if not contrast_first:
        pixels = linear(pixels, contrast, 0.0)
    return pixels


def linear(pixels: np.ndarray, factor: float, offset: float) -> np.ndarray:
    """Return factor * pixels + offset, cut to [0, 255]."""
    if (factor, offset) == (1.0, 0.0):
        return pixels
    table = np.clip(np.arange(256) * factor + offset, 0, 255).astype(np.uint8)
    return table[pixels]


def saturate_and_turn(pixels: np.ndarray, saturation: float, hue_degrees: float) -> np.ndarray:
    """Multiply the saturation (HSV) and turn the hue."""
    if (saturation, hue_degrees) == (1.0, 0.0):
        return pixels
    hue, colour, value = Image.fromarray(pixels).convert("HSV").split()
    values = np.arange(256)
    turned = (values + round(hue_degrees * 256 / 360)) % 256
    hue = hue.point(turned.tolist())
    colour = colour.point(np.clip(values * saturation, 0, 255).astype(int).tolist())
    return np.array(Image.merge("HSV", (hue, colour, value)).convert("RGB"))


def whole_image(
    pixels: np.ndarray, labels: np.ndarray, rng: np.random.Generator
) -> tuple[RawSample, np.ndarray]:
    """Return the evaluation sample: all of an image at its own size; inference resizes."""
    return RawSample(pixels), labels


@dataclass(kw_only=True)
class TrainCrop:
    """The way from an image and its labels to training samples of `crop_size` x `crop_size` pixels.

    At ratio 1, images fit `scale`, as in `resized_size`.
    """

    crop_size: int
    scale: Sequence[int]

    def __call__(
        self, pixels: np.ndarray, labels: np.ndarray, rng: np.random.Generator
    ) -> tuple[RawSample, np.ndarray]:
        """Image (H, W, 3) and label map (H, W), uint8 -> a sample and its label map.

        What the image lacks at its bottom and right is boxes to erase, and labels `IGNORED`.
        """
        side = self.crop_size
        ratio = rng.uniform(*SCALE_RANGE)
        size = resized_size(pixels.shape[:2], self.scale, ratio)
        box = self.choose_crop(labels, size, rng)
        flip = rng.random() < FLIP_PROB
        window = resize_window(pixels, size, box)
        classes = nearest_window(labels, size, box)
        if flip:
            window, classes = window[:, ::-1], classes[:, ::-1]
        window = distort(np.ascontiguousarray(window), rng)
        height, width = classes.shape
        padding = ((0, side - height), (0, side - width))
        boxes = []
        if height < side:
            boxes.append((height, 0, side, side))
        if width < side:
            boxes.append((0, width, height, side))
        padded = RawSample(np.pad(window, (*padding, (0, 0))), boxes)
        return padded, np.pad(classes, padding, constant_values=IGNORED)

    def choose_crop(
        self, labels: np.ndarray, size: tuple[int, int], rng: np.random.Generator
    ) -> Box:
        """Return a random box of the resized image, drawn up to ten times to find one in which no
        category has more than `MAX_CATEGORY_SHARE` of what counts."""
        height, width = (min(self.crop_size, edge) for edge in size)
        for _ in range(MAX_CROP_TRIES):
            top = int(rng.integers(0, size[0] - height, endpoint=True))
            left = int(rng.integers(0, size[1] - width, endpoint=True))
            box = (top, left, top + height, left + width)
            if fullest_share(nearest_window(labels, size, box)) < MAX_CATEGORY_SHARE:
                break
        return box
