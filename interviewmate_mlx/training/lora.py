"""Puts a run's LoRA on its base."""

from interviewmate_mlx.base.base import Base
from interviewmate_mlx.config import RunConfig
from interviewmate_mlx.errors import AdapterError, list_faults
from interviewmate_mlx.model.dora import place_dora
from interviewmate_mlx.model.lora import (
    block_numbers,
    find_targets,
    place_lora,
    resolve_targets,
    train_biases,
)
from interviewmate_mlx.model.starts import check_doubled
from interviewmate_mlx.model.zoo import Network
from interviewmate_mlx.training.folder import adapter_config


def put_lora(run: RunConfig, base: Base, model: Network) -> None:
    """Put a run's LoRA on its base, in place.

    Raises:
        AdapterError: it does not fit.
    """
    lora = run.lora
    targets = resolve_targets(model, lora.targets)
    check_names(model, base, targets)
    config = adapter_config(run, targets, block_numbers(model, lora.layers))
    place_lora(model, config.layers(model), lora.dropout, rslora=lora.rslora)
    if lora.dora:
        place_dora(model)
    for key, got, plain in (("bias", lora.bias, "none"), ("init", lora.init, "default")):
        if got != plain and base.quantization:
            raise AdapterError(
                f"lora.{key}: got {got}, and {base.name} is quantised, whose layers stay as they "
                f"are.\nChoose {plain}, or the base that it was made from."
            )
    if lora.init != "default":
        check_doubled(model)
    train_biases(model, lora.bias)


def check_names(model: Network, base: Base, targets: tuple[str, ...]) -> None:
    """Refuse layers whose adapter PEFT could not load: those that its own files name otherwise.

    Raises:
        AdapterError: all such layers.
    """
    names = base.tensor_names
    faults = [path for path in find_targets(model, targets) if f"{path}.weight" not in names]
    if faults:
        raise AdapterError(
            f"{base.name} does not have these layers under the names of mlx-lm's network, so PEFT "
            f"could not load their adapter:\n{list_faults(faults)}\nChoose other lora.targets."
        )
