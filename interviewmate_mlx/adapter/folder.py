"""An adapter folder is a PEFT folder: read and written here, with no second format.

The keys of `adapter_model.safetensors` are this package's own parameter paths
behind a prefix, so nothing is renamed or transposed in either direction.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from interviewmate_mlx.adapter.config import CONFIG_FILE, AdapterConfig, read_adapter_config
from interviewmate_mlx.errors import AdapterError, WeightsError, list_faults
from interviewmate_mlx.files import atomic_file, atomic_folder
from interviewmate_mlx.formats.cast import FLOATS, cast
from interviewmate_mlx.formats.links import refuse_links_out
from interviewmate_mlx.formats.safetensors_file import (
    SafetensorsHeader,
    TensorEntry,
    read_safetensors_header,
    save_tensors,
)
from interviewmate_mlx.model.lora import place_lora, shape_of
from interviewmate_mlx.model.tree import named_arrays

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
_BASE_KEY = "base_weights"  # in the metadata of WEIGHTS_FILE
# What an adapter folder holds for others; checkpoints are the trainer's own.
_FILES = (
    WEIGHTS_FILE,
    CONFIG_FILE,
    "README.md",
    "run.toml",
    "metrics.jsonl",
    "summary.json",
)


@dataclass(frozen=True)
class Adapter:
    """A PEFT folder, opened and checked; `Adapter.open` makes one.

    Attributes:
        folder: where it lies.
        config: what its `adapter_config.json` says.
        tensors: where each matrix lies, by parameter path.
        base_hash: `Base.weights_hash` of the base it was trained on; empty if unknown.
        files: names of the files that make it up, those that exist.
    """

    folder: Path
    config: AdapterConfig
    tensors: dict[str, TensorEntry]
    base_hash: str
    files: tuple[str, ...]

    @classmethod
    def open(cls, folder: Path) -> "Adapter":
        """Read and check a PEFT folder.

        Raises:
            AdapterError: it is not an adapter, is damaged or not supported, holds links
                to files outside it, or its numbers are not finite.
        """
        config = read_adapter_config(folder)
        header = _read_header(folder)
        tensors = _check_names(folder, header.tensors)
        _check_finite(folder, tensors)
        files = tuple(name for name in _FILES if (folder / name).is_file())
        refuse_links_out(folder, files, AdapterError)
        return cls(folder, config, tensors, header.metadata.get(_BASE_KEY, ""), files)

    def apply(self, model: nn.Module) -> None:
        """Put the adapter onto a base model, in place. Matrices stay float32, as in PEFT.

        Raises:
            AdapterError: its keys or shapes are not the model's; all of them are
                named, and the model is as it was.
        """
        layers = self.config.layers(model)
        self._compare(model, layers)
        place_lora(model, layers, self.config.dropout, rslora=self.config.rslora)
        loaded: Any = mx.load(str(self.folder / WEIGHTS_FILE))
        weights = [(name.removeprefix(PREFIX), a.astype(mx.float32)) for name, a in loaded.items()]
        model.load_weights(weights, strict=False)
        mx.eval(model.trainable_parameters())

    def export(self, out: Path, replace: bool = False) -> Path:
        """Copy the adapter's files, without checkpoints, and return the copy.

        Args:
            out: made if it does not exist; an empty folder will do.
            replace: `out` may be an adapter that was exported before.

        Raises:
            AdapterError: `out` is or contains the adapter, or exists and may not be
                replaced.
            StorageError: it cannot be written.
        """
        source = self.folder.resolve()
        if out.exists() and any(out.samefile(held) for held in (source, *source.parents)):
            raise AdapterError(
                f"{out} is the adapter to be copied, or contains it: {self.folder}\n"
                "Choose another folder.",
                "out",
            )
        # Checkpoints are the only copy of a run's state: such a folder is not an export.
        is_export = (out / CONFIG_FILE).is_file() and not (out / "checkpoints").exists()
        is_empty = not out.exists() or (out.is_dir() and not any(out.iterdir()))
        if is_export and not replace:
            raise AdapterError(
                f"{out} exists already.\nReplace it, or choose another folder.", "replace", "out"
            )
        if not is_export and not is_empty:
            raise AdapterError(
                f"{out} exists and is not an exported adapter; nothing else is replaced:\n"
                f"expected {CONFIG_FILE} in it, and no checkpoints.\nChoose another folder.",
                "out",
            )
        with atomic_folder(out, replace=replace) as temporary:
            for name in self.files:
                shutil.copyfile(self.folder / name, temporary / name)
        return out

    def _compare(self, model: nn.Module, layers: dict[str, tuple[int, float]]) -> None:
        modules = dict(model.named_modules())
        expected: dict[str, tuple[int, ...]] = {}
        for path, (rank, _) in layers.items():
            out_features, in_features = shape_of(modules[path])
            expected[f"{path}.lora_A.weight"] = (rank, in_features)
            expected[f"{path}.lora_B.weight"] = (out_features, rank)
        got = {name: entry.shape for name, entry in self.tensors.items()}
        faults = [
            f"{name}: got {got.get(name, 'nothing')}, expected {shape}"
            for name, shape in expected.items()
            if got.get(name) != shape
        ]
        faults += [f"{name}: got it, expected no such key" for name in got if name not in expected]
        if faults:
            raise AdapterError(
                f"{self.folder} does not fit this model:\n{list_faults(faults)}\n"
                "Choose the base that the adapter was trained on."
            )


def save_adapter(
    folder: Path, weights: dict[str, mx.array], config: AdapterConfig, base_hash: str = ""
) -> None:
    """Write the two PEFT files, each whole or not at all.

    Args:
        folder: made if it does not exist; other files in it are left alone.
        weights: matrices by parameter path, as `adapter_weights` gives them.
        config: what to say of them.
        base_hash: `Base.weights_hash` of the base that they were trained on. It goes into
            the metadata of the weights, which PEFT ignores; of unknown keys in its JSON
            it would warn.

    Raises:
        StorageError: they cannot be written.
    """
    # The weights first: a folder with a config counts as an adapter.
    with atomic_file(folder / WEIGHTS_FILE) as temporary:
        named = {PREFIX + path: matrix for path, matrix in weights.items()}
        known = {_BASE_KEY: base_hash} if base_hash else {}
        save_tensors(temporary, named, {"format": "pt", **known})
    with atomic_file(folder / CONFIG_FILE) as temporary:
        temporary.write_text(json.dumps(config.to_peft(), indent=2) + "\n", encoding="utf-8")


def adapter_weights(model: nn.Module) -> dict[str, mx.array]:
    """The LoRA matrices of a model by parameter path, in the model's order."""
    parameters = named_arrays(model.parameters())
    endings = (".lora_A.weight", ".lora_B.weight")
    return {path: array for path, array in parameters.items() if path.endswith(endings)}


def _read_header(folder: Path) -> SafetensorsHeader:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise AdapterError(
            f"{folder} has no {WEIGHTS_FILE}.\n"
            "Adapters in pickle files (adapter_model.bin) are not read: load and save it with PEFT."
        )
    refuse_links_out(folder, [WEIGHTS_FILE], AdapterError)
    try:
        return read_safetensors_header(path)
    except WeightsError as error:
        fault = str(error).splitlines()[0]
        raise AdapterError(f"{path} is damaged: {fault}\nCopy or train it again.") from error


def _check_names(folder: Path, tensors: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The tensors by parameter path, PEFT's prefix removed; refused if their dtypes are not."""
    faults = [
        f"{name}: got {entry.dtype}, expected one of {', '.join(FLOATS)}"
        for name, entry in tensors.items()
        if entry.dtype not in FLOATS
    ]
    named = {name.removeprefix(PREFIX): entry for name, entry in tensors.items()}
    if len(named) < len(tensors):
        faults.append(f"got the same matrix with and without the prefix {PREFIX}, expected it once")
    if faults:
        raise AdapterError(
            f"{folder / WEIGHTS_FILE} does not hold LoRA matrices:\n{list_faults(faults)}\n"
            "Export the adapter again."
        )
    return named


def _check_finite(folder: Path, tensors: dict[str, TensorEntry]) -> None:
    bad = [name for name, entry in tensors.items() if not _is_finite(entry)]
    if bad:
        raise AdapterError(
            f"{folder / WEIGHTS_FILE} holds NaN or infinity:\n{list_faults(bad)}\nTrain it again."
        )


def _is_finite(entry: TensorEntry) -> bool:
    """Read in pieces: a file may be larger than memory."""
    pieces = (cast(chunk, entry.dtype, "float32") for chunk in entry.chunks())
    return all(np.isfinite(np.frombuffer(piece, "<f4")).all() for piece in pieces)
