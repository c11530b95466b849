"""Which samples make which batch, on how many ranks and after what."""

import pytest

from replknet_paddle.data.dataset import EvalBatches, TrainBatches


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("length", [20, 47])
def test_ranks_partition_each_global_batch(length, batch_size, world_size):
    ranks = [
        TrainBatches(length, batch_size, rank=rank, world_size=world_size, seed=3)
        for rank in range(world_size)
    ]
    for sampler in ranks:
        sampler.set_epoch(2)
    steps = list(zip(*ranks))
    assert all(len(sampler) == len(list(sampler)) == len(steps) for sampler in ranks)
    assert len(steps) == length // (batch_size * world_size)  # an incomplete one is left out
    seen = [name for step in steps for batch in step for name in batch]
    assert all(len(batch) == batch_size for step in steps for batch in step)
    assert len(set(seen)) == len(seen) == len(steps) * batch_size * world_size
    assert {epoch for epoch, _ in seen} == {2}
    assert {index for _, index in seen} <= set(range(length))


@pytest.mark.parametrize("accum_iter", [1, 2, 3, 16])
def test_an_epoch_has_whole_optimizer_steps_only(accum_iter):
    for length in range(100):
        batches = TrainBatches(length, 2, rank=1, world_size=3, seed=0, accum_iter=accum_iter)
        assert len(batches) == len(list(batches)) == length // (6 * accum_iter) * accum_iter


@pytest.mark.parametrize("length, batch_size", [(16, 4), (47, 3), (100, 1)])
def test_two_ranks_see_in_each_step_what_one_sees_with_twice_the_batch(length, batch_size):
    one = TrainBatches(length, 2 * batch_size, rank=0, world_size=1, seed=5)
    two = [TrainBatches(length, batch_size, rank=rank, world_size=2, seed=5) for rank in (0, 1)]
    for epoch in (0, 1):
        for sampler in (one, *two):
            sampler.set_epoch(epoch)
        steps = [first + second for first, second in zip(*two)]
        assert [sorted(step) for step in steps] == [sorted(step) for step in one]
        assert len(steps) == len(one)


@pytest.mark.parametrize("first_batch", [0, 1, 4, 9, 10])
def test_a_resumed_epoch_goes_on_exactly(first_batch):
    whole = TrainBatches(41, 2, rank=1, world_size=2, seed=5)
    whole.set_epoch(4)
    resumed = TrainBatches(41, 2, rank=1, world_size=2, seed=5)
    resumed.set_epoch(4, first_batch)
    assert list(resumed) == list(whole)[first_batch:]
    assert len(resumed) == len(whole) == 10
    resumed.set_epoch(5)  # from the start again
    whole.set_epoch(5)
    assert list(resumed) == list(whole)


def test_each_epoch_and_seed_has_its_own_order_and_each_epoch_all_images():
    orders = []
    for seed, epoch in ((1, 0), (1, 1), (1, 2), (2, 0)):
        sampler = TrainBatches(60, 5, rank=0, world_size=1, seed=seed)
        sampler.set_epoch(epoch)
        order = [index for batch in sampler for _, index in batch]
        assert order == [index for batch in sampler for _, index in batch]
        assert sorted(order) == list(range(60)) and order != sorted(order)
        orders.append(tuple(order))
    assert len(set(orders)) == 4


def test_images_left_out_of_an_epoch_have_their_turn_in_another():
    sampler = TrainBatches(9, 4, rank=0, world_size=2, seed=0)
    left_out = set()
    for epoch in range(60):
        sampler.set_epoch(epoch)
        left_out |= set(range(9)) - {index for batch in sampler for _, index in batch}
    assert left_out == set(range(9))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("length", [1, 3, 40, 101])
@pytest.mark.parametrize("batch_size", [1, 2, 7, 40, 200])
def test_evaluation_sees_every_image_exactly_once(length, batch_size, world_size):
    seen = []
    for rank in range(world_size):
        sampler = EvalBatches(length, batch_size, rank=rank, world_size=world_size)
        listed = list(sampler)
        assert len(sampler) == len(listed)
        assert all(1 <= len(batch) <= batch_size for batch in listed)
        assert all(len(batch) == batch_size for batch in listed[:-1])
        seen += [name for batch in listed for name in batch]
    assert sorted(seen) == [(0, index) for index in range(length)]
