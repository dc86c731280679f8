"""Norm, GELU, attention and cross-entropy from operations that MLX vectorises on a CPU.

MLX's Linux CPU backend computes `exp`, `erf` and `softmax` one number at a time. In
training they then cost as much as the matrix products. Plain arithmetic inside one
`mx.compile` is vectorised, and row sums are fast as matrix products. The functions
here use only those, each with its own derivative. They are for float32 on a CPU;
every other backend has fast kernels. Largest errors against float64, held by
`tests/model/test_cpu_kernels.py`:

    exp           2e-7 * (1 + |x|), relative, for -87 <= x <= 0: as if x had been rounded
    gelu          1e-6 for |x| <= 8, derivative 1e-6
    layer_norm    1e-6 of its largest number, likewise each derivative

Polynomials are summed pairwise (Estrin's scheme). Horner's scheme is a longer chain
than MLX fuses into one kernel, so its intermediate results would be stored.
"""

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import scaled_dot_product_attention

from interviewmate_mlx.model.falcon import exact_gelu
from interviewmate_mlx.model.zoo import Network

# exp(x) = 2**k * exp(r) with x = k * ln 2 + r, |r| <= ln(2) / 2. exp(r): a minimax fit
# (iteratively reweighted least squares in float64); relative error 2e-9.
_LN2 = math.log(2)
_LEAST = -100.0  # whose exp is 0 here
_EXP = [1.0, 1.0, 0.49999991, 0.1666642, 0.041668226, 0.0083748323, 0.0013836825]

# Both GELU and its derivative are 1/2 + x * p(x**2) / q(x**2) where |x| < limit, times x for
# GELU itself. p and q: minimax fits (iteratively reweighted least squares in float64) to
# (Phi(x) - 1/2) / x and (Phi(x) + x * phi(x) - 1/2) / x; errors 2e-8 and 1.1e-7.
_GELU_LIMIT = 5.5
_GELU = (
    [0.39894199, 0.035141785, 0.0047615808, 1.8285227e-4, 6.5306672e-6, 2.2216170e-8],
    [1.0, 0.25475097, 0.029398376, 0.0019624014, 7.8608202e-5, 1.1953995e-6],
)
_SLOPE_LIMIT = 5.75
_SLOPE = (
    [0.79788536, -0.030995172, 0.014230176, 1.9237660e-5, 3.5954257e-5, 1.9290658e-7],
    [1.0, 0.29449490, 0.040980343, 0.0035230261, 1.9203730e-4, 8.9516943e-6],
)


def _polynomial(coefficients: list[float], x: mx.array) -> mx.array:
    """c[0] + c[1] x + c[2] x**2 + ..., pairwise."""
    terms: list[Any] = list(coefficients)
    while len(terms) > 1:
        pairs = zip(terms[0::2], terms[1::2], strict=False)
        odd_one = terms[len(terms) - len(terms) % 2 :]
        terms = [low + high * x for low, high in pairs] + odd_one
        x = x * x
    return terms[0]


def _row_sums(x: mx.array) -> mx.array:
    """(..., K) -> (..., 1): as a matrix product, which BLAS computes faster than MLX a sum."""
    return x @ mx.ones((x.shape[-1], 1))


def exp(x: mx.array) -> mx.array:
    """exp of float32 numbers at most 0; from about -87.7 down it is 0.

    To be called inside `mx.compile`.
    """
    # A comparison keeps the compiler from vectorising its kernel. `contiguous` is not
    # fused, so it ends that kernel here.
    x = mx.contiguous(mx.maximum(x, _LEAST))
    y = x * (1 / _LN2)
    # The larger of 0 and y + 127.5, truncated to an integer: the exponent field of a
    # float32, which starts at bit 23. An exponent of 0 gives 0, not a slow subnormal.
    bits = (0.5 * ((y + 128) + mx.abs(y + 127))).astype(mx.int32) << 23
    k = (bits >> 23).astype(mx.float32) - 127
    return _polynomial(_EXP, x - k * _LN2) * bits.view(mx.float32)


def _rational(
    fit: tuple[list[float], list[float]], limit: float, x: mx.array, factor: mx.array
) -> mx.array:
    """factor * (1/2 + x * p(x**2) / q(x**2)), with x cut to the limits."""
    # `contiguous` ends the kernel, as in `exp`.
    x = mx.contiguous(mx.clip(x, -limit, limit))
    square = x * x
    ratio = _polynomial(fit[0], square) / _polynomial(fit[1], square)
    return 0.5 * factor + factor * x * ratio


@mx.custom_function
@mx.compile
def gelu(x: mx.array) -> mx.array:
    """The exact GELU, x * Phi(x), of float32."""
    return _rational(_GELU, _GELU_LIMIT, x, factor=x)


@gelu.vjp
@mx.compile
def _gelu_vjp(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
    return _rational(_SLOPE, _SLOPE_LIMIT, x, factor=cotangent)


@mx.custom_function
def _layer_norm(
    x: mx.array, weight: mx.array, bias: mx.array, eps: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """The norm, and what its derivative needs: x without its mean and scale, and the scale."""
    centred = x - _row_sums(x) / x.shape[-1]
    scale = mx.rsqrt(_row_sums(centred * centred) / x.shape[-1] + eps)
    normal = centred * scale
    return normal * weight + bias, normal, scale


@_layer_norm.vjp
def _layer_norm_vjp(
    primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
) -> tuple[mx.array, ...]:
    _, weight, _, eps = primals
    _, normal, scale = outputs
    cotangent = cotangents[0]
    product = cotangent * normal
    shares = weight[:, None] / weight.size
    # The last two terms come from the derivatives of the mean and of the scale.
    slope = cotangent * weight - cotangent @ shares - normal * (product @ shares)
    rows = tuple(range(product.ndim - 1))
    return scale * slope, product.sum(rows), cotangent.sum(rows), mx.zeros_like(eps)


def layer_norm(x: mx.array, weight: mx.array, bias: mx.array, eps: float) -> mx.array:
    """(x - mean) / sqrt(variance + eps) * weight + bias along the last axis, float32.

    Args:
        x: (..., C).
        weight, bias: (C,).
        eps: of the variance.

    Returns:
        (..., C).
    """
    outputs: Any = _layer_norm(x, weight, bias, mx.array(eps))
    return outputs[0]


class _LayerNorm(nn.LayerNorm):
    def __call__(self, x: mx.array) -> mx.array:
        return layer_norm(x, self.weight, self.bias, self.eps)


@mx.compile
def _exp_minus(x: mx.array, top: mx.array) -> mx.array:
    return exp(x - top)


@mx.compile
def _times_difference(x: mx.array, y: mx.array, z: mx.array) -> mx.array:
    return x * (y - z)


def _scores(queries: mx.array, keys: mx.array, mask: mx.array) -> mx.array:
    return queries @ keys.swapaxes(-1, -2) + mask


@mx.custom_function
def _attention(
    queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array
) -> tuple[mx.array, mx.array]:
    """Attention, and the logarithm of each row's sum of exponentials, (B, H, L, 1)."""
    scores = _scores(queries, keys, mask)
    top = scores.max(axis=-1, keepdims=True)
    exponentials = _exp_minus(scores, top)
    total = _row_sums(exponentials)
    return (exponentials @ values) / total, top + mx.log(total)


@_attention.vjp
def _attention_vjp(
    primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
) -> tuple[mx.array, ...]:
    queries, keys, values, mask = primals
    out, log_total = outputs
    cotangent = mx.contiguous(cotangents[0])
    # Computed again: keeping them would take more memory than the rest of a layer.
    probabilities = _exp_minus(_scores(queries, keys, mask), log_total)
    inner = _row_sums(cotangent * out)
    score_gradient = _times_difference(probabilities, cotangent @ values.swapaxes(-1, -2), inner)
    return (
        score_gradient @ keys,
        score_gradient.swapaxes(-1, -2) @ queries,
        probabilities.swapaxes(-1, -2) @ cotangent,
        mx.zeros_like(mask),
    )


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    cache: Any = None,
    scale: float,
    mask: mx.array,
) -> mx.array:
    """softmax(scale * queries keys^T + mask) values, float32; the mask gets no gradient.

    Args:
        queries, keys, values: (B, H, L, D), (B, H, K, D) twice.
        cache: ignored; for the signature of mlx-lm's function.
        scale: of the scores.
        mask: (1 or B, H, L, K) float32, added to the scaled scores.

    Returns:
        (B, H, L, D).
    """
    # Made contiguous once; otherwise each product that uses them makes its own copy.
    outputs: Any = _attention(queries * scale, mx.contiguous(keys), mx.contiguous(values), mask)
    return outputs[0]


@mx.custom_function
def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """log sum exp(logits) - logits[targets]: (N, V) float32 and (N,) int32 -> (N,) float32."""
    top = logits.max(axis=-1, keepdims=True)
    total = _row_sums(_exp_minus(logits, top)).squeeze(-1)
    chosen = mx.take_along_axis(logits, targets[:, None], axis=-1).squeeze(-1)
    return mx.log(total) + (top.squeeze(-1) - chosen)


@cross_entropy.vjp
def _cross_entropy_vjp(
    primals: tuple[mx.array, mx.array], cotangent: mx.array, losses: mx.array
) -> tuple[mx.array, mx.array]:
    logits, targets = primals
    chosen = mx.take_along_axis(logits, targets[:, None], axis=-1)
    probabilities = _exp_minus(logits, losses[:, None] + chosen)
    is_target = mx.arange(logits.shape[-1]) == targets[:, None]
    return _times_difference(cotangent[:, None], probabilities, is_target), mx.zeros_like(targets)


def use_cpu_kernels(model: Network) -> None:
    """Let a float32 model on a CPU compute with these functions, in place."""
    for module in model.modules():
        if type(module) is nn.LayerNorm and {"weight", "bias"} <= module.keys():
            module.__class__ = _LayerNorm
        # What a module lets be replaced; mlx-lm's networks have no such places.
        if getattr(module, "attend", None) is scaled_dot_product_attention:
            module.attend = attention
        if getattr(module, "activation", None) is exact_gelu:
            module.activation = gelu
    model.cross_entropy = cross_entropy
