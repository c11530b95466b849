"""5,000 damaged checkpoints: each loads or is refused, and none takes more memory than it may."""

import tracemalloc

import numpy as np
import pytest
from handmade import every_format

from replknet_paddle.checkpoints.readers import read_checkpoint, read_safetensors_metadata
from replknet_paddle.runtime.errors import InputError

FILES = 5000
SHARDS = 20
QUICK_SHARDS = 4  # of them in every run of the tests; all in the full one

# Numbers that parsers stumble over, as 1, 2, 4 and 8 bytes.
EXTREMES = [
    b"\x00",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\x00" * 4,
    b"\xff" * 4,
    b"\xff" * 7 + b"\x7f",
    b"\x00" * 8,
    b"\xff" * 8,
]


def mutate(data: bytes, rng: np.random.Generator, others: list[bytes]) -> bytes:
    """`data` after one to six random injuries."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 7)):
        kind = rng.integers(7)
        at, to = sorted(rng.integers(0, len(data) + 1, 2))
        if kind == 0 and len(data):
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        elif kind == 1 and len(data):
            data[rng.integers(len(data))] = rng.integers(256)
        elif kind == 2:
            extreme = EXTREMES[rng.integers(len(EXTREMES))]
            data[at : at + len(extreme)] = extreme
        elif kind == 3:
            del data[at : min(to, at + 30)]
        elif kind == 4:
            data[at:at] = data[at : min(to, at + 200)] * int(rng.integers(1, 4))
        elif kind == 5:
            other = others[rng.integers(len(others))]
            start = int(rng.integers(len(other)))
            data[at:at] = other[start : start + int(rng.integers(1, 60))]
        elif kind == 6 and rng.random() < 0.2:
            del data[at:]
    return bytes(data)


@pytest.mark.parametrize(
    "shard",
    [pytest.param(i, marks=[pytest.mark.slow] if i >= QUICK_SHARDS else []) for i in range(SHARDS)],
)
def test_mutated_files_load_or_are_refused(shard, tmp_path):
    bases = every_format()
    path = tmp_path / "checkpoint"
    refused = 0
    for index in range(shard, FILES, SHARDS):
        rng = np.random.default_rng(index)
        name = list(bases)[index // SHARDS % len(bases)]
        data = mutate(bases[name], rng, list(bases.values()))
        path.write_bytes(data)
        tracemalloc.start()
        loads = [
            attempt(read, path, f"file {index}, {name}")
            for read in (read_checkpoint, read_safetensors_metadata)
        ]
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        refused += not loads[0]
        # Half a mebibyte for Python itself: objects, the error, and code that runs first here.
        assert peak_bytes <= 2 * len(data) + 2**19, f"file {index}"
    assert 0 < refused < FILES // SHARDS


def attempt(read, path, what: str) -> bool:
    """Whether `read` accepts the file; it may fail in the documented way alone."""
    try:
        read(path)
    except InputError as error:
        assert str(error).startswith(f"{path}: "), what
        return False
    except BaseException as error:
        raise AssertionError(what) from error
    return True
