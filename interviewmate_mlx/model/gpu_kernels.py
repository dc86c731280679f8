"""Attention, norms and cross-entropy through the fused kernels that MLX has for a GPU.

Without such a kernel attention keeps its scores, H * L numbers a token and layer, for the
backward pass. Metal's attention with a backward pass takes no mask but the causal one, and ALiBi
adds slope * (j - i) to the score of query i and key j. That is a product of two vectors of length
two, so two more dimensions of each head carry it:

    query  [q, 1, -a_i]     key  [k, a_j, 1]     value  [v, 0, 0]     a = slope * position

Their product is q . k + a_j - a_i, summed in float32. On CUDA cuDNN's attention takes a mask of
scores as well, if the number of queries is a multiple of 128: they are padded to the next one.
"""

from functools import cache, partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import scaled_dot_product_attention

from interviewmate_mlx import backend
from interviewmate_mlx.model.falcon import alibi_mask
from interviewmate_mlx.model.zoo import Network

# The head sizes that spare dimensions work for, and the next one that MLX's kernels know.
_WIDENED = {64: 72}
# Queries that cuDNN's kernels take at a time.
QUERY_TILE = 128


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
) -> AlibiTerms:
    """ALiBi for `attention`, in place of `falcon.alibi_mask`, whose rounding it has.

    Args:
        slopes: (H,) bfloat16.
        query_positions: (1, L) int32: 0 to L - 1.
        key_positions: the same.
        scale: unused; attention scales these terms as it does the scores.
        dtype: of the queries.
        head_dim: of the queries.
    """
    positions = query_positions[0].astype(mx.bfloat16)
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
    head_dim = queries.shape[-1]
    queries, keys, values = (
        mx.concatenate([part, mx.broadcast_to(m, (*part.shape[:-1], m.shape[-1]))], axis=-1)
        for part, m in zip((queries, keys, values), mask, strict=True)
    )
    out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask="causal")
    return out[..., :head_dim]


def padded_mask(
    slopes: mx.array,
    query_positions: mx.array,
    key_positions: mx.array,
    scale: float,
    dtype: mx.Dtype,
) -> mx.array:
    """`falcon.alibi_mask` for `padded_attention`: for rows that begin at position 0.

    Returns:
        (1, H, L', K), where L' is the next multiple of `QUERY_TILE`.
    """
    length = -(-query_positions.shape[1] // QUERY_TILE) * QUERY_TILE
    return alibi_mask(slopes, mx.arange(length)[None], key_positions, scale, dtype)


def padded_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    cache: Any = None,
    scale: float,
    mask: mx.array,
) -> mx.array:
    """Attention with as many queries as its mask has.

    Args:
        queries, keys, values, cache, scale: see `attention`.
        mask: of scores, (1 or B, H, L or more, K).

    Returns:
        (B, H, L, D).
    """
    length = queries.shape[2]
    if more := mask.shape[2] - length:
        # As the product before lays them out, (B, L, H, D), so that the output lies so, too.
        queries = mx.pad(queries.swapaxes(1, 2), [(0, 0), (0, more), (0, 0), (0, 0)]).swapaxes(1, 2)
    out: mx.array = scaled_dot_product_attention(
        queries, keys, values, cache=cache, scale=scale, mask=mask
    )
    return out.swapaxes(1, 2)[:, :length].swapaxes(1, 2) if more else out


def fused_width(model: Network) -> int:
    """How wide a model's heads become for `attention`; 0 if it is not for them."""
    attentions = _attentions(model)
    return _WIDENED.get(attentions[0].head_dim, 0) if attentions else 0


def _attentions(model: Network) -> list[Any]:
    """The modules that let their attention with ALiBi be replaced."""
    return [module for module in model.modules() if hasattr(module, "attend")]


def use_gpu_kernels(model: Network, dtype: mx.Dtype) -> None:
    """Let a model train with the kernels that this machine's GPU has for it, in place.

    Args:
        model: with what is trained.
        dtype: of its activations.
    """
    if (width := fused_width(model)) and backend.has_causal_kernel(width, dtype):
        use_fused_attention(model)
    elif (found := _attentions(model)) and backend.has_masked_kernel(found[0].head_dim, dtype):
        use_padded_attention(model)
    use_frozen_norms(model)
    if backend.machine().device != "cpu":  # there MLX would add up in the dtype of the logits
        use_fused_cross_entropy(model)


def use_fused_attention(model: Network) -> None:
    """Let a model's attention without a cache go through `attention`, in place.

    Args:
        model: with a `fused_width`.
    """
    head_dim = _attentions(model)[0].head_dim
    _replace_attention(model, attention, partial(alibi_terms, head_dim=head_dim))


def use_padded_attention(model: Network) -> None:
    """Let a model's attention without a cache go through `padded_attention`, in place.

    Args:
        model: with attention that lets itself be replaced.
    """
    _replace_attention(model, padded_attention, padded_mask)


def _replace_attention(model: Network, attend: Any, make_mask: Any) -> None:
    model.transformer.make_mask = make_mask
    for module in _attentions(model):
        module.attend = attend


def use_fused_cross_entropy(model: Network) -> None:
    """Let a model's loss be taken from logits in its own dtype; summed in float32, in place."""
    model.cross_entropy = mx.fast.cross_entropy


def use_frozen_norms(model: Network) -> None:
    """Let norms that are not trained leave the gradient of their own weights out, in place.

    MLX's kernels would compute it, and add it up over all tokens.
    """
    for module in model.modules():
        if type(module) in _FROZEN and "weight" in module and not module.trainable_parameters():
            module.__class__ = _FROZEN[type(module)]


class _FrozenLayerNorm(nn.LayerNorm):
    def __call__(self, x: mx.array) -> mx.array:
        if self.trainable_parameters():  # it was unfrozen since
            return super().__call__(x)
        bias = [self.bias] if "bias" in self else []
        return _frozen(_layer_norm, self.eps)(x, self.weight, *bias)


class _FrozenRMSNorm(nn.RMSNorm):
    def __call__(self, x: mx.array) -> mx.array:
        if self.trainable_parameters():
            return super().__call__(x)
        return _frozen(_rms_norm, self.eps)(x, self.weight)


_FROZEN: dict[type, type] = {nn.LayerNorm: _FrozenLayerNorm, nn.RMSNorm: _FrozenRMSNorm}


def _layer_norm(
    eps: float, x: mx.array, weight: mx.array | None = None, bias: mx.array | None = None
) -> mx.array:
    return mx.fast.layer_norm(x, weight, bias, eps)


def _rms_norm(eps: float, x: mx.array, weight: mx.array | None = None) -> mx.array:
    return mx.fast.rms_norm(x, weight, eps)


@cache  # one for all layers
def _frozen(norm: Any, eps: float) -> Any:
    """A norm of x (..., C) and its parameters, (C,) each, with the gradient of x alone."""
    normalise = partial(norm, eps)
    frozen = mx.custom_function(normalise)

    @frozen.vjp
    def _(primals: tuple[mx.array, ...], cotangent: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        x, weight = primals[:2]
        # That of the norm without a weight.
        slope = (cotangent * weight).astype(x.dtype)
        gradients: Any = mx.vjp(normalise, [x], [slope])[1]
        return *gradients, *map(mx.zeros_like, primals[1:])

    return frozen
