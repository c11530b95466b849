"""Curves of runs, from metrics.jsonl to a picture."""

import json

import pytest
from PIL import Image
from tiny import command

main = command("plot")


pytest.importorskip("matplotlib", reason="optional: requirements/plots.txt")


def write_run(folder, epochs=3, **extra):
    folder.mkdir()
    with open(folder / "metrics.jsonl", "w") as file:
        for epoch in range(1, epochs + 1):
            record = {"epoch": epoch, "train_loss": 2 / epoch, "val_loss": 2.1 / epoch, **extra}
            file.write(json.dumps({**record, "val_top1_percent": 10.0 * epoch}) + "\n")
    return folder


def test_several_runs_become_one_picture(tmp_path):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", val_ema_top1_percent=5.0)]
    target = tmp_path / "curves.png"
    assert main([*map(str, runs), "--out", str(target)]) == 0
    with Image.open(target) as image:
        assert image.format == "PNG" and image.width > 1000
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50  # something is drawn


def test_every_panel_shows_its_curves(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    assert main([str(write_run(tmp_path / "a", val_ema_top1_percent=5.0))]) == 0
    loss, top1 = figures[0].axes
    assert [line.get_label() for line in loss.lines] == ["a: train_loss", "a: val_loss"]
    assert [line.get_label() for line in top1.lines] == ["a: val_top1", "a: val_ema_top1"]
    assert list(top1.lines[0].get_ydata()) == [10.0, 20.0, 30.0]


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "give the folder of a training run"),
        ("", "holds no epoch yet"),
        ("nonsense\n", "line 1: not a record"),
        ('{"loss": 1}\n', "line 1: not a record"),
    ],
)
def test_what_is_no_run_is_refused(content, message, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    if content is not None:
        (run / "metrics.jsonl").write_text(content)
    assert main([str(run), "--out", str(tmp_path / "x.png")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()
