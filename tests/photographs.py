"""A folder of generated photographs, with names and flaws that real folders have."""

import numpy as np
from PIL import Image

# Name of the class, hue of its images in degrees, direction and width of its stripes.
CLASSES = {
    "Grüne Äpfel": (110, 0, 9),
    "Straße bei Nacht": (240, 90, 14),
    "猫 と 犬": (30, 45, 7),
    "한국 음식": (0, 135, 18),
    "red bricks": (330, 0, 25),
}
CORRUPT = "猫 と 犬/halb übertragen.jpg"
ROTATED = "Grüne Äpfel/hochkant 1.jpg"
EXIF_ORIENTATION = 0x0112
# A photograph in the folder of another class; `make-lists --val 0.1` takes it for validation.
MISLABELLED = "red bricks/IMG 0012.jpg"
SHOWN_IN_MISLABELLED = "Grüne Äpfel"


def photograph(name: str, seed: int) -> Image.Image:
    """Stripes of a class in its hue, under uneven light, with grain."""
    rng = np.random.default_rng(seed)
    width, height = (int(side) for side in rng.integers(96, 150, 2))
    hue, degrees, period = CLASSES[name]
    angle = np.radians(degrees + rng.normal(0, 8))
    y, x = np.mgrid[:height, :width]
    along = x * np.cos(angle) + y * np.sin(angle)
    stripes = np.sin(2 * np.pi * along / (period * rng.uniform(0.8, 1.2)) + rng.uniform(0, 6))
    light = 1 + 0.4 * np.cos((x - rng.uniform(0, width)) / width + (y / height) * rng.normal(0, 1))
    value = np.clip((150 + 50 * stripes) * light * rng.uniform(0.7, 1.1), 0, 255)
    hues = np.full_like(value, (hue + rng.normal(0, 10)) % 360 * 255 / 360)
    saturation = np.full_like(value, rng.uniform(70, 160))
    pixels = np.stack([hues, saturation, value], axis=2).astype("uint8")
    image = np.asarray(Image.fromarray(pixels, "HSV").convert("RGB"), dtype=float)
    return Image.fromarray(np.clip(image + rng.normal(0, 12, image.shape), 0, 255).astype("uint8"))


def make_photographs(folder, *, each: int, seed: int) -> None:
    """Write `each` photographs of each class.

    One file is cut short, one asks to be turned, and the 13th of a class shows another one.
    """
    for number, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            path = folder / name / f"IMG {i:04d}.jpg"
            shown = SHOWN_IN_MISLABELLED if path == folder / MISLABELLED else name
            image = photograph(shown, seed + 1000 * number + i)
            if i == 0 and name == ROTATED.split("/")[0]:
                exif = Image.Exif()
                exif[EXIF_ORIENTATION] = 6
                image.save(folder / ROTATED, exif=exif)
            elif i == 0 and name == CORRUPT.split("/")[0]:
                image.save(path)
                content = path.read_bytes()
                path.unlink()
                (folder / CORRUPT).write_bytes(content[: len(content) // 2])
            else:
                image.save(path)
