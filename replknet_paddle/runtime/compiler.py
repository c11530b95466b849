"""The driver of the C++ compiler: shared libraries of this package's sources, in the user's cache.

The name of a library holds a digest of its sources, flags and everything else it must match, so a
library that does not fit is never loaded, and a digest of the compiler, so that another compiler
makes another library, and one of its own bytes, so that no damaged one is loaded. Paddle's
`cpp_extension` is not used: it carries on after a failed compilation (3.3), and includes Python's
headers, which a system with Python alone does not have.

This module imports the standard library alone: finding that a library is up to date takes 0.1 s.
"""

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from replknet_paddle.runtime.files import cache_folder, file_sha256, locked, sync_folder
from replknet_paddle.runtime.machines import available_cores

COMPILERS = ("c++", "g++", "clang++")
COMMON_FLAGS = ("-std=c++17", "-O3", "-fPIC")
LIMIT_SECONDS = 300  # of one compiler call
SCRATCH_PREFIX = "unfinished-"

logger = logging.getLogger(__name__)


class BuildError(Exception):
    """Why there is no library, in one line."""


@dataclass(frozen=True)
class SharedLibrary:
    """A shared library that is compiled from sources of this package."""

    name: str
    sources: tuple[Path, ...]  # the slowest first
    headers: tuple[Path, ...] = ()
    flags: tuple[str, ...] = ()  # beside COMMON_FLAGS
    link_flags: tuple[str, ...] = ()
    must_match: bytes = b""  # what else a library has to fit, such as a version of Paddle

    @property
    def key(self) -> str:
        """Digest of all that a library must match."""
        flags = [flag for flag in self.flags if not flag.startswith("-I")]  # paths differ
        digest = hashlib.sha256(repr((COMMON_FLAGS, flags, platform.machine())).encode())
        for path in sorted((*self.sources, *self.headers)):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return hashlib.sha256(digest.digest() + self.must_match).hexdigest()[:16]

    def find(self, compiler_key: str = "*") -> Path | None:
        """Return the library that fits; the newest, where several compilers made one.

        A damaged one is passed over. BuildError: others may write it, so it could be anything.
        """
        found = build_folder().glob(f"{self.name}-{self.key}-{compiler_key}-*.so")
        for library in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
            refuse_if_others_may_write(library.parent)
            refuse_if_others_may_write(library)
            if library.stem.endswith(f"-{_digest(library)}"):
                return library
            logger.warning("%s is damaged and is not loaded", library)
        return None

    def find_or_build(self) -> Path:
        """Return the library, built on first use; raise BuildError where there is none."""
        library = self.find()
        if library is None:
            find_compiler()  # so that nothing is announced that cannot be done
            logger.info("compiling %s, once for this machine", self.name)
            library, _ = self.build()
        return library

    def build(self) -> tuple[Path, float]:
        """Make the library, unless it exists; return it and the seconds that took, 0 without.

        Any number of processes may do this at once: one compiles, the others wait for it. The
        library appears whole or not at all.
        """
        if not sys.platform.startswith("linux"):
            raise BuildError(f"compiled operators are for Linux; this is {sys.platform}")
        folder = build_folder()
        compiler = find_compiler()
        version = run([*compiler, "--version"])
        compiler_key = hashlib.sha256(repr((compiler, version)).encode()).hexdigest()[:8]
        start = time.perf_counter()
        try:
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            refuse_if_others_may_write(folder)
            with locked(folder / "lock"):
                for left in folder.glob(f"{SCRATCH_PREFIX}*"):  # by a build that was killed
                    shutil.rmtree(left)
                library = self.find(compiler_key)
                if library is not None:
                    os.utime(library)  # from now on the newest, which `find` takes
                    return library, 0.0
                with tempfile.TemporaryDirectory(dir=folder, prefix=SCRATCH_PREFIX) as scratch:
                    made = self._compile(compiler, Path(scratch))
                    with open(made, "rb") as file:
                        os.fsync(file.fileno())
                    made.chmod(0o755)
                    name = f"{self.name}-{self.key}-{compiler_key}-{_digest(made)}.so"
                    library = made.replace(folder / name)
                sync_folder(folder)
        except OSError as error:
            raise BuildError(f"{folder}: {error}") from None
        return library, time.perf_counter() - start

    def _compile(self, compiler: list[str], scratch: Path) -> Path:
        """Compile the sources side by side and link them."""
        command = [*compiler, *COMMON_FLAGS, *self.flags]
        objects = [str(scratch / f"{source.stem}.o") for source in self.sources]
        commands = [[*command, "-c", str(s), "-o", o] for s, o in zip(self.sources, objects)]
        with ThreadPoolExecutor(available_cores()) as pool:
            list(pool.map(run, commands))  # after a failure, no further one is started
        library = scratch / f"{self.name}.so"
        run([*compiler, "-shared", *objects, "-o", str(library), *self.link_flags])
        return library


def build_folder() -> Path:
    """Return where compiled libraries are kept."""
    return cache_folder() / "compiled"


def refuse_if_others_may_write(path: Path) -> None:
    """Raise BuildError where users other than this one and root may write a file or folder."""
    status = path.stat()
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
        raise BuildError(
            f"{path} may be written by other users (owner {status.st_uid}, mode "
            f"{status.st_mode & 0o777:o}), so no code is loaded from there; allowed: this user or "
            "root as its owner, and no write permission for others (chmod go-w)"
        )


def _digest(path: Path) -> str:
    return file_sha256(path)[:16]


def find_compiler() -> list[str]:
    """Return the command of a C++ compiler: CXX, else the first of the usual names."""
    command = shlex.split(os.environ.get("CXX", ""))
    if command:
        if shutil.which(command[0]) is None:
            raise BuildError(f"CXX={' '.join(command)} is not a program")
        return command
    for name in COMPILERS:
        if shutil.which(name) is not None:
            return [name]
    raise BuildError(f"no C++ compiler: none of {', '.join(COMPILERS)} found, and CXX is not set")


def run(command: list[str]) -> str:
    """Run a compiler and return what it prints; its first error is the message of a BuildError."""
    name = os.path.basename(command[0])
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "LC_ALL": "C"},
            timeout=LIMIT_SECONDS,
        )
    except OSError as error:
        raise BuildError(f"{command[0]}: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise BuildError(f"{name} took more than {LIMIT_SECONDS} s") from None
    if done.returncode != 0:
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()]
        what = (errors or lines or ["no output"])[0].strip()
        raise BuildError(f"{name} failed with status {done.returncode}: {what[:300]}")
    return done.stdout
