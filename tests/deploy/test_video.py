"""Frames of real films, written by OpenCV."""

import json
import os
import signal
import struct
import sys

import numpy as np
import pytest
from harness import make_run
from tiny import command

from replknet_paddle.deploy import video
from replknet_paddle.deploy.images import ImageFiles
from replknet_paddle.deploy.video import count_frames, frames, is_film, is_webcam
from replknet_paddle.runtime.errors import InputError

main = command("predict")
FPS = 10
FRAMES = 35


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
    if every:
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


def test_a_whole_film_ends_as_it_says(film):
    list(frames(film, 1))
    assert count_frames(film, 0) == FRAMES


def test_a_film_of_slides_is_whole(cv2, tmp_path):
    write_matroska(tmp_path / "film.mkv", cv2, range(0, 60000, 12000), stated_ms=60000)
    assert len(list(frames(str(tmp_path / "film.mkv"), 0))) == 5


def test_a_film_among_pictures_is_classified_frame_by_frame(film, tmp_path, capsys):
    run = make_run(tmp_path)
    out = tmp_path / "results.jsonl"
    (tmp_path / "broken.mp4").write_text("no film")
    arguments = [str(run), film, str(tmp_path / "broken.mp4"), "--out", str(out)]
    assert main([*arguments, "-backend", "dygraph"]) == 1
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["path"] for r in records] == [
        *(f"{film}#t={i}.00" for i in range(4)),
        str(tmp_path / "broken.mp4"),
    ]
    assert records[-1]["problem"] == "OpenCV cannot open it as a film"
    assert "classified 4 images, skipped 1" in capsys.readouterr().err


def test_a_folder_does_not_stand_for_its_films(film, tmp_path):
    os.symlink(film, tmp_path / "film.mp4")
    files = ImageFiles([str(tmp_path)])
    assert list(files) == [] and files.other_files == 1


def test_a_webcam_goes_on_until_ctrl_c_which_ends_it_well(film, cv2, tmp_path, monkeypatch, capsys):
    """A film that begins again and again stands for the camera; the rest is as with one."""

    class Camera:
        def __init__(self, number):
            assert number == 1
            self.film, self.grabbed = capture(film), 0

        def __getattr__(self, name):
            return getattr(self.film, name)

        def grab(self):
            self.grabbed += 1
            if self.grabbed == 50:
                os.kill(os.getpid(), signal.SIGINT)
            if not self.film.grab():
                self.film = capture(film)
                return self.film.grab()
            return True

    capture = cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    run, out = make_run(tmp_path), tmp_path / "results.csv"
    before = signal.getsignal(signal.SIGINT)
    flags = ["--every=0", "--out", str(out), "-backend=dygraph"]
    assert main([str(run), "webcam:1", *flags]) == 0
    rows = out.read_text().splitlines()
    assert len(rows) > 30 and rows[1].startswith("webcam:1#t=0.")
    assert signal.getsignal(signal.SIGINT) == before
    assert "skipped 0" in capsys.readouterr().err


def test_without_a_webcam_it_is_one_message(cv2, tmp_path, capsys):
    if os.path.exists("/dev/video9"):
        pytest.skip("this machine has a tenth webcam")
    assert main([str(tmp_path), "webcam:9"]) == 2
    assert capsys.readouterr().err == "error: no webcam 9 on this machine, or it is in use\n"


def test_without_opencv_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    (tmp_path / "film.mp4").touch()

    monkeypatch.setitem(sys.modules, "cv2", None)
    for source in (str(tmp_path / "film.mp4"), "webcam"):
        assert main([str(tmp_path), source]) == 2
        error = capsys.readouterr().err
        assert "needs cv2" in error and "requirements/video.txt" in error


def test_names_decide_what_is_a_film_or_a_webcam(tmp_path):
    for name in ("film.mkv", "webcam:2", "picture.png"):
        (tmp_path / name).touch()
    assert is_film(str(tmp_path / "film.mkv")) and not is_film(str(tmp_path / "no.mkv"))
    assert not is_film(str(tmp_path / "picture.png"))
    assert is_webcam("webcam") and is_webcam("webcam:12") and not is_webcam("webcam:x")
    assert not is_webcam(str(tmp_path / "webcam:2"))


@pytest.mark.parametrize("every", ["-1", "nan", "inf"])
def test_times_that_there_are_not_are_refused(tmp_path, capsys, every):
    assert main([str(tmp_path), "film.mp4", f"--every={every}"]) == 2
    assert "--every is" in capsys.readouterr().err


def test_what_opencv_cannot_decode_is_an_input_error(cv2, tmp_path):
    (tmp_path / "film.mp4").write_bytes(b"0" * 1000)
    with pytest.raises(InputError, match="cannot open it as a film"):
        list(frames(str(tmp_path / "film.mp4"), 1))
    assert video.SUFFIXES == tuple(sorted(video.SUFFIXES))
