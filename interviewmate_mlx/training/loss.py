"""The loss is a sum and a count."""

import mlx.core as mx
import mlx.nn as nn


def masked_cross_entropy(
    logits: mx.array, targets: mx.array, mask: mx.array
) -> tuple[mx.array, mx.array]:
    """Sum of cross-entropy over the tokens that count, and their number.

    A sum, not a mean: microbatches of unequal length then add up to the
    gradient of one large batch.

    Args:
        logits: (..., V), any float dtype; summed in float32.
        targets: (...) int32 token ids.
        mask: (...) bool, true on the tokens that count.

    Returns:
        loss_sum: () float32, nats.
        num_tokens: () int32.
    """
    losses = nn.losses.cross_entropy(logits.astype(mx.float32), targets)
    return mx.where(mask, losses, 0).sum(), mask.sum()
