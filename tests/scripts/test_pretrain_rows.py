"""Running text as rows: nothing twice in an epoch, nothing lost in the order of validation."""

import itertools

import numpy as np
import pytest
from pretrain_rows import (
    collate_rows,
    packed_rows,
    rows_in_order,
    rows_per_epoch,
)

END = 99


def text(num_documents: int = 12) -> np.ndarray:
    """Documents of unequal length in which every token but the end is unlike all others."""
    lengths = np.random.default_rng(0).integers(1, 40, num_documents)
    numbers = itertools.count(100)
    parts = [[*itertools.islice(numbers, int(length)), END] for length in lengths]
    return np.concatenate(parts).astype(np.uint16)


def test_epoch_holds_each_token_once_but_for_less_than_a_row():
    tokens, width = text(), 16
    count = rows_per_epoch(len(tokens), width)
    rows = list(itertools.islice(packed_rows(tokens, END, width, seed=3), count))
    inputs = np.concatenate([row[:-1] for row in rows])
    own = inputs[inputs != END]
    assert len(set(own.tolist())) == len(own)
    assert len(tokens) - len(inputs) <= width
    assert all(row.shape == (width + 1,) for row in rows)


def test_row_is_running_text_and_documents_stay_whole():
    tokens = text()
    follows = dict(itertools.pairwise(tokens.tolist()))
    for row in itertools.islice(packed_rows(tokens, END, 16, seed=3), 40):
        for one, other in itertools.pairwise(row.tolist()):
            assert one == END or other == follows[one]


def test_rows_follow_from_seed_and_number_alone():
    tokens = text()
    rows = list(itertools.islice(packed_rows(tokens, END, 16, seed=3), 60))
    for first in (0, 1, 17, 59):
        again = next(packed_rows(tokens, END, 16, seed=3, first=first))
        np.testing.assert_array_equal(again, rows[first])
    other = list(itertools.islice(packed_rows(tokens, END, 16, seed=4), 60))
    assert any((one != two).any() for one, two in zip(rows, other, strict=True))


def test_epochs_differ():
    tokens = text()
    count = rows_per_epoch(len(tokens), 16)
    rows = list(itertools.islice(packed_rows(tokens, END, 16, seed=3), 2 * count))
    epochs = [{tuple(row) for row in part} for part in (rows[:count], rows[count:])]
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("width", [7, 16, 1000])
def test_rows_in_order_predict_each_token_once(width):
    tokens = text()
    rows = rows_in_order(tokens, END, width)
    assert np.concatenate([row[1:] for row in rows]).tolist() == tokens.tolist()
    assert rows[0][0] == END
    assert all(len(row) == width + 1 for row in rows[:-1])


def test_collated_rows_predict_every_token_from_the_one_before():
    rows = [np.array([1, 2, 3, 4], np.uint16), np.array([5, 6, 7, 8], np.uint16)]
    batch = collate_rows(rows)
    assert batch.inputs.tolist() == [[1, 2, 3], [5, 6, 7]]
    predicting = batch.inputs.reshape(-1)[batch.positions]
    assert predicting.tolist() == [1, 2, 3, 5, 6, 7]
    assert batch.targets.tolist() == [2, 3, 4, 6, 7, 8]
    assert batch.mask.tolist() == [True] * 6
    assert (batch.inputs.shape[0], batch.targets.size) == (2, 6)
