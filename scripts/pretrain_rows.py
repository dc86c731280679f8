"""For pretrain.py: running text becomes rows of one width, without padding: what pretraining reads.

Documents, each closed by the end token, are laid one after the other and cut
every `width` tokens. A row may so begin inside a document and hold the end of
one and the start of the next; the end token tells the model where.
"""

import itertools
from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from interviewmate_mlx.data.batches import Microbatch


def rows_per_epoch(num_tokens: int, width: int) -> int:
    """Whole rows in so many tokens; a row needs one token more, its last target."""
    return (num_tokens - 1) // width


def packed_rows(
    tokens: np.ndarray, end_id: int, width: int, seed: int, first: int = 0
) -> Iterator[np.ndarray]:
    """Rows without end, epoch after epoch, in an order of seed and epoch alone.

    In each epoch the documents are shuffled before they are cut and the rows after,
    so cuts fall elsewhere and a step's rows come from all over the text. Less than a
    row at an epoch's end is left out, of other documents each time.

    Args:
        tokens: (N,) token ids; each document ends in `end_id`.
        end_id: the end token.
        width: L, of a row's inputs.
        seed: of the run.
        first: number of the first row wanted, counted over all epochs.

    Yields:
        (L + 1,) token ids: the inputs, and one token more that is only a target.
    """
    documents = np.split(tokens, np.flatnonzero(tokens == end_id) + 1)
    epoch, skipped = divmod(first, rows_per_epoch(len(tokens), width))
    for number in itertools.count(epoch):
        rng = np.random.default_rng([seed, number])
        stream = np.concatenate([documents[i] for i in rng.permutation(len(documents))])
        rows = np.lib.stride_tricks.sliding_window_view(stream, width + 1)[::width]
        order = rng.permutation(len(rows))
        yield from (rows[i] for i in order[skipped:])
        skipped = 0


def rows_in_order(tokens: np.ndarray, end_id: int, width: int) -> list[np.ndarray]:
    """Rows in which each token of a text is predicted once, its first one from the end token.

    Returns:
        Rows of (L + 1,), the last one shorter.
    """
    stream = np.concatenate([[end_id], tokens])
    return [stream[start : start + width + 1] for start in range(0, len(stream) - 1, width)]


def collate_rows(rows: Sequence[np.ndarray]) -> Microbatch:
    """Rows of equal length as a microbatch in which every token is predicted from those before."""
    block = np.stack(rows).astype(np.int32)
    inputs, targets = block[:, :-1], block[:, 1:]
    return Microbatch(
        inputs=mx.array(inputs),
        positions=mx.arange(inputs.size, dtype=mx.int32),
        targets=mx.array(targets.reshape(-1)),
        mask=mx.ones(inputs.size, dtype=mx.bool_),
    )


def collate_groups(rows: Sequence[np.ndarray], size: int) -> list[Microbatch]:
    """Rows as microbatches of up to `size` rows of equal length."""
    by_length = [list(group) for _, group in itertools.groupby(rows, key=len)]
    return [
        collate_rows(group[start : start + size])
        for group in by_length
        for start in range(0, len(group), size)
    ]
