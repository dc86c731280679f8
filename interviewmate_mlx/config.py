"""A run's configuration: frozen dataclasses, read from TOML, every key checked.

The defaults are defined here and nowhere else. They are those of Run A.
"""

import difflib
import math
import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from interviewmate_mlx.errors import ConfigError, brief, list_faults
from interviewmate_mlx.files import is_utf8, read_bounded

_MAX_BYTES = 1 << 16  # of a run's file
_MAX_SHOWN_CHARS = 200  # of a wrong value
_SHIPPED_NAME = re.compile(r"[a-z0-9-]+").fullmatch
_NAMES = 'attention, all-linear, or a list of names, as in ["query_key_value"]'
_LAYERS = "a number of at least 1, or a list of different numbers of blocks from 0"


def _option(default: Any, is_valid: Callable[[Any], bool], expected: str) -> Any:
    """A dataclass field with its default and the range of its values."""
    return field(default=default, metadata={"is_valid": is_valid, "expected": expected})


def _at_least(default: Any, minimum: float) -> Any:
    return _option(default, lambda v: minimum <= v < math.inf, f"at least {minimum}")


def _above_zero(default: Any) -> Any:
    return _option(default, lambda v: 0 < v < math.inf, "above 0")


def _one_of(*names: str) -> Any:
    """A choice; the first name is the default."""
    return _option(names[0], lambda v: v in names, f"one of {', '.join(names)}")


def _name(default: str) -> Any:
    return _option(default, _is_name, "a name or a path, in Unicode")


def _is_name(value: str) -> bool:
    # TOML cannot hold a path that is not UTF-8.
    return bool(value.strip()) and is_utf8(value)


def _is_layers(value: Any) -> bool:
    if isinstance(value, int):
        return value >= 1
    return len(set(value)) == len(value) and all(number >= 0 for number in value)


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and value not in ("", ".", "..") and "/" not in value


@dataclass(frozen=True)
class ModelConfig:
    """[model]"""

    base: str = _name("tiiuae/falcon-rw-1b")  # mini, a folder or a Hub id
    # auto: float32 on a CPU, bfloat16 on a GPU
    dtype: str = _one_of("auto", "float32", "bfloat16", "float16")
    untested_base: bool = False  # train also a network that no test holds against transformers


@dataclass(frozen=True)
class LoraConfig:
    """[lora]"""

    rank: int = _at_least(8, 1)  # of the two matrices that stand for a layer's change
    alpha: float = _above_zero(16.0)  # their product is scaled by alpha / rank
    # share of a layer's inputs that the LoRA does not see, drawn again each step
    dropout: float = _option(0.05, lambda v: 0 <= v < 1, "from 0 to below 1")
    # layers that get one, in every block: names, or the base's own attention, or all-linear
    targets: tuple[str, ...] = _option(("attention",), bool, _NAMES)
    # blocks that get one: so many of the last ones, or a list of their numbers from 0; []: all
    layers: tuple[int, ...] | int = _option((), _is_layers, _LAYERS)
    rslora: bool = False  # scale by alpha / sqrt(rank)
    dora: bool = False  # and learn a magnitude for each row of a weight
    # what A and B begin as: random and 0, or a part of the weights, which is taken out of these
    init: str = _one_of("default", "pissa", "olora")
    # biases that learn as well: none, those of layers with a LoRA, or all of the base's
    bias: str = _one_of("none", "lora_only", "all")
    plus_ratio: float = _at_least(1.0, 1)  # LoRA+: the learning rate of B by that of A
    # an adapter's folder, whose numbers the LoRA starts with; "": a fresh LoRA
    start_from: str = _option("", lambda v: not v or _is_name(v), "an adapter's folder")


@dataclass(frozen=True)
class DataConfig:
    """[data]"""

    path: str = _name("interview")  # the shipped questions, a folder, a file, or a Hub data set
    max_length: int = _at_least(512, 8)  # tokens per row; longer answers are truncated
    # every answer and its end (answers is the same), the last answer of a row, or every token
    train_on: str = _one_of("answer", "answers", "last", "all")
    # auto: the base's own if it has one, else plain; plain, alpaca, chatml, or a file of Jinja
    template: str = _name("auto")
    # rows of text are laid one after the other and cut every max_length tokens: none is lost
    pack: bool = False


METHODS = ("sft", "dpo", "ipo", "orpo", "simpo", "kto")


@dataclass(frozen=True)
class TrainConfig:
    """[train]"""

    # rows to answer like, pairs of answers (dpo, ipo, orpo, simpo), or answers with a label (kto)
    method: str = _one_of(*METHODS)
    # what learns: a LoRA beside the base's weights, or these themselves, each of them
    weights: str = _one_of("lora", "all")
    epochs: float = _above_zero(3.0)  # times over the training rows; 0.5 is half of them once
    max_steps: int = _at_least(0, 0)  # the run ends there at the latest; 0: where epochs end
    batch_size: int = _at_least(1, 1)  # rows; only its product with grad_accumulation counts
    grad_accumulation: int = _at_least(4, 1)  # batches in one step
    learning_rate: float = _above_zero(2e-4)  # after the warmup
    schedule: str = _one_of("linear", "cosine", "constant")  # from there to 0, or level
    # share of the learning rate that cosine falls to
    floor: float = _option(0.0, lambda v: 0 <= v <= 1, "from 0 to 1")
    warmup_ratio: float = _option(0.03, lambda v: 0 <= v <= 1, "from 0 to 1")  # share of the steps
    warmup_steps: int = _at_least(0, 0)  # in place of that share; 0: the share
    # muon is for all weights: for the matrices of the blocks, with AdamW for the rest
    optimizer: str = _one_of("adamw", "muon")
    weight_decay: float = _at_least(0.0, 0)  # of matrices
    max_grad_norm: float = _at_least(1.0, 0)  # 0: no clipping
    save_every: int = _at_least(50, 0)  # steps; 0: only when validating
    keep_checkpoints: int = _at_least(2, 1)  # how many of the newest; each holds the best adapter
    gradient_checkpointing: bool = False  # less memory, for one more forward pass a step
    memory_gb: float = _at_least(0.0, 0)  # that training may use; 0: what the machine can give
    # of LoRA's first values, the order of the rows, and dropout
    seed: int = _option(42, lambda v: 0 <= v < 2**32, "from 0 to 2**32 - 1")

    def total_steps(self, steps_per_epoch: int) -> int:
        """Steps of the whole run."""
        # Rounded: 0.1 * 30 is a little more than 3.
        steps = max(1, math.ceil(round(self.epochs * steps_per_epoch, 6)))
        return min(steps, self.max_steps or steps)

    @property
    def effective_batch(self) -> int:
        """Rows in one step."""
        return self.batch_size * self.grad_accumulation


@dataclass(frozen=True)
class PreferenceConfig:
    """[preference], for the methods that learn from pairs or labels"""

    beta: float = _above_zero(0.1)  # how much a change of the log-probabilities counts
    # share of pairs that are taken to be the wrong way round (dpo, simpo)
    label_smoothing: float = _option(0.0, lambda v: 0 <= v < 0.5, "from 0 to below 0.5")
    length_normalized: bool = False  # means over an answer's tokens, not sums (dpo)
    target_margin: float = _at_least(0.5, 0)  # by which the better answer is to lead (simpo)


# The methods that ask for a key of [preference]; all but sft ask for the others.
_ASKED_BY = {
    "label_smoothing": ("dpo", "simpo"),
    "length_normalized": ("dpo",),
    "target_margin": ("simpo",),
}


@dataclass(frozen=True)
class ValidateConfig:
    """[validate]"""

    every: int = _at_least(0, 0)  # steps; 0: at the end of each epoch
    early_stop_patience: int = _at_least(0, 0)  # validations without a new best; 0: never


LOGGERS = ("tensorboard", "wandb", "trackio")


@dataclass(frozen=True)
class LogConfig:
    """[log]"""

    # boards that `imate-mlx train` sends its numbers to, each an extra of the package
    to: tuple[str, ...] = _option(
        (), lambda v: set(v) <= set(LOGGERS), f"some of {', '.join(LOGGERS)}"
    )
    project: str = _name("interviewmate")  # on wandb and trackio


@dataclass(frozen=True)
class RunConfig:
    """A whole run. `name` is a key above the tables; by default it is the file's name.

    Raises:
        ConfigError: values are out of range. All of them are named.
    """

    name: str = "custom"
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    validate: ValidateConfig = field(default_factory=ValidateConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        faults = [f for t in _TABLES for f in _range_faults(t, getattr(self, t))]
        _refuse(self.name, faults or _idle_faults(self))

    @property
    def folder(self) -> Path:
        """Where the run writes by default. `models/NAME` may be a base of that name."""
        if self.train.weights == "all":
            return Path("models", f"{self.name}-trained")
        return Path("adapters", self.name)

    def replace(self, name: str | None = None, **tables: Mapping[str, Any]) -> "RunConfig":
        """A copy with other values, as in `run.replace(lora={"rank": 16}, data={"path": "mine"})`.

        Args:
            name: of the copy; by default that of this run.
            tables: for each table that changes, the new values by key.

        Raises:
            ConfigError: as for `load_run`.
        """
        name = name or self.name
        merged = {table: asdict(getattr(self, table)) for table in _TABLES}
        merged |= {table: {**merged.get(table, {}), **values} for table, values in tables.items()}
        return _from_tables(name, merged, [], where=name)


_TABLES: dict[str, type] = {
    "model": ModelConfig,
    "lora": LoraConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "preference": PreferenceConfig,
    "validate": ValidateConfig,
    "log": LogConfig,
}


def load_run(run: str, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a shipped run (`A`, `mini`, ...) or a TOML file, and override single keys.

    Args:
        run: a shipped run's name, or the path of a TOML file.
        overrides: each is `table.key=value`, with the value in TOML; quotes may be left out.

    Raises:
        ConfigError: there is no such file, it is not TOML, a key is unknown (the nearest
            one is named), or a value has the wrong type or is out of range. All wrong
            keys and values are named.
    """
    name, text = _find_run(run)
    return _from_tables(name, _parse_toml(run, text), overrides, where=run)


def load_sweep(path: str, overrides: Iterable[str] = ()) -> tuple[RunConfig, dict[str, Any] | None]:
    """A run as `load_run` reads it, and the `[sweep]` table that its file may have.

    Raises:
        ConfigError: as for `load_run`; or `sweep` is not a table.
    """
    name, text = _find_run(path)
    tables = _parse_toml(path, text)
    sweep = tables.pop("sweep", None)
    if sweep is not None and not isinstance(sweep, dict):
        raise ConfigError(f"{path}: sweep: got {brief(sweep, _MAX_SHOWN_CHARS)}, expected a table")
    return _from_tables(name, tables, overrides, where=path), sweep


def override_run(run: RunConfig, overrides: Iterable[str]) -> RunConfig:
    """A copy of a run with single keys overridden, as by `load_run`.

    Raises:
        ConfigError: as for `load_run`.
    """
    return _from_tables(run.name, asdict(run), overrides, where=run.name)


def parse_run(name: str, text: str) -> RunConfig:
    """Parse a run from what `to_toml` returned.

    Args:
        name: of a run that has none in its text.
        text: TOML.

    Raises:
        ConfigError: as for `load_run`.
    """
    return _from_tables(name, _parse_toml(name, text), [], where=name)


def to_toml(run: RunConfig) -> str:
    """The run as TOML. `load_run` reads it back to an equal run."""
    lines = ["# Every key of the run, with its value", f"name = {_toml(run.name)}"]
    for table in _TABLES:
        lines += ["", f"[{table}]"]
        lines += [f"{key} = {_toml(value)}" for key, value in asdict(getattr(run, table)).items()]
    return "\n".join(lines) + "\n"


def shipped(name: str) -> Path:
    """The path of a file or folder that is shipped with the package, in a wheel or a checkout."""
    package = Path(__file__).parent
    return package / name if (package / name).exists() else package.parent / name


def shipped_data(name: str) -> Path | None:
    """The folder of a shipped data set; None if the name is not one."""
    folder = shipped(f"data/{name}")
    return folder if _SHIPPED_NAME(name) and (folder / "train.jsonl").is_file() else None


def shipped_runs() -> dict[str, Path]:
    """The files of the shipped runs, by name: a letter, `mini`, `alpaca` or `dpo`."""
    folder = shipped("configs")
    letters = {path.stem.removeprefix("run_").upper(): path for path in folder.glob("run_*.toml")}
    others = {name: folder / f"{name}.toml" for name in ("mini", "alpaca", "dpo")}
    return dict(sorted(letters.items())) | others


def _find_run(run: str) -> tuple[str, str]:
    path = Path(run)
    if path.suffix != ".toml":
        files = shipped_runs()
        if not (name := next((name for name in files if name.lower() == run.lower()), None)):
            raise ConfigError(
                f"No run {run!r}: expected {', '.join(files)}, or the path of a .toml file."
            )
        is_letter = len(name) == 1
        return f"run_{name}" if is_letter else name, files[name].read_text(encoding="utf-8")
    try:
        if path.exists() and not path.is_file():  # reading a pipe could wait forever
            raise ConfigError(f"{run} is not a file.\nGive the path of a .toml file.")
        data = read_bounded(path, _MAX_BYTES)
    except OSError as error:
        raise ConfigError(
            f"Cannot read the run {brief(run, _MAX_SHOWN_CHARS)[1:-1]}: {error.strerror}.\n"
            f"Give a .toml file that you may read, or {', '.join(shipped_runs())}."
        ) from error
    try:
        name = os.fsencode(path.stem).decode(errors="replace")  # TOML holds no other
        return name, data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{run} is not UTF-8 at byte {error.start}.\nSave it as UTF-8."
        ) from error


def _parse_toml(where: str, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise _not_toml(where, "nested too deeply") from error
    except ValueError as error:  # not only TOMLDecodeError: a number may have too many digits
        raise _not_toml(where, str(error)) from error


def _not_toml(where: str, fault: str) -> ConfigError:
    return ConfigError(f"{where} is not TOML: {fault}\nCorrect the file and run again.")


def _apply_override(tables: dict[str, Any], override: str, faults: list[str]) -> None:
    key, equals, text = override.partition("=")
    table, dot, name = key.strip().partition(".")
    if not (equals and dot and name):
        faults.append(
            f"{override[:_MAX_SHOWN_CHARS]}: expected table.key=value, as in lora.rank=16"
        )
        return
    value = text.strip()
    with suppress(ValueError, RecursionError):  # not TOML: it stays a string
        parsed = tomllib.loads(f"value = {text}")
        expected = get_type_hints(_TABLES[table]).get(name) if table in _TABLES else None
        # A folder may be called 2024, so a key of type str keeps its text. A line break
        # in the text could add another key.
        if len(parsed) == 1 and (expected is not str or isinstance(parsed["value"], str)):
            value = parsed["value"]
    content = tables.setdefault(table, {})
    if isinstance(content, dict):
        content[name] = value


def _from_tables(
    name: str, tables: dict[str, Any], overrides: Iterable[str], where: str
) -> RunConfig:
    faults: list[str] = []
    for override in overrides:
        _apply_override(tables, override, faults)
    parts = {}
    for table, content in tables.items():
        if table == "name":
            name = content
            if not _is_file_name(name):
                shown = brief(name, _MAX_SHOWN_CHARS)
                faults.append(f"name: got {shown}, expected a name without /")
        elif not isinstance(content, dict):
            owners = [f"[{t}]" for t, kind in _TABLES.items() if table in get_type_hints(kind)]
            expected = f"it in {' or '.join(owners)}" if owners else "a table"
            faults.append(f"{table}: got {brief(content, _MAX_SHOWN_CHARS)}, expected {expected}")
        elif table not in _TABLES:
            faults.append(f"unknown table [{table[:_MAX_SHOWN_CHARS]}]{_nearest(table, _TABLES)}")
        else:
            parts[table] = _read_table(table, content, faults)
    for table, values in parts.items():
        faults += _range_faults(table, values)
    _refuse(where, faults)
    return RunConfig(name=name, **parts)


def _read_table(table: str, content: dict[str, Any], faults: list[str]) -> Any:
    types = get_type_hints(_TABLES[table])
    values = {}
    for key, value in content.items():
        if key not in types:
            faults.append(
                f"unknown key {table}.{key[:_MAX_SHOWN_CHARS]}{_nearest(key, types, f'{table}.')}"
            )
            continue
        try:
            values[key] = _coerce(value, types[key])
        except TypeError as error:
            faults.append(f"{table}.{key}: got {brief(value, _MAX_SHOWN_CHARS)}, expected {error}")
    return _TABLES[table](**values)


def _coerce(value: Any, expected: Any) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if expected is float and is_number:
        try:
            return float(value)
        except OverflowError as error:
            raise TypeError(f"a number of at most {sys.float_info.max:.1e}") from error
    if expected == tuple[int, ...] | int:
        numbers = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
            raise TypeError(_LAYERS)
        return tuple(numbers) if isinstance(value, list | tuple) else value
    if expected is int and is_number and isinstance(value, int):
        if value.bit_length() > 63:
            raise TypeError("a whole number of at most 64 bits")  # as TOML has them
        return value
    if expected in (str, bool) and isinstance(value, expected):
        return value
    if expected == tuple[str, ...]:
        names = [value] if isinstance(value, str) else value
        if isinstance(names, list | tuple) and all(isinstance(n, str) and n for n in names):
            return tuple(names)
        raise TypeError(_NAMES)
    kinds = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
    raise TypeError(kinds[expected])


def _nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"; did you mean {prefix}{close[0]}?"
    return f"; expected one of {', '.join(known)}"


def _range_faults(table: str, values: Any) -> list[str]:
    rules = [(getattr(values, f.name), f.name, f.metadata) for f in fields(values) if f.metadata]
    return [
        f"{table}.{key}: got {_shown(value)}, expected {rule['expected']}"
        for value, key, rule in rules
        if not rule["is_valid"](value)
    ]


def _idle_faults(run: RunConfig) -> list[str]:
    """Keys that nothing in the run asks for, and yet have another value than by default."""
    method, faults = run.train.method, []
    if run.train.floor and run.train.schedule != "cosine":
        faults.append(f"train.floor: got {run.train.floor:g}, expected 0 but with schedule cosine")
    for f in fields(run.preference):
        value = getattr(run.preference, f.name)
        asked_by = _ASKED_BY.get(f.name, METHODS[1:])
        if value != f.default and method not in asked_by:
            faults.append(
                f"preference.{f.name}: got {_shown(value)}, and train.method {method} has no such "
                f"thing; expected {_toml(f.default)}, or the method {' or '.join(asked_by)}"
            )
    if run.lora.init != "default" and (run.lora.dora or run.lora.start_from):
        other = "dora" if run.lora.dora else "start_from"
        faults.append(
            f"lora.init: got {run.lora.init!r}, expected 'default' with lora.{other}: "
            + ("it is saved as a plain LoRA" if run.lora.dora else "that gives the first values")
        )
    if run.train.weights == "all":
        faults += [
            f"lora.{f.name}: got {_shown(getattr(run.lora, f.name))}, and train.weights all has no "
            f"LoRA; expected {_toml(f.default)}"
            for f in fields(run.lora)
            if getattr(run.lora, f.name) != f.default
        ]
        if run.model.dtype == "float16":
            faults.append(
                "model.dtype: got 'float16', expected another with train.weights all: small "
                "gradients would be 0 in it"
            )
    elif run.train.optimizer != "adamw":
        faults.append(
            f"train.optimizer: got {run.train.optimizer!r}, expected 'adamw' with train.weights "
            "lora: Muon turns whole matrices"
        )
    if run.data.pack and method != "sft":
        faults.append(f"data.pack: got true, expected false: {method} compares answers")
    if run.data.train_on == "all" and method not in ("sft", "orpo"):
        faults.append(
            f"data.train_on: got 'all', expected 'answer': {method} compares answers alone"
        )
    if method == "kto" and run.train.effective_batch < 2:
        faults.append(
            "train.batch_size x train.grad_accumulation: got 1, expected at least 2: kto looks at "
            "the other answers of a step"
        )
    return faults


def _shown(value: object) -> str:
    """A wrong value, as TOML has it."""
    return brief(list(value) if isinstance(value, tuple) else value, _MAX_SHOWN_CHARS)


def _refuse(run: str, faults: list[str]) -> None:
    if faults:
        raise ConfigError(f"The run {run} is not valid:\n{list_faults(faults, max_shown=20)}")


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        quoted = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{_escape(quoted)}"'
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return repr(value)


def _escape(text: str) -> str:
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)
