"""File systems of 1 MiB, which root can mount; tests that need one are skipped elsewhere."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

FILLING = "filling"  # the file that takes the room


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system of 1 MiB in memory, mounted with these options."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size=1m,{options}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def small_disk(folder: Path, *, free_bytes: int = 0) -> Iterator[Path]:
    """One with so much room left."""
    with mounted(folder, "rw"):
        filling = folder / FILLING
        with open(filling, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        os.truncate(filling, filling.stat().st_size - free_bytes)
        yield folder
