"""Which samples make which batch, on how many ranks and after what."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from properties import same_examples

from replknet_paddle.data.dataset import BalancedBatches, EvalBatches, StepBatches, TrainBatches

LENGTHS, FEW, SEEDS = st.integers(1, 120), st.integers(1, 5), st.integers(0, 9)


def epoch(sampler, number: int, first_batch: int = 0):
    sampler.set_epoch(number, first_batch)
    return list(sampler)


def ranks(kind, length, batch_size, world_size, **options):
    return [
        kind(length, batch_size, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]


@same_examples
@given(LENGTHS, FEW, FEW, FEW, SEEDS, st.integers(0, 9))
def test_ranks_partition_each_global_batch_of_whole_steps(
    length, batch_size, world_size, accum_iter, seed, number
):
    samplers = ranks(TrainBatches, length, batch_size, world_size, seed=seed, accum_iter=accum_iter)
    steps = list(zip(*(epoch(sampler, number) for sampler in samplers)))
    whole_steps = length // (batch_size * world_size * accum_iter)  # others are left out
    assert {len(sampler) for sampler in samplers} == {len(steps)} == {whole_steps * accum_iter}
    assert all(len(batch) == batch_size for step in steps for batch in step)
    seen = [name for step in steps for batch in step for name in batch]
    assert len(set(seen)) == len(seen) == len(steps) * batch_size * world_size
    assert {e for e, _ in seen} <= {number} and {i for _, i in seen} <= set(range(length))
    # One rank with the whole global batch sees the same in each step.
    one = TrainBatches(
        length, batch_size * world_size, rank=0, world_size=1, seed=seed, accum_iter=accum_iter
    )
    assert [[name for batch in step for name in batch] for step in steps] == epoch(one, number)


@same_examples
@given(LENGTHS, FEW, FEW, SEEDS, st.data())
def test_a_resumed_epoch_goes_on_exactly(length, batch_size, world_size, seed, data):
    kinds = {TrainBatches: {}, StepBatches: {"batches": 7}}
    for kind, options in (kinds | {BalancedBatches: {"labels": np.arange(length) % 7}}).items():
        whole = ranks(kind, length, batch_size, world_size, seed=seed, **options)[-1]
        resumed = ranks(kind, length, batch_size, world_size, seed=seed, **options)[-1]
        first_batch = data.draw(st.integers(0, len(whole)))
        assert epoch(resumed, 4, first_batch) == epoch(whole, 4)[first_batch:]
        assert len(resumed) == len(whole)
        assert epoch(resumed, 5) == epoch(whole, 5)  # from the start again


def test_each_epoch_and_seed_has_its_own_order_and_each_epoch_all_images():
    orders = []
    for seed, number in ((1, 0), (1, 1), (1, 2), (2, 0)):
        sampler = TrainBatches(60, 5, rank=0, world_size=1, seed=seed)
        order = [index for batch in epoch(sampler, number) for _, index in batch]
        assert sorted(order) == list(range(60)) and order != sorted(order)
        orders.append(tuple(order))
    assert len(set(orders)) == 4
    assert orders[0] == tuple(np.random.default_rng((1, 0)).permutation(60).tolist())


@same_examples
@given(LENGTHS, FEW, FEW, st.integers(1, 20), SEEDS)
def test_steps_are_passes_over_all_images_whatever_the_epochs(
    length, batch_size, world_size, batches, seed
):
    """As one rank with the whole global batch would have them, one pass after the other."""
    options = {"seed": seed, "batches": batches}
    samplers = ranks(StepBatches, length, batch_size, world_size, **options)
    names = [
        name
        for number in range(3)
        for step in zip(*(epoch(sampler, number) for sampler in samplers))
        for batch in step
        for name in batch
    ]
    assert len(names) == 3 * batches * batch_size * world_size
    assert [number for number, _ in names] == [i // length for i in range(len(names))]
    passes = [[i for number, i in names if number == p] for p in range(len(names) // length)]
    assert all(sorted(order) == list(range(length)) for order in passes)
    assert max(Counter(names).values()) == 1
    if length > 20:
        assert len(set(map(tuple, passes))) == len(passes)
        other = StepBatches(length, length, rank=0, world_size=1, seed=seed + 1, batches=1)
        assert not passes or [i for _, i in epoch(other, 0)[0]] != passes[0]


@same_examples
@given(st.lists(st.sampled_from([0, 0, 0, 1, 4]), min_size=20, max_size=120), FEW, FEW, FEW, SEEDS)
def test_balanced_batches_have_each_class_equally_often(
    labels, batch_size, world_size, accum_iter, seed
):
    """As one rank with the whole global batch would have them; 2, 3 and 5 are never there."""
    labels = np.array(labels)
    options = {"seed": seed, "accum_iter": accum_iter, "labels": labels}
    samplers = ranks(BalancedBatches, len(labels), batch_size, world_size, **options)
    one, other = (
        BalancedBatches(len(labels), batch_size * world_size, rank=0, world_size=1, **settings)
        for settings in (options, options | {"seed": seed + 1})
    )
    seen, orders = [], {tuple(index for step in epoch(other, 0) for _, index in step)}
    for number in range(3):
        steps = zip(*(epoch(sampler, number) for sampler in samplers))
        steps = [[name for batch in step for name in batch] for step in steps]
        assert steps == epoch(one, number)
        drawn = [name for step in steps for name in step]
        counts = np.bincount([labels[index] for _, index in drawn], minlength=5)[np.unique(labels)]
        assert np.ptp(counts) <= 1
        seen += drawn
        orders.add(tuple(index for _, index in drawn))
    assert len(orders) == 4 or not seen
    # An image has another random generator each time, and comes again after all of its class.
    assert max(Counter(seen).values(), default=1) == 1
    for label in set(labels):
        passes = Counter(number for number, index in seen if labels[index] == label)
        size = np.count_nonzero(labels == label)
        assert all(passes[number] == size for number in range(max(passes, default=0)))


@same_examples
@given(LENGTHS, st.integers(1, 200), FEW)
def test_evaluation_sees_every_image_exactly_once(length, batch_size, world_size):
    seen = []
    for sampler in ranks(EvalBatches, length, batch_size, world_size):
        listed = list(sampler)
        assert len(sampler) == len(listed)
        assert all(1 <= len(batch) <= batch_size for batch in listed)
        assert all(len(batch) == batch_size for batch in listed[:-1])
        seen += [name for batch in listed for name in batch]
    assert sorted(seen) == [(0, index) for index in range(length)]
