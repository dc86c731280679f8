"""AdamW as torch computes it, and the learning rate of a step."""

import math

import mlx.optimizers as optim


def adamw(weight_decay: float = 0.0) -> optim.AdamW:
    """AdamW with bias correction, which MLX leaves out by default; equal to `torch.optim.AdamW`.

    The learning rate is set before each step.
    """
    return optim.AdamW(
        learning_rate=0.0,
        betas=[0.9, 0.999],
        eps=1e-8,
        weight_decay=weight_decay,
        bias_correction=True,
    )


def learning_rate_at(
    step: int, total_steps: int, peak: float, schedule: str, warmup_ratio: float
) -> float:
    """The learning rate of one step, as transformers' schedules of the same names give it.

    Args:
        step: from 0. With a warmup the first step's rate is 0, as in transformers.
        total_steps: steps of the whole run.
        peak: the rate after the warmup.
        schedule: `constant`, `linear` (to 0) or `cosine` (half a wave, to 0).
        warmup_ratio: share of the steps over which the rate rises from 0.
    """
    warmup_steps = math.ceil(warmup_ratio * total_steps)
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if schedule == "linear":
        return peak * (1 - progress)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    return peak
