"""Refuses a Paddle that this package does not support, in one message and before it is imported.

Paddle 2 beside numpy 2 fails on import, in words of its own.
"""

import importlib.util
import re
import sys
from pathlib import Path

from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.extras import install_command

OLDEST = (3, 1)  # 3.0 has no public way to tell program capture what to take as one operation
GPU_INDEX = "https://www.paddlepaddle.org.cn/packages/stable/cu126/"


class UnsupportedPaddle(InputError, ImportError):
    """Paddle is missing, or of a version that this package does not support."""


class Refusal:
    """A finder that raises where anything imports Paddle first, so that all else still works."""

    def __init__(self, message: str):
        self.message = message

    def find_spec(self, name: str, path=None, target=None) -> None:
        if name == "paddle":
            raise UnsupportedPaddle(self.message)


def refuse_other_paddles() -> None:
    """Let `import paddle` fail unless the Paddle that is installed is a supported one.

    Raises:
        UnsupportedPaddle: it is not, and has been imported already.
    """
    message = why_not(importlib.util.find_spec("paddle"))
    if message is None:
        return
    if "paddle" in sys.modules:
        raise UnsupportedPaddle(message)
    sys.meta_path.insert(0, Refusal(message))


def why_not(spec) -> str | None:
    """Return why the Paddle of a module spec cannot be used and the command that helps, or None."""
    if spec is None or not spec.origin:  # a folder that is called paddle is no Paddle
        return f"this needs Paddle: {install_command('cpu')}; docs/gpu.md has the command for GPUs"
    file = Path(spec.origin).with_name("version") / "__init__.py"
    content = file.read_text() if file.is_file() else ""
    version = re.search(r"full_version\s*=\s*'((\d+)\.(\d+)[^']*)'", content)
    # Builds of Paddle's development branch report version 0.0.0.
    if version is None or not (0, 0) < (int(version[2]), int(version[3])) < OLDEST:
        return None
    command = install_command("cpu")
    if re.search(r"cuda_version\s*=\s*'\d", content):
        command = f"{install_command('gpu')} --extra-index-url {GPU_INDEX}"
        command += " (docs/gpu.md says which index fits which GPU)"
    oldest = ".".join(map(str, OLDEST))
    return f"Paddle {version[1]} is installed; this needs Paddle {oldest} or later: {command}"
