"""Reads `adapter_config.json`, PEFT's description of a LoRA adapter."""

import math
import re
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import mlx.nn as nn
import regex

from interviewmate_mlx.errors import AdapterError, brief, list_faults
from interviewmate_mlx.files import read_bounded
from interviewmate_mlx.formats.json_file import parse_json
from interviewmate_mlx.formats.links import refuse_outside_links
from interviewmate_mlx.model.lora import linear_paths

CONFIG_FILE = "adapter_config.json"
MERGE_HINT = "Merge that adapter with PEFT (merge_and_unload) and convert the merged model."
_HINT = "Export the adapter again."
_MAX_BYTES = 1 << 20
_MAX_PATTERN_CHARS = 1000
_MAX_REPEATS = 1000  # all counts in braces, multiplied: matching may expand them
# Keys of an `adapter_config.json` of mlx-lm's own tuner, which holds its options.
_MLX_LM_KEYS = {"fine_tune_type", "lora_parameters", "lora_layers", "num_layers"}
_MAX_MATCHING_S = 5.0  # for all patterns and layers together; some patterns would take years

# Keys of PEFT 0.21 that change the maths, with the values that do not.
_UNSUPPORTED: dict[str, Sequence[object]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "fan_in_fan_out": (False,),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    "kasa_config": (None,),
    "layer_replication": (None,),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "monteclora_config": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_bdlora": (None, False),
    "use_qalora": (False,),
    "velora_config": (None,),
}
# The other keys of LoraConfig in PEFT 0.21: read here, or without effect on the maths.
_OTHER_KEYS = {
    "alpha_pattern",
    "auto_mapping",
    "bias",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
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
    "use_dora",
    "use_rslora",
}


Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class AdapterConfig:
    """A LoRA adapter, as `adapter_config.json` describes it."""

    base: str  # a path or a Hub id
    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] | str = ()  # names, or one regular expression over whole paths
    rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    excluded: tuple[str, ...] | str = ()  # as `targets`; these layers are left as they are
    layer_numbers: tuple[int, ...] | None = None  # of the layers with LoRA; None: of all
    layers_patterns: tuple[str, ...] = ()  # before a layer's number in a path; (): any name
    dora: bool = False
    bias: str = "none"  # which biases it brings: none, those of its layers (lora_only), or all

    def to_peft(self) -> dict[str, Any]:
        """The content of `adapter_config.json`."""
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base,
            "r": self.rank,
            "lora_alpha": int(self.alpha) if self.alpha.is_integer() else self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": self.targets,
            "bias": self.bias,
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "use_rslora": self.rslora,
            "use_dora": self.dora,
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
            "layers_to_transform": self.layer_numbers,
            "modules_to_save": None,
        }
        # Keys that PEFT has, too, but that few adapters need.
        optional = {"exclude_modules": self.excluded, "layers_pattern": self.layers_patterns}
        return config | {key: value for key, value in optional.items() if value}

    def of_twice_the_rank(self) -> "AdapterConfig":
        """The same with twice the rank, and the alpha that leaves the scale as it is."""
        factor = math.sqrt(2) if self.rslora else 2
        return replace(self, rank=2 * self.rank, alpha=factor * self.alpha)

    def layers(self, model: nn.Module) -> dict[str, tuple[int, float]]:
        """Rank and alpha of each layer of a model that the adapter changes, by path.

        These are PEFT's own rules: `check_target_module_exists` in its tuners_utils.py. A
        name that matches nothing is ignored if another one matches.

        Raises:
            AdapterError: no linear layer is left, or matching takes too long.
        """
        deadline = time.monotonic() + _MAX_MATCHING_S
        linears = linear_paths(model)
        paths = [path for path in linears if self._changes(path, deadline)]
        if not paths:
            raise AdapterError(
                f"The adapter matches no linear layer of this base:\n{self._rules_in_words()}\n"
                f"This base has: {', '.join(sorted({p.rpartition('.')[2] for p in linears}))}.\n"
                "Choose the base that the adapter was trained on.",
                "base",
            )
        return {
            path: (
                _by_pattern(self.rank_pattern, path, self.rank, deadline),
                _by_pattern(self.alpha_pattern, path, self.alpha, deadline),
            )
            for path in paths
        }

    def _changes(self, path: str, deadline: float) -> bool:
        if self.excluded and _is_named(self.excluded, path, deadline):
            return False
        if isinstance(self.targets, str) or path in self.targets:  # a whole path has no number
            return _is_named(self.targets, path, deadline)
        if not _is_named(self.targets, path, deadline):
            return False
        return (
            self.layer_numbers is None or self._layer_number(path, deadline) in self.layer_numbers
        )

    def _layer_number(self, path: str, deadline: float) -> int | None:
        """The number in a path: the first after one of the patterns, or after any name."""
        before = [rf"(?:^|.*?\.){pattern}" for pattern in self.layers_patterns]
        for pattern in before or [r".*?\.[^.]*"]:
            found = _match(rf"{pattern}\.(?P<layer_number>\d+)\.", path, deadline, whole=False)
            if found:
                return int(found["layer_number"])
        return None

    def _rules_in_words(self) -> str:
        rules = {
            "target_modules": self.targets,
            "exclude_modules": self.excluded,
            "layers_to_transform": self.layer_numbers,
            "layers_pattern": self.layers_patterns,
        }
        given = {key: value for key, value in rules.items() if value}
        return list_faults(
            [f"{k}: {brief(v if isinstance(v, str) else list(v))}" for k, v in given.items()]
        )


def read_content(folder: Path) -> dict[str, Any]:
    """Read `adapter_config.json`, whoever wrote it.

    Raises:
        AdapterError: there is no adapter, or the file is damaged.
    """
    path = folder / CONFIG_FILE
    refuse_outside_links(folder, [CONFIG_FILE], AdapterError)
    try:
        data = read_bounded(path, _MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        hint = "Give the folder of an adapter that was trained here or with PEFT."
        if (folder / "config.json").is_file():
            hint = "It is a model: name it as the base, without an adapter."
        raise AdapterError(
            f"No adapter in {folder}: it has no {CONFIG_FILE}.\n{hint}", "adapter"
        ) from error
    except OSError as error:
        raise AdapterError(f"Cannot read {path}: {error.strerror}.\n{_HINT}") from error
    content: dict[str, Any] = parse_json(path, data, AdapterError, _HINT)
    return content


def is_mlx_lm(content: dict[str, Any]) -> bool:
    """Whether an `adapter_config.json` is of mlx-lm's own tuner."""
    return "peft_type" not in content and bool(_MLX_LM_KEYS & content.keys())


def read_peft_config(folder: Path, content: dict[str, Any]) -> AdapterConfig:
    """Read PEFT's `adapter_config.json`.

    Args:
        folder: the adapter's, for messages.
        content: of the file.

    Raises:
        AdapterError: it is not a LoRA, or it has settings that are not supported. All of
            these are named.
    """
    path = folder / CONFIG_FILE
    if content.get("peft_type") != "LORA":
        raise AdapterError(
            f"{path}: peft_type: got {brief(content.get('peft_type'))}, expected 'LORA'.\n"
            "Only LoRA adapters are supported."
        )
    # PEFT's defaults: rank and alpha are 8 if absent.
    defaults: dict[str, Any] = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False}
    defaults |= {"use_dora": False, "bias": "none"}
    config: dict[str, Any] = {**defaults, **content}
    faults = _config_faults(config)
    if faults:
        raise AdapterError(
            f"{path} has settings that are not supported:\n{list_faults(faults, max_shown=20)}\n"
            f"{MERGE_HINT}"
        )
    targets, excluded = config["target_modules"], config.get("exclude_modules") or ()
    numbers, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or ()
    ranks, alphas = (config.get(key) or {} for key in ("rank_pattern", "alpha_pattern"))
    return AdapterConfig(
        base=config.get("base_model_name_or_path") or "",
        rank=int(config["r"]),
        alpha=float(config["lora_alpha"]),
        dropout=float(config["lora_dropout"]),
        targets=targets if isinstance(targets, str) else tuple(targets),
        rslora=config["use_rslora"],
        dora=config["use_dora"],
        bias=config["bias"],
        rank_pattern={name: int(rank) for name, rank in ranks.items()},
        alpha_pattern={name: float(alpha) for name, alpha in alphas.items()},
        excluded=excluded if isinstance(excluded, str) else tuple(excluded),
        layer_numbers=tuple(_as_list(numbers)) or None,
        layers_patterns=tuple(_as_list(patterns)),
    )


def _as_list(value: Any) -> list[Any]:
    """PEFT has one value or a list of them in some places; null is none."""
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def _config_faults(config: dict[str, Any]) -> list[str]:
    faults = [
        f"{key}: got {brief(config[key])}, expected {neutral[0]!r}"
        for key, neutral in _UNSUPPORTED.items()
        if key in config and config[key] not in neutral
    ]
    faults += [
        f"{key[:80]}: got {brief(value)}, expected no such key (written by a newer PEFT)"
        for key, value in config.items()
        if key not in _UNSUPPORTED and key not in _OTHER_KEYS
        # `is False`, because 0 == False and a 0 may mean something.
        if not (value is None or value is False or value in ("", [], {}))
    ]
    rank, alpha, dropout = (config[key] for key in ("r", "lora_alpha", "lora_dropout"))
    if not is_rank(rank):
        faults.append(f"r: got {brief(rank)}, expected a whole number of at least 1")
    if not is_number(alpha):
        faults.append(f"lora_alpha: got {brief(alpha)}, expected a finite number")
    if not is_number(dropout) or not 0 <= dropout < 1:
        faults.append(f"lora_dropout: got {brief(dropout)}, expected from 0 to below 1")
    if config["bias"] not in ("none", "lora_only", "all"):
        faults.append(f"bias: got {brief(config['bias'])}, expected none, lora_only or all")
    for key in ("use_rslora", "use_dora"):
        if not isinstance(config[key], bool):
            faults.append(f"{key}: got {brief(config[key])}, expected true or false")
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str | None):
        faults.append(f"base_model_name_or_path: got {brief(base)}, expected a name or a path")
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets:
        faults += _pattern_fault("target_modules", targets, targets)
    elif (
        not targets or not isinstance(targets, list) or not all(isinstance(t, str) for t in targets)
    ):
        faults.append(f"target_modules: got {brief(targets)}, expected names of linear layers")
    faults += _layer_faults(config)
    for key, is_value, numbers in (
        ("rank_pattern", is_rank, "whole numbers of at least 1"),
        ("alpha_pattern", is_number, "finite numbers"),
    ):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict) or not all(map(is_value, patterns.values())):
            faults.append(f"{key}: got {brief(patterns)}, expected {numbers} by name")
        else:
            faults += [fault for p in patterns for fault in _pattern_fault(key, p, _at_end(p))]
    return faults


def _layer_faults(config: dict[str, Any]) -> list[str]:
    """Faults of the keys that leave layers out."""
    faults = []
    excluded = config.get("exclude_modules") or []
    if isinstance(excluded, str):
        faults += _pattern_fault("exclude_modules", excluded, excluded)
    elif not isinstance(excluded, list) or not all(isinstance(name, str) for name in excluded):
        faults.append(f"exclude_modules: got {brief(excluded)}, expected names of layers")
    numbers = config.get("layers_to_transform")
    if not all(type(number) is int and number >= 0 for number in _as_list(numbers)):
        faults.append(
            f"layers_to_transform: got {brief(numbers)}, expected whole numbers of at least 0"
        )
    patterns = config.get("layers_pattern") or []
    if not all(isinstance(pattern, str) for pattern in _as_list(patterns)):
        faults.append(f"layers_pattern: got {brief(patterns)}, expected names")
    else:
        for pattern in _as_list(patterns):
            faults += _pattern_fault("layers_pattern", pattern, rf"(?:^|.*?\.){pattern}\.(\d+)\.")
    for key, value in (("layers_to_transform", _as_list(numbers)), ("layers_pattern", patterns)):
        if value and isinstance(config.get("target_modules"), str):
            faults.append(
                f"{key}: got {brief(value)}, expected none beside one pattern in target_modules"
            )
    if patterns and not _as_list(numbers):
        faults.append(f"layers_pattern: got {brief(patterns)}, expected layers_to_transform too")
    return faults


def _is_named(names: Sequence[str] | str, path: str, deadline: float) -> bool:
    """Whether a path is, or ends in, one of the names, or matches the pattern as a whole."""
    if isinstance(names, str):
        return _match(names, path, deadline) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def _by_pattern(patterns: dict[str, Number], path: str, default: Number, deadline: float) -> Number:
    """The value of the first pattern that matches a path, or the default.

    PEFT's rule: a pattern is a regular expression for the end of a path.
    """
    matching = (p for p in patterns if _match(_at_end(p), path, deadline))
    return next((patterns[pattern] for pattern in matching), default)


def _match(pattern: str, path: str, deadline: float, whole: bool = True) -> Any:
    """The match of a pattern with a path, or with its beginning; None if there is none."""
    try:
        remaining_s = max(deadline - time.monotonic(), 1e-3)
        return (regex.fullmatch if whole else regex.match)(pattern, path, timeout=remaining_s)
    except (TimeoutError, regex.error) as error:
        raise AdapterError(
            f"The pattern {brief(pattern)} of the adapter cannot be matched with {path}: "
            f"{str(error) or 'it takes too long'}\nName the target modules one by one."
        ) from error


def _at_end(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _pattern_fault(key: str, written: str, pattern: str) -> list[str]:
    """The fault of a pattern, in the words of `re`; an empty list if it is valid.

    Args:
        key: the key that holds it.
        written: the pattern in the file, for the message.
        pattern: the pattern that is matched.
    """
    if len(written) > _MAX_PATTERN_CHARS:
        got = f"{len(written)} characters"
        return [f"{key}: got {got}, expected a pattern of at most {_MAX_PATTERN_CHARS}"]
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        # Without the position: it counts from the start of `pattern`, not of `written`.
        reason = error.msg if isinstance(error, re.error) else error
        return [f"{key}: got {brief(written)}, expected a regular expression: {reason}"]
    repeats = re.findall(r"\{[\d,]+\}", written)
    counts = [int(n) for repeat in repeats for n in re.findall(r"\d+", repeat)]
    if math.prod(max(1, count) for count in counts) > _MAX_REPEATS:
        return [f"{key}: got {brief(written)}, expected at most {_MAX_REPEATS} repeats"]
    return []


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number. A bool does not count, though Python has it as an int."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max  # also refuses NaN, and 10**400


def is_rank(value: object) -> bool:
    return is_number(value) and value >= 1 and value == int(value)
