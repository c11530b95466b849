"""Batches by steps: passes over the dataset that follow one another across epochs."""

from collections import Counter

import pytest

from replknet_paddle.data.dataset import StepBatches


def batches(*, length=10, batch_size=3, rank=0, world_size=1, seed=0, number=4):
    return StepBatches(
        length, batch_size, rank=rank, world_size=world_size, seed=seed, batches=number
    )


def epoch(sampler, number, first=0):
    sampler.set_epoch(number, first)
    return list(sampler)


def test_every_pass_has_every_image_once():
    sampler = batches()
    names = [name for number in range(5) for batch in epoch(sampler, number) for name in batch]
    assert len(names) == 60  # 5 epochs of 4 batches of 3: six passes over 10 images
    assert Counter(names) == Counter((p, i) for p in range(6) for i in range(10))
    orders = [[i for p, i in names if p == number] for number in range(6)]
    assert len({tuple(order) for order in orders}) == 6


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_divide_what_one_would_have(world_size):
    one = [b for n in range(2) for b in epoch(batches(batch_size=2 * world_size), n)]
    parts = [batches(batch_size=2, rank=r, world_size=world_size) for r in range(world_size)]
    together = [
        [name for part in step for name in part]
        for n in range(2)
        for step in zip(*(epoch(part, n) for part in parts))
    ]
    assert together == one


def test_a_resumed_epoch_goes_on_where_it_was():
    sampler = batches()
    assert epoch(sampler, 3, 2) == epoch(sampler, 3)[2:]
    assert len(sampler) == 4


def test_a_dataset_smaller_than_a_batch_comes_again_within_it():
    (batch,) = epoch(batches(length=2, batch_size=5, number=1), 0)
    assert sorted(batch) == [(0, 0), (0, 1), (1, 0), (1, 1), batch[-1]]


def test_another_seed_is_another_order():
    assert epoch(batches(), 0) != epoch(batches(seed=1), 0)
