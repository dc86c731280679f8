"""The loss is a sum and a count, and its logits exist a chunk at a time."""

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from interviewmate_mlx import backend
from interviewmate_mlx.model.falcon import cross_entropy as falcon_cross_entropy

# Logits that exist at once: 50,304 classes take 103 MB of them for 512 tokens, in float32.
CHUNK_ELEMENTS = 512 * 50_304
# In training on CUDA so many times that: products of 512 rows ran at a third and at a half of an
# H200's speed (`benchmarks/NOTES.md`).
_CHUNKS_ON_CUDA = 4

CrossEntropy = Callable[[mx.array, mx.array], mx.array]
Head = Callable[[mx.array], mx.array]


# What a microbatch comes to: the loss sum; how many it is a sum over; and what is measured
# beside it, by name, each as a sum and a count, () float32. All of it adds up.
Measures = dict[str, tuple[mx.array, mx.array]]
Sums = tuple[mx.array, mx.array, Measures]
# The losses of the predicted tokens (N,), which of them count (N,), and `Microbatch.of_rows`.
Loss = Callable[[mx.array, mx.array, dict[str, mx.array]], Sums]


def token_loss(losses: mx.array, mask: mx.array, of_rows: dict[str, mx.array]) -> Sums:
    """The loss over tokens: each that counts, counts the same.

    A sum, not a mean: microbatches of unequal length then add up to the
    gradient of one large batch.

    Args:
        losses: (N,) float32, of the predicted tokens, nats.
        mask: (N,) bool, true on the tokens that count.
        of_rows: nothing.

    Returns:
        loss_sum: () float32, nats.
        num_tokens: () int32.
        measures: none.
    """
    return mx.where(mask, losses, 0).sum(), mask.sum(), {}


def tokens_at_once(vocab_size: int) -> int:
    """How many tokens' logits exist at once in training."""
    count = _CHUNKS_ON_CUDA if backend.machine().device == "cuda" else 1
    return count * CHUNK_ELEMENTS // vocab_size


def chunked_cross_entropy(
    head: Head,
    hidden: mx.array,
    targets: mx.array,
    chunk: int,
    cross_entropy: CrossEntropy = falcon_cross_entropy,
) -> tuple[mx.array, mx.array]:
    """Each token's loss under a frozen head, and its gradient, with logits of `chunk` tokens.

    The gradient of the hidden states is computed along with the loss, chunk by
    chunk, so that no chunk's logits wait for the backward pass: a token's loss
    depends on its own hidden state alone. The head's own weights get none.

    Args:
        head: hidden states (N, C) -> logits (N, V).
        hidden: (N, C).
        targets: (N,) int32 token ids.
        chunk: tokens at the most. The chunks are of one size, but for the last.
        cross_entropy: (..., V) and (...) int32 -> (...) float32, summed in float32.

    Returns:
        losses: (N,) float32, nats.
        gradient: (N, C), of each token's loss by its hidden state; nothing is
            differentiated through it.
    """

    count = hidden.shape[0]
    chunk = math.ceil(count / math.ceil(count / chunk))

    @mx.custom_function
    def token_losses(hidden: mx.array) -> tuple[mx.array, mx.array]:
        losses: list[mx.array] = []
        gradients: list[mx.array] = []
        for start in range(0, count, chunk):
            part = slice(start, start + chunk)

            def loss_of_part(states: mx.array, part: slice = part) -> tuple[mx.array, mx.array]:
                of_tokens = cross_entropy(head(states), targets[part])
                return of_tokens.sum(), of_tokens

            # The next chunk waits for this one, so that their logits never exist together.
            (states,) = mx.depends([hidden[part]], gradients[-1:] or [targets])
            (_, of_tokens), gradient = mx.value_and_grad(loss_of_part)(states)
            losses.append(of_tokens)
            gradients.append(gradient)
        return mx.concatenate(losses), mx.concatenate(gradients)

    @token_losses.vjp
    def _(
        _: mx.array, cotangents: tuple[mx.array, mx.array], outputs: tuple[mx.array, mx.array]
    ) -> mx.array:
        return (cotangents[0][:, None] * outputs[1]).astype(outputs[1].dtype)

    results: Any = token_losses(hidden)
    return results
