"""AdamW as torch computes it, and the learning rate of a step."""

import math
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_map_with_path


def adamw(weight_decay: float = 0.0, plus_ratio: float = 1.0) -> optim.AdamW:
    """AdamW with bias correction, which MLX leaves out by default; equal to `torch.optim.AdamW`.

    The learning rate is set before each step.

    Args:
        weight_decay: of all parameters.
        plus_ratio: the learning rate of LoRA's B by that of its A; see `LoraPlusAdamW`.
    """
    kind = optim.AdamW if plus_ratio == 1 else LoraPlusAdamW
    optimizer = kind(
        learning_rate=0.0,
        betas=[0.9, 0.999],
        eps=1e-8,
        weight_decay=weight_decay,
        bias_correction=True,
    )
    if isinstance(optimizer, LoraPlusAdamW):
        optimizer.plus_ratio = plus_ratio
    return optimizer


class LoraPlusAdamW(optim.AdamW):
    """LoRA+ (https://arxiv.org/abs/2402.12354): B learns faster than A, as in PEFT's optimizer."""

    plus_ratio = 1.0

    def init(self, parameters: dict[str, Any]) -> None:
        super().init(parameters)

        def note(path: str, parameter: mx.array, state: dict[str, mx.array]) -> None:
            is_fast = "lora_B" in path or parameter.ndim == 1
            state["rate"] = mx.array(self.plus_ratio if is_fast else 1.0)

        tree_map_with_path(note, parameters, self.state)

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]
    ) -> mx.array:
        rate = self.state["learning_rate"]
        self.state["learning_rate"] = rate * state["rate"]
        updated: mx.array = super().apply_single(gradient, parameter, state)
        self.state["learning_rate"] = rate
        return updated


def learning_rate_at(
    step: int,
    total_steps: int,
    peak: float,
    schedule: str,
    warmup_ratio: float,
    warmup_steps: int = 0,
    floor: float = 0.0,
) -> float:
    """The learning rate of one step, as transformers' schedules of the same names give it.

    Args:
        step: from 0. With a warmup the first step's rate is 0, as in transformers.
        total_steps: steps of the whole run.
        peak: the rate after the warmup.
        schedule: `constant`, `linear` (to 0) or `cosine` (half a wave, to the floor).
        warmup_ratio: share of the steps over which the rate rises from 0.
        warmup_steps: that many, and not the share; 0: the share.
        floor: share of the peak that `cosine` falls to.
    """
    warmup_steps = warmup_steps or math.ceil(warmup_ratio * total_steps)
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if schedule == "linear":
        return peak * (1 - progress)
    if schedule == "cosine":
        wave = 0.5 * (1 + math.cos(math.pi * progress))
        return peak * (floor + (1 - floor) * wave)
    return peak
