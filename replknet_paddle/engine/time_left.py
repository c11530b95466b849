"""How long the rest of a training run takes."""

from tqdm import tqdm

from replknet_paddle.checkpoints.run_folder import Progress


def text_of_time_left(
    progress: Progress, *, epochs: int, every: int, batch_seconds: float, evaluation_seconds: float
) -> str:
    """The time left as h:mm:ss.

    Args:
        epochs, every: of the run, and from one evaluation to the next.
        batch_seconds, evaluation_seconds: as for `seconds_left`.
    """
    left = evaluations_left(epoch=progress.epoch, epochs=epochs, every=every)
    seconds = seconds_left(
        batches_left=(epochs - progress.epoch) * progress.batches - progress.batch,
        batch_seconds=batch_seconds,
        evaluations_left=left,
        evaluation_seconds=evaluation_seconds,
    )
    return tqdm.format_interval(seconds)


def evaluations_left(*, epoch: int, epochs: int, every: int) -> int:
    """Evaluations after `epoch` of `epochs`: every `every` epochs, and after the last."""
    if epoch >= epochs:
        return 0
    return epochs // every - epoch // every + (epochs % every != 0)


def seconds_left(
    *,
    batches_left: int,
    batch_seconds: float,
    evaluations_left: int,
    evaluation_seconds: float,
) -> float:
    """Training at the pace of this epoch, evaluations at that of the last one.

    Args:
        batches_left: forward passes of this epoch and the others.
        evaluation_seconds: including the checkpoint; 0 before the first evaluation.
    """
    return batches_left * batch_seconds + evaluations_left * evaluation_seconds
