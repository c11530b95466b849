"""Text that leaves for a terminal or a log file: what files hold must not steer the terminal."""

import re
from typing import TextIO

# Control characters, marks that turn the direction of a line, and bytes that are no UTF-8. Line
# feeds and tabs stay, and the return at the start of a text, by which a progress bar begins.
_STEERING = re.compile(
    r"(?!\A)\r|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def escaped(text: str) -> str:
    """Return `text` with `\\x1b` for an escape character, and so on."""
    return _STEERING.sub(lambda found: ascii(found[0])[1:-1], text)


def printable(text: str) -> str:
    """Return `text` on one line, whatever bytes a file's name was made of."""
    return text if text.isprintable() else ascii(text)[1:-1]


class Terminal:
    """A stream of text that escapes what steers a terminal or does not exist in its encoding."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        encoding = self._stream.encoding or "utf-8"
        text = escaped(text).encode(encoding, "backslashreplace").decode(encoding)
        return self._stream.write(text)

    def __getattr__(self, name):
        return getattr(self._stream, name)
