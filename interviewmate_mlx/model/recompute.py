"""Gradient checkpointing: a block's activations are computed again in its backward pass.

Only the blocks' inputs are kept. So memory grows by C floats per token and layer instead
of some 16 C, for one more forward pass (https://arxiv.org/abs/1604.06174).
"""

from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from interviewmate_mlx.model.dropout import seeds_for, tokens_seeded


@cache
def _checkpointed(block: type[nn.Module]) -> type[nn.Module]:
    """A class of blocks that keep nothing but their input for the backward pass."""

    def call(self: Any, x: mx.array, *rest: Any, **settings: Any) -> Any:
        if not self.training or any(hasattr(a, "state") for a in (*rest, *settings.values())):
            return block.__call__(self, x, *rest, **settings)  # with a cache, there is no training

        # Once for both times, or dropout outside of a step would draw anew.
        seeds = seeds_for(x.shape[:-1])

        def forward(x: mx.array) -> Any:
            with tokens_seeded(seeds):
                return block.__call__(self, x, *rest, **settings)

        return nn.utils.checkpoint(self, forward)(x)

    return type(f"Checkpointed{block.__name__}", (block,), {"__call__": call})


def use_gradient_checkpointing(model: Any) -> None:
    """Let a network's blocks compute their activations twice instead of keeping them, in place."""
    for block in model.layers:
        kind: Any = type(block)
        block.__class__ = _checkpointed(kind)
