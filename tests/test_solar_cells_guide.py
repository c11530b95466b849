"""docs/solar_cells.md from its first command to its last, on every fourth photograph."""

import pytest
from test_guide import Guide
from tiny import table

pytest.importorskip("elpv_dataset", reason="optional: requirements/solar.txt")


@pytest.mark.slow
def test_the_guide_from_its_first_command_to_its_last(tmp_path):
    guide = Guide(tmp_path, "docs/solar_cells.md")
    del guide.commands[0]  # pip install
    guide.run("make-solar-cells", "cells")
    for name in ("train_list.txt", "val_list.txt", "test/val_list.txt"):
        lines = (tmp_path / "cells" / name).read_text().splitlines(keepends=True)
        (tmp_path / "cells" / name).write_text("".join(lines[::4]))  # fewer fit no temperature
    assert "No problems found" in guide.run("check-data", "cells")
    guide.run("train", more=("-epochs=8", "-image_size=64"))
    guide.run("plot")
    guide.run("eval", "output/cells", "-data_path", "cells/test")
    classes = table(tmp_path / "report" / "per_class.csv")
    assert [row["class"] for row in classes] == ["functional", "defective"]
    assert sum(int(row["images"]) for row in classes) == 164
    while guide.commands:
        guide.run()
