"""Dropout that a row has for itself, whatever shares its microbatch.

Whether a number is kept follows from its row, position, layer and channel, by a hash of
integers. So a step drops the same however its rows are split over microbatches, streams or
machines, and however often a block is computed. The hash is part of the kernel that drops,
forward and backward: no mask is stored.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

# Odd numbers, whose multiples differ.
_POSITION, _LAYER, _CHANNEL = 0x85EBCA6B, 0x9E3779B9, 0xC2B2AE35
# What lowbias32 multiplies by (https://github.com/skeeto/hash-prospector).
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B

_seeds_in_use: ContextVar[mx.array | None] = ContextVar("seeds_in_use", default=None)


@contextmanager
def tokens_seeded(seeds: mx.array) -> Iterator[None]:
    """Let dropout within the block follow from `token_seeds`."""
    token = _seeds_in_use.set(seeds)
    try:
        yield
    finally:
        _seeds_in_use.reset(token)


def token_seeds(row_ids: np.ndarray, length: int, seed: int) -> mx.array:
    """Numbers for each token of some rows, alike in every microbatch that a row is part of.

    Args:
        row_ids: (B,) uint32, what tells the rows apart.
        length: L, of the rows; what is beyond changes nothing.
        seed: of the step, below 2**32.

    Returns:
        (B, L) uint32.
    """
    rows = _hash(row_ids ^ np.uint32(seed))
    return mx.array(_hash(rows[:, None] + _multiples(_POSITION, length)))


class Dropout(nn.Module):
    """While training, set each number to 0 with probability `p` and scale the rest by 1 / (1 - p).

    Without `tokens_seeded` each call draws from MLX's random state.

    Args:
        p: the probability, to a 2**-32nd.
        number: of the layer, from 0; each drops others.

    Raises:
        ValueError: p is not from 0 to below 1.
    """

    def __init__(self, p: float, number: int = 0) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout: got {p}, expected from 0 to below 1")
        self._keep, self._number = 1 - p, number

    @property
    def draws(self) -> bool:
        """Whether a call drops anything."""
        return self.training and self._keep < 1

    def __call__(self, x: mx.array, scale: float = 1.0, dtype: mx.Dtype = mx.float32) -> mx.array:
        """Drop some numbers of x, and scale the others.

        Args:
            x: (..., C); with `tokens_seeded`, of as many tokens as there are seeds.
            scale: beside 1 / (1 - p).
            dtype: of the result. It is scaled in float32: in bfloat16 1 / 0.95 is 1.0547.
        """
        if not self.draws:
            return x.astype(dtype) if scale == 1 else (x.astype(mx.float32) * scale).astype(dtype)
        seeds = _seeds_in_use.get()
        if seeds is None:
            seeds = mx.random.randint(0, 2**31 - 1, x.shape[:-1]).astype(mx.uint32)
        channels = _hash(
            np.uint32(self._number * _LAYER % 2**32) + _multiples(_CHANNEL, x.shape[-1])
        )
        left: mx.array = _drop(
            x.reshape(*seeds.shape, -1),
            seeds[..., None],
            mx.array(channels),
            mx.array(round(self._keep * 2**32), mx.uint32),
            mx.array(scale / self._keep),
            mx.array(0, dtype),
        )
        return left.reshape(x.shape)


def _multiples(of: int, count: int) -> np.ndarray:
    return np.arange(count, dtype=np.uint32) * np.uint32(of)


def _hash(x: np.ndarray) -> np.ndarray:
    """Other numbers, one for each uint32: near ones become as different as distant ones."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(_FIRST)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(_SECOND)
    hashed: np.ndarray = x ^ (x >> np.uint32(16))
    return hashed


def _left(
    x: mx.array,
    seeds: mx.array,
    channels: mx.array,
    threshold: mx.array,
    scale: mx.array,
    nothing: mx.array,
) -> mx.array:
    """What dropout leaves.

    Args:
        x: (..., C), any float dtype.
        seeds: (..., 1) uint32, of the tokens, hashed.
        channels: (C,) uint32, hashed.
        threshold: () uint32; numbers whose hash is below are kept.
        scale: () float32, of what is kept.
        nothing: 0, () in the dtype of the result.
    """
    # Both are hashed already, and the comparison looks at the high bits first: so the steps of
    # `_hash` between its products suffice. All of them would be a longer chain than MLX fuses.
    x1 = (seeds + channels) * mx.array(_FIRST, mx.uint32)
    is_kept = (x1 ^ (x1 >> 15)) * mx.array(_SECOND, mx.uint32) < threshold
    return mx.where(is_kept, (x.astype(mx.float32) * scale).astype(nothing.dtype), nothing)


_drop: Any = mx.custom_function(_left)


@_drop.vjp
def _drop_vjp(
    primals: tuple[mx.array, ...], cotangent: mx.array, _: mx.array
) -> tuple[mx.array, ...]:
    x, seeds, channels, threshold, scale, _ = primals
    # The dependency keeps the compiler from storing the forward pass' hash.
    (seeds,) = mx.depends([seeds], [cotangent])
    gradient = _left(cotangent, seeds, channels, threshold, scale, mx.array(0, x.dtype))
    return gradient, *(mx.zeros_like(primal) for primal in primals[1:])
