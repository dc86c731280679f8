"""For pretrain.py: a term of the loss against repetition.

Small models go round in circles: what they have said, they find likely again. Unlikelihood
training (https://arxiv.org/abs/1908.04319) takes probability away from chosen wrong tokens. Here
these are the tokens that would complete a pair which the row has already.
"""

import mlx.core as mx

from interviewmate_mlx.model.falcon import Model
from interviewmate_mlx.training.loss import CrossEntropy

LEAST = 1e-4  # of 1 - p: where p is 1 in float32, the term stays finite


def use_unlikelihood(model: Model, weight: float, width: int) -> None:
    """Add `weight` times the unlikelihood of repeated pairs to a model's loss, in place.

    In eval mode the loss stays the cross-entropy, so that losses can be compared.

    Args:
        model: trained on packed rows of equal width.
        weight: alpha in the paper.
        width: L, the tokens of a row.
    """
    cross_entropy: CrossEntropy = model.cross_entropy

    def loss(logits: mx.array, targets: mx.array) -> mx.array:
        losses = cross_entropy(logits, targets)
        if not model.training or targets.size % width:  # the text's end is a shorter row
            return losses
        return losses + weight * repeat_unlikelihood(logits, targets, losses, width)

    model.cross_entropy = loss


def repeat_unlikelihood(
    logits: mx.array, targets: mx.array, losses: mx.array, width: int
) -> mx.array:
    """-log(1 - p), summed over the tokens that followed the present token earlier in its row.

    The true next token is never one of them. One that followed twice counts twice.

    Args:
        logits: (B * L, V) float32.
        targets: (B * L,) int32. The present token is the target before; a row's first place
            has none.
        losses: (B * L,), the cross-entropy.
        width: L.

    Returns:
        (B * L,) float32, nats.
    """
    rows = targets.reshape(-1, width)
    at, earlier = rows[:, :, None], rows[:, None, :]
    is_same = at == earlier
    # A pair (i, j) of places: their present tokens are the targets one place before each.
    follows_same = mx.pad(is_same[:, :-1, :-1], [(0, 0), (1, 0), (1, 0)])
    is_earlier = mx.tri(width, width, -1) > 0
    would_repeat = follows_same & is_earlier & ~is_same

    by_row = logits.reshape(-1, width, logits.shape[-1])
    logits_of_target = mx.take_along_axis(by_row, at, axis=-1)
    log_total = losses.reshape(-1, width, 1) + logits_of_target
    followers = mx.broadcast_to(earlier, would_repeat.shape)
    log_p = mx.take_along_axis(by_row, followers, axis=-1) - log_total
    terms = -mx.log(mx.maximum(1 - mx.exp(mx.minimum(log_p, 0)), LEAST))
    return mx.where(would_repeat, terms, 0).sum(-1).reshape(-1)
