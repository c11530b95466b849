"""Finding and decoding people's own pictures and films, among which anything may be."""

import contextlib
import json
import os
import struct
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from harness import make_run
from PIL import Image
from tiny import FIXTURES, command

from replknet_paddle.data.make_lists import image_suffixes
from replknet_paddle.deploy.images import (
    ImageFiles,
    count_frames,
    decode,
    frames,
)
from replknet_paddle.runtime.errors import InputError

main = command("predict")
FPS = 10
FRAMES = 35
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
    assert files.passed_over == {".txt": 1, ".csv": 1, "without a suffix": 2}
    assert files.count() == 5


@pytest.mark.parametrize(
    "arguments, names",
    [
        (["**/a.png"], ["a.png", "sub/a.png"]),
        (["*"], ["a.png", "b.JPG", "notes.txt", "png"]),
        (["[1].png"], ["[1].png"]),  # a file of this name
        (["notes.txt", "a.png", "a.png"], ["a.png", "a.png", "notes.txt"]),  # whatever its name
    ],
)
def test_what_arguments_stand_for(tree, arguments, names):
    for name in ("sub/[1].png", "sub/1.png"):
        make(tree / name)
    if arguments == ["[1].png"]:
        tree = tree / "sub"
    assert found(*(tree / name for name in arguments)) == [str(tree / name) for name in names]


def test_a_list_stands_for_the_images_of_its_lines_where_lists_are_read(tree):
    (tree / "sub" / "up.png").symlink_to(tree / "a.png")
    lines = "a.png 3\nno label\n\n../a.png 1\ndeep/er/c.JpEg\t12\ngone.png 0\nup.png 2"
    (tree / "sub" / "list.txt").write_text(lines)
    path = str(tree / "sub" / "list.txt")
    assert list(ImageFiles([path])) == [(path, None)]
    files = ImageFiles([path], reads_lists=True)
    problems = [
        f"line {n} of {path} leads out of the list's folder, maybe by a link; name the images or "
        "their folder instead"
        for n in (4, 7)
    ]
    assert list(files) == [
        (f"{tree}/sub/a.png", None, 3),
        (f"{path}, line 2", "no label after the path: 'no label' ends with 'label'"),
        (f"{tree}/sub/../a.png", problems[0], 1),
        (f"{tree}/sub/deep/er/c.JpEg", None, 12),
        (f"{tree}/sub/gone.png", "no such file or directory", 0),
        (f"{tree}/sub/up.png", problems[1], 2),
    ]
    assert files.count() == 2 and files.highest == (12, f"{tree}/sub/deep/er/c.JpEg")
    assert found(tree / "su[b]" / "*.txt", reads_lists=True) == [path]  # of a pattern, a file


def test_links_to_files_count_and_links_to_folders_do_not(tree):
    (tree / "sub" / "link.png").symlink_to(tree / "a.png")
    (tree / "sub" / "up").symlink_to(tree)  # would never end
    assert len(found(tree)) == 6
    assert len(found(tree / "sub" / "up")) == 6  # unless it is what was asked for


def test_the_folder_that_pictures_go_to_is_left_out(tree):
    out = tree / "sub" / "out"
    make(out / "drawn.png")
    assert len(found(tree)) == 6
    assert len(found(tree, leave_out=[str(out)])) == 5
    (tree / "link").symlink_to(out)
    assert len(found(tree, leave_out=[str(tree / "link")])) == 5


def test_a_folder_without_images_says_what_it_holds(tree):
    for name in ("texts/a.txt", "texts/below/b.md"):
        (tree / name).parent.mkdir(exist_ok=True, parents=True)
        (tree / name).touch()
    says = f"no image in the folder {tree / 'texts'}; passed over 2 files"
    with pytest.raises(InputError, match=says):
        ImageFiles([str(tree), str(tree / "texts")]).count()


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
    names = ["10.png", "9.png", "a/b.png", "a/c/1.png", "a/z.png", "b/x.png", "b.png", "c.png"]
    for name in reversed(names):
        make(tmp_path / name)
    files = [os.path.relpath(path, tmp_path) for path, _ in ImageFiles([str(tmp_path)])]
    assert files == sorted(names, key=lambda name: name.split("/"))
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


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_cannot_be_decoded_is_an_input_error_that_says_why(tmp_path):
    good = (FIXTURES / "images" / "landscape_499x375.jpg").read_bytes()
    png = (FIXTURES / "images" / "palette_220x200.png").read_bytes()
    # A program: Pillow would have Ghostscript run it.
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    contents = {"empty.png": b"", "cut.jpg": good[:5000], "cut.png": png[:500],
                "damaged.png": png[:60] + b"\xff" * 40 + png[100:], "program.eps": eps}  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "large.png")
    for name, says in {
        "empty.png": "cannot identify it as any of JPEG, PNG",
        "cut.jpg": "truncated",
        "cut.png": "truncated",
        "damaged.png": ".",
        "program.eps": "cannot identify it as any of JPEG, PNG",
        "folder.png": "not a regular file",
        "pipe.png": "not a regular file",
        "dangling.png": "No such file or directory",
        "huge.png": "400000000 pixels",
        "large.png": "10000 x 10000 pixels may be a decompression bomb; allowed: 89,478,485",
    }.items():
        with pytest.raises(InputError, match=f"(?i){says}"):
            decode(tmp_path / name)


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


# ---- films


@pytest.fixture(scope="module")
def cv2():
    return pytest.importorskip(
        "cv2", reason="OpenCV is not installed (requirements/video.txt)", exc_type=ImportError
    )


@pytest.fixture(scope="module", params=["film.avi", "Film.MP4"])
def film(request, cv2, tmp_path_factory):
    """A film of 3.5 seconds, whose frame i has 7 i of red and none of green and blue."""
    path = tmp_path_factory.mktemp("films") / request.param
    code = cv2.VideoWriter_fourcc(*("MJPG" if path.suffix == ".avi" else "mp4v"))
    writer = cv2.VideoWriter(str(path), code, FPS, (64, 48))
    for i in range(FRAMES):
        pixels = np.zeros((48, 64, 3), "uint8")
        pixels[..., 2] = 7 * i  # OpenCV's order is blue, green, red
        writer.write(pixels)
    writer.release()
    return str(path)


@pytest.mark.parametrize(
    "every, numbers",
    [(1, [0, 10, 20, 30]), (0.25, [0, 3, 5, 8, 10, 13, 15, 18, 20, 23, 25, 28, 30, 33]),
     (0, range(FRAMES)), (0.1, range(FRAMES)), (100, [0])],
)  # fmt: skip
def test_a_frame_is_taken_every_so_often_with_its_time_and_colours(film, every, numbers):
    taken = list(frames(film, every))
    assert [frame.path for frame in taken] == [f"{film}#t={i / FPS:.2f}" for i in numbers]
    for frame, i in zip(taken, numbers):
        assert frame.pixels.shape == (48, 64, 3) and frame.pixels.dtype == np.uint8
        red, green, blue = frame.pixels.reshape(-1, 3).mean(axis=0)
        assert red == pytest.approx(7 * i, abs=6) and max(green, blue) < 8
    assert count_frames(film, every) == len(taken)


def element(number: str, *content) -> bytes:
    """An element of Matroska: numbers, text, bytes, or elements within it."""
    parts = []
    for part in content:
        if isinstance(part, int):
            part = part.to_bytes(8, "big")
        elif isinstance(part, float):
            part = struct.pack(">d", part)
        parts.append(part.encode() if isinstance(part, str) else part)
    payload = b"".join(parts)
    return bytes.fromhex(number) + b"\x01" + len(payload).to_bytes(7, "big") + payload


def write_matroska(path, cv2, milliseconds, *, stated_ms: float) -> None:
    """A film of JPEGs at the given times, the i-th of them with 7 (i % 36) of red."""
    clusters = []
    for i, time in enumerate(milliseconds):
        pixels = np.zeros((48, 64, 3), "uint8")
        pixels[..., 2] = 7 * (i % 36)
        jpeg = cv2.imencode(".jpg", pixels)[1].tobytes()
        block = element("a3", b"\x81\0\0\x80" + jpeg)
        clusters.append(element("1f43b675", element("e7", time), block))
    head = element(
        "1a45dfa3", element("4286", 1), element("42f7", 1), element("42f2", 4),
        element("42f3", 8), element("4282", "matroska"), element("4287", 4), element("4285", 2),
    )  # fmt: skip
    info = element("1549a966", element("2ad7b1", 1_000_000), element("4489", float(stated_ms)),
                   element("4d80", "x"), element("5741", "x"))  # fmt: skip
    size = element("e0", element("b0", 64), element("ba", 48))
    track = element("ae", element("d7", 1), element("73c5", 1), element("83", 1),
                    element("86", "V_MJPEG"), size)  # fmt: skip
    segment = element("18538067", info, element("1654ae6b", track), *clusters)
    path.write_bytes(head + segment)


# 30 frames a second for two seconds, then one, and for the last second 10.
VARIABLE_MS = [
    *(round(i * 1000 / 30) for i in range(60)),
    *range(2000, 22000, 1000),
    *range(22000, 23000, 100),
]


@pytest.mark.parametrize(
    "every, taken",
    [
        (1, [0, 30, *range(60, 80), 80]),
        (0, range(90)),
        (0.5, [0, 15, 30, 45, *range(60, 80), 80, 85]),
        (5, [0, 63, 68, 73, 78]),
    ],
)
def test_a_film_of_variable_rate_has_the_times_of_its_frames(cv2, tmp_path, every, taken):
    film = tmp_path / "film.mkv"
    write_matroska(film, cv2, VARIABLE_MS, stated_ms=23000)
    found = list(frames(str(film), every))
    assert [f.path for f in found] == [f"{film}#t={VARIABLE_MS[i] / 1000:.2f}" for i in taken]
    if max(taken) < 36:  # of eight bits
        assert [round(f.pixels[..., 0].mean() / 7) for f in found] == list(taken)


@pytest.mark.parametrize("name", ["film.mkv", "film.avi"])
def test_a_film_that_ends_early_is_a_problem_that_is_counted(cv2, tmp_path, capsys, name):
    path, run = tmp_path / name, tmp_path / "run"
    run.mkdir()
    if name == "film.mkv":
        write_matroska(path, cv2, range(0, 4000, 250), stated_ms=9000)
    else:
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), FPS, (64, 48))
        for i in range(90):
            writer.write(np.full((48, 64, 3), i, "uint8"))
        writer.release()
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    assert main([str(make_run(run) / "best"), str(path)]) == 1
    said = capsys.readouterr().err
    assert "the film ends after" in said and "of 9.0 seconds" in said
    assert "skipped 1" in said


def test_a_film_of_slides_is_whole(cv2, tmp_path):
    write_matroska(tmp_path / "film.mkv", cv2, range(0, 60000, 12000), stated_ms=60000)
    assert len(list(frames(str(tmp_path / "film.mkv"), 0))) == 5


def test_a_film_among_pictures_is_classified_frame_by_frame(film, tmp_path, capsys):
    run = make_run(tmp_path)
    out = tmp_path / "results.jsonl"
    (tmp_path / "broken.mp4").write_text("no film")
    arguments = [str(run), film, str(tmp_path / "broken.mp4"), "-output", str(out)]
    assert main([*arguments, "-backend", "eager"]) == 1
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["path"] for r in records] == [
        *(f"{film}#t={i}.00" for i in range(4)),
        str(tmp_path / "broken.mp4"),
    ]
    assert records[-1]["problem"] == "OpenCV cannot open it as a film"
    assert "classified 4 images, skipped 1" in capsys.readouterr().err


def test_a_grid_is_replaced_where_a_film_is_among_the_pictures(film, tmp_path):
    words = [str(make_run(tmp_path)), film, "-backend=eager", f"-save_grid={tmp_path / 'grid.png'}"]
    assert main(words) == 0
    assert main([*words, "-overwrite"]) == 0


def test_a_folder_does_not_stand_for_its_films(film, tmp_path):
    os.symlink(film, tmp_path / "film.mp4")
    files = ImageFiles([str(tmp_path)], frame_seconds=1)
    assert list(files) == [] and files.passed_over.total() == 1


def test_where_films_are_not_asked_for_a_film_is_a_file_like_any_other(film):
    assert list(ImageFiles([film])) == [(film, None)]
