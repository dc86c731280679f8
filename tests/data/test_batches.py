"""Steps and microbatches: every row once, few widths, right positions."""

import itertools

import numpy as np
import pytest

from interviewmate_mlx.data.batches import (
    WIDTH_STEP,
    by_width,
    collate,
    epoch_steps,
    padded_width,
    split_step,
    steps_per_epoch,
)
from interviewmate_mlx.data.prompts import Example
from interviewmate_mlx.data.records import Record


def example(length: int, prompt: int = 3, start: int = 1) -> Example:
    tokens = np.arange(start, start + length, dtype=np.int32)
    return Example(Record(f"row of {length}"), tokens, np.arange(length) >= prompt)


@pytest.mark.parametrize(
    ("num_rows", "batch"), [(211, 4), (7, 4), (3, 4), (64, 1), (130, 2), (1, 1)]
)
def test_epoch_trains_on_every_row_exactly_once(num_rows, batch):
    lengths = np.random.default_rng(0).integers(10, 400, num_rows).tolist()
    steps = epoch_steps(lengths, batch, seed=1, epoch=0)
    assert sorted(row for step in steps for row in step) == list(range(num_rows))
    assert len(steps) == steps_per_epoch(num_rows, batch)
    sizes = sorted(map(len, steps))
    assert sizes[1:] == [batch] * (len(steps) - 1)
    assert sizes[0] == (num_rows % batch or batch)


def test_order_follows_from_seed_and_epoch():
    lengths = np.random.default_rng(0).integers(10, 400, 100).tolist()
    order = epoch_steps(lengths, 4, seed=1, epoch=0)
    assert epoch_steps(lengths, 4, seed=1, epoch=0) == order
    assert epoch_steps(lengths, 4, seed=1, epoch=1) != order
    assert epoch_steps(lengths, 4, seed=2, epoch=0) != order


def test_rows_of_a_step_have_similar_lengths():
    lengths = np.random.default_rng(0).integers(60, 400, 211).tolist()
    steps = epoch_steps(lengths, 4, seed=1, epoch=0)
    longest = [max(lengths[row] for row in step) for step in steps]
    padded = sum(padded_width(n) * len(step) for n, step in zip(longest, steps, strict=True))
    at_random = sum(
        padded_width(max(lengths[i : i + 4])) * len(lengths[i : i + 4]) for i in range(0, 211, 4)
    )
    assert padded < 1.16 * sum(lengths)
    assert at_random > 1.4 * sum(lengths)
    # An epoch does not go from short to long all the same.
    assert abs(np.corrcoef(range(len(longest)), longest)[0, 1]) < 0.3


def test_collated_positions_point_at_the_token_before_each_target():
    rows = [example(10), example(7, prompt=5, start=100)]
    batch = collate(rows)
    inputs, positions, targets, mask = (np.array(array) for array in batch.arrays()[:4])
    assert inputs.shape == (2, WIDTH_STEP)
    found = list(zip(inputs.reshape(-1)[positions[mask]], targets[mask], strict=True))
    assert found == [(n, n + 1) for n in range(3, 10)] + [(n, n + 1) for n in (104, 105)]
    assert mask.sum() == 9


def test_few_shapes_over_many_batches():
    rng = np.random.default_rng(0)
    shapes = set()
    for _ in range(300):
        rows = [example(int(n)) for n in rng.integers(100, 380, 4)]
        batch = collate(rows)
        shapes.add((batch.inputs.shape, batch.targets.shape))
    widths = {shape[0][1] for shape in shapes}
    assert all(width % WIDTH_STEP == 0 for width in widths)
    assert len(shapes) <= 5 * len(widths)


@pytest.mark.parametrize(
    ("lengths", "budget", "sizes"),
    [
        ([33, 33, 33, 33], 128, [4]),
        ([33, 33, 33, 33], 127, [3, 1]),
        ([33, 33, 33, 33], 64, [2, 2]),
        ([33, 33, 33, 33], 1, [1, 1, 1, 1]),
        ([300, 20, 20, 20], 320, [1, 3]),
        ([5], 0, [1]),
    ],
)
def test_step_is_split_as_little_as_the_budget_allows(lengths, budget, sizes):
    groups = split_step([example(length) for length in lengths], budget)
    assert [len(group) for group in groups] == sizes
    for group in groups:
        width = padded_width(max(map(len, group)) - 1)
        assert width * len(group) <= budget or len(group) == 1


def test_groups_by_width_hold_every_row_and_one_width_each():
    rows = [example(int(n)) for n in np.random.default_rng(0).integers(10, 200, 45)]
    groups = by_width(rows)
    assert sorted(map(id, itertools.chain(*groups))) == sorted(map(id, rows))
    widths = [{padded_width(len(row) - 1) for row in group} for group in groups]
    assert all(len(width) == 1 for width in widths)
    assert len(set().union(*widths)) == len(groups)
