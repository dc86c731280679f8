"""How the weights of a folder are quantised."""

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from interviewmate_mlx.errors import ModelError, brief, list_faults

# MLX's kinds, and the sizes of a group and of a number that each has.
_MODES = {
    "affine": ({32, 64, 128}, {2, 3, 4, 5, 6, 8}),
    "mxfp4": ({32}, {4}),
    "mxfp8": ({32}, {8}),
    "nvfp4": ({16}, {4}),
}


@dataclass(frozen=True)
class Quantization:
    """How the weights of a folder are quantised, as mlx-lm writes it.

    Attributes:
        default: `group_size`, `bits` and `mode` of a layer.
        by_path: of single layers, where they differ.
    """

    default: dict[str, Any]
    by_path: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, bits: int, group_size: int = 64) -> "Quantization":
        """MLX's usual kind, the same for every layer.

        Raises:
            ModelError: there is no such kind.
        """
        settings = {"group_size": group_size, "bits": bits, "mode": "affine"}
        if faults := _faults(settings):
            raise ModelError(
                f"Cannot quantise to {bits} bits in groups of {group_size}: expected "
                f"{' and '.join(faults)}.",
                "quantize",
                "group_size",
            )
        return cls(settings)

    @property
    def settings(self) -> dict[str, Any]:
        """As in `config.json`."""
        return {**self.default, **self.by_path}

    def of_layer(self, path: str) -> dict[str, Any]:
        """`group_size`, `bits` and `mode` of a layer."""
        return self.by_path.get(path, self.default)

    @property
    def bits(self) -> int:
        """Of a number in most layers."""
        return int(self.default["bits"])

    def apply(self, model: nn.Module, weights: dict[str, mx.array]) -> None:
        """Quantise the layers of a network whose weights are, in place.

        Raises:
            ValueError: a layer's shape does not allow it.
        """
        nn.quantize(
            model,
            **self.default,
            class_predicate=lambda path, _: (
                self.by_path.get(path, True) if f"{path}.scales" in weights else False
            ),
        )


def read_quantization(
    folder: Path, config: dict[str, Any], names: Collection[str]
) -> Quantization | None:
    """How a folder's weights are quantised; None if they are not.

    Args:
        folder: the model's, for messages.
        config: its `config.json`.
        names: of its tensors.

    Raises:
        ModelError: they are not quantised as MLX does it, or the config contradicts the
            weights.
    """
    settings = config.get("quantization")
    other = config.get("quantization_config")
    if settings is None and isinstance(other, dict) and other.get("quant_method"):
        raise ModelError(
            f"{folder}/config.json: quantization_config: quantised by "
            f"{brief(other['quant_method'])}, expected weights as they are, or quantised by MLX.\n"
            "Choose the model that it was made from."
        )
    key = "quantization_config" if settings is None else "quantization"
    settings = other if settings is None else settings
    if settings is None:
        return None
    fault = ""
    if not isinstance(settings, dict):
        fault = f"got {brief(settings)}, expected a table"
    else:
        defaults = {"mode": "affine", **settings}
        faults = _faults(defaults)
        if faults:
            fault = f"got {brief(settings)}, expected {' and '.join(faults)}"
        elif not any(name.endswith(".scales") for name in names):
            fault = f"got {defaults['bits']} bits, expected none: the weights are not quantised"
    if fault:
        raise ModelError(f"{folder}/config.json: {key}: {fault}.\nConvert or quantise it again.")
    by_path = {path: value for path, value in defaults.items() if isinstance(value, dict)}
    by_path = {path: {"mode": "affine", **value} for path, value in by_path.items()}
    wrong = [
        f"{path}: expected {' and '.join(_faults(by_path[path]))}"
        for path in by_path
        if _faults(by_path[path])
    ]
    if wrong:
        raise ModelError(
            f"{folder}/config.json: quantization of single layers:\n{list_faults(wrong)}\n"
            "Convert or quantise it again."
        )
    return Quantization(_sizes(defaults), {path: _sizes(v) for path, v in by_path.items()})


def _sizes(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: settings[key] for key in ("group_size", "bits", "mode")}


def _faults(settings: dict[str, Any]) -> list[str]:
    mode = settings.get("mode")
    if not isinstance(mode, str) or mode not in _MODES:
        return [f"a mode out of {', '.join(_MODES)}"]
    groups, bits = _MODES[mode]
    expected = {"group_size": groups, "bits": bits}
    return [
        f"{key} out of {', '.join(map(str, sorted(allowed)))}"
        for key, allowed in expected.items()
        if type(settings.get(key)) is not int or settings[key] not in allowed
    ]
