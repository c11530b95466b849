"""The pipelines' steps against Pillow, colorsys and counts, and what may not happen by chance."""

import colorsys
import struct
import zlib

import numpy as np
import paddle
import pytest
from numpy_heads import bilinear
from PIL import Image

from replknet_paddle.data.transforms.finish import FinishBatch
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.segmentation.data import (
    IGNORED,
    TrainCrop,
    distort,
    fullest_share,
    linear,
    nearest_window,
    read_labels,
    resize_window,
    resized_size,
    saturate_and_turn,
)


def noise(height=23, width=31, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def label_image(numbers):
    return Image.fromarray(np.array(numbers, np.uint8))


def grey_png(path, numbers, bits):
    """Write what Pillow does not: a grey PNG of one row whose numbers have so many bits."""
    digits = np.unpackbits(numbers[0][:, None], axis=1)[:, 8 - bits :].ravel()
    header = struct.pack(">IIBBBBB", numbers.shape[1], 1, bits, 0, 0, 0, 0)
    row = zlib.compress(b"\0" + np.packbits(digits).tobytes())
    file = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", row), (b"IEND", b"")):
        crc = struct.pack(">I", zlib.crc32(kind + data))
        file += struct.pack(">I", len(data)) + kind + data + crc
    path.write_bytes(file)


def grey_tiff(path, numbers, bits):
    """Write a grey TIFF of one row of 16 numbers of 4 bits."""
    tags = [(256, 16), (257, 1), (258, bits), (259, 1), (262, 1), (273, 8), (278, 1), (279, 8)]
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    pixels = bytes(even << 4 | odd for even, odd in numbers.reshape(-1, 2).tolist())
    count = struct.pack("<H", len(tags))
    header = struct.pack("<2sHI", b"II", 42, 8 + len(pixels))
    path.write_bytes(header + pixels + count + entries + bytes(4))


def palette_png(path, numbers, bits):
    image = Image.frombytes("P", numbers.shape[::-1], numbers.tobytes())
    image.putpalette([i % 256 for i in range(3 * 2**bits)])
    image.save(path, "PNG", bits=bits)


@pytest.mark.parametrize(
    "write, bits",
    [*((grey_png, n) for n in (1, 2, 4, 8)), *((palette_png, n) for n in (1, 2, 4, 8))]
    + [(grey_tiff, 4)],
)
def test_labels_of_all_bits_are_their_numbers(write, bits, tmp_path):
    """Pillow multiplies what it reads from grey files of 2 and 4 bits."""
    numbers = np.arange(2**bits, dtype=np.uint8)[None]
    write(tmp_path / "labels", numbers, bits)
    image = Image.open(tmp_path / "labels")
    labels = read_labels(image, numbers.shape[::-1], num_classes=255, zero_is_ignored=False)
    assert labels.tolist() == numbers.tolist() and (bits < 8 or labels[0, 255] == IGNORED)


def test_labels_that_count_from_one_shift_down_and_zero_is_ignored():
    image = label_image([[0, 1, 150, 255]])
    labels = read_labels(image, (4, 1), num_classes=150, zero_is_ignored=True)
    assert labels.tolist() == [[IGNORED, 0, 149, IGNORED]]


OF_NO_CLASS = "label pixels are of no class, the first is"


@pytest.mark.parametrize(
    "image, zero_is_ignored, message",
    [
        (label_image([[0, 7, 9]]), False, f"2 {OF_NO_CLASS} 7; allowed: 0 to 4"),
        (label_image([[0, 6, 5]]), True, f"1 {OF_NO_CLASS} 6; allowed: 1 to 5"),
        (label_image([[0, 1]]), False, "2 x 1 pixels and its image 3 x 1"),
        (Image.new("RGB", (3, 1)), False, "mode 'RGB'"),
        (Image.new("I;16", (3, 1)), False, "mode 'I;16'"),
    ],
)
def test_labels_that_cannot_be_right(image, zero_is_ignored, message):
    with pytest.raises(InputError, match=message):
        read_labels(image, (3, 1), num_classes=5, zero_is_ignored=zero_is_ignored)


@pytest.mark.parametrize(
    "size, scale, wanted",
    [
        ((512, 683), (2048, 512), (512, 683)),
        ((1024, 2048), (2049, 1025), (1025, 2049)),
        ((300, 400), (2048, 512), (512, 683)),
        ((100, 1000), (2048, 512), (205, 2048)),
        ((400, 300), (1024, 256), (341, 256)),
        ((1, 4000), (2048, 512), (1, 2048)),
    ],
)
def test_size_that_fits_the_scale(size, scale, wanted):
    assert resized_size(size, scale) == wanted


@pytest.mark.parametrize(
    "ratio, wanted",
    [(0.5, (512, 1024)), (0.75, (768, 1536)), (1.0, (1025, 2049)), (1.25, (1281, 2561)),
     (1.5, (1537, 3073)), (1.75, (1793, 3585))],
)  # fmt: skip
def test_edges_at_a_ratio_are_whole_pixels_as_in_the_official_code(ratio, wanted):
    """A Cityscapes image. mmsegmentation cuts ratio * edge to an integer for both edges, and
    mmcv then rounds what keeps the shape."""
    edges = [int(2049 * ratio), int(1025 * ratio)]
    factor = min(edges[0] / 2048, edges[1] / 1024)
    assert wanted == (int(1024 * factor + 0.5), int(2048 * factor + 0.5))
    assert resized_size((1024, 2048), (2049, 1025), ratio) == wanted


@pytest.mark.parametrize("new_size", [(23, 31), (40, 17), (11, 60), (1, 1)])
def test_a_window_of_a_resized_image_is_a_part_of_it(new_size):
    pixels = noise()
    whole = bilinear(pixels.transpose(2, 0, 1).astype("float64"), new_size, align_corners=False)
    top, left = new_size[0] // 3, new_size[1] // 4
    got = resize_window(pixels, new_size, (top, left, *new_size))
    difference = got.astype(int).transpose(2, 0, 1) - whole[:, top:, left:]
    assert np.abs(difference).max() <= 0.51  # rounding alone


@pytest.mark.parametrize("new_size", [(23, 31), (46, 62), (40, 17), (11, 60), (1, 1)])
def test_labels_become_those_of_pillows_nearest_pixel(new_size):
    labels = noise(channels=1)[:, :, 0]
    wanted = np.array(Image.fromarray(labels).resize(new_size[::-1], Image.Resampling.NEAREST))
    top, left = new_size[0] // 3, new_size[1] // 4
    got = nearest_window(labels, new_size, (top, left, *new_size))
    assert (got == wanted[top:, left:]).all()


def test_saturation_and_hue_as_in_colorsys():
    pixels = noise(8, 9)
    got = saturate_and_turn(pixels, 1.3, 30.0).astype(float)
    for (row, column), _ in np.ndenumerate(pixels[:, :, 0]):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixels[row, column] / 255)
        wanted = colorsys.hsv_to_rgb((hue + 30 / 360) % 1, min(saturation * 1.3, 1), value)
        assert np.abs(got[row, column] - 255 * np.array(wanted)).max() < 12  # 8-bit HSV


def test_brightness_and_contrast_are_linear_and_cut():
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)[..., None].repeat(3, 2)
    for factor, offset in ((1.0, 32.0), (1.5, 0.0)):
        wanted = np.minimum(np.arange(256) * factor + offset, 255).astype(int)
        assert (linear(pixels, factor, offset)[..., 0].ravel() == wanted).all()
    assert linear(pixels, 1.0, 0.0) is pixels


def test_distortion_stays_in_its_limits_and_is_sometimes_none():
    pixels = np.full((4, 4, 3), 100, np.uint8)
    results = [int(distort(pixels, np.random.default_rng(i))[0, 0, 0]) for i in range(400)]
    assert min(results) >= (100 - 32) * 0.5 - 1 and max(results) <= (100 + 32) * 1.5
    assert 0.15 < np.mean(np.array(results) == 100) < 0.35  # neither brightness nor contrast
    assert min(results) < 50 and max(results) > 150


@pytest.mark.parametrize(
    "labels, share",
    [([0, 0, 1, IGNORED], 2 / 3), ([IGNORED, IGNORED], 1.0), ([3, 3], 1.0), ([0, 1], 0.5)],
)
def test_share_of_the_fullest_category(labels, share):
    assert fullest_share(np.array(labels, np.uint8)) == pytest.approx(share)


def test_the_category_cap_moves_crops_off_what_fills_them():
    """A corner with two categories in a field of a third: uncapped crops mostly miss it."""
    labels = np.zeros((64, 64), np.uint8)
    labels[:24, :24] = np.random.default_rng(0).integers(1, 3, (24, 24))
    crop = TrainCrop(crop_size=24, scale=(64, 64))
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(200):
        top, left, bottom, right = crop.choose_crop(labels, (64, 64), rng)
        assert (bottom - top, right - left) == (24, 24) and bottom <= 64 and right <= 64
        shares.append(fullest_share(labels[top:bottom, left:right]))
    capped = np.mean(np.array(shares) < 0.75)
    free = [
        fullest_share(labels[top : top + 24, left : left + 24])
        for top, left in rng.integers(0, 41, (200, 2))
    ]
    assert capped > 3 * np.mean(np.array(free) < 0.75) and capped > 0.5


def test_a_sample_keeps_pixels_and_labels_together():
    """Each class is one grey: distortion aside, every pixel tells its own label."""
    labels = np.kron(np.arange(16).reshape(4, 4), np.ones((16, 16))).astype(np.uint8)
    pixels = (labels * 16)[..., None].repeat(3, 2)
    crop = TrainCrop(crop_size=48, scale=(64, 64))
    agreeing, flips, sizes = [], set(), set()
    for seed in range(60):
        sample, classes = crop(pixels, labels, np.random.default_rng(seed))
        assert sample.pixels.shape == (48, 48, 3) and classes.shape == (48, 48)
        kept = classes != IGNORED
        sizes.add(int(kept.sum()))
        assert (sample.pixels[~kept] == 0).all()
        grey = sample.pixels[..., 0].astype(float)
        # Distortion is increasing in the grey: within a sample, darker means a lower label.
        inner = kept & (np.roll(classes, 3, 0) == classes) & (np.roll(classes, -3, 0) == classes)
        inner &= (np.roll(classes, 3, 1) == classes) & (np.roll(classes, -3, 1) == classes)
        means = [
            grey[inner & (classes == k)].mean() for k in range(16) if (inner & (classes == k)).any()
        ]
        agreeing.append(all(a <= b + 1e-6 for a, b in zip(means, means[1:])))
        row = classes[:, kept[0]][0].astype(int)
        flips.add(int(np.sign(np.diff(row).sum())))
    assert all(agreeing)
    assert {-1, 1} <= flips  # mirrored and not
    assert min(sizes) < 48 * 48 == max(sizes)  # padded ones and full ones


def test_padding_becomes_zero_and_its_labels_ignored():
    crop = TrainCrop(crop_size=48, scale=(16, 16))  # at most 32 pixels
    sample, classes = crop(noise(16, 12), np.zeros((16, 12), np.uint8), np.random.default_rng(0))
    finish = FinishBatch(mean=[0.5, 0.4, 0.3], std=[0.2, 0.2, 0.2], erase_mode="const")
    batch = finish(paddle.to_tensor(sample.pixels[None]), [(0, sample.boxes, sample.seed)]).numpy()
    padded = classes == IGNORED
    assert padded.any() and not padded.all()
    assert (batch[0][:, padded] == 0).all() and (batch[0][:, ~padded] != 0).mean() > 0.9
