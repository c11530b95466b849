"""Files: where they are looked up, written whole or not at all, locked, checked, and digests."""

import contextlib
import ctypes
import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import secrets
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from replknet_paddle.runtime.errors import InputError

CACHE_VARIABLE = "REPLKNET_PADDLE_CACHE"
PARTIAL_SUFFIX = ".unfinished"

_PACKAGE = Path(__file__).resolve().parents[1]
_CHUNK_BYTES = 2**20
_UNWRITABLE = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")

# The checkout. In an installed package, which has the YAML files inside it, the package.
PROJECT_FOLDER = next(
    folder for folder in (_PACKAGE, _PACKAGE.parent) if (folder / "configs").is_dir()
)

Path_ = str | os.PathLike


# ---- where things are


def cache_folder() -> Path:
    """Return the folder for downloaded weights and compiled libraries."""
    setting = os.environ.get(CACHE_VARIABLE)
    return Path(setting).expanduser() if setting else Path.home() / ".cache" / "replknet_paddle"


def find_path(path: Path_) -> str:
    """Return `path`, or the project's file or folder of that name where there is none here."""
    path = os.fspath(path)
    own = os.path.join(PROJECT_FOLDER, path)
    is_missing = path and not os.path.isabs(path) and not os.path.lexists(path)
    return own if is_missing and os.path.exists(own) else path


def searched(path: Path_) -> str:
    """Return a path that was not found, for messages, with the places that were searched."""
    path = os.fspath(path)
    if os.path.isabs(path):
        return path
    places = dict.fromkeys([os.path.abspath(path), os.path.join(PROJECT_FOLDER, path)])
    return f"{path or repr(path)} (tried {' and '.join(places)})"


def searched_weights(path: Path_) -> str:
    """Return `searched`, and a file of the same name and a suffix, if there is any."""
    names = []
    for folder in (".", PROJECT_FOLDER) if path else ():
        own = os.path.join(folder, path)
        names += [
            os.fspath(path) + found[len(own) :] for found in glob.glob(glob.escape(own) + ".*")
        ]
    near = f"; did you mean {min(names)}?" if names else ""
    return f"{searched(path)}{near}"


def command_line(*words: str) -> str:
    """Return `replknet WORDS`, as it can be typed into a shell here."""
    if shutil.which("replknet") is not None:
        return shlex.join(["replknet", *words])
    name = os.path.basename(sys.executable)
    python = name if shutil.which(name) == sys.executable else sys.executable
    return shlex.join([python, "-m", _PACKAGE.name, *words])


# ---- written whole or not at all


@contextlib.contextmanager
def atomic_file(path: Path_, mode: str = "w", *, keep_partial=None, **options) -> Iterator[IO]:
    """Open a temporary file that becomes `path` when the block ends without an exception.

    Until then `path` stays as it was, or does not exist. The bytes are on the disk before the file
    gets its name. What has been written is kept as `path`.unfinished where `keep_partial(error)`
    is true. `options` are those of `open`; text is UTF-8 by default.
    """
    path = Path(path)
    partial = _partial(path)
    if "b" not in mode:
        options.setdefault("encoding", "utf-8")
    try:
        with path_in_error(path):
            with open(partial, mode.replace("w", "x"), **options) as file:  # never through a link
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            sync_folder(path.parent)
    except BaseException as error:
        if keep_partial is not None and partial.exists() and keep_partial(error):
            os.replace(partial, f"{path}{PARTIAL_SUFFIX}")
        raise
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path_) -> Iterator[Path]:
    """Make a folder that becomes `path`, no link, when the block ends without an exception.

    Until then `path` stays as it was, or does not exist. A folder that is there is replaced at one
    moment, where the file system can do that.
    """
    path = Path(path)
    partial = _partial(path)
    try:
        with path_in_error(path):
            partial.mkdir(parents=True)
            yield partial
            if path.exists():
                _replace_folder(path, partial)
            else:
                os.rename(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace_folder(path: Path, new: Path) -> None:
    """Let the folder `new` take the name `path`; the one that has it ends as `new`, to be removed,
    or goes at once."""
    try:
        _exchange(path, new)
    except (OSError, AttributeError):  # of NFS, and of a C library without this call
        old = new.with_suffix(".old")
        os.rename(path, old)
        try:
            os.rename(new, path)
        except BaseException:
            os.rename(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> None:
    """Let two files or folders have each other's names."""
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    names = os.fsencode(first), os.fsencode(second)
    if ctypes.CDLL(None, use_errno=True).renameat2(here, names[0], here, names[1], exchange):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _partial(path: Path) -> Path:
    """Return a name beside `path` that nobody can foresee, and put a link there."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL_SUFFIX}")


def write_text(path: Path_, text: str) -> None:
    """Write a text file, whole or not at all."""
    with atomic_file(path) as file:
        file.write(text)


def json_text(value, indent: int | None = None) -> str:
    """Return JSON of `value` that people can read: letters are themselves, and a number that is not
    finite is null. Escaped are halves of letters, which are no UTF-8, and what many programs take
    for the end of a line."""
    value = json.loads(json.dumps(value), parse_constant=lambda _: None)
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return _UNWRITABLE.sub(lambda letter: f"\\u{ord(letter[0]):04x}", text)


def append_whole(path: Path_, text: str) -> None:
    """Append to a text file, all of `text` or nothing."""
    with path_in_error(path), open(path, "ab", buffering=0) as file:
        size = file.tell()
        data = text.encode()
        try:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(size)
            raise


@contextlib.contextmanager
def path_in_error(path: Path_) -> Iterator[None]:
    """Let an OSError that leaves this context name `path`, which a full disk's does not, and what
    the disk is full of."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        if error.errno == errno.ENOSPC and is_full_of_files(os.path.dirname(path)):
            error.strerror = "No free inodes left on device, so no more files can be made"
        raise


def is_full_of_files(folder: Path_) -> bool:
    """Return whether the file system of a folder has no inode left for another file."""
    with contextlib.suppress(OSError):
        space = os.statvfs(folder or ".")
        return space.f_files > 0 and space.f_favail == 0
    return False


def sync_folder(folder: Path_) -> None:
    """Make a rename in `folder` survive a power failure, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# ---- locked, read, and checked before work starts


@contextlib.contextmanager
def locked(path: Path_) -> Iterator[None]:
    """Let one process at a time into the block. The system releases the lock of one that dies."""
    with open(path, "a") as file:  # which empties nothing, should it be a link
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def file_sha256(path: Path_) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def check_file_target(path: Path_, suffixes: Sequence[str] = (), *, must_be_new=False) -> None:
    """Raise, before work starts, where the file `path` cannot be written, does not end in one of
    the `suffixes`, where there are any, or exists though it `must_be_new`."""
    path = os.fspath(path)
    if suffixes and os.path.splitext(path)[1].lower() not in suffixes:
        raise InputError(f"{path}: the name must end in {' or '.join(suffixes)}")
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder; name a file")
    if must_be_new and os.path.lexists(path):
        raise InputError(f"{path} exists; name a new file, or replace it by -overwrite")
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"no folder {folder} to write {os.path.basename(path)} into")
    check_place_is_writable(folder)


def check_new_folder(path: Path_, *, replaces: str | None = None, is_kept: bool = False) -> None:
    """Raise InputError, before work starts, where `path` is no empty folder and cannot be one; a
    folder may hold something where it `is_kept`, or files that all match the pattern `replaces`."""
    if not os.path.isdir(path) and os.path.lexists(path):
        raise InputError(f"{path} is a file; name a new folder")
    if replaces is not None:
        for found in Path(path).rglob("*"):
            if not re.fullmatch(replaces, found.relative_to(path).as_posix()):
                raise InputError(f"folder {path} has {found}, which would be lost; name another")
    elif os.path.isdir(path) and os.listdir(path) and not is_kept:
        raise InputError(f"folder {path} is not empty; name a new one, or add -overwrite")
    check_place_is_writable(path)


def check_place_is_writable(path: Path_) -> None:
    """Raise InputError where the folder `path`, or what it would be made in, is read-only."""
    folder = os.fspath(path)
    while not os.path.isdir(folder):
        if os.path.lexists(folder):
            raise InputError(f"cannot write {path}: {folder} is a file; name another place")
        folder = os.path.dirname(os.path.abspath(folder))
    if not os.access(folder, os.W_OK):
        raise InputError(f"folder {folder} is not writable; name another one")
