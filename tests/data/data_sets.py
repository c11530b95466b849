"""Datasets in list files for the tests of this folder, configurations over them, and mutations."""

from io import BytesIO

import numpy as np
from PIL import Image
from tiny import flags

from replknet_paddle.config import get_config, update_config
from replknet_paddle.data.dataset import ListDataset
from replknet_paddle.data.transforms.pipelines import EvalTransform


def small(image, _):
    """A transform that is nearly none."""
    return np.asarray(image.convert("RGB").resize((4, 4)), dtype="float32").transpose(2, 0, 1)


def evaluation(image, _):
    mean = std = (0.5, 0.5, 0.5)
    return EvalTransform(image_size=8, crop_pct=1.0, mode="warp", mean=mean, std=std)(image)


def write_image(path, size=(9, 7), value=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


def one_image_set(folder, line: bytes, transform=small):
    """A data set whose list is an image that is fine, and `line`."""
    folder.mkdir(exist_ok=True)
    write_image(folder / "fine.png")
    (folder / "list.txt").write_bytes(b"fine.png 0\n\n" + line + b" 1\n")
    return ListDataset(str(folder / "list.txt"), str(folder), transform, num_classes=2)


def configured(tiny_config_file, folder, *opts, **values):
    """The tiny configuration over a data folder; `opts` as after -opts, `values` as flags."""
    values["opts"] = [str(option) for option in opts]
    return update_config(get_config(tiny_config_file), flags(data_path=str(folder), **values))


def picture(seed: int, form: str = "JPEG", size=(40, 36), mode: str = "RGB") -> bytes:
    """An image file of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, form)
    return buffer.getvalue()


def write(path, content: bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def image_tree(folder, images: list[str]):
    """Images of different content under these names."""
    for seed, image in enumerate(images):
        write(folder / image, picture(seed))


def data_with(folder, bad: dict[int, bytes], count: int = 24):
    """`count` images in both lists, some of them with other content than they should have."""
    for i in range(count):
        (folder / f"{i}.jpg").write_bytes(bad.get(i, picture(i)))
    for split in ("train", "val"):
        lines = [f"{i}.jpg {i % 4}\n" for i in range(count)]
        (folder / f"{split}_list.txt").write_text("".join(lines))


def batches(loader):
    return [(images.numpy(), labels.numpy()) for images, labels in loader]


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """`content` with bytes changed, cut off, doubled or moved; most of it near the beginning."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 6)):
        place = int(rng.integers(min(len(data), 64 if rng.random() < 0.5 else len(data)) or 1))
        kind = rng.integers(5)
        if kind == 0:
            data[place : place + 1] = bytes([rng.integers(256)])
        elif kind == 1:
            del data[place:]
        elif kind == 2:
            data[place:place] = data[place : place + int(rng.integers(1, 30))]
        elif kind == 3:
            del data[place : place + int(rng.integers(1, 30))]
        else:
            data[place : place + 2] = [(0, 0), (255, 255), (127, 255), (0, 1)][rng.integers(4)]
    return bytes(data)
