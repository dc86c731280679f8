"""Reads and writes adapter folders. Their format is PEFT's; there is no other.

The keys of `adapter_model.safetensors` are a prefix and this package's own parameter
paths, so nothing is renamed or transposed in either direction.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from interviewmate_mlx.adapter.config import CONFIG_FILE, AdapterConfig, read_adapter_config
from interviewmate_mlx.errors import AdapterError, WeightsError, list_faults
from interviewmate_mlx.files import atomic_file, atomic_folder
from interviewmate_mlx.formats.cast import FLOAT_DTYPES, cast
from interviewmate_mlx.formats.links import refuse_outside_links
from interviewmate_mlx.formats.safetensors_file import (
    SafetensorsHeader,
    TensorEntry,
    load_tensors,
    read_safetensors_header,
    save_tensors,
)
from interviewmate_mlx.model.lora import place_lora, shape_of
from interviewmate_mlx.model.tree import named_arrays

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
_BASE_KEY = "base_weights"  # in the metadata of WEIGHTS_FILE
# The files to export or push. Checkpoints are only for the trainer.
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
    """A PEFT folder, opened and checked. `Adapter.open` creates one.

    Attributes:
        folder: the adapter's folder.
        config: its `adapter_config.json`.
        tensors: where each matrix lies, by parameter path.
        base_hash: `Base.weights_hash` of the base it was trained on; empty if unknown.
        files: names of its files, without checkpoints.
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
                to files outside it, or has numbers that are not finite.
        """
        config = read_adapter_config(folder)
        header = _read_header(folder)
        tensors = _check_names(folder, header.tensors)
        _check_finite(folder, tensors)
        files = tuple(name for name in _FILES if (folder / name).is_file())
        refuse_outside_links(folder, files, AdapterError)
        return cls(folder, config, tensors, header.metadata.get(_BASE_KEY, ""), files)

    def apply(self, model: nn.Module) -> None:
        """Add the adapter to a base model, in place. Its matrices are float32, as in PEFT.

        Raises:
            AdapterError: its keys or shapes do not fit the model. All of these are
                named, and the model is unchanged.
        """
        layers = self.config.layers(model)
        self._compare(model, layers)
        place_lora(model, layers, self.config.dropout, rslora=self.config.rslora)
        loaded = load_tensors(self.folder / WEIGHTS_FILE)
        weights = [(name.removeprefix(PREFIX), a.astype(mx.float32)) for name, a in loaded.items()]
        model.load_weights(weights, strict=False)
        mx.eval(model.trainable_parameters())

    def export(self, out: Path, replace: bool = False) -> Path:
        """Copy the adapter's files, without checkpoints, and return `out`.

        Args:
            out: the new folder; it may exist if it is empty.
            replace: `out` may also be an adapter that was exported before.

        Raises:
            AdapterError: `out` is or contains the adapter, or exists and may not be
                replaced.
            StorageError: it cannot be written.
        """
        source = self.folder.resolve()
        if out.exists() and any(out.samefile(place) for place in (source, *source.parents)):
            raise AdapterError(
                f"{out} is the adapter to be copied, or contains it: {self.folder}\n"
                "Choose another folder.",
                "out",
            )
        # Checkpoints may be the only copy of a run's state. A folder with them is not an export.
        is_export = (out / CONFIG_FILE).is_file() and not (out / "checkpoints").exists()
        is_empty = not out.exists() or (out.is_dir() and not any(out.iterdir()))
        if is_export and not replace:
            raise AdapterError(
                f"{out} already exists.\nReplace it, or choose another folder.", "replace", "out"
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
        faults += [f"{name}: unexpected key" for name in got if name not in expected]
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
        folder: created if it does not exist; other files in it are kept.
        weights: matrices by parameter path, from `adapter_weights`.
        config: the content of `adapter_config.json`.
        base_hash: `Base.weights_hash` of the base that they were trained on. It is stored
            in the metadata of the weights, because PEFT ignores that. PEFT would warn
            about an unknown key in `adapter_config.json`.

    Raises:
        StorageError: they cannot be written.
    """
    # The weights come first, because a folder with a config counts as an adapter.
    with atomic_file(folder / WEIGHTS_FILE) as temporary:
        named = {PREFIX + path: matrix for path, matrix in weights.items()}
        metadata = {"format": "pt"} | ({_BASE_KEY: base_hash} if base_hash else {})
        save_tensors(temporary, named, metadata)
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
    refuse_outside_links(folder, [WEIGHTS_FILE], AdapterError)
    try:
        return read_safetensors_header(path)
    except WeightsError as error:
        fault = str(error).splitlines()[0]
        raise AdapterError(f"{path} is damaged: {fault}\nCopy or train it again.") from error


def _check_names(folder: Path, tensors: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Check dtypes and names; return the tensors by parameter path, without PEFT's prefix."""
    faults = [
        f"{name}: got {entry.dtype}, expected one of {', '.join(FLOAT_DTYPES)}"
        for name, entry in tensors.items()
        if entry.dtype not in FLOAT_DTYPES
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
    """Whether all numbers are finite. Read in pieces: a file may be larger than memory."""
    pieces = (cast(chunk, entry.dtype, "float32") for chunk in entry.chunks())
    return all(np.isfinite(np.frombuffer(piece, "<f4")).all() for piece in pieces)
