"""List files as people really have them: labelled images, and pairs of images."""

import io
import os
from functools import partial

import numpy as np
import pytest
from data_sets import configured, small
from hypothesis import example, given
from hypothesis import strategies as st
from properties import same_examples

from replknet_paddle.data import lists
from replknet_paddle.data.dataset import ListDataset, get_dataset
from replknet_paddle.data.lists import (
    parse_labelled,
    parse_list,
    parse_pair,
    read_list,
    scan_labelled,
)
from replknet_paddle.runtime.errors import InputError


def read(tmp_path, content: bytes, parse, *scan, **options):
    """[(path, label, line number)] of a list file's content."""
    file = tmp_path / "list.txt"
    file.write_bytes(content)
    paths, ends, lines, labels = read_list(str(file), parse, *scan, **options)
    starts = [0, *ends[:-1]]
    return [
        (bytes(paths[start:end]), int(label), int(line))
        for start, end, label, line in zip(starts, ends, labels, lines)
    ]


def labelled(num_classes=1000):
    return partial(parse_labelled, num_classes=num_classes, allow_outside=False)


PAIRS = partial(parse_pair, allow_outside=False)


def is_path(path: bytes, *, spaces: bool) -> bool:
    """Whether a line can hold this path."""
    inside = path.strip() and not path.startswith(b"/") and b".." not in path.split(b"/")
    ends = path == path.strip() and not path.startswith(b"\xef\xbb\xbf")
    return bool(inside and ends and not set(path) & set(b"\0\n" if spaces else b"\0\n\r\t \v\f"))


SPACE = st.text(" \t", min_size=1, max_size=3).map(str.encode)
ENDS = st.sampled_from([b"\n", b"\r\n", b" \n", b"\t\r\n", b"\n\n \n"])
PATHS = st.binary(min_size=1, max_size=40) | st.text(min_size=1, max_size=20).map(
    lambda text: text.encode("utf-8", "surrogatepass")
)


@same_examples
@given(
    st.lists(
        st.tuples(
            PATHS.filter(partial(is_path, spaces=True)), SPACE, st.integers(0, 999), SPACE, ENDS
        ),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from([b"", b"\xef\xbb\xbf", b"\n", b"\xef\xbb\xbf\r\n"]),
)
@example([(b"my photo 7", b" ", 3, b"", b"\n"), (b'#"a, b"..c', b"\t", 9, b" ", b"\n")], b"")
def test_the_label_is_what_follows_the_last_white_space(tmp_path, entries, start):
    content, expected = start, []
    for path, between, label, before, end in entries:
        expected.append((path, label, content.count(b"\n") + 1))
        content += before + path + between + b"%03d" % label + end
    if start.endswith(b"\xbf"):  # the mark is part of the first line, in front of white space
        content = start + content[len(start) :].lstrip()
    assert read(tmp_path, content, labelled()) == expected


@same_examples
@given(PATHS, PATHS, st.sampled_from([b"\t", b" \t ", b" ", b"  "]))
def test_a_pair_is_two_paths_with_a_tab_where_they_hold_spaces(tmp_path, image, labels, between):
    spaces = b"\t" in between
    for path in (image, labels):
        if not is_path(path, spaces=spaces) or b"\t" in path:
            return
    [(path, _, _)] = read(tmp_path, image + between + labels + b"\r\n", PAIRS)
    assert path.split(b"\t") == [image, labels]


@same_examples
@given(
    st.lists(
        st.binary(max_size=40)
        | st.builds(lambda *parts: b" ".join(parts), PATHS, PATHS)
        | st.builds(lambda path, label: b"%b %d" % (path, label), PATHS, st.integers()),
        max_size=14,
    )
)
def test_any_line_is_an_image_inside_or_a_problem_with_its_number(tmp_path, lines):
    file = tmp_path / "list.txt"
    file.write_bytes(b"\n".join(lines))
    for parse in (labelled(10), PAIRS):
        if looks_like_utf16(file.read_bytes()):
            with pytest.raises(InputError, match="UTF-16"):
                read_list(str(file), parse)
            continue
        good = [line for line in parse_list(str(file), parse) if not line.problem]
        bad = [line for line in parse_list(str(file), parse) if line.problem]
        for line in good:
            assert 0 <= line.label < 10
            for path in line.path.split(b"\t") if parse is PAIRS else [line.path]:
                assert path and not path.startswith(b"/") and b".." not in path.split(b"/")
        if good and not bad:
            assert len(read_list(str(file), parse)[0]) == sum(len(line.path) for line in good)
            continue
        with pytest.raises(InputError) as caught:
            read_list(str(file), parse)
        messages = str(caught.value).splitlines()
        assert len(messages) == min(10, len(bad)) or (not bad and "lists no image" in messages[0])
        for line, message in zip(bad, messages):
            assert message.startswith(f"{file}, line {line.number}: ") and len(message) < 1000
            assert message.isprintable()


def looks_like_utf16(content: bytes) -> bool:
    head = content[: io.DEFAULT_BUFFER_SIZE]
    return head.startswith((b"\xff\xfe", b"\xfe\xff")) or head.count(b"\0") > len(head) / 16


# What decides on the way that a line is read, and on its label.
TRICKY_LINES = st.builds(
    lambda *parts: b"".join(parts),
    st.sampled_from([b"", b"", b" ", b"\t", b"\xef\xbb\xbf"]),
    st.sampled_from([b"", b"a", b"x/y.jpg", b"x y", b"x\ry", b"x\\y", b"..", b"../x", b"x/..z"])
    | st.sampled_from([b"/", b"/x", b"-", b"\0" + b"z" * 40]),
    st.sampled_from([b" ", b" ", b"\t", b"  ", b"\v", b"", b"\xe2\x80\xa8"]),
    st.sampled_from(
        [b"0", b"007", b"9", b"10", b"", b"-1", b"x", b"9" * 9, b"9" * 10, b"\xd9\xa3"]
    ),
    st.sampled_from([b"\n", b"\n", b"\r\n", b"\r\r\n", b" \n", b"\n\n", b""]),
)


@same_examples
@given(
    st.lists(TRICKY_LINES, min_size=1, max_size=6).map(b"".join),
    st.integers(1, 60),
    st.sampled_from([None, 10]),
    st.booleans(),
)
@example(b"x/y.jpg 10\n", 60, 10, False)
@example(b"a 1\nx\0" + b"z" * 40 + b" 1\n", 60, 10, True)
@example(b"a 1\n/x 1\n", 60, None, False)
@example(b"a 1\nx \n", 60, None, False)
def test_lists_are_read_in_blocks_as_they_are_line_by_line(
    tmp_path, content, block_bytes, num_classes, allow_outside
):
    """With the same paths, labels, line numbers and problems, wherever a block ends."""
    options = {"num_classes": num_classes, "allow_outside": allow_outside}
    lines = [
        parse_labelled(line, **options)._replace(number=number)
        for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1)
        if line.strip()
    ]
    good = [(line.path, line.label, line.number) for line in lines if not line.problem]
    problems: list = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lists, "BLOCK_BYTES", block_bytes)
        arguments = partial(parse_labelled, **options), partial(scan_labelled, **options)
        if looks_like_utf16(content) or not lines:
            with pytest.raises(InputError, match="UTF-16|lists no image"):
                read(tmp_path, content, *arguments)
            return
        assert read(tmp_path, content, *arguments, problems=problems) == good
    assert problems == [line for line in lines if line.problem]


def test_the_usual_lines_are_scanned_and_not_parsed_one_by_one():
    lines = [b"train/n01440764/n01440764_10026.JPEG 0", b"val/a b.jpg 12", "猫/1.jpg\t3".encode()]
    for end in (b"\n", b"\r\n"):
        block = b"".join(line + end for line in lines)
        paths, ends, labels = scan_labelled(block, 21_841, allow_outside=False)
        assert np.split(np.frombuffer(paths, "S1"), ends)[1].tobytes() == b"val/a b.jpg"
        assert labels.tolist() == [0, 12, 3]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_a_list_in_utf16_is_named_so(tmp_path, encoding):
    for text in ("train/a.jpg 0\ntrain/b.jpg 1\n", "训练/猫/图.jpg 0\r\n"):
        for parse in (labelled(), PAIRS):
            with pytest.raises(InputError, match="list.txt seems to be text in UTF-16.*UTF-8$"):
                read(tmp_path, text.encode(encoding), parse)


NO_NUMBERS = (b"three", b"photo.jpg", b"1.0", b"1e2", b"0x1", b"1_0")


@pytest.mark.parametrize(
    "line, says",
    [
        (b"a.jpg", "expected a path and a label, got 'a.jpg'"),
        (b"a.jpg,3", "expected a path and a label"),
        *((b"a.jpg %b" % text, f"'{text.decode()}'") for text in NO_NUMBERS),
        (b"a.jpg \xd9\xa3", "label"),
        (b"a.jpg -1", "label -1 is outside [0, 10)"),
        (b"a.jpg 10", "label 10 is outside [0, 10); MODEL.NUM_CLASSES"),
        pytest.param(b"a.jpg " + b"9" * 5000, "outside [0, 10)", id="5000 digits"),
        (b"../a.jpg 3", "'../a.jpg 3'"),
        (b"x/../a.jpg 3", "inside the data folder"),
        (b"x/.. 3", "inside the data folder"),
        (b"/etc/passwd 3", "relative"),
        (b"a\0.jpg 3", "a path cannot hold a NUL byte"),
    ],
)
def test_a_wrong_line_is_named_by_file_and_number(tmp_path, line, says):
    with pytest.raises(InputError) as caught:
        read(tmp_path, b"fine.jpg 0\n\n" + line + b"\n", labelled(10))
    [message] = str(caught.value).splitlines()
    assert message.startswith(f"{tmp_path / 'list.txt'}, line 3: ")
    assert says in message and len(message) < 1000


@pytest.mark.parametrize(
    "line, says",
    [
        (b"a.png", "expected the paths of an image and of its labels, with a tab .* got 'a.png'"),
        (b"a.png b.png c.png", "expected the paths"),
        (b"a b.png\t", "expected the paths"),
        (b"../a.png al.png", "paths must be relative and stay inside .*, got '../a.png al.png'"),
        (b"a.png /etc/passwd", "paths must be relative and stay inside"),
        (b"a.png b\0.png", "a path cannot hold a NUL byte"),
    ],
)
def test_a_wrong_pair_is_named_by_file_and_number(tmp_path, line, says):
    with pytest.raises(InputError, match=f"list.txt, line 2: {says}"):
        read(tmp_path, b"a.png b.png\n" + line + b"\n", PAIRS)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"  \r\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
def test_a_list_without_images_is_refused(tmp_path, content):
    for parse in (labelled(), PAIRS):
        with pytest.raises(InputError, match="lists no image"):
            read(tmp_path, content, parse)


def test_a_dataset_knows_the_paths_and_labels_of_its_list(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"one two.jpg 1\nth\xe9.jpg 0\nf.jpg 1")
    data = ListDataset(str(tmp_path / "list.txt"), str(tmp_path), small, num_classes=2)
    assert len(data) == 3
    assert [data.path(i) for i in range(3)] == ["one two.jpg", os.fsdecode(b"th\xe9.jpg"), "f.jpg"]
    assert data.labels.tolist() == [1, 0, 1] and data.labels.dtype == np.int64
    assert [label for _, label in data.paths_and_labels()] == [1, 0, 1]
    assert data.absent_classes(4) == [2, 3]


@pytest.mark.parametrize("is_train, name", [(True, "train_list.txt"), (False, "val_list.txt")])
def test_a_missing_folder_or_list_says_what_to_prepare(tmp_path, tiny_config_file, is_train, name):
    """Also where a file is in the place of the folder, or a folder in that of the list."""
    (tmp_path / "data" / name).mkdir(parents=True)
    (tmp_path / "file").write_text("")
    for folder, says in (
        ("nowhere", f"no data folder {tmp_path / 'nowhere'}; "),
        ("file", f"no data folder {tmp_path / 'file'}; "),
        ("", f"no list file {tmp_path / name}; "),
        ("data", f"no list file {tmp_path / 'data' / name}; "),
    ):
        with pytest.raises(FileNotFoundError) as caught:
            get_dataset(configured(tiny_config_file, tmp_path / folder), is_train)
        assert str(caught.value).startswith(says)
        for part in ("-data_path", "train_list.txt", "val_list.txt", "class"):
            assert part in str(caught.value)
