"""Images as they lie in folders: links, odd names, damage, and what is refused unread."""

import gc
import os
import resource
import struct
import time
import zlib
from io import BytesIO

import numpy as np
import pytest
from data_sets import (
    configured,
    evaluation,
    mutated,
    one_image_set,
    picture,
    small,
    write,
    write_image,
)
from PIL import Image, features

from replknet_paddle.data.dataset import ListDataset, get_dataset
from replknet_paddle.deploy.images import decode
from replknet_paddle.runtime.errors import InputError, SampleError


@pytest.mark.parametrize(
    "name",
    ["with space.png", "caf\u00e9 \u56fe.png", "a..b.png", "#x.png", os.fsdecode(b"caf\xe9.png")],
)
def test_odd_names_open(tmp_path, name):
    data = one_image_set(tmp_path, os.fsencode(name))
    write_image(tmp_path / "image.png")
    os.rename(tmp_path / "image.png", tmp_path / name)
    pixels, label = data[0, 1]
    assert label == 1 and isinstance(label, np.int64)
    assert pixels.shape == (3, 4, 4) and (pixels == 100).all()


def png_with(kind: bytes, data: bytes, before: bytes) -> bytes:
    """A grey PNG file with one more chunk, before the first one of the kind `before`."""
    file = BytesIO()
    Image.new("RGB", (4, 4), (100, 100, 100)).save(file, "PNG")
    chunk = kind + data
    chunk = struct.pack(">I", len(data)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    head, mark, tail = file.getvalue().partition(before)
    return head[:-4] + chunk + head[-4:] + mark + tail


@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
@pytest.mark.parametrize(
    "kind, start, compressed",
    [
        (b"iCCP", b"profile\0\0", True),
        (b"zTXt", b"Comment\0\0", True),
        (b"tEXt", b"Comment\0", False),
        (b"iTXt", b"Comment\0\1\0\0\0", True),
    ],
)
def test_large_texts_and_profiles_of_png_files_are_no_damage(
    tmp_path, kind, start, compressed, before
):
    def read(size):
        content = bytes([65]) * size
        content = zlib.compress(content) if compressed else content
        (tmp_path / "image.png").write_bytes(png_with(kind, start + content, before))
        return np.array(decode(tmp_path / "image.png"))

    assert (read(2_000_000) == 100).all()
    with pytest.raises(InputError, match="text or colour profile is larger than 64 MiB"):
        read(2**26 + 1)


def test_links_are_followed_inside_the_data_folder_and_not_out_of_it(tmp_path):
    outside, data = tmp_path / "outside", tmp_path / "data"
    write_image(outside / "secret.png")
    write_image(outside / "deep" / "secret.png")
    write_image(tmp_path / "data2" / "secret.png")  # its path begins as the data folder's does
    write_image(data / "real" / "a.png")
    for name, target in {
        **{"file": outside / "secret.png", "relative": "../outside/secret.png", "twice": "file"},
        **{"folder": outside, "up": "..", "neighbour": tmp_path / "data2"},
        **{"inside": "real/a.png", "inside absolute": data / "real" / "a.png"},
        **{"inside folder": data / "real", "real/there and back": "../../data/real/a.png"},
    }.items():
        (data / name).symlink_to(target)
    for line in ("inside", "inside absolute", "inside folder/a.png", "real/there and back"):
        assert one_image_set(data, line.encode())[0, 1][1] == 1, line
    for line in (
        *("file", "relative", "twice", "folder/secret.png", "folder/deep/secret.png"),
        *("up/outside/secret.png", "up/data2/secret.png", "neighbour/secret.png"),
    ):
        with pytest.raises(SampleError, match="outside the data folder") as caught:
            one_image_set(data, line.encode())[0, 1]
        assert "line 3" in str(caught.value) and line in str(caught.value)


@pytest.mark.parametrize("slash", ["", "/"])
def test_the_data_folder_itself_may_be_a_link(tmp_path, slash, monkeypatch):
    write_image(tmp_path / "disk" / "class" / "a.png")
    (tmp_path / "disk" / "list.txt").write_text("class/a.png 0\n")
    (tmp_path / "link").symlink_to("disk")
    monkeypatch.chdir(tmp_path)
    for root in (str(tmp_path / "link") + slash, "link" + slash, "./disk"):
        data = ListDataset(os.path.join(root, "list.txt"), root, small, num_classes=1)
        assert data[0, 0][1] == 0


def test_a_relative_data_folder_is_that_of_the_folder_one_is_in(tmp_path, monkeypatch):
    """As in a notebook, which goes from one folder to another."""
    for name in ("first", "second"):
        write_image(tmp_path / name / "data" / "class" / f"{name}.png")
        (tmp_path / name / "data" / "list.txt").write_text(f"class/{name}.png 0\n")
        monkeypatch.chdir(tmp_path / name)
        assert ListDataset("data/list.txt", "data", small, num_classes=1)[0, 0][1] == 0


def test_the_root_folder_can_be_the_data_folder(tmp_path):
    write_image(tmp_path / "a.png")
    (tmp_path / "list.txt").write_text(f"{str(tmp_path)[1:]}/a.png 0\n")
    assert ListDataset(str(tmp_path / "list.txt"), "/", small, num_classes=1)[0, 0][1] == 0


def test_paths_outside_can_be_allowed(tmp_path, tiny_config_file):
    write(tmp_path / "a.jpg", picture(0))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link.jpg").symlink_to("../a.jpg")
    lines = f"../a.jpg 0\n{tmp_path}/a.jpg 0\nlink.jpg 0\n"
    (tmp_path / "data" / "val_list.txt").write_text(lines)
    config = configured(tiny_config_file, tmp_path / "data", "DATA.ALLOW_OUTSIDE", True)
    data = get_dataset(config, False)
    assert all(np.array_equal(data[0, i][0], data[0, 0][0]) for i in range(3))
    with pytest.raises(InputError, match=r"DATA\.ALLOW_OUTSIDE"):
        get_dataset(configured(tiny_config_file, tmp_path / "data"), False)


def refused(folder) -> dict[str, str]:
    """Files that are no image: {name: part of the reason}."""
    for name, form in (("half.jpg", "JPEG"), ("half.png", "PNG")):
        content = picture(0, form, (64, 64))
        write(folder / name, content[: len(content) // 2])
    write(folder / "empty.jpg", b"")
    write(folder / "text.jpg", b"no image")
    # The reader of this format would start another program.
    write(
        folder / "script.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    )
    for name, side in (("wide", 60_000), ("large", 10_000)):  # nothing of them may be decoded
        write(folder / name, b"P6 %d %d 255\n" % (side, side))
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")  # opening it would wait for somebody to write
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
        "script.jpg": "cannot identify",
        "wide": "bomb",
        "large": "bomb",
        "folder.jpg": "not a regular file",
        "pipe.jpg": "not a regular file",
        "text.jpg/a.jpg": "",
        "loop.jpg": "",
        "x" * 300: "",
        "deep.png": "8 bits",
    }


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_that_cannot_be_read_is_named_by_list_line_and_path(tmp_path):
    for path, reason in refused(tmp_path).items():
        data = one_image_set(tmp_path, path.encode(), evaluation)
        with pytest.raises(SampleError) as caught:
            data[0, 1]
        [message] = str(caught.value).splitlines()
        start = f"{tmp_path / 'list.txt'}, line 3: cannot read image {path}: "
        assert message.startswith(start), message
        assert reason in message[len(start) :] and len(message) > len(start)
        assert isinstance(caught.value, InputError)


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def seeds() -> list[bytes]:
    """A small image file of each format."""
    forms = ["JPEG", "PNG", "GIF", "BMP", "TIFF"]
    forms += [form for form in ("WEBP", "AVIF") if features.check(form.lower())]
    files = [picture(i, form, (20, 17)) for i, form in enumerate(forms)]
    files += [picture(8, "JPEG", mode="CMYK"), picture(9, "PNG", mode="P")]
    progressive = BytesIO()
    Image.new("L", (12, 10), 77).save(progressive, "JPEG", progressive=True)
    return [*files, progressive.getvalue()]


# The first of them in every run of the tests, all of them in the full one.
@pytest.mark.parametrize("count", [1500, pytest.param(15_000, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")
def test_mutated_images_give_a_sample_or_one_error_and_keep_no_memory(tmp_path, count):
    data, files = one_image_set(tmp_path, b"image", evaluation), seeds()
    rng, errors, slowest = np.random.default_rng(0), 0, 0.0
    for i in range(count):
        if i == count // 5:
            gc.collect()
            before = resident_bytes()
        write(tmp_path / "image", mutated(files[i % len(files)], rng))
        start = time.process_time()
        try:
            assert data[0, 1][0].shape == (3, 8, 8)
        except SampleError as error:
            errors += 1
            assert "line 3: cannot read image image: " in str(error) and "\n" not in str(error)
        slowest = max(slowest, time.process_time() - start)
    assert 0.1 * count < errors < 0.99 * count
    assert slowest < 5
    gc.collect()
    assert resident_bytes() - before < 30e6
