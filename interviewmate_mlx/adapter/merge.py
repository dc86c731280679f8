"""The updates of adapters as plain matrices: combined with weights, and added to a base's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from interviewmate_mlx.adapter.folder import Adapter
from interviewmate_mlx.errors import AdapterError, list_faults
from interviewmate_mlx.model.lora import lora_layers, remove_lora


@dataclass(frozen=True)
class Update:
    """What an adapter adds to a layer's weight: `scale * B A`; DoRA then stretches its rows.

    Attributes:
        a: (r, in) float32.
        b: (out, r) float32.
        scale: alpha / r, or what rsLoRA makes of it.
        magnitude: (out,) float32, the norms that DoRA gives the rows of the sum; None: their own.
    """

    a: mx.array
    b: mx.array
    scale: float
    magnitude: mx.array | None = None

    def added_to(self, weight: mx.array) -> mx.array:
        """The sum, (out, in), computed in float32 and rounded to the weight's dtype."""
        total: mx.array = weight.astype(mx.float32) + self.scale * (self.b @ self.a)
        if self.magnitude is not None:
            total *= (self.magnitude / mx.linalg.norm(total, axis=1))[:, None]
        return total.astype(weight.dtype)


def read_updates(adapter: Adapter, model: nn.Module) -> dict[str, Update]:
    """An adapter's updates by the path of the layer that each changes.

    Args:
        adapter: opened.
        model: the base's network, unchanged by this; its weights need not be in memory.

    Raises:
        AdapterError: as for `Adapter.apply`.
    """
    adapter.apply(model)
    updates = {
        path: Update(
            layer.lora_A.weight,
            layer.lora_B.weight,
            layer.scale,
            layer.get("lora_magnitude_vector"),
        )
        for path, layer in lora_layers(model)
    }
    remove_lora(model)
    return updates


def read_biases(adapter: Adapter) -> dict[str, mx.array]:
    """The biases that an adapter brings, by their names in the base."""
    found = adapter.matrices().items() if adapter.config.bias != "none" else ()
    return {name.replace(".base_layer.", "."): a for name, a in found if name.endswith(".bias")}


def combine(adapters: Sequence[dict[str, Update]], weights: Sequence[float]) -> dict[str, Update]:
    """Several adapters as one, as PEFT's `add_weighted_adapter` with `linear` combines them.

    Each matrix is the sum of the adapters' matrices, scaled by the root of weight times scale;
    the sign is A's. (So the product of several has terms that mix two adapters.)

    Args:
        adapters: the updates of each.
        weights: one for each adapter.

    Raises:
        AdapterError: two adapters have different ranks in a layer.
    """
    if any(part.magnitude is not None for updates in adapters for part in updates.values()):
        raise AdapterError(
            "A DoRA cannot be combined with others or weighted: it scales whole weights.\n"
            "Merge it alone, and train the others on the merged base."
        )
    paths = dict.fromkeys(path for updates in adapters for path in updates)
    faults, combined = [], {}
    for path in paths:
        parts = [(u[path], w) for u, w in zip(adapters, weights, strict=True) if path in u]
        ranks = sorted({part.a.shape[0] for part, _ in parts})
        if len(ranks) > 1:
            faults.append(f"{path}: got ranks {', '.join(map(str, ranks))}")
            continue
        factors = [weight * part.scale for part, weight in parts]
        roots = [math.sqrt(abs(factor)) for factor in factors]
        a = sum(
            math.copysign(root, factor) * part.a
            for (part, _), root, factor in zip(parts, roots, factors, strict=True)
        )
        b = sum(root * part.b for (part, _), root in zip(parts, roots, strict=True))
        combined[path] = Update(mx.array(a), mx.array(b), 1.0)
    if faults:
        raise AdapterError(
            f"The adapters cannot be combined, for their ranks differ:\n{list_faults(faults)}\n"
            "Merge one of them, and train the other on the merged base."
        )
    return combined
