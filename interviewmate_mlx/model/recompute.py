"""Gradient checkpointing: a block's activations are computed anew for its backward pass.

Only what flows between blocks is kept, so memory grows by C floats a token and layer
instead of some 16 C, for one forward pass more (https://arxiv.org/abs/1604.06174).
"""

from contextlib import ExitStack
from typing import Any

import mlx.core as mx

from interviewmate_mlx.model.falcon import Block, Model
from interviewmate_mlx.model.lora import Dropout


class _RecomputedBlock(Block):
    """A block that keeps its input alone."""

    def __call__(self, x: mx.array, bias: mx.array, cache: Any = None) -> mx.array:
        if not self.training or cache is not None:
            return super().__call__(x, bias, cache)
        dropouts = [m for m in self.modules() if isinstance(m, Dropout) and m.draws]
        # Dropout must draw the same the second time, so it draws from a key of its own. (Not
        # from rows of one array: `mx.compile` loses track of those inside a checkpoint.)
        keys = [mx.random.randint(0, 2**31 - 1, (2,)).astype(mx.uint32) for _ in dropouts]

        def forward(parameters: dict[str, Any], x: mx.array) -> mx.array:
            with ExitStack() as stack:
                for dropout, key in zip(dropouts, keys, strict=True):
                    stack.enter_context(dropout.drawing_from(key))
                self.update(parameters)
                return Block.__call__(self, x, bias)

        return mx.checkpoint(forward)(self.trainable_parameters(), x)


def recompute_blocks(model: Model) -> None:
    """Let a model's blocks compute their activations twice instead of keeping them, in place."""
    for block in model.layers:
        block.__class__ = _RecomputedBlock
