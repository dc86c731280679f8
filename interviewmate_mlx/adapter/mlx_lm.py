"""Adapters of mlx-lm's own tuner: how they are named and laid out, in both directions.

It keeps `lora_a` as (in, r) and `lora_b` as (r, out), and adds `scale * x A B` to a layer; its
configuration is the options of a training run. PEFT has the transposed of both, and alpha / r
for the scale.
"""

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from interviewmate_mlx.adapter.config import AdapterConfig, is_number, is_rank
from interviewmate_mlx.errors import AdapterError, brief, list_faults
from interviewmate_mlx.formats.safetensors_file import TensorEntry, save_tensors
from interviewmate_mlx.model.lora import lora_layers

WEIGHTS_FILE = "adapters.safetensors"
_CONFIG_FILE = "adapter_config.json"
_NAMES = {
    ".lora_a": ".lora_A.weight",
    ".lora_b": ".lora_B.weight",
    ".m": ".lora_magnitude_vector",  # of DoRA
}
_BLOCK = re.compile(r"(?P<before>.*?\.)(?P<number>\d+)\.(?P<key>.+)").fullmatch


def our_name(name: str) -> str:
    """The path of a matrix here, by its name there."""
    for theirs, ours in _NAMES.items():
        if name.endswith(theirs):
            return name.removesuffix(theirs) + ours
    return name


def transposed(entry: TensorEntry) -> TensorEntry:
    """A matrix as it lies in a file, read by columns; a vector as it is."""
    if len(entry.shape) == 1:
        return entry
    rows, columns = entry.shape
    return TensorEntry(entry.dtype, (columns, rows), entry.path, entry.offset, (1, columns))


def read_config(
    folder: Path, content: dict[str, Any], tensors: dict[str, TensorEntry]
) -> AdapterConfig:
    """What PEFT's configuration would say of an adapter.

    Args:
        folder: the adapter's, for messages.
        content: its `adapter_config.json`.
        tensors: of its file, by name.

    Raises:
        AdapterError: it is no LoRA of linear layers, or its settings contradict its matrices.
    """
    kind = content.get("fine_tune_type", "lora")
    settings = content.get("lora_parameters")
    settings = settings if isinstance(settings, dict) else {}
    rank, scale, dropout = (settings.get(key) for key in ("rank", "scale", "dropout"))
    faults = []
    if kind not in ("lora", "dora"):
        faults.append(f"fine_tune_type: got {brief(kind)}, expected 'lora' or 'dora'")
    if not is_rank(rank):
        faults.append(f"lora_parameters.rank: got {brief(rank)}, expected a whole number above 0")
    if not is_number(scale):
        faults.append(f"lora_parameters.scale: got {brief(scale)}, expected a finite number")
    if dropout is not None and not (is_number(dropout) and 0 <= dropout < 1):
        faults.append(f"lora_parameters.dropout: got {brief(dropout)}, expected from 0 to below 1")
    faults += [
        f"{name}: expected a name that ends in .lora_a or .lora_b (or, with 'dora', .m)"
        for name in tensors
        if not name.endswith(tuple(_NAMES)) or (kind == "lora" and name.endswith(".m"))
    ]
    faults += [
        f"{name}: got shape {entry.shape}, expected a matrix (LoRA on experts is not supported)"
        for name, entry in tensors.items()
        if len(entry.shape) != (1 if name.endswith(".m") else 2)
    ]
    faults += [
        f"{name}: got rank {entry.shape[1]}, expected {rank}"
        for name, entry in tensors.items()
        if name.endswith(".lora_a") and len(entry.shape) == 2 and entry.shape[1] != rank
    ]
    if not tensors:
        faults.append("expected matrices, got none")
    if faults:
        raise AdapterError(
            f"{folder}, an adapter of mlx-lm, cannot be read here:\n{list_faults(faults)}\n"
            "Merge it into its base with mlx_lm.fuse, and give the folder of the merged model as "
            "the base."
        )
    assert isinstance(rank, int)
    assert isinstance(scale, int | float)
    base = content.get("model")
    paths = [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]
    targets, numbers = _as_targets(paths)
    return AdapterConfig(
        base=base if isinstance(base, str) else "",
        rank=rank,
        alpha=float(scale * rank),
        dropout=float(dropout or 0),
        targets=targets,
        layer_numbers=numbers,
        dora=kind == "dora",
    )


def _as_targets(paths: list[str]) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """Layers as PEFT names them: the same names in some blocks, or whole paths."""
    found = [_BLOCK(path) for path in paths]
    if all(found):
        parts = [match.groupdict() for match in found if match]
        keys = {part["key"].rpartition(".")[2] for part in parts}
        numbers = sorted({int(part["number"]) for part in parts})
        whole = {(part["before"], part["number"], part["key"]) for part in parts}
        same = {part["before"] for part in parts}
        longer = {part["key"] for part in parts}
        is_regular = len(same) == 1 and len(whole) == len(numbers) * len(longer)
        if is_regular and len(longer) == len(keys):
            return tuple(sorted(keys)), tuple(numbers)
    return tuple(paths), None


def write(folder: Path, model: nn.Module, base: str, dropout: float) -> None:
    """Write the LoRA of a network as `mlx_lm.generate --adapter-path` loads it.

    Args:
        folder: exists.
        model: with its LoRA.
        base: its name, for the configuration.
        dropout: of the training.

    Raises:
        AdapterError: mlx-lm has no place for what the adapter is: the same layers, rank and
            scale in the last blocks.
    """
    layers = dict(lora_layers(model))
    numbers, keys, faults = set(), set(), []
    for path in layers:
        if match := _BLOCK(path):
            numbers.add(int(match["number"]))
            keys.add(match["key"])
        else:
            faults.append(f"{path}: expected a layer of a block")
    total = len(model.layers)
    if numbers != set(range(total - len(numbers), total)):
        faults.append(f"blocks {sorted(numbers)}: expected the last ones of {total}")
    if len(layers) != len(numbers) * len(keys):
        faults.append("expected the same layers in each block")
    kinds = sorted({(layer.lora_A.weight.shape[0], layer.scale) for layer in layers.values()})
    if len(kinds) != 1:
        faults.append(f"expected one rank and scale, got {', '.join(map(str, kinds))}")
    if faults:
        raise AdapterError(
            f"mlx-lm cannot hold this adapter:\n{list_faults(faults)}\n"
            "Merge it into its base instead: imate-mlx merge."
        )
    ((rank, scale),) = kinds
    arrays = {}
    for path, layer in sorted(layers.items()):
        arrays[f"{path}.lora_a"] = mx.contiguous(layer.lora_A.weight.T)
        arrays[f"{path}.lora_b"] = mx.contiguous(layer.lora_B.weight.T)
        if "lora_magnitude_vector" in layer:
            arrays[f"{path}.m"] = layer.lora_magnitude_vector
    save_tensors(folder / WEIGHTS_FILE, arrays, {"format": "mlx"})
    has_dora = any("lora_magnitude_vector" in layer for layer in layers.values())
    settings = {
        "fine_tune_type": "dora" if has_dora else "lora",
        "model": base,
        "num_layers": len(numbers),
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": dropout,
            "keys": sorted(keys),
        },
    }
    text = json.dumps(settings, indent=2) + "\n"
    (folder / _CONFIG_FILE).write_text(text, encoding="utf-8")
