"""The driver of the C++ compiler: shared libraries of this package's sources, in the user's cache.

The name of a library holds a digest of its sources, flags and everything else it must match, so a
library that does not fit is never loaded, and a digest of the compiler, so that another compiler
makes another library. Paddle's `cpp_extension` is not used: it carries on after a failed
compilation (3.3), and includes Python's headers, which a system with Python alone does not have.

This module imports the standard library alone: finding that a library is up to date takes 0.1 s.
"""

import contextlib
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
from dataclasses import dataclass
from pathlib import Path

from replknet_paddle.runtime.cores import available_cores
from replknet_paddle.runtime.files import cache_folder, locked, write_text

COMPILERS = ("c++", "g++", "clang++")
COMMON_FLAGS = ("-std=c++17", "-O3", "-fPIC")
LIMIT_SECONDS = 300  # of one compiler call

logger = logging.getLogger(__name__)


class BuildError(Exception):
    """Why there is no library, in one line."""


@dataclass(frozen=True)
class SharedLibrary:
    """A shared library that is compiled from sources of this package.

    Attributes:
        name: start of the file's name.
        sources: what to compile, the slowest first.
        headers: further files that the sources include.
        flags: of the compiler, beside `COMMON_FLAGS`.
        link_flags: of the linker.
        must_match: what else a library has to fit, such as a version of Paddle.
        dependent: names of the sources whose object files depend on `must_match`; object files of
            the others are kept and used again.
    """

    name: str
    sources: tuple[Path, ...]
    headers: tuple[Path, ...] = ()
    flags: tuple[str, ...] = ()
    link_flags: tuple[str, ...] = ()
    must_match: bytes = b""
    dependent: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Digest of all that a library must match."""
        return hashlib.sha256(self._sources_digest() + self.must_match).hexdigest()[:16]

    def _sources_digest(self) -> bytes:
        flags = [flag for flag in self.flags if not flag.startswith("-I")]  # paths differ
        digest = hashlib.sha256(repr((COMMON_FLAGS, flags, platform.machine())).encode())
        for path in sorted((*self.sources, *self.headers)):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return digest.digest()

    def find(self) -> Path | None:
        """The library that fits; the newest, where several compilers made one."""
        found = build_folder().glob(f"{self.name}-{self.key}-*.so")
        return max(found, key=lambda path: path.stat().st_mtime, default=None)

    def find_or_build(self) -> Path:
        """The library, built on first use.

        A failed compilation is not repeated before `replknet build` does it.

        Raises:
            BuildError: there is no library, and why.
        """
        library = self.find()
        if library is not None:
            return library
        with contextlib.suppress(OSError):
            failure = self._failure_file().read_text(encoding="utf-8").splitlines()[0]
            raise BuildError(f"its build failed: {failure}; replknet build tries again")
        find_compiler()  # so that nothing is announced that cannot be done
        logger.info("compiling %s, once for this machine", self.name)
        return self.build()[0]

    def build(self) -> tuple[Path, float]:
        """Make the library, unless it exists.

        Any number of processes may do this at once: one compiles, the others wait for it. The
        library appears whole or not at all.

        Returns:
            The library, and the seconds it took; 0 where it existed.

        Raises:
            BuildError: it cannot be made. The compiler's output is in a file beside it.
        """
        if not sys.platform.startswith("linux"):
            raise BuildError(f"compiled operators are for Linux; this is {sys.platform}")
        folder = build_folder()
        log: list[str] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder / "lock"):
                compiler = find_compiler()
                try:
                    return self._build_alone(folder, compiler, log)
                except BuildError as error:
                    write_text(self._failure_file(), "\n".join([str(error), *log]))
                    raise
        except OSError as error:
            raise BuildError(f"{folder}: {error}") from None

    def _build_alone(self, folder: Path, compiler: list[str], log: list[str]) -> tuple[Path, float]:
        library = folder / f"{self.name}-{self.key}-{compiler_key(compiler)}.so"
        seconds = 0.0
        if library.exists():
            os.utime(library)  # from now on the newest, which `find` takes
        else:
            start = time.perf_counter()
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                os.replace(self._compile(compiler, Path(scratch), log), library)
            seconds = time.perf_counter() - start
        self._failure_file().unlink(missing_ok=True)
        return library, seconds

    def _failure_file(self) -> Path:
        return build_folder() / f"failed-{self.name}-{self.key}.txt"

    def _compile(self, compiler: list[str], scratch: Path, log: list[str]) -> Path:
        """Compile the sources side by side and link them."""
        folder = build_folder()
        digest = compiler_key(compiler).encode() + self._sources_digest()
        shared = hashlib.sha256(digest).hexdigest()[:16]
        waiting, running, objects = list(self.sources), [], []
        try:
            while waiting or running:
                while waiting and len(running) < available_cores():
                    source = waiting.pop(0)
                    kept = folder / f"{source.stem}-{shared}.o"
                    is_dependent = source.name in self.dependent
                    if not is_dependent and kept.exists():
                        objects.append(kept)
                        continue
                    new = scratch / kept.name
                    objects.append(new if is_dependent else kept)
                    command = [*compiler, *COMMON_FLAGS, *self.flags]
                    running.append((_start([*command, "-c", str(source), "-o", str(new)]), new))
                if running:
                    process, new = running.pop(0)
                    _finish(process, log)
                    if new not in objects:
                        os.replace(new, folder / new.name)
        finally:
            for process, _ in running:
                process.kill()
                process.communicate()
        library = scratch / f"{self.name}.so"
        link = [*compiler, "-shared", *map(str, objects), "-o", str(library), *self.link_flags]
        _finish(_start(link), log)
        return library


def build_folder() -> Path:
    """Where compiled libraries are kept."""
    return cache_folder() / "build"


def find_compiler() -> list[str]:
    """The command of a C++ compiler: that of CXX, else the first of the usual names.

    Raises:
        BuildError: there is none.
    """
    command = shlex.split(os.environ.get("CXX", ""))
    if command:
        if shutil.which(command[0]) is None:
            raise BuildError(f"CXX={' '.join(command)} is not a program")
        return command
    for name in COMPILERS:
        if shutil.which(name) is not None:
            return [name]
    raise BuildError(f"no C++ compiler: none of {', '.join(COMPILERS)} found, and CXX is not set")


def compiler_key(compiler: list[str]) -> str:
    """Digest of a compiler and its version.

    Raises:
        BuildError: the compiler does not report its version.
    """
    version = _finish(_start([*compiler, "--version"]), log=[])
    return hashlib.sha256(repr((compiler, version)).encode()).hexdigest()[:8]


def _start(command: list[str]) -> subprocess.Popen:
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "LC_ALL": "C"},
        )
    except OSError as error:
        raise BuildError(f"{command[0]}: {error.strerror}") from None


def _finish(process: subprocess.Popen, log: list[str]) -> str:
    """Wait for a compiler; returns its output, which goes to the log as well."""
    name = os.path.basename(process.args[0])
    try:
        output, _ = process.communicate(timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise BuildError(f"{name} took more than {LIMIT_SECONDS} s") from None
    log += [shlex.join(process.args), output]
    if process.returncode != 0:
        lines = [line for line in output.splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()]
        what = (errors or lines or ["no output"])[0].strip()
        raise BuildError(f"{name} failed with status {process.returncode}: {what[:300]}")
    return output
