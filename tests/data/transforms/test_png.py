"""PNG files decoded without the system's zlib, against Pillow; and where Paddle comes first."""

import io
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image
from tiny import ROOT

from replknet_paddle.data.transforms.image import MAX_PIXELS
from replknet_paddle.data.transforms.png import decode_png, unfilter
from replknet_paddle.runtime.errors import InputError


def picture(mode):
    """Smooth gradients with noise, on which encoders choose every filter."""
    rng = np.random.default_rng(0)
    ramp = np.add.outer(np.arange(37), 2 * np.arange(53))
    pixels = np.stack([ramp + 40 * i + rng.integers(0, 9, ramp.shape) for i in range(4)], -1)
    image = Image.fromarray((pixels % 256).astype("uint8"), "RGBA")
    return image.convert("RGB").convert(mode) if mode in ("P", "1", "L") else image.convert(mode)


def png(image, **options):
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "LA", "RGBA", "1"])
def test_decodes_what_pillow_decodes(mode):
    data = png(picture(mode))
    wanted = Image.open(io.BytesIO(data))
    got = decode_png(data, max_pixels=MAX_PIXELS)
    assert (got.mode, got.size) == (wanted.mode, wanted.size)
    assert (np.array(got) == np.array(wanted)).all()
    assert (np.array(got.convert("RGB")) == np.array(wanted.convert("RGB"))).all()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_decodes_palettes_of_few_bits(bits):
    numbers = np.random.default_rng(0).integers(0, 2**bits, (9, 13), np.uint8)
    image = Image.frombytes("P", (13, 9), numbers.tobytes())
    image.putpalette(range(3 * 2**bits))
    data = png(image, bits=bits)
    assert data[24] == bits
    assert (np.array(decode_png(data, max_pixels=MAX_PIXELS)) == numbers).all()


@pytest.mark.parametrize("kind", [0, 1, 2, 3, 4])
def test_each_filter_against_its_definition(kind):
    rng = np.random.default_rng(kind)
    filtered = rng.integers(0, 256, (6, 7, 3), np.uint8)
    got = unfilter(filtered, np.full(6, kind))
    wanted = np.zeros((6, 7, 3), int)
    for (row, column, byte), value in np.ndenumerate(filtered):
        a = wanted[row, column - 1, byte] if column else 0
        b = wanted[row - 1, column, byte] if row else 0
        c = wanted[row - 1, column - 1, byte] if row and column else 0
        paeth = min((abs(b - c), 0, a), (abs(a - c), 1, b), (abs(a + b - 2 * c), 2, c))[2]
        wanted[row, column, byte] = (int(value) + [0, a, b, (a + b) // 2, paeth][kind]) % 256
    assert (got == wanted).all()


@pytest.mark.parametrize("cut", [20, 60, 200])
def test_cut_files_are_damaged(cut):
    with pytest.raises(InputError, match="damaged"):
        decode_png(png(picture("RGB"))[:cut], max_pixels=MAX_PIXELS)


def test_changed_bytes_and_bombs_are_refused():
    data = bytearray(png(picture("RGB")))
    data[100] ^= 1
    with pytest.raises(InputError, match="checksum"):
        decode_png(bytes(data), max_pixels=MAX_PIXELS)
    with pytest.raises(InputError, match="decompression bomb"):
        decode_png(png(picture("L")), max_pixels=100)


def test_sixteen_bits_are_refused_with_what_to_do():
    image = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8))
    with pytest.raises(InputError, match="16 bits per channel; import replknet_paddle or zlib"):
        decode_png(png(image), max_pixels=MAX_PIXELS)


PROGRAM = """
import sys
if {paddle_first}:
    import paddle
import numpy as np
from replknet_paddle.segmentation.dataset import SegmentationDataset
from replknet_paddle.segmentation.transforms import whole_image
data = SegmentationDataset("{folder}/list.txt", "{folder}", whole_image, num_classes=200)
sample, labels = data.read_sample(0, 0)
assert (sample.pixels == np.load("{folder}/image.npy")).all()
assert (labels == np.load("{folder}/labels.npy")).all()
print("read")
"""


@pytest.mark.parametrize("paddle_first", [True, False])
def test_labels_read_right_whatever_was_imported_first(tmp_path, paddle_first):
    """On Paddle 2.6 Pillow alone fails here, if Paddle comes first."""
    labels = np.random.default_rng(0).integers(0, 150, (30, 40), np.uint8).repeat(4, 0)
    pixels = np.random.default_rng(1).integers(0, 256, (120, 40, 3), np.uint8)
    Image.fromarray(labels).save(tmp_path / "labels.png")
    Image.fromarray(pixels).save(tmp_path / "image.png")
    np.save(tmp_path / "labels.npy", labels)
    np.save(tmp_path / "image.npy", pixels)
    (tmp_path / "list.txt").write_text("image.png labels.png\n")
    program = PROGRAM.format(folder=tmp_path, paddle_first=paddle_first)
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert result.stdout.endswith("read\n"), result.stderr


def test_bytes_after_the_image_are_not_read():
    image = picture("L")
    packed = zlib.compress(b"x" * 10**6)
    data = png(image)
    assert (np.array(decode_png(data + packed[:5], max_pixels=MAX_PIXELS)) == np.array(image)).all()
