"""The photographs of solar cells: in three parts, which are disjoint, stratified, and the same each
time. A package of tiny images stands in for elpv-dataset, which the last test takes."""

import hashlib
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
from PIL import Image
from tiny import command

main = command("make-solar-cells")

CLASSES = ("functional", "defective")
LISTS = {"train": "train_list.txt", "val": "val_list.txt", "test": "test/val_list.txt"}
# How many cells have a probability of a defect and a type.
KINDS = {("0.0", "mono"): 41, ("0.33", "poly"): 22, ("0.66", "mono"): 8, ("1.0", "poly"): 33}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A stand-in for elpv-dataset: {name of the image file: (probability, type)}."""
    data = tmp_path / "package" / "elpv_dataset" / "data"
    (data / "images").mkdir(parents=True)
    cells = dict(enumerate(kind for kind, count in KINDS.items() for _ in range(count)))
    for i in cells:
        Image.new("L", (2, 2), i).save(data / "images" / f"cell{i:04d}.png")
    rows = (f"images/cell{i:04d}.png  {p:20}{kind}\n" for i, (p, kind) in cells.items())
    (data / "labels.csv").write_text("".join(rows))
    stand_in = SimpleNamespace(__file__=str(data.parent / "__init__.py"))
    monkeypatch.setitem(sys.modules, "elpv_dataset", stand_in)
    return {f"cell{i:04d}.png": kind for i, kind in cells.items()}


def parts_of(folder):
    """{name of the image file: label} of each part, whose files are exactly those of its list."""
    parts = {}
    for part, name in LISTS.items():
        data = (folder / name).parent
        lines = (line.rsplit(" ", 1) for line in (folder / name).read_text().splitlines())
        images = {data / path: int(label) for path, label in lines}
        assert set(images) == set((folder / part).rglob("*.png"))
        assert all(path.parent.name == CLASSES[label] for path, label in images.items())
        parts[part] = {path.name: label for path, label in images.items()}
    return parts


def test_every_cell_is_in_one_part_with_its_label_and_kinds_are_divided_alike(package, tmp_path):
    assert main([str(tmp_path)]) == 2  # not an empty folder
    assert main([str(tmp_path / "cells")]) == main([str(tmp_path / "again")]) == 0
    parts = parts_of(tmp_path / "cells")
    assert parts == parts_of(tmp_path / "again")
    assert sum(map(len, parts.values())) == len(package)
    for part, share in {"train": 5 / 8, "val": 1 / 8, "test": 2 / 8}.items():
        for name, label in parts[part].items():
            assert label == (float(package[name][0]) > 0.5)
            (copy,) = (tmp_path / "cells").rglob(name)
            assert Image.open(copy).getpixel((0, 0)) == int(name[4:8])
        counts = Counter(package[name] for name in parts[part])
        assert all(abs(counts[kind] - share * count) < 2 for kind, count in KINDS.items())


def test_the_split_of_the_real_cells_is_that_of_the_documented_figures(tmp_path):
    pytest.importorskip("elpv_dataset", reason="optional: requirements/solar.txt")
    assert main([str(tmp_path)]) == 0
    parts = parts_of(tmp_path)
    counts = {part: (len(cells), sum(cells.values())) for part, cells in parts.items()}
    assert counts == {"train": (1640, 514), "val": (328, 102), "test": (656, 205)}
    names = " ".join(sorted(parts["test"])).encode()
    assert hashlib.sha256(names).hexdigest().startswith("3c98cdfaff6af1cf")
