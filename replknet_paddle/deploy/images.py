"""People's own pictures: finding them in folders, and decoding them.

Folders are listed one at a time, so only the names of the files of one folder and those above it
are in memory. What cannot be listed or decoded is reported where it stands among the others, and
ends nothing.
"""

import glob
import os
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image

from replknet_paddle.data.transforms.image import FORMATS, load, open_image
from replknet_paddle.deploy.video import (
    Frame,
    count_frames,
    frames,
    import_opencv,
    is_film,
    is_webcam,
    open_capture,
)
from replknet_paddle.runtime.errors import InputError


def image_suffixes() -> set[str]:
    """The file name suffixes, in lower case and with their dot, that folders are searched for."""
    Image.init()
    return {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}


def decode(source) -> Image.Image:
    """The picture in a file, an array or a Pillow image, loaded, in its own mode.

    Args:
        source: a path; an array (H, W, 3) uint8, RGB; or a Pillow image, which is returned.

    Raises:
        InputError: it is none of these, or cannot be decoded; the message says why.
    """
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


class ImageFiles:
    """The images that command-line arguments stand for.

    A folder stands for the files in and below it whose names end as those of images do, in sorted
    order; links to folders are not followed. A pattern such as 'photos/**/*.jpg' stands for the
    files it matches, in sorted order. A film or webcam stands for frames of it (deploy/video.py).
    Anything else is a file, whatever its name.

    Args:
        arguments: files, folders, patterns, films, `webcam`.
        leave_out: a folder that is not searched, where a search comes by it.
        frame_seconds: between the frames of a film or webcam.

    Attributes:
        other_files: how many files the last iteration has passed over in folders, for their names.
    """

    def __init__(
        self,
        arguments: Iterable[str],
        *,
        leave_out: str | None = None,
        frame_seconds: float = 1.0,
    ):
        self.arguments = list(arguments)
        self.leave_out = leave_out
        self.frame_seconds = frame_seconds
        self.suffixes = image_suffixes()
        self.other_files = 0

    @property
    def is_live(self) -> bool:
        """Whether a webcam is among them."""
        return any(map(is_webcam, self.arguments))

    def __iter__(self) -> Iterator[tuple[str, str | None] | Frame]:
        """Pairs of a path and None, or of a folder or film and why it could not be read; frames."""
        self.other_files = 0
        for argument in self.arguments:
            yield from self._files(argument)

    def count(self) -> int:
        """How many there are, webcams left out.

        Raises:
            FileNotFoundError: an argument names nothing.
            InputError: an argument is a folder that cannot be listed, or stands for no image; or
                OpenCV is missing, which films and webcams need.
        """
        total = 0
        for argument in self.arguments:
            if is_webcam(argument):
                open_capture(argument).release()
                continue
            if is_film(argument):
                import_opencv()
                try:
                    total += count_frames(argument, self.frame_seconds)
                except InputError:  # reported in its place
                    total += 1
                continue
            self.other_files = 0
            found = 0
            problem = None
            for path, why in self._files(argument):
                if why is None:
                    found += 1
                elif path == argument:
                    problem = f"{argument}: {why}"
            if problem is None and not found:
                problem = self._emptiness(argument)
            if problem is not None:
                raise InputError(problem)
            total += found
        return total

    def _emptiness(self, argument: str) -> str:
        if not os.path.isdir(argument):
            if glob.has_magic(argument):
                raise FileNotFoundError(f"no file matches {argument}")
            raise FileNotFoundError(f"no image, folder or pattern {argument}")
        others = f"; it holds {self.other_files:,} other files" if self.other_files else ""
        return (
            f"no image in the folder {argument}{others}. Files are taken for images whose names "
            "end in .jpg, .png or another suffix of an image format"
        )

    def _files(self, argument: str) -> Iterator[tuple[str, str | None] | Frame]:
        if is_film(argument) or is_webcam(argument):
            try:
                yield from frames(argument, self.frame_seconds)
            except InputError as error:
                yield argument, str(error)
        elif os.path.isdir(argument):
            yield from self._walk(argument)
        elif os.path.lexists(argument):
            yield argument, None
        elif glob.has_magic(argument):
            for path in sorted(glob.iglob(argument, recursive=True)):
                if not os.path.isdir(path):
                    yield path, None

    def _walk(self, top: str) -> Iterator[tuple[str, str | None]]:
        found = [(top, True)]  # paths and whether each is a folder, the next one last
        while found:
            path, is_folder = found.pop()
            if not is_folder:
                yield path, None
                continue
            try:
                entries = self._listed(path)
            except OSError as error:
                yield path, f"cannot list the folder: {error.strerror}"
            else:
                found += sorted(entries, reverse=True)

    def _listed(self, folder: str) -> list[tuple[str, bool]]:
        """The images and folders in a folder: paths, and whether each is a folder."""
        listed = []
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    if not self._is_left_out(entry.path):
                        listed.append((entry.path, True))
                elif os.path.splitext(entry.name)[1].lower() in self.suffixes:
                    listed.append((entry.path, False))
                else:
                    self.other_files += 1
        return listed

    def _is_left_out(self, folder: str) -> bool:
        return (
            self.leave_out is not None
            and os.path.exists(self.leave_out)
            and os.path.samefile(folder, self.leave_out)
        )
