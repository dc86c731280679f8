"""Quantises the weights of a folder, one tensor at a time."""

import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from interviewmate_mlx.base.fit import put_weights
from interviewmate_mlx.base.quantization import Quantization
from interviewmate_mlx.errors import ModelError
from interviewmate_mlx.files import Progress
from interviewmate_mlx.formats.json_file import read_json
from interviewmate_mlx.formats.safetensors_file import load_tensors, safetensors_header
from interviewmate_mlx.model.architectures import NetworkConfig
from interviewmate_mlx.model.tree import named_arrays
from interviewmate_mlx.model.zoo import build_network


def quantize_file(path: Path, network: NetworkConfig, quantization: Quantization) -> int:
    """Quantise the weights in a file, in place, and say so in the `config.json` beside it.

    Args:
        path: a safetensors file with all weights of the network.
        network: which it is.
        quantization: of each layer whose width its groups divide, embedding and head included,
            unless mlx-lm's network has other wishes.

    Returns:
        Bytes of the new weights.

    Raises:
        ModelError: no layer can be quantised so.
    """
    model = build_network(network)
    put_weights(model, load_tensors(path), None)
    chosen = quantize_model(model, quantization)
    arrays = named_arrays(model.parameters())
    del model
    nbytes = sum(array.nbytes for array in arrays.values())
    temporary = path.with_name(f"quantized-{path.name}")
    write_arrays(temporary, arrays)
    os.replace(temporary, path)
    settings = {k: v for k, v in quantization.default.items() if k != "mode" or v != "affine"}
    settings |= {layer: how for layer, how in chosen.items() if isinstance(how, dict)}
    config_path = path.parent / "config.json"
    config = read_json(config_path) | {"quantization": settings}
    config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return nbytes


def quantize_model(
    model: nn.Module, quantization: Quantization
) -> dict[str, bool | dict[str, Any]]:
    """Quantise a network, in place; return which layers, as `choose_layers` does.

    Raises:
        ModelError: no layer can be quantised so.
    """
    chosen = choose_layers(model, quantization)
    if not any(chosen.values()):
        raise ModelError(
            f"No layer of this network can be quantised in groups of "
            f"{quantization.default['group_size']}.\nChoose a smaller group.",
            "group_size",
        )

    def choose(path: str, _: nn.Module) -> bool | dict[str, Any]:
        return chosen.get(path, False)

    nn.quantize(model, **quantization.default, class_predicate=choose)
    return chosen


def choose_layers(model: nn.Module, quantization: Quantization) -> dict[str, bool | dict[str, Any]]:
    """Which layers of a network are quantised, by path, and how, where a layer has its own way."""
    wish = getattr(model, "quant_predicate", None)
    chosen: dict[str, bool | dict[str, Any]] = {}
    for path, module in model.named_modules():
        if not hasattr(module, "to_quantized"):
            continue
        fits = module.weight.shape[-1] % quantization.default["group_size"] == 0
        found: Any = wish(path, module) if wish and fits else fits
        chosen[path] = {"mode": "affine", **found} if isinstance(found, dict) else bool(found)
    return chosen


def write_arrays(path: Path, arrays: dict[str, mx.array], progress: Progress | None = None) -> None:
    """Write arrays to a safetensors file, computing one at a time; `arrays` is emptied."""
    layout = [(name, _dtype_name(array), array.shape) for name, array in arrays.items()]
    total = sum(array.nbytes for array in arrays.values())
    done = 0
    with open(path, "wb") as file:
        file.write(safetensors_header(layout, {"format": "pt"}))
        for name, _, _ in layout:
            array = arrays.pop(name)
            # numpy has no bfloat16.
            plain = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
            done += file.write(np.asarray(plain).tobytes())
            if progress:
                progress(done, total)


def _dtype_name(array: mx.array) -> str:
    return str(array.dtype).removeprefix("mlx.core.")
