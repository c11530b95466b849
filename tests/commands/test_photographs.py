"""A folder as people have it, from its files to predictions: who takes what for an image."""

import json
import logging

import numpy as np
from harness import finish, metrics
from PIL import Image, features
from tiny import command

# Of the formats that are read, by the names that Pillow knows for them.
SUFFIXES = [
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"),
    *([".avif", ".avifs"] if features.check("avif") else []),
]
CLASSES = ["Pâté à l'été", "собака", "قطة", "猫 と 犬"]
JUNK = ["__MACOSX/._a.jpg", ".ipynb_checkpoints/a.jpg", "@eaDir/a.jpg", "._b.jpg", "Thumbs.db"]


def fill(folder) -> tuple[list[str], int]:
    """Write an image with each suffix that Pillow knows into a class of its turn, more JPEGs, and
    junk; return the paths of those that are images here, and the number of the others."""
    rng, images, others = np.random.default_rng(0), [], 0
    Image.init()
    suffixes = sorted(Image.registered_extensions())
    for i, suffix in enumerate([*suffixes, *[".JPG"] * 16]):
        name = f"{CLASSES[i % 4]}/{CLASSES[(i // 4) % 4]} {i}{suffix}"
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(rng.integers(0, 256, (24, 30, 3), np.uint8))
        form = Image.registered_extensions()[suffix.lower()]
        try:
            picture.convert("F" if suffix == ".pfm" else "RGB").save(path, form)
        except (OSError, ValueError, KeyError):  # a format that Pillow does not write, or not so
            path.write_bytes(b"any bytes")
        if suffix.lower() in SUFFIXES:
            images.append(name)
        else:
            others += 1
    for name in JUNK:
        path = folder / CLASSES[1] / name
        path.parent.mkdir(exist_ok=True)
        picture.save(path, "JPEG")
    (folder / "пусто").mkdir()
    (folder / CLASSES[0] / "a note.txt").touch()
    return sorted(images), others + 1


def test_the_commands_agree_on_what_is_an_image(tmp_path, tiny_config_file, caplog, capsys):
    photos, run = tmp_path / "photos", tmp_path / "run"
    images, others = fill(photos)
    assert {name[name.rindex(".") :].lower() for name in images} == set(SUFFIXES)

    with caplog.at_level(logging.WARNING):
        assert command("make-lists")([str(photos), "--val", "0.25"]) == 0
    assert f"passed over {others} files not named as images are (" in caplog.text
    assert "1 folder without an image, left out: пусто" in caplog.text
    lists = [(photos / f"{split}_list.txt").read_text("utf-8") for split in ("train", "val")]
    train, val = ([line.rsplit(" ", 1)[0] for line in text.splitlines()] for text in lists)
    assert sorted(train + val) == images
    assert (photos / "class_names.txt").read_text("utf-8") == "".join(f"{n}\n" for n in CLASSES)

    checked = ["-cfg", str(tiny_config_file), "-report", str(tmp_path / "report.json")]
    assert command("check-data")([str(photos), *checked]) == 0, capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert sum(part["images"] for part in report["lists"].values()) == len(images)

    flags = [f"-cfg={tiny_config_file}", f"-data_path={photos}", f"-output={run}"]
    said = finish([*flags, "-batch_size=4", "-opts", "TRAIN.NUM_EPOCHS", "1"])
    assert f"{len(train)} training and {len(val)} validation images" in said
    assert "cannot read" not in said
    assert metrics(run)[-1]["epoch"] == 1

    results = tmp_path / "results.jsonl"
    assert command("predict")([str(run / "last"), str(photos), "-output", str(results)]) == 0
    others += 3  # the lists and the names of the classes
    assert f"passed over {others} files not named as images are (" in capsys.readouterr().err
    predicted = [json.loads(line) for line in results.read_text("utf-8").splitlines()]
    assert sorted(p["path"].removeprefix(f"{photos}/") for p in predicted) == images
