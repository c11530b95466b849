"""Write the goldens beside this file: what timm does, given chosen draws or replayed ones.

Run by hand where timm 1.0.31, torch, torchvision and Pillow 13 are installed (the project
needs none of the first three): `python tests/data/transforms/goldens/make_goldens.py`.

- `timm_operations.npz`: a small image, and what each operation makes of it at several
  magnitudes, with timm's random sign forced both ways.
- `timm_draws.json`: timm's AutoAugment table, and the crops, erased boxes, mixup draws and
  operations that it arrives at when each of its random draws is answered by one numpy generator
  of a stated seed. timm draws a sign only for the operations that use one, and no chance for
  operations that are certain; we draw both always, so the replay draws and discards them.
- `timm_samples.npz`: whole training samples of the official recipe at 24 pixels (erasing more
  often than it), replayed likewise; the name of each array is PHOTOGRAPH, a space and the seed.
"""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL
import timm
import torch
from PIL import Image
from timm.data import auto_augment, create_transform, mixup, random_erasing, transforms

HERE = Path(__file__).parent
IMAGES = HERE.parents[2] / "fixtures" / "images"
MADE_BY = f"timm {timm.__version__}, Pillow {PIL.__version__}"
FILL = (124, 116, 104)
HPARAMS = {"img_mean": FILL, "interpolation": Image.Resampling.BICUBIC}
MAGNITUDES = (0.0, 4.0, 9.3, 10.0)
OPERATIONS = sorted(
    {*auto_augment._RAND_TRANSFORMS, *auto_augment._RAND_INCREASING_TRANSFORMS, "PosterizeOriginal"}
)
DIRECTED = ("Rotate", "Shear", "Translate", "ColorI", "ContrastI", "BrightnessI", "SharpnessI")


def is_directed(name: str) -> bool:
    return name.startswith(DIRECTED)


def operations() -> dict[str, np.ndarray]:
    image = Image.open(IMAGES / "landscape_499x375.jpg").crop((90, 40, 330, 240)).resize((16, 12))
    arrays = {"made_by": np.array(MADE_BY), "image": np.array(image)}
    for name in OPERATIONS:
        for magnitude in MAGNITUDES:
            if "Posterize" in name and auto_augment.LEVEL_TO_ARG[name](magnitude, {})[0] == 0:
                continue  # timm hands 0 bits to Pillow 13, which refuses them
            for sign in (1, -1) if is_directed(name) else (1,):
                auto_augment.random = SimpleNamespace(random=lambda s=sign: 0.5 - 0.25 * s)
                op = auto_augment.AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=HPARAMS)
                arrays[f"{name} {magnitude} {sign}"] = np.array(op(image))
    auto_augment.random = random
    return arrays


def replay(seed: int) -> np.random.Generator:
    """Let one generator answer all that timm asks `random` and `numpy.random` for."""
    rng = np.random.default_rng(seed)
    answers = SimpleNamespace(
        random=rng.random,
        uniform=rng.uniform,
        gauss=rng.normal,
        randint=lambda low, high: int(rng.integers(low, high, endpoint=True)),
        choice=lambda items: items[rng.integers(len(items))],
    )
    numpy_answers = SimpleNamespace(
        rand=rng.random,
        beta=rng.beta,
        randint=lambda low, high, size: rng.integers(low, high),
        choice=lambda items, size, replace, p: [
            items[i] for i in rng.integers(len(items), size=size)
        ],
    )
    for module in (transforms, random_erasing, auto_augment):
        module.random = answers
    for module in (mixup, auto_augment):
        module.np = SimpleNamespace(random=numpy_answers, sqrt=np.sqrt, clip=np.clip)
    return rng


def crops() -> list[dict]:
    rows = []
    for seed in range(40):
        width, height = [(500, 375), (333, 500), (900, 100), (60, 700)][seed % 4]
        replay(seed)
        crop = transforms.RandomResizedCropAndInterpolation.get_params
        image = Image.new("L", (width, height))
        top, left, crop_height, crop_width = crop(image, (0.08, 1.0), (0.75, 1.3333333))
        box = (left, top, left + crop_width, top + crop_height)
        rows.append({"seed": seed, "width": width, "height": height, "box": box})
    return rows


class Recorder:
    """Stands for an image, and notes where it is written to."""

    def __init__(self):
        self.boxes = []

    def __setitem__(self, key, value):
        self.boxes.append((key[1].start, key[2].start, key[1].stop, key[2].stop))


def erased_boxes() -> list[dict]:
    rows = []
    for seed in range(30):
        height, width, count = [(64, 64, 1), (40, 70, 3)][seed % 2]
        replay(seed)
        recorder = Recorder()
        eraser = random_erasing.RandomErasing(0.5, max_count=count, device="cpu")
        eraser._erase(recorder, 3, height, width, torch.float32)
        row = {"seed": seed, "height": height, "width": width, "count": count}
        rows.append(row | {"boxes": recorder.boxes})
    return rows


def policy_operations(policy) -> list:
    """The operations of a timm policy, made to draw a chance and a sign whatever they are."""
    if isinstance(policy, auto_augment.RandAugment):
        ops = policy.ops
    else:
        ops = [op for sub_policy in policy.policy for op in sub_policy]
    for op in ops:
        op.prob = min(op.prob, 1 - 1e-12)
        if not is_directed(op.name):

            def draw_first(image, *args, apply=op.aug_fn, **kwargs):
                auto_augment.random.random()
                return apply(image, *args, **kwargs)

            op.aug_fn = draw_first
    return ops


def policies(transform, setting: str) -> list[dict]:
    rows = []
    policy = transform(setting, dict(HPARAMS))
    applied = []
    for op in policy_operations(policy):

        def record(image, *args, name=op.name, apply=op.aug_fn, **kwargs):
            applied.append((name, args[0] if args else None))
            return apply(image, *args, **kwargs)

        op.aug_fn = record
    for seed in range(60):
        replay(seed)
        applied.clear()
        policy(Image.new("RGB", (8, 8)))
        rows.append({"seed": seed, "applied": list(applied)})
    return rows


def auto_augment_policy() -> list[list]:
    return [
        [(op.name, op.prob, op.magnitude) for op in pair]
        for pair in auto_augment.auto_augment_policy("original", dict(HPARAMS))
    ]


def samples() -> dict[str, np.ndarray]:
    arrays = {"made_by": np.array(MADE_BY)}
    pipeline = create_transform(
        24,
        is_training=True,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        ratio=(0.75, 1.3333333),
        re_prob=0.5,
        re_mode="pixel",
    )
    policy_operations(pipeline.transforms[2])
    for seed in range(12):
        name = ("landscape_499x375.jpg", "gray_333x251.jpg", "portrait_301x400.jpg")[seed % 3]
        rng = replay(seed)
        torch.rand = lambda *_, rng=rng: torch.tensor([rng.random()])  # the flip
        random_erasing._get_pixels = lambda _, __, shape, rng=rng, **___: torch.from_numpy(
            rng.standard_normal(shape, np.float32)
        )
        arrays[f"{name} {seed}"] = pipeline(Image.open(IMAGES / name).convert("RGB")).numpy()
    return arrays


def mixes() -> list[dict]:
    rows = []
    for seed in range(40):
        alphas = [(0.8, 1.0), (0.2, 0.0), (0.0, 1.0), (0.8, 0.3)][seed % 4]
        row = {"seed": seed, "mixup_alpha": alphas[0], "cutmix_alpha": alphas[1], "prob": 0.8}
        row |= {"switch_prob": 0.6, "height": 48, "width": 65}
        replay(seed)
        mixer = mixup.Mixup(*alphas, None, row["prob"], row["switch_prob"])
        lam, use_cutmix = mixer._params_per_batch()
        box = None
        if use_cutmix:
            size = row["height"], row["width"]
            (top, bottom, left, right), lam = mixup.cutmix_bbox_and_lam(size, lam)
            box = [int(v) for v in (top, left, bottom, right)]
        rows.append(row | {"lam": float(lam), "box": box})
    return rows


def minmax_boxes() -> list[dict]:
    rows = []
    for seed in range(10):
        replay(seed)
        top, bottom, left, right = mixup.rand_bbox_minmax((48, 65), (0.2, 0.8))
        box = [int(v) for v in (top, left, bottom, right)]
        rows.append({"seed": seed, "height": 48, "width": 65, "minmax": (0.2, 0.8), "box": box})
    return rows


def main() -> None:
    np.savez_compressed(HERE / "timm_operations.npz", **operations())
    draws = {
        "made_by": f"{MADE_BY}, its draws answered by numpy {np.__version__}'s default_rng(seed)",
        "crops": crops(),
        "erased_boxes": erased_boxes(),
        "rand_augment": policies(auto_augment.rand_augment_transform, "rand-m9-mstd0.5-inc1"),
        "auto_augment_policy": auto_augment_policy(),
        "auto_augment": policies(auto_augment.auto_augment_transform, "original"),
        "mixes": mixes(),
        "minmax_boxes": minmax_boxes(),
    }
    np.savez_compressed(HERE / "timm_samples.npz", **samples())
    # One row a line, so that a change can be read in a diff.
    entries = []
    for key, value in draws.items():
        rows = (
            json.dumps(value)
            if isinstance(value, str)
            else ("[\n" + ",\n".join(json.dumps(row) for row in value) + "\n]")
        )
        entries.append(f'"{key}": {rows}')
    (HERE / "timm_draws.json").write_text("{\n" + ",\n".join(entries) + "\n}\n")


if __name__ == "__main__":
    main()
