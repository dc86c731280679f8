"""A run that starts from an adapter: more epochs, other rows, preferences after answers."""

import mlx.nn as nn

from interviewmate_mlx.adapter.folder import Adapter, adapter_weights
from interviewmate_mlx.errors import AdapterError, list_faults


def check_start(
    adapter: Adapter, model: nn.Module, base_hash: str, alpha: float, rslora: bool
) -> None:
    """Refuse an adapter that is not of the run's base and shape.

    Args:
        adapter: to start from.
        model: the run's, with its LoRA.
        base_hash: `Base.weights_hash` of the run's base.
        alpha, rslora: of the run's LoRA.

    Raises:
        AdapterError: all that differs.
    """
    faults = []
    if adapter.base_hash and adapter.base_hash != base_hash:
        faults.append(f"model.base: got other weights than those of {adapter.config.base}")
    if adapter.config.alpha_pattern or adapter.config.alpha != alpha:
        expected = adapter.config.alpha_pattern or f"{adapter.config.alpha:g}"
        faults.append(f"lora.alpha: got {alpha:g}, expected {expected}")
    if adapter.config.rslora != rslora:
        faults.append(f"lora.rslora: got {rslora}, expected {adapter.config.rslora}")
    ours = {path: array.shape for path, array in adapter_weights(model).items()}
    theirs = {path: entry.shape for path, entry in adapter.tensors.items()}
    faults += [
        f"{path}: got {ours.get(path, 'nothing')}, expected {theirs.get(path, 'nothing')}"
        for path in {**ours, **theirs}
        if ours.get(path) != theirs.get(path)
    ]
    if faults:
        raise AdapterError(
            f"The run cannot start from {adapter.folder}, which it does not fit:\n"
            f"{list_faults(faults)}\n"
            "Give the run the adapter's base, rank, alpha, targets, layers, rslora, dora and bias "
            "(they stand in its run.toml or adapter_config.json), or merge it into the base."
        )


def start_from(adapter: Adapter, model: nn.Module) -> None:
    """Give a model's LoRA the numbers of an adapter that fits it, in place."""
    adapter.load_into(model)
