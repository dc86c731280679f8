"""An adapter folder is a PEFT folder: read and written here, with no second format.

The keys of `adapter_model.safetensors` are this package's own parameter paths
behind a prefix, so nothing is renamed or transposed in either direction.
"""

import json
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from interviewmate_mlx.errors import AdapterError, list_faults
from interviewmate_mlx.files import atomic_file, atomic_folder
from interviewmate_mlx.model.lora import find_targets, linear_paths, place_lora, shape_of

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
PREFIX = "base_model.model."
# What an adapter folder holds for others; checkpoints are the trainer's own.
ADAPTER_FILES = (
    WEIGHTS_FILE,
    CONFIG_FILE,
    "README.md",
    "run.toml",
    "metrics.jsonl",
    "summary.json",
)

# What PEFT 0.21 can write that changes the maths, with the values that do not.
_UNSUPPORTED: dict[str, Sequence[Any]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "bias": ("none",),
    "exclude_modules": (None, []),
    "fan_in_fan_out": (False,),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    "kasa_config": (None,),
    "layer_replication": (None,),
    "layers_to_transform": (None, []),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "monteclora_config": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_bdlora": (None, False),
    "use_dora": (False,),
    "use_qalora": (False,),
    "velora_config": (None,),
}
# The rest of LoraConfig in PEFT 0.21: what is read here, and what changes no maths.
_OTHER_KEYS = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "layers_pattern",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
}


@dataclass(frozen=True)
class AdapterConfig:
    """What `adapter_config.json` says of a LoRA adapter."""

    base: str
    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] | str = ()  # names, or one regular expression over whole paths
    rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def layers(self, model: nn.Module) -> dict[str, tuple[int, float]]:
        """Rank and alpha of each layer of a model that the adapter covers, by path.

        Raises:
            AdapterError: a target matches no linear layer.
        """
        if isinstance(self.targets, str):
            paths = [path for path in linear_paths(model) if re.fullmatch(self.targets, path)]
            if not paths:
                raise AdapterError(f"target_modules {self.targets!r} matches no linear layer.")
        else:
            paths = find_targets(model, self.targets)
        return {
            path: (
                _by_pattern(self.rank_pattern, path, self.rank),
                _by_pattern(self.alpha_pattern, path, self.alpha),
            )
            for path in paths
        }


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read `adapter_config.json`.

    Raises:
        AdapterError: no adapter there, no LoRA, or a kind of LoRA that is not
            supported; every such key is named.
    """
    path = folder / CONFIG_FILE
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(
            f"No adapter in {folder}: it has no {CONFIG_FILE}.\n"
            "Give the folder that `imate-mlx train` or PEFT wrote."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"Cannot read {path}: {error}\nExport the adapter anew.") from error
    if not isinstance(written, dict):
        raise AdapterError(f"{path}: got a JSON {type(written).__name__}, expected an object.")
    if written.get("peft_type") != "LORA":
        raise AdapterError(
            f"{path}: peft_type: got {written.get('peft_type')!r}, expected 'LORA'.\n"
            "Only LoRA adapters are supported."
        )
    # PEFT falls back to 8 where rank or alpha is absent.
    absent = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False}
    config: dict[str, Any] = {**absent, **written}
    faults = _config_faults(config)
    if faults:
        raise AdapterError(
            f"{path} holds what is not supported:\n{list_faults(faults, most=20)}\n"
            "Merge that adapter with PEFT (merge_and_unload) and convert the merged model."
        )
    targets = config["target_modules"]
    ranks, alphas = (config.get(key) or {} for key in ("rank_pattern", "alpha_pattern"))
    return AdapterConfig(
        base=str(config.get("base_model_name_or_path") or ""),
        rank=int(config["r"]),
        alpha=float(config["lora_alpha"]),
        dropout=float(config["lora_dropout"]),
        targets=targets if isinstance(targets, str) else tuple(targets),
        rslora=config["use_rslora"],
        rank_pattern={name: int(rank) for name, rank in ranks.items()},
        alpha_pattern={name: float(alpha) for name, alpha in alphas.items()},
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
    weights = _read_weights(folder)
    _compare(folder, model, layers, weights)
    place_lora(model, layers, config.dropout, rslora=config.rslora)
    model.load_weights(list(weights.items()), strict=False)
    mx.eval(model.trainable_parameters())
    return config


def save_adapter(folder: Path, weights: dict[str, mx.array], config: AdapterConfig) -> None:
    """Write the two PEFT files, each whole or not at all.

    Args:
        folder: made when it is not there; other files in it are left alone.
        weights: matrices by parameter path, as `adapter_weights` gives them.
        config: what to say of them.
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
        mx.save_safetensors(str(temporary), named, metadata={"format": "pt"})
    with atomic_file(folder / CONFIG_FILE) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


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
    read_adapter_config(folder)
    _read_weights(folder)
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


def _config_faults(config: dict[str, Any]) -> list[str]:
    faults = [
        f"{key}: got {config[key]!r}, expected {neutral[0]!r}"
        for key, neutral in _UNSUPPORTED.items()
        if key in config and config[key] not in neutral
    ]
    faults += [
        f"{key}: got {value!r}, expected no such key (written by a newer PEFT)"
        for key, value in config.items()
        if key not in _UNSUPPORTED and key not in _OTHER_KEYS
        # By identity: a 0 may say something.
        if not (value is None or value is False or value in ("", [], {}))
    ]
    rank, alpha, dropout = (config[key] for key in ("r", "lora_alpha", "lora_dropout"))
    if not _is_rank(rank):
        faults.append(f"r: got {rank!r}, expected a whole number of at least 1")
    if not _is_number(alpha):
        faults.append(f"lora_alpha: got {alpha!r}, expected a finite number")
    if not _is_number(dropout) or not 0 <= dropout < 1:
        faults.append(f"lora_dropout: got {dropout!r}, expected from 0 to below 1")
    if not isinstance(config["use_rslora"], bool):
        faults.append(f"use_rslora: got {config['use_rslora']!r}, expected true or false")
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets:
        faults += _pattern_fault("target_modules", targets, targets)
    elif (
        not targets or not isinstance(targets, list) or not all(isinstance(t, str) for t in targets)
    ):
        faults.append(f"target_modules: got {targets!r}, expected names of linear layers")
    for key, is_value, numbers in (
        ("rank_pattern", _is_rank, "whole numbers of at least 1"),
        ("alpha_pattern", _is_number, "finite numbers"),
    ):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict) or not all(map(is_value, patterns.values())):
            faults.append(f"{key}: got {patterns!r}, expected {numbers} by name")
        else:
            faults += [fault for p in patterns for fault in _pattern_fault(key, p, _at_end(p))]
    return faults


def _read_weights(folder: Path) -> dict[str, mx.array]:
    """Matrices in float32 by parameter path; the prefix of PEFT is taken off."""
    path = folder / WEIGHTS_FILE
    if not path.exists():
        raise AdapterError(
            f"{folder} has no {WEIGHTS_FILE}.\n"
            "Adapters in pickle files (adapter_model.bin) are not read: load and save it with PEFT."
        )
    try:
        loaded: Any = mx.load(str(path))
    except (RuntimeError, ValueError) as error:
        raise AdapterError(f"{path} is damaged: {error}\nCopy or train it anew.") from error
    faults = [
        f"{name}: got {array.dtype}, expected a float"
        for name, array in loaded.items()
        if not mx.issubdtype(array.dtype, mx.floating)
    ]
    if faults:
        raise AdapterError(f"{path} holds no LoRA matrices:\n{list_faults(faults)}")
    weights = {name.removeprefix(PREFIX): a.astype(mx.float32) for name, a in loaded.items()}
    bad = [name for name, array in weights.items() if not mx.isfinite(array).all().item()]
    if bad:
        raise AdapterError(f"{path} holds NaN or infinity:\n{list_faults(bad)}\nTrain it anew.")
    return weights


def _compare(
    folder: Path,
    model: nn.Module,
    layers: dict[str, tuple[int, float]],
    weights: dict[str, mx.array],
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


def _by_pattern(patterns: dict[str, Any], path: str, default: Any) -> Any:
    """PEFT's rule: a pattern matches the end of a path, as a regular expression."""
    matching = (p for p in patterns if re.match(_at_end(p), path))
    return next((patterns[pattern] for pattern in matching), default)


def _at_end(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _pattern_fault(key: str, written: str, pattern: str) -> list[str]:
    """What is wrong with a pattern as it is used, in `re`'s own words; nothing if it is valid."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        # Without the position, which counts from the start of the whole pattern.
        reason = error.msg if isinstance(error, re.error) else error
        return [f"{key}: got {written!r}, expected a regular expression: {reason}"]
    return []


def _is_lora(path: str) -> bool:
    return path.endswith((".lora_A.weight", ".lora_B.weight"))


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number; no bool, though Python counts it as one."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max  # also refuses NaN, and 10**400


def _is_rank(value: Any) -> bool:
    return _is_number(value) and value >= 1 and value == int(value)
