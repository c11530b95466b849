"""People's own pictures and films: finding them in folders and lists, and decoding them.

Folders are listed one at a time, so only the names of the files of one folder and those above it
are in memory. What cannot be listed or decoded is reported where it stands among the others, and
ends nothing. OpenCV (requirements/video.txt) reads films.
"""

import glob
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image

from replknet_paddle.data.lists import describe, parse_labelled, parse_list, resolve
from replknet_paddle.data.make_lists import find_images, image_suffixes, say_passed_over
from replknet_paddle.data.transforms.image import load, open_image
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.packages import import_extra

FILM_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
# A film that ends earlier than it says by more than the larger of these, once its last frame has
# been shown as long as any other, has lost something: containers round.
MISSING_SECONDS, MISSING_SHARE = 1.0, 0.05


@dataclass(frozen=True)
class Frame:
    """One picture of a film."""

    path: str  # with the time in seconds, film.mp4#t=12.48, as URLs of media have it
    pixels: np.ndarray  # (H, W, 3) uint8, RGB


# A path, and why it could not be read or None, with the label where a list gives one; or a frame.
Found = tuple[str, str | None] | tuple[str, str | None, int] | Frame


class ImageFiles:
    """The images that command-line arguments stand for, one after the other.

    A folder stands for what `find_images` finds in it. A pattern such as 'photos/**/*.jpg' stands
    for the files it matches, in sorted order. A film stands for frames of it, where `frame_seconds`
    is given. A list file (NAME.txt), where `reads_lists`, stands for the images of its lines, whose
    paths are relative to its folder and stay in it. Anything else is a file, whatever its name.

    `leave_out` are folders that are not searched. `frame_seconds` lie between the frames of a film:
    0 for all frames, None for no films. `passed_over` counts the suffixes of what the last
    iteration did not take for images. `highest` is the highest label in the lists that `count` has
    read, and the image that has it.
    """

    def __init__(
        self,
        arguments: Iterable[str],
        *,
        leave_out: Iterable[str] = (),
        frame_seconds: float | None = None,
        reads_lists: bool = False,
    ):
        self.arguments = list(arguments)
        self.leave_out = list(leave_out)
        self.frame_seconds = frame_seconds
        self.reads_lists = reads_lists
        self.passed_over: Counter = Counter()
        self.highest = (-1, "")

    def __iter__(self) -> Iterator[Found]:
        """Yield what the arguments stand for."""
        self.passed_over.clear()
        for argument in self.arguments:
            yield from self._files(argument)

    def count(self) -> int:
        """Return how many images there are, or raise an error for an argument that stands for none,
        a folder that cannot be listed, or a film without OpenCV."""
        total = 0
        for argument in self.arguments:
            if self._is_film(argument):
                import_opencv()
                try:
                    total += count_frames(argument, self.frame_seconds)
                except InputError:  # reported in its place
                    total += 1
                continue
            self.passed_over.clear()
            found, first_problem = 0, None
            for path, problem, *label in self._files(argument):
                if label:
                    self.highest = max(self.highest, (label[0], path))
                if problem is None:
                    found += 1
                elif path == argument:
                    raise InputError(f"{argument}: {problem}")
                else:
                    first_problem = first_problem or f"{path}: {problem[:200]}"
            if not found:
                raise self._emptiness(argument, first_problem)
            total += found
        return total

    def _is_film(self, argument: str) -> bool:
        """Return whether an argument is the file of a film, by its name."""
        return (
            self.frame_seconds is not None
            and argument.lower().endswith(FILM_SUFFIXES)
            and os.path.isfile(argument)
        )

    def is_list(self, argument: str) -> bool:
        """Return whether an argument is a list file, by its name."""
        return self.reads_lists and argument.lower().endswith(".txt") and os.path.isfile(argument)

    def _emptiness(self, argument: str, first_problem: str | None) -> Exception:
        """Return the error for an argument that stands for no image."""
        if self.is_list(argument):
            found = "" if first_problem is None else f"; {first_problem}"
            return InputError(
                f"no image in the list {argument}{found}. A list has a line for each image: its "
                "path below the list's folder, a space and its label. Pictures do not end in .txt"
            )
        if not os.path.isdir(argument):
            if glob.has_magic(argument):
                return FileNotFoundError(f"no file matches {argument}")
            return FileNotFoundError(f"no image, folder or pattern {argument or repr(argument)}")
        others = say_passed_over(self.passed_over)
        return InputError(
            f"no image in the folder {argument}{others and f'; {others}'}. Files are taken for "
            f"images whose names end in {', '.join(sorted(image_suffixes()))}"
        )

    def _files(self, argument: str) -> Iterator[Found]:
        if self._is_film(argument):
            try:
                yield from frames(argument, self.frame_seconds)
            except InputError as error:
                yield argument, str(error)
        elif self.is_list(argument):
            yield from listed_images(argument)
        elif os.path.isdir(argument):
            yield from find_images(argument, self.passed_over, is_left_out=self._is_left_out)
        elif os.path.lexists(argument):
            yield argument, None
        elif glob.has_magic(argument):
            for path in sorted(glob.iglob(argument, recursive=True)):
                if not os.path.isdir(path):
                    yield path, None

    def _is_left_out(self, folder: str) -> bool:
        there = filter(os.path.exists, self.leave_out)
        return any(os.path.samefile(folder, path) for path in there)


def listed_images(list_file: str) -> Iterator[Found]:
    """Yield what stands in each line of a list file; of a bad line, its place is the path."""
    folder = os.path.dirname(list_file)
    # It is `resolve` that keeps paths inside: the parser's message speaks of a key of the data.
    parse = partial(parse_labelled, num_classes=None, allow_outside=True)
    for line in parse_list(list_file, parse):
        if line.problem is not None:
            yield f"{list_file}, line {line.number}", line.problem
            continue
        name, problem = os.fsdecode(line.path), None
        try:
            resolve(os.path.abspath(folder), name, allow_outside=False)
        except InputError:
            problem = (
                f"line {line.number} of {list_file} leads out of the list's folder, maybe by a "
                "link; name the images or their folder instead"
            )
        except OSError as error:
            problem = describe(error)
        yield os.path.join(folder, name), problem, line.label


def decode(source) -> Image.Image:
    """Return the picture in a file, an array (H, W, 3) uint8, RGB, or a Pillow image, loaded, in
    its own mode; an InputError says why it cannot be decoded."""
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
            raise InputError(
                f"array {source.shape} of {source.dtype}; allowed: (height, width, 3) of uint8, RGB"
            )
        return Image.fromarray(source)
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(
            f"{type(source).__name__}; allowed: a path, an array (height, width, 3) of uint8, or a "
            "Pillow image"
        )
    try:
        with open_image(os.fspath(source)) as image:
            load(image)
            return image
    except OSError as error:
        raise InputError(error.strerror or str(error)) from None


# ---- films


def import_opencv():
    """Return OpenCV, without its messages about damaged files."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    cv2 = import_extra("cv2", "video")
    # The function's place in OpenCV 4 and in OpenCV 5; 0 is silent in both.
    owner = cv2 if hasattr(cv2, "setLogLevel") else cv2.utils.logging
    owner.setLogLevel(0)
    return cv2


def open_film(film: str) -> tuple:
    """Return OpenCV's capture of a film, its number of frames, and its seconds, by its header; 0
    where it says nothing."""
    cv2 = import_opencv()
    capture = cv2.VideoCapture(os.path.abspath(film))
    if not capture.isOpened():
        raise InputError("OpenCV cannot open it as a film")
    count, rate = (capture.get(what) for what in (cv2.CAP_PROP_FRAME_COUNT, cv2.CAP_PROP_FPS))
    return capture, int(count), count / rate if count > 0 and rate > 0 else 0.0


def count_frames(film: str, every_seconds: float) -> int:
    """Return how many frames `frames` gives of a film, by what its header says."""
    capture, count, seconds = open_film(film)
    capture.release()
    if not seconds:
        return 1
    return min(count, math.ceil(seconds / every_seconds)) if every_seconds else count


def frames(film: str, every_seconds: float) -> Iterator[Frame]:
    """Yield frames of a film, the first one and then one each `every_seconds`; 0: all of them.
    InputError: it cannot be opened, no frame can be decoded, or it ends early."""
    cv2 = import_opencv()
    capture, _, stated = open_film(film)
    seconds, longest, due = None, 0.0, 0.0
    try:
        while capture.grab():
            before = seconds or 0.0
            # Of the frame, in the container: films may have a variable rate.
            seconds = capture.get(cv2.CAP_PROP_POS_MSEC) / 1e3
            longest = max(longest, seconds - before)
            if seconds < due - 1e-6:
                continue
            decoded, pixels = capture.retrieve()
            if not decoded:
                continue
            if every_seconds:  # the next one after this frame, and not those that it came after
                due += every_seconds * (1 + math.floor((seconds - due) / every_seconds + 1e-6))
            yield Frame(f"{film}#t={seconds:.2f}", cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))
    finally:
        capture.release()
    if seconds is None:
        raise InputError("OpenCV decodes no frame of it")
    if stated - seconds > longest + max(MISSING_SECONDS, MISSING_SHARE * stated):
        raise InputError(
            f"the film ends after {seconds:.1f} of {stated:.1f} seconds: the rest is missing or "
            "damaged"
        )
