from pathlib import Path

import pytest

from replknet_paddle.checkpoints.readers import read_checkpoint
from replknet_paddle.runtime.errors import InputError


@pytest.fixture
def file(tmp_path):
    """Writes bytes to a file and returns its path."""

    def write(data: bytes, name: str = "checkpoint.bin") -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


@pytest.fixture
def refused(file):
    """Asserts that bytes are refused in one message, which names the file and has given words."""

    def check(data: bytes, *words: str) -> None:
        path = file(data)
        with pytest.raises(InputError) as caught:
            read_checkpoint(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: ")
        for word in words:
            assert word in message

    return check
