"""Every text of the package that a user may see: messages, log lines, help.

    python tests/messages.py            print them, sorted
    python tests/messages.py --record   write tests/fixtures/messages.txt

A reviewer sees in that file's diff which texts a change adds, alters or takes away. Texts stand for
themselves, wherever the code that says them is: {} is a value.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORDED = ROOT / "tests" / "fixtures" / "messages.txt"


def messages() -> list[str]:
    """Return the texts with at least two words of all modules, sorted, each once."""
    found = set()
    for path in (ROOT / "replknet_paddle").rglob("*.py"):
        found |= set(_texts(ast.parse(path.read_text())))
    texts = (" ".join(text.split()) for text in found if len(text.split()) > 1)
    return sorted(text if text.isprintable() else ascii(text)[1:-1] for text in texts)


def _texts(tree: ast.AST) -> Iterator[str]:
    """Strings and f-strings below `tree` but for docstrings, not even those that commands print as
    help, which golden.py compares."""
    inside = set()  # what belongs to an f-string, or is a docstring that no user sees
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            inside.add(body[0].value)
        if isinstance(node, ast.JoinedStr):
            inside |= {part for part in node.values if isinstance(part, ast.Constant)}
            yield "".join(p.value if isinstance(p, ast.Constant) else "{}" for p in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inside:
            yield node.value


def main() -> int:
    text = "".join(f"{line}\n" for line in messages())
    if sys.argv[1:] == ["--record"]:
        RECORDED.write_text(text)
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
