"""How heavy the project is: lines and files against the budget, and modules too small to stand.

    python tests/weight.py

It prints and never fails: a budget that can only be kept by cramming is to be exceeded.
"""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "replknet_paddle"
SMALL_LINES = 60


def main() -> None:
    for name, folder, suffixes, lines_at_most, files_at_most in (
        ("package", PACKAGE, (".py",), 14_500, 100),
        ("tests", ROOT / "tests", (".py",), 15_000, None),
        ("C++", PACKAGE, (".cpp", ".h", ".inc"), None, None),
        ("shell", ROOT, (".sh",), None, None),
    ):
        paths = folder.rglob("*") if folder != ROOT else folder.glob("*")
        counts = [lines(path) for path in paths if path.suffix in suffixes]
        budget = f"; budget {lines_at_most:,}" if lines_at_most else ""
        budget += f" in {files_at_most}" if files_at_most else ""
        print(f"{name:8} {sum(counts):7,} lines in {len(counts):3} files{budget}")
    users = importers()
    small = {
        name: lines(path)
        for name, path in modules().items()
        if path.name != "__init__.py" and lines(path) < SMALL_LINES and len(users[name]) == 1
    }
    print(f"modules of one importer and under {SMALL_LINES} lines: {len(small)}")
    for name, count in sorted(small.items()):
        print(f"  {name} ({count} lines), imported by {users[name].pop()}")


def lines(path: Path) -> int:
    return len(path.read_bytes().splitlines())


def modules() -> dict[str, Path]:
    """The modules of the package by dotted name."""
    paths = {path: path.relative_to(ROOT).with_suffix("").parts for path in PACKAGE.rglob("*.py")}
    return {".".join(p for p in parts if p != "__init__"): path for path, parts in paths.items()}


def importers() -> dict[str, set[str]]:
    """By each module, those of the package that import it."""
    known, found = modules(), defaultdict(set)
    for name, path in known.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                for imported in (node.module, *names):
                    if imported in known and imported != name:
                        found[imported].add(name)
    return found


if __name__ == "__main__":
    main()
