"""docs/architecture.png shows the network that the configuration describes."""

import importlib.util

import numpy as np
import pytest
from PIL import Image
from tiny import ROOT

from replknet_paddle.analysis.figures import save_figure
from replknet_paddle.config import get_config

pytest.importorskip("matplotlib", reason="optional: requirements/plots.txt")


@pytest.fixture
def figure():
    path = ROOT / "docs" / "draw_architecture.py"
    spec = importlib.util.spec_from_file_location("draw_architecture", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script.draw(get_config(ROOT / "configs" / "replknet_31b.yaml"))


def test_the_figure_names_the_sizes_of_the_stages(figure):
    texts = [" ".join(text.get_text().split()) for text in figure.axes[0].texts]
    for stage, kernel, pairs, size in (
        (1, 31, 2, "128 x 56 x 56"),
        (2, 29, 2, "256 x 28 x 28"),
        (3, 27, 18, "512 x 14 x 14"),
        (4, 13, 2, "1024 x 7 x 7"),
    ):
        blocks = f"{pairs} x (RepLK block, ConvFFN)"
        assert f"stage {stage} {kernel}x{kernel} kernels {blocks} {size}" in texts
    assert "31x31 depthwise BN" in texts and "5x5 depthwise BN" in texts


def test_the_picture_in_the_docs_is_the_one_that_is_drawn(figure, tmp_path):
    save_figure(figure, str(tmp_path / "drawn.png"))
    drawn, kept = (
        np.asarray(Image.open(path).convert("RGB").reduce(8), dtype=int)
        for path in (tmp_path / "drawn.png", ROOT / "docs" / "architecture.png")
    )
    assert drawn.shape == kept.shape
    # Letters differ with the version of matplotlib and the fonts of the system, by a quarter of a
    # percent of means over eight by eight pixels; one box that moves by a fifth of an inch makes
    # eight tenths.
    assert np.mean(np.abs(drawn - kept).max(axis=2) > 60) < 0.005
    assert kept.min() < 120 and tuple(kept[0, 0]) == (255, 255, 255)
