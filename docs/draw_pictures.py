"""Draw predictions.png, report.png, page.png and page_narrow.png of docs/, on photographs.

    pip install -r requirements/test.txt -r requirements/page.txt scikit-image    # and Chromium
    python docs/draw_pictures.py docs WORK    # WORK: new folder for data and run; three minutes

docs/report.md says what they are. Training crops and validation crops share no pixel.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from replknet_paddle.commands import main
from replknet_paddle.data.make_lists import make_lists

CLASSES = ("astronaut", "cat", "coffee", "rocket", "stars", "temple")


def make_crops(folder: Path, photographs: list[np.ndarray]) -> None:
    rng = np.random.default_rng(0)
    for split, count in {"train": 60, "val": 12}.items():
        for name, photograph in zip(CLASSES, photographs):
            (folder / split / name).mkdir(parents=True)
            edge = int(0.4 * photograph.shape[1])
            part = photograph[:, :edge] if split == "train" else photograph[:, edge:]
            for i in range(count):
                width = int(part.shape[1] * rng.uniform(0.6, 1))
                height = min(int(width / rng.uniform(0.75, 1.5)), part.shape[0])
                room = part.shape[1] - width, part.shape[0] - height
                left, top = rng.integers(room, endpoint=True)
                crop = Image.fromarray(part[top : top + height, left : left + width])
                crop.save(folder / split / name / f"{i:02d}.jpg", quality=92)


def take_screenshots(target: Path) -> None:
    from playwright.sync_api import sync_playwright

    report, page = Path("report/report.html").resolve().as_uri(), "http://127.0.0.1:7860"
    pictures = {"report": (report, 1280), "page": (page, 1120), "page_narrow": (page, 390)}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium")
        for name, (address, width) in pictures.items():
            tab = browser.new_page(viewport={"width": width, "height": 800})
            tab.goto(address)
            if address == page:
                tab.set_input_files("input[type=file]", "data/val/cat/01.jpg")
                tab.wait_for_selector("#classes dd")
                tab.wait_for_timeout(2000)  # pictures fade in
            path = target / f"{name}.png"
            tab.screenshot(path=path, full_page=True)
            shades = Image.open(path).convert("RGB").point(lambda v: v // 4 * 255 // 63)
            shades.save(path, optimize=True)  # 64 of each colour, for a smaller file


if __name__ == "__main__":
    from skimage.data import astronaut, chelsea, coffee, hubble_deep_field, rocket
    from sklearn.datasets import load_sample_image

    photographs = [astronaut(), chelsea(), coffee(), rocket(), hubble_deep_field()]
    docs, work = (Path(name).resolve() for name in sys.argv[1:])
    work.mkdir()
    os.chdir(work)
    make_crops(Path("data"), [*photographs, load_sample_image("china.jpg")])
    make_lists("data", train="train", val="val")
    flags = ["-data_path=data", "-output=run"]
    main(["train", "-cfg=configs/replknet_nano_finetune.yaml", *flags])
    main(["eval", "run", "-data_path=data", "-report=report"])
    crops = [f"data/val/{name}/{i:02d}.jpg" for name in CLASSES for i in (0, 1)]
    main(["predict", "run", *crops, f"-save_grid={docs / 'predictions.png'}", "-overwrite"])
    command = [sys.executable, "-m", "replknet_paddle", "page", "run"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            server.stdout.readline()  # its address: it is there
            take_screenshots(docs)
        finally:
            server.terminate()
