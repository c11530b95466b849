"""Datasets in list files for the tests of this folder, and configurations over them."""

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
    values["opts"] = [str(option) for option in (*opts, *values.pop("opts", ()))]
    return update_config(get_config(tiny_config_file), flags(data_path=str(folder), **values))


def picture(seed: int, form: str = "JPEG", size=(40, 36)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def data_with(folder, bad: dict[int, bytes], count: int = 24):
    """`count` images in both lists, some of them with other content than they should have."""
    for i in range(count):
        (folder / f"{i}.jpg").write_bytes(bad.get(i, picture(i)))
    for split in ("train", "val"):
        lines = [f"{i}.jpg {i % 4}\n" for i in range(count)]
        (folder / f"{split}_list.txt").write_text("".join(lines))


def epoch(loader, number: int):
    loader.batch_sampler.set_epoch(number)
    return [(images.numpy(), labels.numpy()) for images, labels in loader]


def broken(folder):
    """Files that are no image: {name: part of the reason}."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (64, 64, 3)).astype("uint8"))
    for name, form in (("half.jpg", "JPEG"), ("half.png", "PNG")):
        buffer = BytesIO()
        image.save(buffer, form)
        (folder / name).write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("no image")
    (folder / "folder.jpg").mkdir()
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "dangling.jpg").symlink_to("nothing.jpg")
    Image.fromarray(np.full((8, 8), 40_000, dtype="uint16")).save(folder / "deep.png")
    return {
        "missing.jpg": "no such file",
        "no folder/missing.jpg": "no such file",
        "dangling.jpg": "no such file",
        "half.jpg": "truncated",
        "half.png": "",
        "empty.jpg": "cannot identify",
        "text.jpg": "cannot identify",
        "folder.jpg": "regular",
        "text.jpg/a.jpg": "",
        "loop.jpg": "",
        "x" * 300: "",
        "deep.png": "8 bits",
    }


def evaluation(image, _):
    mean = std = (0.5, 0.5, 0.5)
    return EvalTransform(image_size=8, crop_pct=1.0, mode="warp", mean=mean, std=std)(image)
