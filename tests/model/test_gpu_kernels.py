"""The attention and the loss of a GPU, computed by parts on a CPU: the same numbers.

On a machine with a GPU the same tests meet its fused kernels.
"""

import math
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from checkpoints import our_model, tiny_falcon
from mlx_lm.models.cache import BatchKVCache, KVCache

from interviewmate_mlx import backend
from interviewmate_mlx.model import falcon
from interviewmate_mlx.model.falcon import alibi_mask, alibi_slopes
from interviewmate_mlx.model.gpu_kernels import (
    QUERY_TILE,
    alibi_terms,
    attention,
    fused_width,
    padded_attention,
    padded_mask,
    use_frozen_norms,
    use_fused_attention,
    use_fused_cross_entropy,
    use_padded_attention,
)
from interviewmate_mlx.training.loss import token_loss

HEAD_DIM, SCALE = 64, 1 / 8
# Of rows, and whether queries are padded for a mask; else heads are widened.
LENGTHS = [(1, False), (8, False), (9, True), (128, True), (225, False), (300, True)]


def terms(heads: int, length: int, dtype: mx.Dtype):
    positions = mx.arange(length)[None]
    return alibi_terms(alibi_slopes(heads), positions, positions, SCALE, dtype, head_dim=HEAD_DIM)


def attend(q: mx.array, k: mx.array, v: mx.array, padded: bool) -> mx.array:
    _, heads, length, _ = q.shape
    if not padded:
        return attention(q, k, v, scale=SCALE, mask=terms(heads, length, q.dtype))
    positions = mx.arange(length)[None]
    mask = padded_mask(alibi_slopes(heads), positions, positions, SCALE, q.dtype)
    assert mask.shape == (1, heads, -(-length // QUERY_TILE) * QUERY_TILE, length)
    return padded_attention(q, k, v, scale=SCALE, mask=mask)


def naive(q, k, v, bias):
    """In float64, by torch: (B, H, L, D) thrice, and ALiBi's term of each position (H, L)."""
    length = q.shape[-2]
    scores = (q @ k.transpose(-1, -2) + bias[:, None, :] - bias[:, :, None]) * SCALE
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    return torch.softmax(scores.masked_fill(hidden, -math.inf), -1) @ v


def rounded_bias(heads: int, length: int) -> torch.Tensor:
    """slope * position, each and their product rounded to bfloat16, as the reference has it."""
    slopes = torch.tensor(np.array(alibi_slopes(heads).astype(mx.float32))).bfloat16()
    return (slopes[:, None] * torch.arange(length).bfloat16()).double()


@pytest.mark.parametrize(("length", "padded"), LENGTHS)
@pytest.mark.parametrize("heads", [2, 6])
def test_attention_and_its_derivatives_are_the_naive_one_s(heads, length, padded):
    rng = np.random.default_rng(length)
    arrays = [rng.normal(size=(2, heads, length, HEAD_DIM)).astype(np.float32) for _ in range(4)]
    doubles = [torch.tensor(a.astype(np.float64), requires_grad=True) for a in arrays[:3]]
    bias = rounded_bias(heads, length)
    exact = naive(*doubles, bias)
    exact.backward(torch.tensor(arrays[3]).double())

    def ours(q, k, v):
        return attend(q, k, v, padded)

    inputs = list(map(mx.array, arrays))
    (out,), slopes = mx.compile(lambda *a: mx.vjp(ours, list(a[:3]), [a[3]]))(*inputs)
    # A score is a sum of D + 2 products, each rounded to 2**-24 of the largest partial sum.
    largest = SCALE * (2 * bias.max().item() + 5 * math.sqrt(HEAD_DIM))
    of_score = math.sqrt(HEAD_DIM + 2) * 2**-24 * largest
    # A probability is off by its score's error, and the sums over keys by some roundings more.
    allowed = 4 * (of_score + math.sqrt(length) * 2**-24)
    expected = [exact.detach().numpy(), *(double.grad.numpy() for double in doubles)]
    for one, other in zip([out, *slopes], expected, strict=True):
        size = max(1.0, np.abs(other).max())
        np.testing.assert_allclose(np.array(one), other, atol=allowed * size, rtol=0)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize(("length", "padded"), LENGTHS)
def test_in_half_precision_it_errs_no_more_than_with_a_mask(dtype, length, padded):
    rng = np.random.default_rng(length)
    heads, positions = 6, mx.arange(length)[None]
    q, k, v = (
        mx.array(rng.normal(size=(2, heads, length, HEAD_DIM))).astype(dtype) for _ in range(3)
    )
    doubles = [torch.tensor(np.array(a.astype(mx.float32))).double() for a in (q, k, v)]
    exact = naive(*doubles, rounded_bias(heads, length)).numpy()
    mask = alibi_mask(alibi_slopes(heads), positions, positions, SCALE, dtype)
    fused = attend(q, k, v, padded)
    masked = attention(q, k, v, scale=SCALE, mask=mask)
    errors = [np.abs(np.array(out.astype(mx.float32)) - exact) for out in (fused, masked)]
    rounding = np.abs(exact).max() * float(mx.finfo(dtype).eps)
    assert errors[0].max() < 1.5 * errors[1].max() + rounding
    assert errors[0].mean() < 1.2 * errors[1].mean() + 0.1 * rounding


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize(("length", "padded"), [(40, False), (40, True), (128, True), (200, True)])
def test_in_half_precision_derivatives_err_no_more_than_autodiff_s(dtype, length, padded):
    """On a GPU those of the fused kernels, beside those of attention by parts."""
    rng, heads, positions = np.random.default_rng(length), 6, mx.arange(length)[None]
    shape = (2, heads, length, HEAD_DIM)
    q, k, v, cotangent = (mx.array(rng.normal(size=shape)).astype(dtype) for _ in range(4))
    doubles = [torch.tensor(wide(a), requires_grad=True) for a in (q, k, v)]
    naive(*doubles, rounded_bias(heads, length)).backward(torch.tensor(wide(cotangent)))
    mask = alibi_mask(alibi_slopes(heads), positions, positions, SCALE, dtype)

    def by_parts(q, k, v):
        return mx.softmax(SCALE * q @ k.swapaxes(-1, -2) + mask, axis=-1) @ v

    errors = []
    for function in (partial(attend, padded=padded), by_parts):
        slopes = mx.vjp(function, [q, k, v], [cotangent])[1]
        assert {slope.dtype for slope in slopes} == {dtype}
        exact = [double.grad.numpy() for double in doubles]
        errors.append([np.abs(wide(a) - b) for a, b in zip(slopes, exact, strict=True)])
    for fused, parts, double in zip(*errors, doubles, strict=True):
        rounding = double.grad.abs().max().item() * float(mx.finfo(dtype).eps)
        assert fused.max() < 1.5 * parts.max() + rounding
        assert fused.mean() < 1.3 * parts.mean() + 0.1 * rounding


def wide(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def test_terms_are_exact_in_half_precision():
    """They are bfloat16 numbers, and float16 holds those below 65,504."""
    wide = terms(32, 2048, mx.float32)
    for dtype in (mx.bfloat16, mx.float16):
        for one, other in zip(terms(32, 2048, dtype), wide, strict=True):
            assert mx.array_equal(one.astype(mx.float32), other)


def fused(model: falcon.Model, padded: bool = False) -> falcon.Model:
    (use_padded_attention if padded else use_fused_attention)(model)
    return model


PADDED = pytest.mark.parametrize("padded", [False, True], ids=["wider", "padded"])


@pytest.mark.parametrize(("heads", "layers", "length"), [(1, 1, 1), (2, 2, 40), (3, 2, 225)])
@PADDED
def test_logits_equal_the_reference_s(heads, layers, length, padded):
    reference = tiny_falcon(heads, HEAD_DIM, layers, seed=heads)
    model = fused(our_model(reference), padded)
    ids = np.random.default_rng(0).integers(0, 384, (2, length))
    with torch.no_grad():
        expected = reference(torch.tensor(ids)).logits.numpy()
    got = np.array(mx.compile(model)(mx.array(ids)))
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("heads", "length"), [(2, 40), (3, 225)])
@PADDED
def test_logits_in_half_precision_err_no_more_than_transformers_do(dtype, heads, length, padded):
    """Both beside the same rounded weights in float32."""
    half = getattr(torch, dtype)
    reference = tiny_falcon(heads, HEAD_DIM, layers=2, seed=heads).to(half).float()
    model = fused(our_model(reference), padded)
    model.set_dtype(getattr(mx, dtype))
    ids = np.random.default_rng(0).integers(0, 384, (2, length))
    with torch.no_grad():
        exact = reference(torch.tensor(ids)).logits.numpy()
        theirs = reference.to(half)(torch.tensor(ids)).logits.float().numpy()
    ours = np.array(mx.compile(model)(mx.array(ids)).astype(mx.float32))
    error, allowed = np.abs(ours - exact), np.abs(theirs - exact)
    # On a CPU MLX rounds the scores as well, torch does not: two roundings more of some twelve,
    # and with a mask two again, of the mask and of the sum.
    assert error.mean() < (1.4 if padded else 1.2) * allowed.mean()
    assert error.max() < 1.6 * allowed.max()


@PADDED
def test_padding_on_the_right_changes_nothing(padded):
    model = fused(our_model(tiny_falcon(2, HEAD_DIM, 2)), padded)
    ids = np.random.default_rng(0).integers(0, 384, (1, 37))
    longer = np.pad(ids, [(0, 0), (0, 11)])
    one, other = (np.array(model(mx.array(rows))) for rows in (ids, longer))
    np.testing.assert_allclose(one, other[:, :37], atol=1e-5, rtol=0)


@PADDED
def test_with_a_cache_the_mask_is_used(monkeypatch, padded):
    model = our_model(tiny_falcon(2, HEAD_DIM, 2))
    ids = mx.array(np.random.default_rng(0).integers(0, 384, (2, 12)))

    def through_caches() -> np.ndarray:
        plain = [KVCache() for _ in model.layers]
        logits = [model(ids[:1, :7], plain), model(ids[:1, 7:], plain)]
        batched = [BatchKVCache([0, 3]) for _ in model.layers]
        return np.array(mx.concatenate([*logits, *mx.split(model(ids, batched), 2)], axis=1))

    expected = through_caches()
    fused(model, padded)
    monkeypatch.setattr(model.transformer, "make_mask", None)
    np.testing.assert_array_equal(through_caches(), expected)


def test_other_head_sizes_are_left_alone():
    assert fused_width(our_model(tiny_falcon(2, HEAD_DIM))) == 72
    for head_dim in (16, 80, 128):
        assert fused_width(our_model(tiny_falcon(2, head_dim, 1))) == 0


# What kernels multiply scores by before they take powers of two.
LOG2_E = math.log2(math.e)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_mask_stays_finite_in_every_kernel(dtype, head_dim):
    """A row of -inf alone, as left padding would have it, becomes NaN and spoils what follows."""
    positions = mx.arange(-5, 7)[None]
    mask = alibi_mask(alibi_slopes(4), positions, positions, head_dim**-0.5, dtype)
    assert mx.isfinite(mask * mx.array(LOG2_E, dtype)).all()
    mx.random.seed(0)
    q, k, v = (mx.random.normal((1, 4, 12, head_dim)).astype(dtype) for _ in range(3))
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=head_dim**-0.5, mask=mask)
    assert mx.isfinite(out).all()
    # The lowest probability that a visible key can have is above that of a hidden one.
    hidden = mask.min().item()
    assert math.exp(max(hidden / 2, -1000.0)) == 0.0


@pytest.mark.parametrize("head_dim", [64, 128])
def test_left_padded_rows_give_the_unpadded_row_s_logits(head_dim):
    model = our_model(tiny_falcon(2, head_dim, 2))
    ids = np.random.default_rng(0).integers(0, 384, (1, 9))
    alone = np.array(model(mx.array(ids)))
    batch = mx.array(np.concatenate([np.pad(ids, [(0, 0), (5, 0)]), np.zeros((1, 14), int)]))
    cache = [BatchKVCache([5, 0]) for _ in model.layers]
    padded = np.array(model(batch, cache))
    assert np.isfinite(padded).all()
    np.testing.assert_allclose(padded[:1, 5:], alone, atol=1e-4, rtol=0)


def test_fused_cross_entropy_is_the_loss():
    model = our_model(tiny_falcon(2, HEAD_DIM, 1))
    logits = 5 * mx.random.normal((7, 384))
    targets, mask = mx.random.randint(0, 384, (7,)), mx.arange(7) > 2
    expected, count, _ = token_loss(model.cross_entropy(logits, targets), mask, {})
    use_fused_cross_entropy(model)
    got, same_count, _ = token_loss(model.cross_entropy(logits, targets), mask, {})
    assert got.dtype == mx.float32
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)
    assert count.item() == same_count.item() == 4


NORMS = {
    "layer": (lambda: nn.LayerNorm(48), ["weight", "bias"]),
    "layer_without_bias": (lambda: nn.LayerNorm(48, bias=False), ["weight"]),
    "rms": (lambda: nn.RMSNorm(48), ["weight"]),
}


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("kind", NORMS)
def test_frozen_norm_has_the_norm_s_value_and_gradient(kind, dtype):
    """One product with the weight is rounded to the dtype before the rest, and one after."""
    make, names = NORMS[kind]
    norm, rng = make(), np.random.default_rng(0)
    norm.update({name: mx.array(rng.normal(size=48)).astype(dtype) for name in names})
    x, cotangent = (mx.array(3 * rng.normal(size=(5, 7, 48))).astype(dtype) for _ in range(2))
    plain = mx.vjp(norm, [x], [cotangent])
    norm.freeze()
    use_frozen_norms(norm)
    assert type(norm) is not type(make())
    for compiled in (mx.compile, lambda f: f):
        (out,), (slope,) = compiled(lambda x, c: mx.vjp(norm, [x], [c]))(x, cotangent)
        assert mx.array_equal(out, plain[0][0])
        assert slope.dtype == dtype
        size = mx.abs(plain[1][0]).max().item()
        allowed = 3 * float(mx.finfo(dtype).eps) * size
        assert mx.abs(slope - plain[1][0]).max().item() <= allowed
    assert set(norm.parameters()) == set(names)


@pytest.mark.parametrize("kind", NORMS)
def test_norm_that_is_unfrozen_again_learns(kind):
    norm, (x, cotangent) = NORMS[kind][0](), mx.random.normal((2, 5, 48))
    norm.freeze()
    use_frozen_norms(norm)
    norm.unfreeze()
    slopes = nn.value_and_grad(norm, lambda x: (norm(x) * cotangent).sum())(x)[1]
    normal = mx.fast.rms_norm(x, None, norm.eps)
    if kind != "rms":
        normal = mx.fast.layer_norm(x, None, None, norm.eps)
    np.testing.assert_allclose(slopes["weight"], (normal * cotangent).sum(axis=0), atol=1e-5)


def test_norms_that_are_trained_stay_as_they_are():
    norm = nn.LayerNorm(8)
    use_frozen_norms(norm)
    assert type(norm) is nn.LayerNorm
    norm.freeze()
    norm.unfreeze(keys="bias")
    use_frozen_norms(norm)
    assert type(norm) is nn.LayerNorm


@pytest.mark.skipif(backend.machine().device == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_on_a_gpu_the_scores_are_not_kept(dtype):
    causal = backend.has_causal_kernel(72, dtype)
    assert causal or backend.has_masked_kernel(64, dtype)


def test_path_of_a_gpu_on_a_cpu(monkeypatch):
    if backend.machine().device != "cpu":
        pytest.skip("there is a GPU")
    monkeypatch.delenv("INTERVIEWMATE_PATH", raising=False)
    assert not backend.has_causal_kernel(72, mx.bfloat16)
    monkeypatch.setenv("INTERVIEWMATE_PATH", "gpu")
    here = backend.machine()
    assert (here.path, here.dtype, here.cpu_streams) == ("gpu", "bfloat16", 0)
    assert backend.has_causal_kernel(72, mx.bfloat16)
    assert not backend.has_masked_kernel(64, mx.bfloat16)
