"""Writes the tables of the published models into README.md and docs/model_zoo.md.

    python docs/zoo_tables.py            # after a change to zoo/records.py
    python docs/zoo_tables.py --check    # status 1 if that has not been done

A table stands between two comments that mark its place; everything around it is written by hand.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from replknet_paddle.zoo.records import MODELS, OFFICIAL_PAGE, PADDLEVIT_PAGE, PublishedModel

_ROOT = Path(__file__).resolve().parents[1]
_BEGIN, _END = "<!-- zoo table: begin -->", "<!-- zoo table: end -->"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _accuracy(model: PublishedModel, place: int) -> str:
    if place >= len(model.accuracies):
        return "-"
    found = model.accuracies[place]
    return f"{_percent(found.top1_percent)} / {_percent(found.top5_percent)} ({found.source})"


def _accuracy_by(model: PublishedModel, source: str) -> str:
    places = [i for i, found in enumerate(model.accuracies) if found.source == source]
    return _accuracy(model, places[0]).removesuffix(f" ({source})") if places else "-"


def _download(model: PublishedModel) -> str:
    links = [f"[PyTorch]({model.page})", f"[.pdparams]({model.paddlevit_page})"]
    if model.url:
        links.insert(0, f"[automatic]({model.url})")
    return ", ".join(links)


# Heading and content of each column.
_README_COLUMNS: tuple[tuple[str, Callable[[PublishedModel], str]], ...] = (
    ("model", lambda model: f"`{model.name}`"),
    ("pre-trained on", lambda model: model.pretrained_on or "-"),
    ("input", lambda model: str(model.image_size)),
    ("classes", lambda model: f"{model.num_classes:,}"),
    ("parameters", lambda model: f"{model.parameters / 1e6:.1f} M"),
    ("multiply-adds", lambda model: f"{model.multiply_adds / 1e9:.1f} G"),
    ("official top-1 / top-5 %", lambda model: _accuracy(model, 0)),
    ("PaddleViT's", lambda model: _accuracy_by(model, "PaddleViT")),
    ("config", lambda model: f"[{model.config}](configs/{model.config})"),
)
_CHINESE_HEADINGS = (
    "模型", "预训练数据", "输入", "类别数", "参数量", "乘加次数", "官方 top-1 / top-5 %",
    "PaddleViT 精度", "配置",
)  # fmt: skip
_CHINESE_COLUMNS = tuple(
    (heading, content) for heading, (_, content) in zip(_CHINESE_HEADINGS, _README_COLUMNS)
)
_ZOO_COLUMNS: tuple[tuple[str, Callable[[PublishedModel], str]], ...] = (
    ("model", lambda model: f"`{model.name}`"),
    ("mmpretrain calls it", lambda model: f"`{model.alias}`" if model.alias else "-"),
    ("parameters", lambda model: f"{model.parameters:,}"),
    ("multiply-adds, merged", lambda model: f"{model.multiply_adds:,}"),
    ("top-1 / top-5 %", lambda model: _accuracy(model, 0)),
    ("and by", lambda model: _accuracy(model, 1)),
    ("config", lambda model: f"[{model.config}](../configs/{model.config})"),
    ("weights", _download),
    ("SHA-256 begins", lambda model: f"`{model.sha256_start}`" if model.url else "-"),
    ("licence", lambda model: model.licence),
)


def _table(columns: tuple[tuple[str, Callable[[PublishedModel], str]], ...]) -> str:
    rows = [[heading for heading, _ in columns], ["---"] * len(columns)]
    rows += [[content(model) for _, content in columns] for model in MODELS]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


TABLES = {
    _ROOT / "README.md": _table(_README_COLUMNS),
    _ROOT / "README_zh.md": _table(_CHINESE_COLUMNS),
    _ROOT / "docs" / "model_zoo.md": f"{_table(_ZOO_COLUMNS)}\n\n"
    f"All files: [official PyTorch]({OFFICIAL_PAGE}), [PaddleViT]({PADDLEVIT_PAGE}).",
}


def with_table(path: Path) -> str:
    """The document's text with the table that `zoo/records.py` gives now.

    Raises:
        FileNotFoundError: the document is gone.
        ValueError: it has lost the marks of its table.
    """
    text = path.read_text(encoding="utf-8")
    if text.count(_BEGIN) != 1 or text.count(_END) != 1:
        raise ValueError(f"{path} needs {_BEGIN} and {_END} once each, around its table")
    before, rest = text.split(_BEGIN)
    _, after = rest.split(_END)
    return f"{before}{_BEGIN}\n{TABLES[path]}\n{_END}{after}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing, report differences")
    args = parser.parse_args(argv)
    status = 0
    for path in TABLES:
        text = with_table(path)
        if path.read_text(encoding="utf-8") == text:
            continue
        if args.check:
            print(
                f"{path} does not match zoo/records.py; run: python docs/zoo_tables.py",
                file=sys.stderr,
            )
            status = 1
        else:
            path.write_text(text, encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
