"""An adapter folder is a PEFT folder: read and written here, with no second format.

The keys of `adapter_model.safetensors` are this package's own parameter paths
behind a prefix, so nothing is renamed or transposed in either direction.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from interviewmate_mlx.errors import AdapterError, WeightsError, list_faults
from interviewmate_mlx.files import atomic_file, atomic_folder
from interviewmate_mlx.model.lora import place_lora, shape_of
from interviewmate_mlx.weights.adapter_config import (
    CONFIG_FILE,
    AdapterConfig,
    read_adapter_config,
)
from interviewmate_mlx.weights.cast import FLOATS, cast
from interviewmate_mlx.weights.links import refuse_links_out
from interviewmate_mlx.weights.safetensors_file import (
    TensorEntry,
    read_safetensors_header,
    save_tensors,
)

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
_BASE_KEY = "base_weights"  # in the metadata of WEIGHTS_FILE
# What an adapter folder holds for others; checkpoints are the trainer's own.
ADAPTER_FILES = (
    WEIGHTS_FILE,
    CONFIG_FILE,
    "README.md",
    "run.toml",
    "metrics.jsonl",
    "summary.json",
)


def load_adapter(model: nn.Module, folder: Path) -> AdapterConfig:
    """Put the adapter of a PEFT folder onto a base model, in place.

    The file's keys and shapes are compared with the model's in both directions
    before anything is touched. Matrices are kept in float32, as in PEFT.

    Raises:
        AdapterError: the folder cannot be read, or does not fit; all misfits named.
    """
    config = read_adapter_config(folder)
    layers = config.layers(model)
    entries = _read_entries(folder)
    _compare(folder, model, layers, entries)
    _check_finite(folder, entries)
    place_lora(model, layers, config.dropout, rslora=config.rslora)
    loaded: Any = mx.load(str(folder / WEIGHTS_FILE))
    weights = [(name.removeprefix(PREFIX), a.astype(mx.float32)) for name, a in loaded.items()]
    model.load_weights(weights, strict=False)
    mx.eval(model.trainable_parameters())
    return config


def trained_on(folder: Path) -> str:
    """The `hash_weights` of the base an adapter was trained on; empty where that is not known."""
    path = folder / WEIGHTS_FILE
    try:
        loaded: Any = mx.load(str(path), return_metadata=True)
    except (RuntimeError, ValueError):
        return ""  # reading it will say why
    return str(loaded[1].get(_BASE_KEY, ""))


def save_adapter(
    folder: Path, weights: dict[str, mx.array], config: AdapterConfig, base_hash: str = ""
) -> None:
    """Write the two PEFT files, each whole or not at all.

    Args:
        folder: made when it is not there; other files in it are left alone.
        weights: matrices by parameter path, as `adapter_weights` gives them.
        config: what to say of them.
        base_hash: `hash_weights` of the base that they were trained on. It goes into the metadata
            of the weights: PEFT passes that over, and warns of keys it does not know in its JSON.

    Raises:
        OSError: they cannot be written.
    """
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.base,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha.is_integer() else config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": config.targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": config.rslora,
        "use_dora": False,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "layers_to_transform": None,
        "modules_to_save": None,
    }
    # The weights first: a folder with a config counts as an adapter.
    with atomic_file(folder / WEIGHTS_FILE) as temporary:
        named = {PREFIX + path: matrix for path, matrix in weights.items()}
        known = {_BASE_KEY: base_hash} if base_hash else {}
        save_tensors(temporary, named, {"format": "pt", **known})
    with atomic_file(folder / CONFIG_FILE) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check_adapter(folder: Path) -> None:
    """Read an adapter folder without a model to put it on.

    Raises:
        AdapterError: it is none, it is damaged, or its numbers are not finite.
    """
    read_adapter_config(folder)
    _check_finite(folder, _read_entries(folder))


def export_adapter(folder: Path, out: Path, replace: bool = False) -> Path:
    """Copy an adapter folder, without its checkpoints, and return the copy.

    Args:
        folder: left as it is.
        out: made when it is not there; an empty folder will do.
        replace: `out` may be an adapter that was exported before.

    Raises:
        AdapterError: `folder` is no complete adapter, it is or lies in `out`, or
            `out` is there already and may not be replaced.
    """
    check_adapter(folder)
    refuse_links_out(folder, ADAPTER_FILES, AdapterError)
    source = folder.resolve()
    if out.exists() and any(out.samefile(held) for held in (source, *source.parents)):
        raise AdapterError(
            f"{out} is the adapter to be copied, or holds it: {folder}\nChoose another --out."
        )
    # Checkpoints are the only copy of a run's state: such a folder is no export.
    is_export = (out / CONFIG_FILE).is_file() and not (out / "checkpoints").exists()
    try:
        with atomic_folder(out, replace=replace and is_export) as temporary:
            for name in ADAPTER_FILES:
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, temporary / name)
    except FileExistsError as error:
        raise AdapterError(
            f"{out} is there already.\nReplace it with --force, or choose another --out."
            if is_export
            else f"{out} is there already, and is no exported adapter, which alone is replaced:\n"
            f"expected {CONFIG_FILE} in it, and no checkpoints.\nChoose another --out."
        ) from error
    return out


def adapter_weights(model: nn.Module) -> dict[str, mx.array]:
    """The LoRA matrices of a model by parameter path, in the model's order."""
    parameters = dict(tree_flatten(model.parameters()))
    return {path: array for path, array in parameters.items() if _is_lora(path)}


def _read_entries(folder: Path) -> dict[str, TensorEntry]:
    """Where each matrix lies, by parameter path, the prefix of PEFT taken off."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise AdapterError(
            f"{folder} has no {WEIGHTS_FILE}.\n"
            "Adapters in pickle files (adapter_model.bin) are not read: load and save it with PEFT."
        )
    refuse_links_out(folder, [WEIGHTS_FILE], AdapterError)
    try:
        entries = read_safetensors_header(path)
    except (WeightsError, OSError) as error:
        fault = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise AdapterError(f"{path} is damaged: {fault}\nCopy or train it anew.") from error
    faults = [
        f"{name}: got {entry.dtype}, expected one of {', '.join(FLOATS)}"
        for name, entry in entries.items()
        if entry.dtype not in FLOATS
    ]
    named = {name.removeprefix(PREFIX): entry for name, entry in entries.items()}
    if len(named) < len(entries):
        faults.append(f"got the same matrix with and without the prefix {PREFIX}, expected it once")
    if faults:
        raise AdapterError(
            f"{path} holds no LoRA matrices:\n{list_faults(faults)}\nExport the adapter anew."
        )
    return named


def _check_finite(folder: Path, entries: dict[str, TensorEntry]) -> None:
    bad = [name for name, entry in entries.items() if not _is_finite(entry)]
    if bad:
        raise AdapterError(
            f"{folder / WEIGHTS_FILE} holds NaN or infinity:\n{list_faults(bad)}\nTrain it anew."
        )


def _is_finite(entry: TensorEntry) -> bool:
    """In pieces: a file may be larger than memory."""
    pieces = (cast(chunk, entry.dtype, "float32") for chunk in entry.chunks())
    return all(np.isfinite(np.frombuffer(piece, "<f4")).all() for piece in pieces)


def _compare(
    folder: Path,
    model: nn.Module,
    layers: dict[str, tuple[int, float]],
    weights: dict[str, TensorEntry],
) -> None:
    modules = dict(model.named_modules())
    expected: dict[str, tuple[int, ...]] = {}
    for path, (rank, _) in layers.items():
        out_features, in_features = shape_of(modules[path])
        expected[f"{path}.lora_A.weight"] = (rank, in_features)
        expected[f"{path}.lora_B.weight"] = (out_features, rank)
    faults = [
        f"{name}: got {weights[name].shape if name in weights else 'nothing'}, expected {shape}"
        for name, shape in expected.items()
        if name not in weights or weights[name].shape != shape
    ]
    faults += [f"{name}: got it, expected no such key" for name in weights if name not in expected]
    if faults:
        raise AdapterError(
            f"{folder} does not fit this model:\n{list_faults(faults)}\n"
            "Choose the base that the adapter was trained on."
        )


def _is_lora(path: str) -> bool:
    return path.endswith((".lora_A.weight", ".lora_B.weight"))
