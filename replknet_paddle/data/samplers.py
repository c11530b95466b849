"""Which samples make which batch, on each rank.

Samples are named by (epoch, index), and all that is random in one depends on nothing but the seed
and that name: neither the number of workers nor a restart changes what the network sees.
"""

from collections.abc import Iterator

import numpy as np
import paddle


class TrainBatches(paddle.io.Sampler):
    """The (epoch, index) names of one rank's training batches, epoch by epoch.

    All ranks shuffle alike, and each takes its part of every global batch, so two ranks with
    batch b see in each step what one rank with batch 2b sees. An epoch has whole optimizer steps
    only, as in the official code: the images beyond them are left out of that epoch.

    Args:
        accum_iter: batches of an optimizer step.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        rank: int,
        world_size: int,
        seed: int,
        accum_iter: int = 1,
    ):
        self.length = length
        self.accum_iter = accum_iter
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.epoch = 0
        self.first_batch = 0

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """What the next iteration gives: this epoch, from this batch on."""
        self.epoch = epoch
        self.first_batch = first_batch

    def __len__(self) -> int:
        """Batches in a whole epoch, for this rank as for any other."""
        step_images = self.batch_size * self.world_size * self.accum_iter
        return self.length // step_images * self.accum_iter

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        step = self.batch_size * self.world_size
        for batch in range(self.first_batch, len(self)):
            start = batch * step + self.rank * self.batch_size
            yield [(self.epoch, int(index)) for index in order[start : start + self.batch_size]]


class StepBatches(TrainBatches):
    """The (pass, index) names of one rank's training batches, in epochs of a given number.

    Whole passes over the dataset, each shuffled anew, follow one another without regard to epochs:
    a batch may end one pass and begin the next, and no image is left out.

    Args:
        batches: of an epoch.
    """

    def __init__(self, length: int, batch_size: int, *, batches: int, **places):
        super().__init__(length, batch_size, **places)
        self.batches = batches

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order_of, order = -1, None
        for batch in range(self.first_batch, self.batches):
            global_batch = self.epoch * self.batches + batch
            start = (global_batch * self.world_size + self.rank) * self.batch_size
            names = []
            for place in range(start, start + self.batch_size):
                number, position = divmod(place, self.length)
                if number != order_of:
                    order = np.random.default_rng((self.seed, number)).permutation(self.length)
                    order_of = number
                names.append((number, int(order[position])))
            yield names


class EvalBatches(paddle.io.Sampler):
    """The names of one rank's evaluation batches: every image once over all ranks, none twice."""

    def __init__(self, length: int, batch_size: int, *, rank: int, world_size: int):
        self.indices = range(rank, length, world_size)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield [(0, index) for index in self.indices[start : start + self.batch_size]]
