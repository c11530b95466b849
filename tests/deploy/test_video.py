"""Frames of real films, written by OpenCV."""

import json
import os
import signal
import sys

import numpy as np
import pytest
from runs import make_run
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
