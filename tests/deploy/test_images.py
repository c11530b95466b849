"""Finding and decoding people's own files, among which anything may be."""

import contextlib
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import FIXTURES

from replknet_paddle.deploy.images import ImageFiles, decode, image_suffixes
from replknet_paddle.runtime.errors import InputError

PICTURES = sorted((FIXTURES / "images").glob("[!eR]*"))


def make(path, size=(4, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 100, 50)).save(path, "PNG")
    return path


def found(*arguments, **options):
    return sorted(path for path, problem in ImageFiles(map(str, arguments), **options))


@pytest.fixture
def tree(tmp_path):
    for name in ("a.png", "b.JPG", "sub/a.png", "sub/deep/er/c.JpEg", "with space/d é.png"):
        make(tmp_path / name)
    for name in ("notes.txt", "sub/table.csv", "png", "sub/no_suffix"):
        (tmp_path / name).touch()
    return tmp_path


def test_a_folder_is_searched_to_its_depths_for_names_of_images(tree):
    files = ImageFiles([str(tree)])
    names = sorted(os.path.relpath(path, tree) for path, _ in files)
    assert names == ["a.png", "b.JPG", "sub/a.png", "sub/deep/er/c.JpEg", "with space/d é.png"]
    assert files.other_files == 4
    assert files.count() == 5


def test_a_pattern_stands_for_the_files_it_matches(tree):
    assert found(tree / "**" / "a.png") == [str(tree / "a.png"), str(tree / "sub" / "a.png")]
    assert found(tree / "*") == sorted(
        str(tree / n) for n in ("a.png", "b.JPG", "notes.txt", "png")
    )


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    path = make(tmp_path / "[1].png")
    make(tmp_path / "1.png")
    assert found(path) == [str(path)]


def test_a_file_that_is_named_is_taken_whatever_its_name(tree):
    assert found(tree / "notes.txt", tree / "a.png", tree / "a.png") == sorted(
        [str(tree / "a.png")] * 2 + [str(tree / "notes.txt")]
    )


def test_links_to_files_count_and_links_to_folders_do_not(tree):
    (tree / "sub" / "link.png").symlink_to(tree / "a.png")
    (tree / "sub" / "up").symlink_to(tree)  # would never end
    assert len(found(tree)) == 6
    assert len(found(tree / "sub" / "up")) == 6  # unless it is what was asked for


def test_the_folder_that_pictures_go_to_is_left_out(tree):
    out = tree / "sub" / "out"
    make(out / "drawn.png")
    assert len(found(tree)) == 6
    assert len(found(tree, leave_out=str(out))) == 5
    (tree / "link").symlink_to(out)
    assert len(found(tree, leave_out=str(tree / "link"))) == 5


def test_pipes_are_not_waited_for(tree):
    os.mkfifo(tree / "pipe.png")
    assert len(found(tree)) == 6
    with pytest.raises(InputError, match="not a regular file"):
        decode(tree / "pipe.png")


@pytest.mark.parametrize(
    "argument, says",
    [
        ("empty", "no image in the folder"),
        ("texts", "it holds 2 other files"),
        ("nowhere", "no image, folder or pattern"),
        ("*.gif", "no file matches"),
    ],
)
def test_what_stands_for_no_image_is_an_error_that_names_it(tree, argument, says):
    (tree / "empty").mkdir()
    for name in ("texts/a.txt", "texts/below/b.md"):
        (tree / name).parent.mkdir(exist_ok=True, parents=True)
        (tree / name).touch()
    with pytest.raises((InputError, FileNotFoundError), match=says) as caught:
        ImageFiles([str(tree), str(tree / argument)]).count()
    assert str(tree / argument) in str(caught.value)


@contextlib.contextmanager
def as_nobody():
    """Not being root, whom no permissions stop."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_without_permission_is_an_error_or_reported_among_the_files():
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others
        os.chmod(folder, 0o755)
        picture = make(Path(folder) / "a.png")
        closed = Path(folder) / "closed"
        make(closed / "b.png")
        closed.chmod(0o000)
        with as_nobody():
            if not os.access(folder, os.R_OK, effective_ids=True):
                pytest.skip(f"{folder} lies in a folder that others cannot enter")
            files = list(ImageFiles([folder]))
            with pytest.raises(InputError, match=f"{closed}: cannot list the folder: Permission"):
                ImageFiles([str(closed)]).count()
            assert ImageFiles([folder]).count() == 1
        closed.chmod(0o755)
    assert sorted(files, key=str) == [
        (str(picture), None),
        (str(closed), "cannot list the folder: Permission denied"),
    ]


def test_files_come_in_sorted_order(tmp_path):
    names = ["b.png", "a/z.png", "a/c/1.png", "c.png", "a/b.png", "10.png", "9.png", "b/x.png"]
    for name in names:
        make(tmp_path / name)
    wanted = ["10.png", "9.png", "a/b.png", "a/c/1.png", "a/z.png", "b/x.png", "b.png", "c.png"]
    files = [os.path.relpath(path, tmp_path) for path, _ in ImageFiles([str(tmp_path)])]
    assert sorted(files) == sorted(names) and files.index("9.png") == 1
    assert (
        files
        == sorted(files, key=lambda name: name.split("/"))
        == sorted(wanted, key=lambda name: name.split("/"))
    )
    pattern = [path for path, _ in ImageFiles([str(tmp_path / "*.png")])]
    assert pattern == sorted(pattern) and len(pattern) == 4


def test_one_folder_is_listed_at_a_time(tmp_path, monkeypatch):
    for name in ("a/1.png", "b/2.png"):
        make(tmp_path / name)
    listed, real = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: listed.append(folder) or real(folder))
    files = iter(ImageFiles([str(tmp_path)]))
    next(files)
    assert listed == [str(tmp_path), str(tmp_path / "a")]


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_decoding_gives_the_pixels_that_pillow_gives(path):
    with Image.open(path) as expected:
        decoded = decode(path)
        assert decoded.mode == expected.mode
        np.testing.assert_array_equal(np.asarray(decoded), np.asarray(expected))


def test_arrays_and_pillow_images_are_taken_as_they_are():
    array = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype("uint8")
    np.testing.assert_array_equal(np.asarray(decode(array)), array)
    image = Image.fromarray(array)
    assert decode(image) is image


@pytest.mark.parametrize(
    "source",
    [
        np.zeros((5, 7, 3), "float32"),
        np.zeros((5, 7), "uint8"),
        np.zeros((3, 5, 7), "uint8"),
        np.zeros((5, 7, 4), "uint8"),
        np.zeros((0, 7, 3), "uint8"),
        b"bytes",
        None,
        7,
    ],
    ids=lambda source: str(getattr(source, "shape", source)),
)
def test_other_arrays_and_things_are_refused_with_what_is_allowed(source):
    with pytest.raises(InputError, match=r"allowed: .*\(height, width, 3\) of uint8"):
        decode(source)


def bad_files(folder):
    """{file: part of the message}."""
    good = (FIXTURES / "images" / "landscape_499x375.jpg").read_bytes()
    png = (FIXTURES / "images" / "palette_220x200.png").read_bytes()
    contents = {
        "text.jpg": (b"no picture", "cannot identify it as any of JPEG, PNG"),
        "empty.png": (b"", "cannot identify it as any of JPEG, PNG"),
        "cut.jpg": (good[:5000], "truncated"),
        "cut.png": (png[:500], "truncated"),
        "damaged.png": (png[:60] + b"\xff" * 40 + png[100:], ""),
        # A program: Pillow would have Ghostscript run it.
        "program.eps": (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n",
            "cannot identify it as any of JPEG, PNG",
        ),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    (folder / "folder.png").mkdir()
    (folder / "dangling.png").symlink_to(folder / "nowhere")
    Image.new("1", (20_000, 20_000)).save(folder / "huge.png")
    Image.new("1", (10_000, 10_000)).save(folder / "large.png")
    return {name: says for name, (_, says) in contents.items()} | {
        "folder.png": "not a regular file",
        "dangling.png": "No such file or directory",
        "nowhere.png": "No such file or directory",
        "huge.png": "400000000 pixels",
        "large.png": "10000 x 10000 pixels may be a decompression bomb; allowed: 89,478,485",
    }


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_cannot_be_decoded_is_an_input_error_that_says_why(tmp_path):
    for name, says in bad_files(tmp_path).items():
        with pytest.raises(InputError) as caught:
            decode(tmp_path / name)
        assert says.lower() in str(caught.value).lower(), name
        assert str(caught.value), name


@pytest.mark.filterwarnings(
    "ignore::UserWarning:PIL.*", "ignore::PIL.Image.DecompressionBombWarning"
)
def test_damage_of_any_kind_is_an_input_error(tmp_path):
    """Random bytes changed in files of several formats: decoded or refused, never another error."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (24, 24, 3)).astype("uint8"))
    refused = 0
    for suffix in (".png", ".jpg", ".gif", ".bmp", ".tiff", ".webp", ".ppm"):
        path = tmp_path / f"picture{suffix}"
        picture.save(path)
        content = path.read_bytes()
        for _ in range(40):
            damaged = np.frombuffer(content, "uint8").copy()
            damaged[rng.integers(0, min(len(damaged), 300), 3)] = rng.integers(0, 256, 3)
            path.write_bytes(damaged.tobytes())
            try:
                decode(path)
            except InputError:
                refused += 1
    assert refused > 40


def test_folders_are_searched_for_the_usual_suffixes_and_not_for_programs():
    suffixes = image_suffixes()
    assert {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tif", ".tiff", ".webp"} <= suffixes
    assert not suffixes & {".eps", ".ps", ".txt", ".py", ".pdf", ".mp4", ".mpg", ".h5", ".csv"}


@pytest.mark.skipif(sys.platform != "linux", reason="needs names of files that are any bytes")
def test_names_that_are_no_text_are_found_and_decoded(tmp_path):
    name = os.path.join(os.fsencode(tmp_path), b"\xff\xfe.png")
    os.rename(make(tmp_path / "x.png"), name)
    (path,) = found(tmp_path)
    assert os.fsencode(path) == name
    assert decode(path).size == (4, 3)
