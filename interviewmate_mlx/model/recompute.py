"""Gradient checkpointing: a block's activations are computed again in its backward pass.

Only the blocks' inputs are kept. So memory grows by C floats per token and layer instead
of some 16 C, for one more forward pass (https://arxiv.org/abs/1604.06174).
"""

from contextlib import ExitStack
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from interviewmate_mlx.model.falcon import Block, Model
from interviewmate_mlx.model.lora import Dropout


class _CheckpointedBlock(Block):
    """A block that keeps nothing but its input for the backward pass."""

    def __call__(self, x: mx.array, mask: Any, cache: Any = None) -> mx.array:
        if not self.training or cache is not None:
            return super().__call__(x, mask, cache)
        dropouts = [m for m in self.modules() if isinstance(m, Dropout) and m.draws]
        # Dropout must draw the same the second time, so each draws from a key of its own. (Not
        # from rows of one array: `mx.compile` loses track of those inside a checkpoint.)
        keys = [mx.random.randint(0, 2**31 - 1, (2,)).astype(mx.uint32) for _ in dropouts]

        def forward(x: mx.array) -> mx.array:
            with ExitStack() as stack:
                for dropout, key in zip(dropouts, keys, strict=True):
                    # The second time x is another array: then masks are not kept, but drawn again.
                    key = mx.stop_gradient(mx.depends([key], [x])[0])
                    stack.enter_context(dropout.drawing_from(key))
                return Block.__call__(self, x, mask)

        return nn.utils.checkpoint(self, forward)(x)


def use_gradient_checkpointing(model: Model) -> None:
    """Let a model's blocks compute their activations twice instead of keeping them, in place."""
    for block in model.layers:
        block.__class__ = _CheckpointedBlock
