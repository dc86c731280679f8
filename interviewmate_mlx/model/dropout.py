"""Dropout that a row has for itself, whatever shares its microbatch.

Whether a number is kept follows from its row, position, layer and channel, by a hash of
integers. So a step drops the same however its rows are split over microbatches, streams or
machines, and however often a block is computed. The hash is part of the kernel that drops,
forward and backward: no mask is stored.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from interviewmate_mlx.errors import ModelError

# Odd numbers, whose multiples differ.
_POSITION, _LAYER, _CHANNEL = 0x85EBCA6B, 0x9E3779B9, 0xC2B2AE35
# What lowbias32 multiplies by (https://github.com/skeeto/hash-prospector).
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B

_seeds_in_use: ContextVar[mx.array | None] = ContextVar("seeds_in_use", default=None)


def token_seeds(row_ids: np.ndarray, length: int, seed: int) -> mx.array:
    """Numbers for each token of some rows, alike in every microbatch that a row is part of.

    Args:
        row_ids: (B,) uint32, what tells the rows apart; equal ones get equal numbers.
        length: L, of the rows. A row's first numbers are the same with any length.
        seed: of the step, below 2**32.

    Returns:
        (B, L) uint32.
    """
    rows = _hash(row_ids ^ np.uint32(seed))
    return mx.array(_hash(rows[:, None] + _multiples(_POSITION, length)))


def seeds_for(shape: Sequence[int]) -> mx.array:
    """The seeds of the tokens in use; where there are none, new ones of this shape, drawn."""
    seeds = _seeds_in_use.get()
    if seeds is not None:
        return seeds
    return mx.random.randint(0, 2**31 - 1, shape).astype(mx.uint32)


@contextmanager
def tokens_seeded(seeds: mx.array) -> Iterator[None]:
    """Let dropout within the block follow from seeds of the tokens."""
    token = _seeds_in_use.set(seeds)
    try:
        yield
    finally:
        _seeds_in_use.reset(token)


class Dropout(nn.Module):
    """While training, set each number to 0 with probability `p` and scale the rest by 1 / (1 - p).

    Without `tokens_seeded` each call draws from MLX's random state.

    Args:
        p: the probability, to a 2**-32nd.
        number: of the layer, from 0, so that no two layers drop alike.

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
            x: (..., C); with `tokens_seeded`, all of those tokens, in their order.
            scale: beside 1 / (1 - p).
            dtype: of the result. It is scaled in float32: in bfloat16 1 / 0.95 is 1.0547.

        Raises:
            ModelError: x has another number of tokens.
        """
        if not self.draws:
            return x.astype(dtype) if scale == 1 else (x.astype(mx.float32) * scale).astype(dtype)
        seeds = seeds_for(x.shape[:-1])
        if seeds.size * x.shape[-1] != x.size:
            raise ModelError(
                f"A layer with a LoRA takes {x.shape}, where the microbatch has {seeds.size} "
                "tokens: its dropout needs all of them at once.\n"
                "Set lora.dropout to 0, or name other lora.targets."
            )
        dropped: mx.array = _drop(
            x.reshape(*seeds.shape, -1),
            seeds[..., None],
            _channels(self._number, x.shape[-1]),
            mx.array(min(max(1, round(self._keep * 2**32)), 2**32 - 1), mx.uint32),
            mx.array(scale / self._keep),
            mx.array(0, dtype),
        )
        return dropped.reshape(x.shape)


@cache  # or each compiled variant of a step would hold its own
def _channels(number: int, count: int) -> mx.array:
    """Numbers for each channel of a layer, (C,) uint32, odd."""
    start = np.uint32(number * _LAYER % 2**32)
    return mx.array(_hash(start + _multiples(_CHANNEL, count)) | np.uint32(1))


def _multiples(of: int, count: int) -> np.ndarray:
    return np.arange(count, dtype=np.uint32) * np.uint32(of)


def _hash(x: np.ndarray) -> np.ndarray:
    """Other numbers, one for each uint32: near ones become as different as distant ones."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(_FIRST)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(_SECOND)
    hashed: np.ndarray = x ^ (x >> np.uint32(16))
    return hashed


def _kept(
    x: mx.array,
    seeds: mx.array,
    channels: mx.array,
    threshold: mx.array,
    scale: mx.array,
    zero: mx.array,
) -> mx.array:
    """What dropout keeps of x, scaled, and 0 in place of the rest.

    Args:
        x: (..., C), any float dtype.
        seeds: (..., 1) uint32, of the tokens, hashed.
        channels: (C,) uint32, hashed, odd.
        threshold: () uint32; numbers whose hash is below are kept.
        scale: () float32, of what is kept.
        zero: () in the dtype of the result; a custom function takes nothing but arrays.
    """
    # Both are hashed already, so their product and one more step are enough. (After their sum
    # some pairs of channels are correlated. `_hash` whole is a longer chain than MLX fuses.)
    product = (seeds | 1) * channels
    is_kept = (product ^ (product >> 15)) * mx.array(_SECOND, mx.uint32) < threshold
    return mx.where(is_kept, (x.astype(mx.float32) * scale).astype(zero.dtype), zero)


_drop: Any = mx.custom_function(_kept)


@_drop.vjp
def _drop_vjp(
    primals: tuple[mx.array, ...], cotangent: mx.array, _: mx.array
) -> tuple[mx.array, ...]:
    x, seeds, channels, threshold, scale, _ = primals
    # The dependency keeps the compiler from storing the forward pass' hash.
    (seeds,) = mx.depends([seeds], [cotangent])
    gradient = _kept(cotangent, seeds, channels, threshold, scale, mx.array(0, x.dtype))
    return gradient, *(mx.zeros_like(primal) for primal in primals[1:])
