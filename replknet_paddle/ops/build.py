"""Compile the operator: `replknet build`, which setup_env.sh runs where there is a compiler.

One shared library in build/ops, of csrc/ and nothing else: the kernels, and the thin operator over
them, which is compiled against the headers of the Paddle that is installed. Its name holds a
checksum of the sources and of Paddle's version, so that a library that does not fit is never
loaded, and one of the compiler, so that another compiler makes another library. Paddle's own
`cpp_extension` is not used: 3.3 carries on after a failed compilation, 2.6 needs an old setuptools,
and both include Python's headers, which a system with Python alone does not have.

This module imports the standard library alone: finding that all is up to date takes 0.1 s.
"""

import contextlib
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
BUILD_FOLDER = ROOT.parent / "build" / "ops"
OPERATORS = "paddle_op.cpp"  # the only source that knows Paddle
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread", "-w")
LIMIT_SECONDS = 300  # of one compiler call


class BuildError(Exception):
    """Why there is no library, in one line."""


def sources() -> list[Path]:
    """What is compiled, the slowest first."""
    csrc = ROOT / "csrc"
    return [*sorted((csrc / "cpu").glob("*.cpp")), csrc / "pointwise.cpp", csrc / OPERATORS]


def paddle_folder() -> Path:
    """Where Paddle is installed, without importing it.

    Raises:
        BuildError: nowhere.
    """
    spec = importlib.util.find_spec("paddle")
    if spec is None or not spec.origin:
        raise BuildError(f"{sys.executable} has no Paddle")
    return Path(spec.origin).parent


def library_key() -> str:
    """Checksum of all that a library must fit: sources, flags, machine and Paddle's version."""
    version = (paddle_folder() / "version" / "__init__.py").read_bytes()
    return hashlib.sha256(_sources_digest() + version).hexdigest()[:16]


def _sources_digest() -> bytes:
    digest = hashlib.sha256(repr((FLAGS, platform.machine())).encode())
    for path in sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.digest()


def find_library() -> Path | None:
    """The library that fits; the newest, where several compilers made one."""
    found = BUILD_FOLDER.glob(f"large_kernel-{library_key()}-*.so")
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def why_missing() -> str:
    """Why `find_library` finds none, and what to do."""
    if not sys.platform.startswith("linux"):
        return f"it is for Linux; this is {sys.platform}"
    with contextlib.suppress(OSError):
        failure = (BUILD_FOLDER / f"failed-{library_key()}.txt").read_text(encoding="utf-8")
        return f"its build failed: {failure.splitlines()[0]}; replknet build tries again"
    return "it has not been built; replknet build does it"


def find_compiler() -> list[str]:
    """The command of a C++ compiler: that of CXX, else the first of the usual names.

    Raises:
        BuildError: there is none.
    """
    command = shlex.split(os.environ.get("CXX", ""))
    if command:
        if shutil.which(command[0]) is None:
            raise BuildError(f"CXX={' '.join(command)} is no program")
        return command
    for name in COMPILERS:
        if shutil.which(name) is not None:
            return [name]
    raise BuildError(f"no C++ compiler: none of {', '.join(COMPILERS)}, and CXX names no other")


def compiler_key(compiler: list[str]) -> str:
    """Checksum of a compiler and its version.

    Raises:
        BuildError: it does not even tell its version.
    """
    version = _run([*compiler, "--version"], log=[])
    return hashlib.sha256(repr((compiler, version)).encode()).hexdigest()[:8]


def build() -> tuple[Path, float]:
    """Make the library, unless it is there.

    Any number of processes may do this at once: one compiles, the others wait for it. The library
    appears whole or not at all.

    Returns:
        The library, and the seconds it took; 0 where it was there.

    Raises:
        BuildError: it cannot be made. What the compiler said is in failed-KEY.txt beside it.
    """
    if not sys.platform.startswith("linux"):
        raise BuildError(f"the operator is for Linux; this is {sys.platform}")
    paddle = paddle_folder()
    log: list[str] = []
    try:
        BUILD_FOLDER.mkdir(parents=True, exist_ok=True)
        with _lock(BUILD_FOLDER / "lock"):
            failure = BUILD_FOLDER / f"failed-{library_key()}.txt"
            try:
                compiler = find_compiler()
                key = f"{library_key()}-{compiler_key(compiler)}"
                library = BUILD_FOLDER / f"large_kernel-{key}.so"
                if library.exists():
                    os.utime(library)  # from now on the newest, which `find_library` takes
                    return library, 0.0
                start = time.perf_counter()
                with tempfile.TemporaryDirectory(dir=BUILD_FOLDER) as folder:
                    os.replace(_compile(compiler, paddle, Path(folder), log), library)
            except BuildError as error:
                failure.write_text("\n".join([str(error), *log]), encoding="utf-8")
                raise
            failure.unlink(missing_ok=True)
            return library, time.perf_counter() - start
    except OSError as error:
        raise BuildError(f"{BUILD_FOLDER}: {error}") from None


def _compile(compiler: list[str], paddle: Path, folder: Path, log: list[str]) -> Path:
    """Compile the sources side by side and link them.

    The kernels know nothing of Paddle: what has been compiled for another one is taken from there.
    """
    kernels = hashlib.sha256(compiler_key(compiler).encode() + _sources_digest()).hexdigest()[:16]
    includes = [ROOT / "csrc", paddle / "include", paddle / "include" / "third_party"]
    command = [
        *compiler,
        *FLAGS,
        "-DPADDLE_WITH_CUSTOM_KERNEL",
        *(f"-I{path}" for path in includes),
    ]
    waiting, running, objects = sources(), [], []
    try:
        while waiting or running:
            while waiting and len(running) < len(os.sched_getaffinity(0)):
                source = waiting.pop(0)
                kept = BUILD_FOLDER / f"{source.stem}-{kernels}.o"
                if source.name != OPERATORS and kept.exists():
                    objects.append(kept)
                    continue
                new = folder / kept.name
                objects.append(new if source.name == OPERATORS else kept)
                running.append((_start([*command, "-c", str(source), "-o", str(new)]), new))
            if running:
                process, new = running.pop(0)
                _finish(process, log)
                if new not in objects:
                    os.replace(new, BUILD_FOLDER / new.name)
    finally:
        for process, _ in running:
            process.kill()
            process.communicate()
    library = folder / "large_kernel.so"
    base = paddle / "base"
    _run(
        [*compiler, "-shared", "-pthread", *map(str, objects), "-o", str(library)]
        + [f"-L{base}", f"-L{paddle / 'libs'}", f"-Wl,-rpath,{base}", "-Wl,--no-as-needed"]
        + ["-l:libpaddle.so", "-ldl"],
        log,
    )
    return library


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
    """Wait for a compiler; its output goes to the log as well."""
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
        what = (errors or lines or ["it says nothing"])[0].strip()
        raise BuildError(f"{name} failed with status {process.returncode}: {what[:300]}")
    return output


def _run(command: list[str], log: list[str]) -> str:
    return _finish(_start(command), log)


@contextlib.contextmanager
def _lock(path: Path):
    """Only one process at a time; one that dies lets go."""
    import fcntl  # not on every system, and Linux has been asked for by now

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> int:
    try:
        library, seconds = build()
    except BuildError as error:
        with contextlib.suppress(BuildError):
            if find_library() is not None:
                print(f"the convolutions built before stay in use; {error}", file=sys.stderr)
                return 0
        print(
            f"no fast depthwise convolution, {error}; all works without, by Paddle's own",
            file=sys.stderr,
        )
        return 1
    if seconds:
        print(f"fast depthwise convolution built in {seconds:.0f} s: {library}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
