"""Frames of films and webcams, by OpenCV (requirements/video.txt)."""

import math
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.packages import import_extra

SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
# A film that ends earlier than it says by more than the larger of these, once its last frame has
# been shown as long as any other, has lost something: containers round.
MISSING_SECONDS, MISSING_SHARE = 1.0, 0.05

WEBCAM = re.compile(r"webcam(?::(\d+))?")


@dataclass(frozen=True)
class Frame:
    """One picture of a film or webcam.

    Attributes:
        path: the film and the time, `film.mp4#t=12.48`, in seconds, as URLs of media have it.
        pixels: (H, W, 3) uint8, RGB.
    """

    path: str
    pixels: np.ndarray


def is_film(argument: str) -> bool:
    """Whether a command-line argument is the file of a film, by its name."""
    return argument.lower().endswith(SUFFIXES) and os.path.isfile(argument)


def is_webcam(argument: str) -> bool:
    """Whether a command-line argument means a webcam: `webcam`, or `webcam:1` for the second."""
    return WEBCAM.fullmatch(argument) is not None and not os.path.lexists(argument)


def import_opencv():
    """OpenCV, without its messages about damaged files.

    Raises:
        InputError: it is not installed.
    """
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    cv2 = import_extra("cv2", "video")
    # The function's place in OpenCV 4 and in OpenCV 5; 0 is silent in both.
    owner = cv2 if hasattr(cv2, "setLogLevel") else cv2.utils.logging
    owner.setLogLevel(0)
    return cv2


def open_capture(argument: str):
    """OpenCV's capture of a film or webcam.

    Raises:
        InputError: it cannot be opened, or OpenCV is not installed.
    """
    cv2 = import_opencv()
    webcam = is_webcam(argument)
    source = int(WEBCAM.fullmatch(argument)[1] or 0) if webcam else os.path.abspath(argument)
    capture = cv2.VideoCapture(source)
    if not capture.isOpened():
        capture.release()
        raise InputError(
            f"no webcam {source} on this machine, or it is in use"
            if webcam
            else "OpenCV cannot open it as a film"
        )
    return capture


def count_frames(film: str, every_seconds: float) -> int:
    """How many frames `frames` gives of a film, by what its header says.

    Raises:
        InputError: it cannot be opened, or OpenCV is not installed.
    """
    cv2 = import_opencv()
    capture = open_capture(film)
    count, seconds = capture.get(cv2.CAP_PROP_FRAME_COUNT), stated_seconds(capture)
    capture.release()
    if not seconds:
        return 1
    return min(int(count), math.ceil(seconds / every_seconds)) if every_seconds else int(count)


def frames(argument: str, every_seconds: float) -> Iterator[Frame]:
    """Frames of a film, the first one and then one each `every_seconds`; 0: all of them.

    Those of a webcam come as long as the caller takes them, by the clock.

    Raises:
        InputError: it cannot be opened, or its first frame cannot be decoded.
    """
    cv2 = import_opencv()
    capture = open_capture(argument)
    live = is_webcam(argument)
    start, seconds, longest, due = time.monotonic(), None, 0.0, 0.0
    stated = 0.0 if live else stated_seconds(capture)
    try:
        while capture.grab():
            before = seconds or 0.0
            if live:
                seconds = time.monotonic() - start
            else:  # of the frame, in the container: films may have a variable rate
                seconds = capture.get(cv2.CAP_PROP_POS_MSEC) / 1e3
            longest = max(longest, seconds - before)
            if seconds < due - 1e-6:
                continue
            decoded, pixels = capture.retrieve()
            if not decoded:
                continue
            if live:
                due = max(due + every_seconds, seconds)
            elif every_seconds:  # the next one after this frame, and not those that it came after
                due += every_seconds * (1 + math.floor((seconds - due) / every_seconds + 1e-6))
            yield Frame(f"{argument}#t={seconds:.2f}", cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))
    finally:
        capture.release()
    if seconds is None:
        raise InputError("OpenCV decodes no frame of it")
    if stated - seconds > longest + max(MISSING_SECONDS, MISSING_SHARE * stated):
        raise InputError(
            f"the film ends after {seconds:.1f} of {stated:.1f} seconds: the rest is missing or "
            "damaged"
        )


def stated_seconds(capture) -> float:
    """How long a film says that it is; 0 where it says nothing."""
    cv2 = import_opencv()
    count, rate = (capture.get(what) for what in (cv2.CAP_PROP_FRAME_COUNT, cv2.CAP_PROP_FPS))
    return count / rate if count > 0 and rate > 0 else 0.0
