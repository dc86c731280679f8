"""The loss is a sum and a count, and its logits exist a chunk at a time."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from interviewmate_mlx.model.falcon import cross_entropy as falcon_cross_entropy

# Logits that exist at once, in float32: 50,304 classes take 103 MB of them for 512 tokens.
CHUNK_ELEMENTS = 512 * 50_304

CrossEntropy = Callable[[mx.array, mx.array], mx.array]
Head = Callable[[mx.array], mx.array]


def masked_cross_entropy(
    logits: mx.array,
    targets: mx.array,
    mask: mx.array,
    cross_entropy: CrossEntropy = falcon_cross_entropy,
) -> tuple[mx.array, mx.array]:
    """Sum of cross-entropy over the tokens that count, and their number.

    A sum, not a mean: microbatches of unequal length then add up to the
    gradient of one large batch.

    Args:
        logits: (..., V), any float dtype.
        targets: (...) int32 token ids.
        mask: (...) bool, true on the tokens that count.
        cross_entropy: (..., V) and (...) int32 -> (...) float32, summed in float32.

    Returns:
        loss_sum: () float32, nats.
        num_tokens: () int32.
    """
    losses = cross_entropy(logits, targets)
    return mx.where(mask, losses, 0).sum(), mask.sum()


def chunked_cross_entropy(
    head: Head,
    hidden: mx.array,
    targets: mx.array,
    mask: mx.array,
    chunk: int,
    cross_entropy: CrossEntropy = falcon_cross_entropy,
) -> tuple[mx.array, mx.array]:
    """The loss sum of a frozen head and its gradient, with logits of `chunk` tokens at once.

    The gradient of the hidden states is computed along with the loss, chunk by
    chunk, so that no chunk's logits wait for the backward pass. The head's own
    weights get none.

    Args:
        head: hidden states (N, C) -> logits (N, V).
        hidden: (N, C).
        targets: (N,) int32 token ids.
        mask: (N,) bool, true on the tokens that count.
        chunk: tokens.
        cross_entropy: as in `masked_cross_entropy`.

    Returns:
        loss_sum: () float32, nats.
        gradient: (N, C), by the hidden states; nothing is differentiated through it.
    """

    @mx.custom_function
    def loss_sum(hidden: mx.array) -> tuple[mx.array, mx.array]:
        total = mx.array(0.0)
        gradients: list[mx.array] = []
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)

            def loss_of_part(states: mx.array, part: slice = part) -> mx.array:
                return masked_cross_entropy(head(states), targets[part], mask[part], cross_entropy)[
                    0
                ]

            # The next chunk waits for this one, so that their logits never exist together.
            (states,) = mx.depends([hidden[part]], gradients[-1:] or [total])
            loss, gradient = mx.value_and_grad(loss_of_part)(states)
            total += loss
            gradients.append(gradient)
        return total, mx.concatenate(gradients)

    @loss_sum.vjp
    def _(
        _: mx.array, cotangents: tuple[mx.array, mx.array], outputs: tuple[mx.array, mx.array]
    ) -> mx.array:
        return (cotangents[0] * outputs[1]).astype(outputs[1].dtype)

    results: Any = loss_sum(hidden)
    return results
