"""What the parts of a layer cost in which a GPU has several ways: attention, norms, the head.

    python benchmarks/kernels.py --rows 32 --length 224

Each in the device's dtype at Falcon-RW-1B's widths, forward, and with the gradient of its input;
microseconds, the best of five times ten in a row. Attention without a kernel for its backward
pass keeps its scores: cuDNN's wants a multiple of 128 queries, Metal's a causal mask.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from interviewmate_mlx import backend  # its BLAS must be loaded before MLX

# isort: split
import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import scaled_dot_product_attention

from interviewmate_mlx.model.falcon import alibi_mask, alibi_slopes
from interviewmate_mlx.model.gpu_kernels import (
    alibi_terms,
    attention,
    padded_attention,
    padded_mask,
    use_frozen_norms,
)
from interviewmate_mlx.training.loss import chunked_cross_entropy

HEAD_DIM, VOCAB = 64, 50_304
TIMES, IN_A_ROW = 5, 10
CHUNKS = 512, 2048, 8192  # tokens whose logits exist at once

Function = Callable[[mx.array], Any]


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=224, help="tokens of a row")
    parser.add_argument("--heads", type=int, default=32, help=f"of {HEAD_DIM} channels each")
    parser.add_argument("--vocab", type=int, default=VOCAB)
    asked = parser.parse_args(words)
    here = backend.machine()
    print(f"{here.device}: {here.device_name}, {here.dtype}; {asked.rows} x {asked.length} tokens")
    print(f"{'':<40}{'forward':>10}{'and back':>10}")
    shape = asked.rows, asked.length, asked.heads
    for name, function, x in [*attentions(*shape), *norms(*shape)]:
        print(f"{name:<40}{timed(function, x):>10.0f}{timed(with_gradient(function), x):>10.0f}")
    for name, function, x in heads(*shape, asked.vocab):
        print(f"{name:<40}{'':>10}{timed(function, x):>10.0f}")


def attentions(rows: int, length: int, heads: int) -> Iterator[tuple[str, Function, mx.array]]:
    """Ways of attention: a name, a function of queries, keys and values in one, and these."""
    dtype = backend.resolve_dtype("auto")
    qkv = mx.random.normal((rows, length, heads, 3, HEAD_DIM)).astype(dtype)
    positions, scale = mx.arange(length)[None], HEAD_DIM**-0.5
    of_mask = alibi_slopes(heads), positions, positions, scale, dtype
    ways: dict[str, tuple[Any, Any]] = {
        "a mask": (scaled_dot_product_attention, alibi_mask(*of_mask)),
        "wider heads": (attention, alibi_terms(*of_mask, head_dim=HEAD_DIM)),
        "a mask, padded queries": (padded_attention, padded_mask(*of_mask)),
    }

    def through(attend: Any, mask: Any, qkv: mx.array) -> mx.array:
        split = (part.squeeze(3).swapaxes(1, 2) for part in mx.split(qkv, 3, axis=3))
        out: mx.array = attend(*split, cache=None, scale=scale, mask=mask)
        return out.swapaxes(1, 2).reshape(rows, length, heads * HEAD_DIM)

    for name, (attend, mask) in ways.items():
        yield f"attention, {name}", partial(through, attend, mask), qkv


def norms(rows: int, length: int, heads: int) -> Iterator[tuple[str, Function, mx.array]]:
    """Norms with the gradient of their weights, and without: a name, the norm, its input."""
    dtype, channels = backend.resolve_dtype("auto"), heads * HEAD_DIM
    x = mx.random.normal((rows, length, channels)).astype(dtype)
    for name, kind in (("layer norm", nn.LayerNorm), ("RMS norm", nn.RMSNorm)):
        for is_frozen in (False, True):
            norm = kind(channels)
            norm.weight = mx.linspace(0.5, 1.5, channels)
            norm.set_dtype(dtype)
            if is_frozen:
                norm.freeze()
                use_frozen_norms(norm)
            yield f"{name}{', frozen' if is_frozen else ''}", norm, x


def heads(
    rows: int, length: int, num_heads: int, vocab: int
) -> Iterator[tuple[str, Function, mx.array]]:
    """The loss of all tokens, so many at once: a name, a function of their states, and these."""
    dtype, channels = backend.resolve_dtype("auto"), num_heads * HEAD_DIM
    hidden = mx.random.normal((rows * length, channels)).astype(dtype)
    weight = (0.02 * mx.random.normal((vocab, channels))).astype(dtype)
    targets = mx.zeros(rows * length, mx.int32)

    def losses(chunk: int, hidden: mx.array) -> Any:
        return chunked_cross_entropy(
            lambda states: states @ weight.T, hidden, targets, chunk, mx.fast.cross_entropy
        )

    for chunk in CHUNKS:
        yield f"head and loss, {chunk} tokens at once", partial(losses, chunk), hidden


def with_gradient(function: Function) -> Function:
    """What a function gives, and the gradient of its input for a cotangent without a pattern."""

    def both(x: mx.array) -> Any:
        cotangent = mx.sin(mx.arange(function(x).size)).reshape(function(x).shape).astype(x.dtype)
        values, gradients = mx.vjp(function, [x], [cotangent])
        return *values, *gradients

    return both


def timed(function: Function, x: mx.array) -> float:
    """Microseconds of a compiled function of an array."""
    compiled = mx.compile(function)
    mx.eval(x, compiled(x))
    times = []
    for _ in range(TIMES):
        start = time.perf_counter()
        for _ in range(IN_A_ROW):
            mx.async_eval(compiled(x))
        mx.synchronize()
        times.append((time.perf_counter() - start) / IN_A_ROW)
    return 1e6 * min(times)


if __name__ == "__main__":
    main()
