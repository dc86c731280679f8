"""Writes a base with updates added to its weights, as a model folder in the Hub's layout."""

import shutil
from pathlib import Path

import mlx.core as mx

from interviewmate_mlx.adapter.merge import Update
from interviewmate_mlx.base.base import Base
from interviewmate_mlx.base.converted import MODEL_FILE, write_json
from interviewmate_mlx.base.quantization import Quantization
from interviewmate_mlx.base.quantize import quantize_file, write_arrays
from interviewmate_mlx.errors import AdapterError, list_faults
from interviewmate_mlx.files import Progress, check_free_space
from interviewmate_mlx.formats.json_file import read_json
from interviewmate_mlx.formats.model_files import OTHER_FILES, TOKENIZER_FILES
from interviewmate_mlx.formats.safetensors_file import load_tensors

_WEIGHTS = "model.safetensors"
_PACKED = (".scales", ".biases")  # beside a quantised `.weight`


def write_merged(
    folder: Path,
    base: Base,
    updates: dict[str, Update],
    dtype: str | None = None,
    progress: Progress | None = None,
    biases: dict[str, mx.array] | None = None,
) -> int:
    """Write a base's files with updates added to its weights. Quantised weights come out plain.

    A tensor is in memory at a time.

    Args:
        folder: an empty folder.
        base: the base, in files.
        updates: by the path of the layer that each changes.
        dtype: of all float weights; None keeps the base's own.
        progress: called with bytes done and bytes in all.
        biases: in place of the base's, by name.

    Returns:
        Bytes of the weights.

    Raises:
        AdapterError: a layer has another name in the base's files.
        StorageError: the disk has too little free space.
    """
    stored: dict[str, mx.array] = {}
    for file in base.headers:
        stored |= load_tensors(file)
    biases = biases or {}
    missing = [path for path in updates if f"{path}.weight" not in stored]
    missing += [name for name in biases if name not in stored]
    if missing:
        raise AdapterError(
            f"{base.name} does not have these layers under the names of mlx-lm's network:\n"
            f"{list_faults(missing)}\nThey cannot be merged in the Hub's layout."
        )
    merged = {}
    for name, array in stored.items():
        path = name.removesuffix(".weight")
        if base.quantization and name.endswith(_PACKED) and _weight_of(name) in stored:
            continue
        if base.quantization and f"{path}.scales" in stored:
            scales, zeros = stored[f"{path}.scales"], stored.get(f"{path}.biases")
            array = mx.dequantize(array, scales, zeros, **base.quantization.of_layer(path))
        if name in biases:
            array = biases[name].astype(array.dtype)
        if dtype and mx.issubdtype(array.dtype, mx.floating):
            array = array.astype(getattr(mx, dtype))
        merged[name] = updates[path].added_to(array) if path in updates else array
    del stored
    nbytes = sum(array.nbytes for array in merged.values())
    check_free_space(folder, nbytes)
    write_arrays(folder / _WEIGHTS, merged, progress)
    for name in (*OTHER_FILES, *TOKENIZER_FILES, MODEL_FILE):
        if (base.folder / name).is_file():
            shutil.copyfile(base.folder / name, folder / name)
    config = read_json(folder / "config.json")
    for key in ("quantization", "quantization_config"):
        config.pop(key, None)
    write_json(folder / "config.json", config | ({"torch_dtype": dtype} if dtype else {}))
    return nbytes


def quantize_merged(folder: Path, base: Base, quantization: Quantization) -> int:
    """Quantise a folder that `write_merged` wrote, in place; return the bytes of its weights.

    Raises:
        ModelError: no layer can be quantised so.
    """
    return quantize_file(folder / _WEIGHTS, base.network, quantization)


def _weight_of(name: str) -> str:
    return name.rpartition(".")[0] + ".weight"
