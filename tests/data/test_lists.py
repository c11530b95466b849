"""List files as people really have them."""

import os

import numpy as np
import pytest
from data_sets import configured, small

from replknet_paddle.data.dataset import ListDataset, get_dataset
from replknet_paddle.data.lists import read_list
from replknet_paddle.runtime.errors import InputError


def parse(tmp_path, content: bytes, num_classes=1000):
    """[(path, label, line number)] of a list file's content."""
    file = tmp_path / "list.txt"
    file.write_bytes(content)
    paths, ends, lines, labels = read_list(str(file), num_classes)
    starts = [0, *ends[:-1]]
    return [
        (paths[start:end], int(label), int(line))
        for start, end, label, line in zip(starts, ends, labels, lines)
    ]


@pytest.mark.parametrize(
    "line, path, label",
    [
        (b"train/a.jpg 3", b"train/a.jpg", 3),
        (b"train/a.jpg\t3", b"train/a.jpg", 3),
        (b"train/a.jpg \t  3", b"train/a.jpg", 3),
        (b"train/a.jpg 3   ", b"train/a.jpg", 3),
        (b"train/a.jpg 3\t", b"train/a.jpg", 3),
        (b"  train/a.jpg 3", b"train/a.jpg", 3),
        (b"great white shark/my photo.jpg 3", b"great white shark/my photo.jpg", 3),
        (b"two  spaces\tand a tab.jpg 3", b"two  spaces\tand a tab.jpg", 3),
        (b"a 7 3", b"a 7", 3),
        (b"a.jpg 003", b"a.jpg", 3),
        (b"a.jpg 0", b"a.jpg", 0),
        (b"a.jpg 999", b"a.jpg", 999),
        (b"caf\xc3\xa9/\xe5\x9b\xbe.jpg 3", b"caf\xc3\xa9/\xe5\x9b\xbe.jpg", 3),
        (b"latin-1 caf\xe9.jpg 3", b"latin-1 caf\xe9.jpg", 3),
        (b"a..b/c...jpg 3", b"a..b/c...jpg", 3),
        (b"./a.jpg 3", b"./a.jpg", 3),
        (b'"quoted".jpg 3', b'"quoted".jpg', 3),
        (b"a,b.jpg 3", b"a,b.jpg", 3),
        (b"# no comment.jpg 3", b"# no comment.jpg", 3),
    ],
)
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_the_label_is_what_follows_the_last_white_space(tmp_path, line, path, label, end):
    assert parse(tmp_path, line + end) == [(path, label, 1)]


def test_blank_lines_count_and_give_no_image(tmp_path):
    content = b"\n  \na.jpg 1\r\n\r\n\t\nb.jpg 2\n\n"
    assert parse(tmp_path, content) == [(b"a.jpg", 1, 3), (b"b.jpg", 2, 6)]


@pytest.mark.parametrize("rest", [b"a.jpg 1\nb.jpg 2\n", b"\r\na.jpg 1\r\nb.jpg 2"])
def test_a_byte_order_mark_is_no_part_of_the_first_path(tmp_path, rest):
    assert [image[:2] for image in parse(tmp_path, b"\xef\xbb\xbf" + rest)] == [
        (b"a.jpg", 1),
        (b"b.jpg", 2),
    ]


def test_a_list_names_an_image_as_often_as_it_does(tmp_path):
    assert len(parse(tmp_path, b"a.jpg 1\na.jpg 1\na.jpg 2\n")) == 3


@pytest.mark.parametrize(
    "line, says",
    [
        (b"a.jpg", "expected a path and a label, got 'a.jpg'"),
        (b"3", "expected a path and a label"),
        (b"my photo.jpg", "'photo.jpg'"),
        (b"a.jpg three", "'three'"),
        (b"a.jpg 1.0", "'1.0'"),
        (b"a.jpg 1e2", "'1e2'"),
        (b"a.jpg 0x1", "'0x1'"),
        (b"a.jpg 1_0", "'1_0'"),
        (b"a.jpg,3", "expected a path and a label"),
        (b"a.jpg \xd9\xa3", "label"),
        (b"a.jpg -1", "label -1 is outside [0, 10)"),
        (b"a.jpg 10", "label 10 is outside [0, 10); MODEL.NUM_CLASSES"),
        (b"a.jpg 99999999999999999999999", "outside [0, 10)"),
        pytest.param(b"a.jpg " + b"9" * 5000, "label", id="5000 digits"),
        (b"../a.jpg 3", "'../a.jpg 3'"),
        (b"x/../a.jpg 3", "inside the data folder"),
        (b"x/.. 3", "inside the data folder"),
        (b"/etc/passwd 3", "relative"),
        (b"//a.jpg 3", "relative"),
        (b"a\0.jpg 3", "path"),
    ],
)
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_wrong_line_is_named_by_file_and_number(tmp_path, line, says, end):
    with pytest.raises(InputError) as caught:
        parse(tmp_path, b"fine.jpg 0" + end + end + line + end, num_classes=10)
    [message] = str(caught.value).splitlines()
    assert message.startswith(f"{tmp_path / 'list.txt'}, line 3: ")
    assert says in message and len(message) < 1000


def test_several_wrong_lines_are_reported_together(tmp_path):
    with pytest.raises(InputError) as caught:
        parse(tmp_path, b"a\nb.jpg 1\n\nc.jpg x\nd.jpg 9\ne.jpg 2\n../f 1\n", num_classes=3)
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0].rsplit(" ")[-1] for line in lines] == ["1", "4", "5", "7"]


def test_a_list_that_is_wrong_throughout_does_not_flood(tmp_path):
    with pytest.raises(InputError) as caught:
        parse(tmp_path, b"a.jpg 5\n" * 10_000, num_classes=5)
    assert len(str(caught.value).splitlines()) <= 11


@pytest.mark.parametrize("content", [b"", b"\n\n", b"  \r\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
def test_a_list_without_images_is_refused(tmp_path, content):
    with pytest.raises(InputError, match=r"list\.txt lists no image"):
        parse(tmp_path, content)


def test_paths_and_line_numbers_of_images(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"\none two.jpg 1\nth\xe9.jpg 0\n\nf.jpg 1\n")
    data = ListDataset(str(tmp_path / "list.txt"), str(tmp_path), small, num_classes=2)
    assert len(data) == 3
    assert [data.path(i) for i in range(3)] == ["one two.jpg", os.fsdecode(b"th\xe9.jpg"), "f.jpg"]
    assert data.labels.tolist() == [1, 0, 1] and data.labels.dtype == np.int64


@pytest.mark.parametrize("is_train, name", [(True, "train_list.txt"), (False, "val_list.txt")])
def test_a_missing_folder_or_list_says_what_to_prepare(tmp_path, tiny_config_file, is_train, name):
    nowhere = tmp_path / "nowhere"
    with pytest.raises(FileNotFoundError) as caught:
        get_dataset(configured(tiny_config_file, nowhere), is_train)
    assert str(caught.value).startswith(f"no data folder {nowhere}; ")
    with pytest.raises(FileNotFoundError) as caught:
        get_dataset(configured(tiny_config_file, tmp_path), is_train)
    assert str(caught.value).startswith(f"no list file {tmp_path / name}; ")
    for part in ("-data_path", "train_list.txt", "val_list.txt", "class"):
        assert part in str(caught.value)


def test_a_file_in_place_of_the_folder_and_a_folder_in_place_of_the_list(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="no data folder"):
        ListDataset(str(tmp_path / "file"), str(tmp_path / "file"), small, num_classes=2)
    with pytest.raises(FileNotFoundError, match="no list file"):
        ListDataset(str(tmp_path), str(tmp_path), small, num_classes=2)
