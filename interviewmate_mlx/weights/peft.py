"""An adapter folder is a PEFT folder: read and written here, with no second format.

The keys of `adapter_model.safetensors` are this package's own parameter paths
behind a prefix, so nothing is renamed or transposed in either direction.
"""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from interviewmate_mlx.errors import AdapterError, list_faults
from interviewmate_mlx.files import atomic_file, atomic_folder
from interviewmate_mlx.model.lora import find_targets, place_lora, shape_of

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
            linears = find_targets(model, _linear_names(model))
            paths = [path for path in linears if re.fullmatch(self.targets, path)]
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
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(
            f"No adapter in {folder}: it has no {CONFIG_FILE}.\n"
            "Give the folder that `imate-mlx train` or PEFT wrote."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"Cannot read {path}: {error}\nExport the adapter anew.") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: got a JSON {type(config).__name__}, expected an object.")
    if config.get("peft_type") != "LORA":
        raise AdapterError(
            f"{path}: peft_type: got {config.get('peft_type')!r}, expected 'LORA'.\n"
            "Only LoRA adapters are supported."
        )
    faults = [
        f"{key}: got {config[key]!r}, expected {neutral[0]!r}"
        for key, neutral in _UNSUPPORTED.items()
        if key in config and config[key] not in neutral
    ]
    # PEFT falls back to 8 where rank or alpha is absent.
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    dropout = config.get("lora_dropout", 0.0)
    targets: Any = config.get("target_modules")
    patterns = [config.get(f"{name}_pattern") or {} for name in ("rank", "alpha")]
    if not _is_number(rank) or rank < 1 or rank != int(rank):
        faults.append(f"r: got {rank!r}, expected a whole number of at least 1")
    if not _is_number(alpha):
        faults.append(f"lora_alpha: got {alpha!r}, expected a number")
    if not _is_number(dropout) or not 0 <= dropout < 1:
        faults.append(f"lora_dropout: got {dropout!r}, expected from 0 to below 1")
    is_list = isinstance(targets, list) and all(isinstance(target, str) for target in targets)
    if not targets or not (is_list or isinstance(targets, str)):
        faults.append(f"target_modules: got {targets!r}, expected names of linear layers")
    for name, pattern in zip(("rank", "alpha"), patterns, strict=True):
        if not isinstance(pattern, dict) or not all(map(_is_number, pattern.values())):
            faults.append(f"{name}_pattern: got {pattern!r}, expected numbers by name")
    if faults:
        raise AdapterError(
            f"{path} holds what is not supported:\n{list_faults(faults, most=20)}\n"
            "Merge that adapter with PEFT (merge_and_unload) and convert the merged model."
        )
    return AdapterConfig(
        base=str(config.get("base_model_name_or_path") or ""),
        rank=int(rank),
        alpha=float(alpha),
        dropout=float(dropout),
        targets=targets if isinstance(targets, str) else tuple(targets),
        rslora=bool(config.get("use_rslora", False)),
        rank_pattern={name: int(value) for name, value in patterns[0].items()},
        alpha_pattern={name: float(value) for name, value in patterns[1].items()},
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

    Raises:
        AdapterError: `folder` is no complete adapter, or `out` is there already.
    """
    read_adapter_config(folder)
    _read_weights(folder)
    try:
        with atomic_folder(out, replace=replace) as temporary:
            for name in ADAPTER_FILES:
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, temporary / name)
    except FileExistsError as error:
        raise AdapterError(
            f"{out} is there already.\nReplace it with --force, or choose another --out."
        ) from error
    return out


def adapter_weights(model: nn.Module) -> dict[str, mx.array]:
    """The LoRA matrices of a model by parameter path, in the model's order."""
    parameters = dict(tree_flatten(model.parameters()))
    return {path: array for path, array in parameters.items() if _is_lora(path)}


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
    matching = (p for p in patterns if re.match(rf"(.*\.)?({p})$", path))
    return next((patterns[pattern] for pattern in matching), default)


def _linear_names(model: nn.Module) -> list[str]:
    leaves = tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
    return [path for path, m in leaves if isinstance(m, nn.Linear | nn.QuantizedLinear)]


def _is_lora(path: str) -> bool:
    return path.endswith((".lora_A.weight", ".lora_B.weight"))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
