"""How much of an adapter's effect is left when the merged weights are quantised."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from interviewmate_mlx.base.base import Base
from interviewmate_mlx.base.quantization import Quantization
from interviewmate_mlx.base.quantize import quantize_model
from interviewmate_mlx.data.prompts import Example
from interviewmate_mlx.errors import AdapterError
from interviewmate_mlx.evaluation.loss import row_losses, score

LEAST_SHARE = 0.5


@dataclass(frozen=True)
class Survival:
    """Losses on the same rows, nats per predicted token.

    Attributes:
        base, merged: in the merged model's dtype.
        quantized_base, quantized_merged: both quantised in the same way.
    """

    base: float
    merged: float
    quantized_base: float
    quantized_merged: float

    @property
    def share(self) -> float:
        """What the adapter still takes off the loss, of what it took off before."""
        return (self.quantized_base - self.quantized_merged) / (self.base - self.merged)


def measure_survival(
    base: Base,
    merged: Base,
    quantization: Quantization,
    dtype: mx.Dtype,
    examples: Sequence[Example],
) -> Survival:
    """Measure what quantising the merged weights leaves of the adapter's effect.

    The base is quantised in the same way, so that what quantising costs any model does not count.

    Args:
        base: the base alone.
        merged: it with the adapter merged in, not quantised.
        quantization: to come.
        dtype: of the activations.
        examples: rows that the adapter was not trained on.

    Raises:
        AdapterError: the adapter does not lower the loss on these rows, so there is no effect
            to be measured; or less than half of it is left.
    """
    losses = []
    for one in (base, merged):
        model = one.load(dtype)
        losses.append(_loss(model, examples))
        if one.quantization is None:
            quantize_model(model, quantization)
        losses.append(_loss(model, examples))
        del model
    found = Survival(losses[0], losses[2], losses[1], losses[3])
    if found.merged >= found.base:
        raise AdapterError(
            f"The adapter does not lower the loss on these rows ({found.base:.4f} without it, "
            f"{found.merged:.4f} with it), so it cannot be said what quantising would leave of "
            "its effect.\nGive rows like those it was trained on, or do not quantise.",
            "data",
            "quantize",
        )
    if found.share < LEAST_SHARE:
        raise AdapterError(
            f"Quantised to {quantization.bits} bits, {max(0.0, found.share):.0%} of the adapter's "
            f"effect on the loss would be left, expected at least {LEAST_SHARE:.0%}: "
            f"{found.base:.4f} to {found.merged:.4f} before, {found.quantized_base:.4f} to "
            f"{found.quantized_merged:.4f} after.\n"
            "Take more bits or smaller groups, or serve the adapter beside the quantised base.",
            "quantize",
            "group_size",
        )
    return found


def _loss(model: Any, examples: Sequence[Example]) -> float:
    model.eval()
    return score(row_losses(model, examples)).loss
