"""Curves of runs, from metrics.jsonl to a picture."""

import json
import os
import subprocess
import sys
import warnings

import pytest
from PIL import Image
from tiny import ROOT, command

from replknet_paddle.analysis.plots import best_record, build_figure, find_font, read_metrics

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
    assert main([*map(str, runs), "-output", str(target)]) == 0
    with Image.open(target) as image:
        assert image.format == "PNG" and image.width > 1000
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50  # something is drawn


@pytest.mark.parametrize("encoding, shown", [("gbk", "猫\\xd6"), ("ascii", "\\u732b\\xd6")])
def test_a_notebooks_backend_and_other_encodings_do_not_matter(tmp_path, encoding, shown):
    run, target = write_run(tmp_path / "猫Ö"), tmp_path / "猫Ö.png"
    command = [sys.executable, "-m", "replknet_paddle", "plot", run, "-output", target]
    settings = {"MPLBACKEND": "of_a_notebook", "PYTHONIOENCODING": encoding}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode(encoding).strip() == f"wrote {tmp_path}/{shown}.png"
    assert target.is_file()


def test_every_panel_shows_its_curves(tmp_path):
    run = write_run(tmp_path / "a", val_ema_top1_percent=5.0)
    figure = build_figure({str(run): read_metrics(run)})
    loss, top1 = figure.axes
    assert [line.get_label() for line in loss.lines] == ["a: train_loss", "a: val_loss"]
    curves, ema, best = top1.lines
    assert [curves.get_label(), ema.get_label()] == ["a: val_top1", "a: val_ema_top1"]
    assert list(curves.get_ydata()) == [10.0, 20.0, 30.0]
    assert figure.get_suptitle() == "Training: a"
    assert best.get_label() == "a: best, 30.00 % at epoch 3" and best.get_marker() == "*"


@pytest.mark.parametrize("encoding", ["ascii", "gbk", "utf-8:strict"])
def test_a_name_that_the_console_cannot_show_is_escaped(tmp_path, encoding):
    target = tmp_path / os.fsdecode("\u9c7c\U0001f41f\xe4".encode() + b"\xff.png")
    done = subprocess.run(
        [*(sys.executable, "-m", "replknet_paddle", "plot"), write_run(tmp_path / "a")]
        + ["-output", target],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        cwd=ROOT,
    )
    shown = {
        "ascii": rb"\u9c7c\U0001f41f\xe4",
        "gbk": "\u9c7c".encode("gbk") + rb"\U0001f41f\xe4",
        "utf-8:strict": "\u9c7c\U0001f41f\xe4".encode(),
    }[encoding] + rb"\udcff.png"
    assert done.returncode == 0 and target.is_file(), done.stderr
    assert done.stdout == b"wrote " + bytes(tmp_path) + b"/" + shown + b"\n"


def test_runs_whose_folders_share_a_name_are_told_apart_by_their_paths(tmp_path):
    runs = []
    for parent in ("x", "y"):
        (tmp_path / parent).mkdir()
        runs.append(str(write_run(tmp_path / parent / "run")))
    loss, _ = build_figure({run: read_metrics(run) for run in runs}).axes
    names = [line.get_label().rpartition(": ")[0] for line in loss.lines]
    assert names == [runs[0], runs[0], runs[1], runs[1]]


@pytest.mark.parametrize(
    "top1, ema, best",
    [
        ([50, 70, 60], (), (2, 70)),
        ([70, 70], (), (1, 70)),  # the first one, as the run keeps it
        ([50, 60], [55, 65], (2, 65)),
        ([None], (), None),  # never evaluated
    ],
)
def test_the_best_epoch_is_that_of_the_better_weights(top1, ema, best):
    records = [{"epoch": i, "val_top1_percent": value} for i, value in enumerate(top1, 1)]
    for record, value in zip(records, ema):
        record["val_ema_top1_percent"] = value
    key, record = best_record(records) or (None, None)
    assert (record and (record["epoch"], record[key])) == best


def test_names_of_runs_are_drawn_in_a_font_that_has_their_letters(tmp_path):
    if find_font("猫") is None:
        pytest.skip("no font with Chinese letters is installed (fonts-noto-cjk)")
    figure = build_figure({"猫": read_metrics(write_run(tmp_path / "run"))})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(tmp_path / "x.png")
    assert [w for w in caught if "Glyph" in str(w.message)] == []


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
    assert main([str(run), "-output", str(tmp_path / "x.png")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_a_run_of_segmentation_shows_its_miou():
    records = [
        {"epoch": epoch, "train_loss": 1.0 / epoch, "val_miou_percent": miou}
        for epoch, miou in ((1, 30.0), (2, 55.0), (3, 50.0))
    ]
    assert best_record(records) == ("val_miou_percent", records[1])
    figure = build_figure({"output/shapes": records})
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss (nats)", "mIoU (%)"]
    assert "best, 55.00 % at epoch 2" in figure.axes[1].get_legend_handles_labels()[1][-1]
