"""Images as they lie in folders: links, odd names, damage, and what is refused unread."""

import os
import random
from io import BytesIO

import numpy as np
import pytest
from data_sets import broken, configured, evaluation, one_image_set, picture, small, write_image
from PIL import Image, features

from replknet_paddle.data.dataset import ListDataset, get_dataset
from replknet_paddle.runtime.errors import InputError, SampleError


def test_a_sample_is_what_the_transform_gives_and_the_label(tmp_path):
    pixels, label = one_image_set(tmp_path, b"fine.png")[0, 1]
    assert label == 1 and isinstance(label, np.int64)
    assert pixels.shape == (3, 4, 4) and (pixels == 100).all()


@pytest.mark.parametrize("name", ["with space.png", "caf\u00e9 \u56fe.png", "a..b.png", "#x.png"])
def test_odd_names_open(tmp_path, name):
    data = one_image_set(tmp_path, name.encode())
    write_image(tmp_path / name)
    assert data[0, 1][1] == 1


def test_a_name_that_is_not_utf8_opens(tmp_path):
    data = one_image_set(tmp_path, b"caf\xe9.png")
    os.rename(tmp_path / "fine.png", os.path.join(os.fsencode(tmp_path), b"caf\xe9.png"))
    assert data[0, 1][1] == 1


def links(tmp_path):
    """A data folder with links of all kinds: {line: whether the image may be read}."""
    outside, data = tmp_path / "outside", tmp_path / "data"
    data.mkdir()
    write_image(outside / "secret.png")
    write_image(outside / "deep" / "secret.png")
    write_image(tmp_path / "data2" / "secret.png")  # its path begins as the data folder's does
    write_image(data / "real" / "a.png")
    (data / "file").symlink_to(outside / "secret.png")
    (data / "relative").symlink_to("../outside/secret.png")
    (data / "twice").symlink_to("file")
    (data / "folder").symlink_to(outside)
    (data / "up").symlink_to("..")
    (data / "neighbour").symlink_to(tmp_path / "data2")
    (data / "inside").symlink_to("real/a.png")
    (data / "inside absolute").symlink_to(data / "real" / "a.png")
    (data / "inside folder").symlink_to(data / "real")
    (data / "real" / "there and back").symlink_to("../../data/real/a.png")
    return {
        "file": False,
        "relative": False,
        "twice": False,
        "folder/secret.png": False,
        "folder/deep/secret.png": False,
        "up/outside/secret.png": False,
        "up/data2/secret.png": False,
        "neighbour/secret.png": False,
        "inside": True,
        "inside absolute": True,
        "inside folder/a.png": True,
        "real/there and back": True,
    }


def test_links_are_followed_inside_the_data_folder_and_not_out_of_it(tmp_path):
    for line, allowed in links(tmp_path).items():
        data = one_image_set(tmp_path / "data", line.encode())
        if allowed:
            assert data[0, 1][1] == 1, line
        else:
            with pytest.raises(SampleError, match="outside the data folder") as caught:
                data[0, 1]
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


def test_the_root_folder_can_be_the_data_folder(tmp_path):
    write_image(tmp_path / "a.png")
    (tmp_path / "list.txt").write_text(f"{str(tmp_path)[1:]}/a.png 0\n")
    assert ListDataset(str(tmp_path / "list.txt"), "/", small, num_classes=1)[0, 0][1] == 0


def test_an_image_that_cannot_be_read_is_named_by_list_line_and_path(tmp_path):
    for path, reason in broken(tmp_path).items():
        data = one_image_set(tmp_path, path.encode(), evaluation)
        with pytest.raises(SampleError) as caught:
            data[0, 1]
        [message] = str(caught.value).splitlines()
        start = f"{tmp_path / 'list.txt'}, line 3: cannot read image {path}: "
        assert message.startswith(start)
        assert reason in message[len(start) :] and len(message) > len(start)
        assert isinstance(caught.value, InputError)


def test_an_image_too_large_to_be_honest_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    data = one_image_set(tmp_path, b"fine.png")
    with pytest.raises(SampleError, match="line 3: cannot read image fine.png: .*bomb"):
        data[0, 1]


FORMATS = ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF"]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.filterwarnings("ignore")
def test_damaged_images_give_a_sample_or_a_sample_error(tmp_path, form):
    if form in ("WEBP", "AVIF") and not features.check(form.lower()):
        pytest.skip(f"this Pillow reads no {form}")
    draw = random.Random(0)
    buffer = BytesIO()
    Image.frombytes("RGB", (20, 24), draw.randbytes(1440)).save(buffer, form)
    data = one_image_set(tmp_path, b"damaged", evaluation)
    failures = 0
    for i in range(150):
        content = bytearray(buffer.getvalue())
        if i % 3 == 0:
            content = content[: draw.randrange(len(content))]
        for _ in range(min(i % 4, len(content))):
            content[draw.randrange(draw.choice([min(len(content), 200), len(content)]))] = (
                draw.randrange(256)
            )
        (tmp_path / "damaged").write_bytes(content)
        try:
            assert data[0, 1][0].shape == (3, 8, 8)
        except SampleError as error:
            failures += 1
            assert len(str(error).splitlines()) == 1 and "line 3" in str(error)
    assert failures


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused_without_being_decoded(tmp_path):
    header = b"P6 %d %d 255\n"
    for name, width, height in (("wide", 60_000, 60_000), ("large", 10_000, 9_000)):
        (tmp_path / name).write_bytes(header % (width, height))
    (tmp_path / "list.txt").write_text("wide 0\nlarge 0\n")
    data = ListDataset(str(tmp_path / "list.txt"), str(tmp_path), None, num_classes=1)
    for index in range(2):
        with pytest.raises(SampleError, match="bomb"):
            data[0, index]


def test_formats_whose_readers_start_programs_are_refused(tmp_path):
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    (tmp_path / "a.jpg").write_bytes(script)
    (tmp_path / "list.txt").write_text("a.jpg 0\n")
    data = ListDataset(str(tmp_path / "list.txt"), str(tmp_path), None, num_classes=1)
    with pytest.raises(SampleError, match="cannot identify"):
        data[0, 0]


def test_what_is_no_regular_file_is_refused_without_being_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "list.txt").write_text("pipe.jpg 0\nfolder.jpg 0\n")
    data = ListDataset(str(tmp_path / "list.txt"), str(tmp_path), None, num_classes=1)
    for index in range(2):
        with pytest.raises(SampleError, match="not a regular file"):
            data[0, index]


def test_paths_outside_can_be_allowed(tmp_path, tiny_config_file):
    (tmp_path / "data").mkdir()
    (tmp_path / "a.jpg").write_bytes(picture(0))
    (tmp_path / "data" / "link.jpg").symlink_to("../a.jpg")
    lines = f"../a.jpg 0\n{tmp_path}/a.jpg 0\nlink.jpg 0\n"
    (tmp_path / "data" / "val_list.txt").write_text(lines)
    config = configured(tiny_config_file, tmp_path / "data", "DATA.ALLOW_OUTSIDE", True)
    data = get_dataset(config, False)
    assert all(np.array_equal(data[0, i][0], data[0, 0][0]) for i in range(3))
    with pytest.raises(InputError, match=r"DATA\.ALLOW_OUTSIDE"):
        get_dataset(configured(tiny_config_file, tmp_path / "data"), False)
