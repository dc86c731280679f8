"""Attention and cross-entropy through the fused kernels that MLX has for a GPU.

Fused attention with a backward pass takes no mask but the causal one, and ALiBi adds
slope * (j - i) to the score of query i and key j. That is a product of two vectors of
length two, so two more dimensions of each head carry it:

    query  [q, 1, -a_i]     key  [k, a_j, 1]     value  [v, 0, 0]     a = slope * position

Their product is q . k + a_j - a_i, summed in float32. Without it the scores, H * L numbers a
token and layer, would be kept for the backward pass.
"""

from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.models.base import scaled_dot_product_attention

from interviewmate_mlx.model.zoo import Network

# The head sizes that this works for, and the next one that MLX's kernels know.
_WIDENED = {64: 72}


class AlibiTerms(NamedTuple):
    """The dimensions that each gets beside its own, (1, H, L, D' - D)."""

    queries: mx.array
    keys: mx.array
    values: mx.array


def alibi_terms(
    slopes: mx.array,
    query_positions: mx.array,
    key_positions: mx.array,
    scale: float,
    dtype: mx.Dtype,
    *,
    head_dim: int,
    multiple: int,
) -> AlibiTerms:
    """ALiBi for `attention`, in place of `falcon.alibi_mask`, whose rounding it has.

    Args:
        slopes: (H,) bfloat16.
        query_positions: (1, L) int32: 0 to L - 1.
        key_positions: the same.
        scale: unused; attention scales these terms as it does the scores.
        dtype: of the queries.
        head_dim: of the queries.
        multiple: that the length of a row is padded to.
    """
    length = -(-query_positions.shape[1] // multiple) * multiple
    positions = mx.arange(length).astype(mx.bfloat16)
    terms = (slopes[:, None] * positions)[None, :, :, None].astype(dtype)
    ones = mx.ones_like(terms)
    nothing = mx.zeros((*terms.shape[:-1], _WIDENED[head_dim] - head_dim), dtype)
    return AlibiTerms(
        mx.concatenate([ones, -terms, nothing[..., 2:]], axis=-1),
        mx.concatenate([terms, ones, nothing[..., 2:]], axis=-1),
        nothing,
    )


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    cache: Any = None,
    scale: float,
    mask: mx.array | AlibiTerms,
) -> mx.array:
    """Causal attention with ALiBi.

    Args:
        queries, keys, values: (B, H, L, D), (B, H, K, D) twice.
        cache: for mlx-lm's function.
        scale: of the scores.
        mask: from `alibi_terms`, for rows that begin at position 0; or a mask of scores.

    Returns:
        (B, H, L, D).
    """
    if isinstance(mask, mx.array):
        return scaled_dot_product_attention(
            queries, keys, values, cache=cache, scale=scale, mask=mask
        )
    length, head_dim = queries.shape[-2:]
    parts = [queries, keys, values]
    if longer := mask.queries.shape[-2] - length:
        # Keys beyond the row come after all of its queries, which do not see them.
        parts = [mx.pad(part, [(0, 0), (0, 0), (0, longer), (0, 0)]) for part in parts]
    queries, keys, values = (
        mx.concatenate([part, mx.broadcast_to(m, (*part.shape[:-1], m.shape[-1]))], axis=-1)
        for part, m in zip(parts, mask, strict=True)
    )
    out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask="causal")
    return out[..., :length, :head_dim]


def fused_width(model: Network) -> int:
    """How wide a model's heads become for `attention`; 0 if it is not for them."""
    attentions = _attentions(model)
    return _WIDENED.get(attentions[0].head_dim, 0) if attentions else 0


def _attentions(model: Network) -> list[Any]:
    """The modules that let their attention with ALiBi be replaced."""
    return [module for module in model.modules() if hasattr(module, "attend")]


def use_fused_attention(model: Network, multiple: int = 1) -> None:
    """Let a model's attention without a cache go through `attention`, in place.

    Args:
        model: with a `fused_width`.
        multiple: of the row lengths that the kernels take.
    """
    attentions = _attentions(model)
    head_dim = attentions[0].head_dim
    model.transformer.make_mask = partial(alibi_terms, head_dim=head_dim, multiple=multiple)
    for module in attentions:
        module.attend = attention


def use_fused_cross_entropy(model: Network) -> None:
    """Let a model's loss be taken from logits in its own dtype; summed in float32, in place."""
    model.cross_entropy = mx.fast.cross_entropy
