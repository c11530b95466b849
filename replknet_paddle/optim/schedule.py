"""Learning rate per optimizer step: warm-up, then a cosine or a line down to the minimum.

The schedule of the official training code (ConvNeXt's step array, used by Swin and BEiT too) as
a pure function, so that a resumed run needs nothing but the step number.
"""

import math


def get_lr(
    step: int,
    *,
    base_lr: float,
    min_lr: float,
    warmup_start_lr: float,
    warmup_steps: int,
    total_steps: int,
) -> float:
    """Return the learning rate of one optimizer step.

    Warm-up rises on a straight line through steps 0 (`warmup_start_lr`) and `warmup_steps - 1`
    (`base_lr`). The cosine starts at `base_lr` again, on step `warmup_steps`, so the peak lasts
    two steps. It would meet `min_lr` at step `total_steps`, one after the last: the run's last
    step is still a little above the minimum, as in the official code.

    Steps count from 0. A warm-up of 0 steps is none, and one of a single step stays at
    `warmup_start_lr`. ValueError: `step` or `warmup_steps` is outside [0, `total_steps`].
    """
    _check_step(step, warmup_steps, total_steps)
    if step < warmup_steps:
        return warmup_start_lr + (base_lr - warmup_start_lr) * step / max(warmup_steps - 1, 1)
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)  # 0 at the peak, to 1
    return min_lr + 0.5 * (base_lr - min_lr) * (1.0 + math.cos(math.pi * progress))


def get_poly_lr(
    step: int,
    *,
    base_lr: float,
    min_lr: float,
    warmup_start_lr: float,
    warmup_steps: int,
    total_steps: int,
) -> float:
    """Return the rate of one step of segmentation: a straight line down, below it a warm-up.

    The line would meet `min_lr` at step `total_steps`, one after the last ("poly" with power 1). In
    the warm-up the line's rate is multiplied by a factor that rises linearly from
    `warmup_start_lr / base_lr` on step 0 to 1 on step `warmup_steps`. Source: mmcv's lr hooks.
    """
    _check_step(step, warmup_steps, total_steps)
    rate = min_lr + (base_lr - min_lr) * (1 - step / total_steps)
    if step < warmup_steps:
        rate *= 1 - (1 - step / warmup_steps) * (1 - warmup_start_lr / base_lr)
    return rate


def base_learning_rate(
    base_lr: float, global_batch: int, linear_scaled_lr: int | None = None
) -> float:
    """Return the peak that a configured rate means, with `global_batch` images per optimizer step.

    `linear_scaled_lr` is None where `base_lr` is absolute, as the official recipes' are; else the
    batch that it was written for (PaddleViT's rule, which scales the peak alone and leaves the
    start of the warm-up and the minimum as they are).
    """
    return base_lr if linear_scaled_lr is None else base_lr * global_batch / linear_scaled_lr


def _check_step(step: int, warmup_steps: int, total_steps: int) -> None:
    if not (0 <= step <= total_steps and 0 <= warmup_steps <= total_steps):
        raise ValueError(
            f"step and warmup_steps must lie in [0, total_steps={total_steps}]; "
            f"got step={step}, warmup_steps={warmup_steps}"
        )
