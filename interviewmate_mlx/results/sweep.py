"""Several runs one after the other: each an ordinary run folder, and a table of them all.

A sweep that was killed goes on where it was: finished trials stay, the one that was under way is
resumed, and values that are proposed one by one are proposed again.
"""

import itertools
import json
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from interviewmate_mlx import backend
from interviewmate_mlx.base.base import Base
from interviewmate_mlx.config import RunConfig, to_toml
from interviewmate_mlx.errors import ConfigError, DivergedError, TrainingError, brief, list_faults
from interviewmate_mlx.files import Progress, atomic_file, contents
from interviewmate_mlx.formats.json_file import read_json
from interviewmate_mlx.training.checkpoint import checkpoints
from interviewmate_mlx.training.events import Event, Finished, Summary, Validated
from interviewmate_mlx.training.loop import train
from interviewmate_mlx.training.metrics import METRICS_FILE, SUMMARY_FILE, read_metrics

SWEEP_FILE = "sweep.json"
FINISHED, DIVERGED, STOPPED, INTERRUPTED = "finished", "diverged", "stopped", "interrupted"
METHODS = ("grid", "random", "optuna")
_MAX_TRIALS = 10_000
# A trial stops if it has gained less than this share of what the best one had by the same step.
PRUNE_SHARE = 0.5

Values = dict[str, Any]  # of a run's keys, as in {"lora.rank": 8}


@dataclass(frozen=True)
class Trial:
    """A run of a sweep.

    Attributes:
        name: of its folder.
        run: what is trained.
        values: what is particular to it, for the table.
    """

    name: str
    run: RunConfig
    values: Values


@dataclass(frozen=True)
class Outcome:
    """What became of a trial.

    Attributes:
        trial: the run.
        status: `finished`, `diverged`, `stopped` (it was clearly worse than another), or
            `interrupted` (the sweep can go on).
        summary: of what was done; None if it diverged.
        message: why, if it is not finished.
    """

    trial: Trial
    status: str
    summary: Summary | None
    message: str = ""

    @property
    def loss(self) -> float:
        """What trials are compared by: the best validation loss, or the last training loss."""
        if self.summary is None:
            return math.inf
        if self.summary.best_valid_loss is not None:
            return self.summary.best_valid_loss
        return self.summary.final_loss


def best_of(outcomes: Sequence[Outcome]) -> Outcome | None:
    """The finished trial with the lowest loss."""
    finished = [outcome for outcome in outcomes if outcome.status == FINISHED]
    return min(finished, key=lambda outcome: outcome.loss, default=None)


def trials_of_runs(runs: Sequence[RunConfig], num_seeds: int = 1) -> list[Trial]:
    """The trials of given runs, each with as many seeds.

    Raises:
        ConfigError: two runs have the same name.
    """
    names = [run.name for run in runs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(
            f"Runs of one sweep need names of their own: {', '.join(sorted(twice))} is there twice."
        )
    if num_seeds == 1:
        return [Trial(run.name, run, {}) for run in runs]
    trials = []
    for run in runs:
        for seed in range(run.train.seed, run.train.seed + num_seeds):
            name = f"{run.name}-seed{seed}"
            trials.append(
                Trial(name, run.replace(name, train={"seed": seed}), {"train.seed": seed})
            )
    return trials


@dataclass(frozen=True)
class Space:
    """The `[sweep]` table of a run's file: which values are tried, and in which way.

    Attributes:
        method: `grid` (all combinations), `random`, or `optuna`.
        num_trials: how many, where they are not a grid.
        seed: of what is drawn.
        values: by key of a run: a list to choose from, or a range {"low", "high", "log"}.
    """

    method: str
    num_trials: int
    seed: int
    values: dict[str, list[Any] | dict[str, Any]]

    @classmethod
    def read(cls, table: dict[str, Any], where: str) -> "Space":
        """Check a `[sweep]` table.

        Raises:
            ConfigError: it is wrong; all of what is wrong is named.
        """
        method, values = table.get("method", "grid"), table.get("values", {})
        num_trials, seed = table.get("trials", 20), table.get("seed", 0)
        faults = [
            f"sweep.{key}: not known, expected method, trials, seed or values"
            for key in table.keys() - {"method", "trials", "seed", "values"}
        ]
        if method not in METHODS:
            faults.append(f"sweep.method: got {brief(method)}, expected {', '.join(METHODS)}")
        for key, value, least in (("trials", num_trials, 1), ("seed", seed, 0)):
            is_whole = isinstance(value, int) and not isinstance(value, bool)
            if not is_whole or not least <= value <= _MAX_TRIALS:
                faults.append(f"sweep.{key}: got {brief(value)}, expected {least} to {_MAX_TRIALS}")
        if not isinstance(values, dict) or not values:
            faults.append('sweep.values: expected keys of a run, such as "lora.rank" = [4, 8]')
            values = {}
        for key, choice in values.items():
            faults += [f"sweep.values.{key}: {fault}" for fault in _value_faults(choice, method)]
        if method == "optuna" and find_spec("optuna") is None:
            faults.append('sweep.method: optuna needs pip install "interviewmate-mlx[tune]"')
        if faults:
            raise ConfigError(f"{where} holds no valid sweep:\n{list_faults(faults)}")
        return cls(method, num_trials, seed, values)

    def proposer(self) -> Generator[Values, float, None]:
        """The values of one trial after the other; it is sent the loss of each."""
        return {"grid": self._grid, "random": self._random, "optuna": self._optuna}[self.method]()

    def _grid(self) -> Generator[Values, float, None]:
        for chosen in itertools.product(*self.values.values()):
            yield dict(zip(self.values, chosen, strict=True))

    def _random(self) -> Generator[Values, float, None]:
        rng = np.random.default_rng(self.seed)
        for _ in range(self.num_trials):
            yield {key: _draw(choice, rng) for key, choice in self.values.items()}

    def _optuna(self) -> Generator[Values, float, None]:
        import optuna  # noqa: PLC0415  an extra

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=self.seed))
        for _ in range(self.num_trials):
            trial = study.ask()
            loss = yield {key: _suggest(trial, key, choice) for key, choice in self.values.items()}
            if math.isfinite(loss):
                study.tell(trial, loss)
            else:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)


def _value_faults(choice: object, method: object) -> list[str]:
    if isinstance(choice, list):
        return [] if choice else ["got an empty list"]
    if not isinstance(choice, dict):
        return [f"got {brief(choice)}, expected a list, or a range such as {{low = 1, high = 9}}"]
    if method == "grid":
        return ["got a range, expected a list: a grid has no end otherwise"]
    low, high, log = (choice.get(key, False) for key in ("low", "high", "log"))
    is_range = all(type(x) in (int, float) for x in (low, high)) and type(log) is bool
    if choice.keys() - {"low", "high", "log"} or not is_range:
        return ["expected {low = NUMBER, high = NUMBER, log = true or false}"]
    if not low < high or (log and low <= 0):
        least = "0 < low < high, as log is true" if log else "low < high"
        return [f"got {low} to {high}, expected {least}"]
    return []


def _is_whole(choice: dict[str, Any]) -> bool:
    return isinstance(choice["low"], int) and isinstance(choice["high"], int)


def _draw(choice: list[Any] | dict[str, Any], rng: np.random.Generator) -> Any:
    if isinstance(choice, list):
        return choice[int(rng.integers(len(choice)))]
    low, high = choice["low"], choice["high"]
    if choice.get("log"):
        drawn = math.exp(rng.uniform(math.log(low), math.log(high)))
        return round(drawn) if _is_whole(choice) else drawn
    return int(rng.integers(low, high + 1)) if _is_whole(choice) else float(rng.uniform(low, high))


def _suggest(trial: Any, key: str, choice: list[Any] | dict[str, Any]) -> Any:
    if isinstance(choice, list):
        # By number: optuna takes no lists as choices.
        return choice[trial.suggest_categorical(key, range(len(choice)))]
    suggest = trial.suggest_int if _is_whole(choice) else trial.suggest_float
    return suggest(key, choice["low"], choice["high"], log=choice.get("log", False))


def trials_of_space(run: RunConfig, space: Space) -> Generator[Trial, float, None]:
    """The trials of a space; it is sent the loss of each.

    Raises:
        ConfigError: a value that is tried is not one of its key's.
    """
    proposer, number = space.proposer(), 1
    try:
        values = next(proposer)
        while True:
            name = f"trial_{number:03}"
            loss = yield Trial(name, with_values(run, name, values), values)
            values, number = proposer.send(loss), number + 1
    except StopIteration:
        return


def with_values(run: RunConfig, name: str, values: Values) -> RunConfig:
    """A run with other values.

    Raises:
        ConfigError: a key is not known, or a value is not one of its key's.
    """
    tables: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        table, _, field = key.partition(".")
        tables.setdefault(table, {})[field] = value
    return run.replace(name, **tables)


def check_trials(run: RunConfig, space: Space) -> None:
    """Refuse a space with values that are none of their keys', before the first trial.

    Raises:
        ConfigError: the first of them.
    """
    for key, choice in space.values.items():
        for value in choice if isinstance(choice, list) else (choice["low"], choice["high"]):
            with_values(run, "trial", {key: value})


def sweep(
    trials: Sequence[Trial] | Generator[Trial, float, None],
    out: Path,
    *,
    settings: dict[str, Any],
    prune: bool = False,
    stop: Callable[[], bool] = lambda: False,
    fetching: Progress | None = None,
) -> Iterator[Trial | Event | Outcome]:
    """Train one trial after the other, each into a folder of its own below `out`.

    Args:
        trials: all of them, or a generator that is sent the loss of each.
        out: the sweep's folder, made here. One that holds the same sweep is gone on with.
        settings: what makes it the same sweep; kept in the folder.
        prune: stop a trial at a validation after which it has gained less than half of what
            the best trial so far had gained over its base by the same step.
        stop: asked after each step; true saves and ends.
        fetching: called with bytes done and in all, while a base is pulled.

    Yields:
        Each `Trial`; the events of its training, if it is not done already; its `Outcome`.

    Raises:
        InterviewMateError: a trial cannot start. One that diverges is an `Outcome`.
    """
    record = _open(out, settings)
    held: tuple[tuple[str, str], Base] | None = None  # the base in memory, and its name
    curves: dict[str, dict[int, float]] = {}  # of the trials so far: validation losses by step
    outcomes: list[Outcome] = []
    source: Iterator[Trial] = iter(trials)
    trial = next(source, None)
    while trial:
        yield trial
        folder = out / trial.name
        known = record["trials"].get(trial.name, {})
        if known.get("status") in (FINISHED, DIVERGED, STOPPED):
            outcome = Outcome(trial, known["status"], _summary(folder), known.get("message", ""))
            curves[trial.name] = {int(step): loss for step, loss in known["curve"].items()}
        else:
            wanted = trial.run.model.base, trial.run.model.dtype
            if held is None or held[0] != wanted:
                held = None  # its memory is free before the next one is read
                mx.clear_cache()
                held = wanted, _load(trial.run, fetching)
            best = best_of(outcomes) if prune else None
            rival = curves[best.trial.name] if best else {}
            outcome, curve = yield from _train(trial, folder, held[1], rival, stop)
            curves[trial.name] = curve
            record["trials"][trial.name] = {
                "status": outcome.status,
                "message": outcome.message,
                "values": trial.values,
                "curve": {str(step): loss for step, loss in curve.items()},
            }
            _write(out, record)
        yield outcome
        outcomes.append(outcome)
        if outcome.status == INTERRUPTED:
            return
        try:
            trial = source.send(outcome.loss) if isinstance(source, Generator) else next(source)
        except StopIteration:
            return


def _train(
    trial: Trial, folder: Path, base: Base, rival: dict[int, float], stop: Callable[[], bool]
) -> Generator[Event, None, tuple[Outcome, dict[int, float]]]:
    """Train a trial, from the start or from where it was."""
    curve: dict[int, float] = {}
    pruned = ""

    def is_stopping() -> bool:
        return bool(pruned) or stop()

    resume = bool(checkpoints(folder))
    replace = not resume and folder.exists() and bool(contents(folder))
    try:
        events = train(
            trial.run, folder, resume=resume, replace=replace, stop=is_stopping, base=base
        )
        if resume:
            curve = _curve_of(folder)
        for event in events:
            if isinstance(event, Validated):
                curve[event.step] = event.loss
                pruned = pruned or clearly_worse(curve, rival, event.step)
            yield event
            if isinstance(event, Finished):
                finished = event
    except DivergedError as error:
        return Outcome(trial, DIVERGED, None, str(error).splitlines()[0]), curve
    if not finished.interrupted:
        return Outcome(trial, FINISHED, finished.summary), curve
    if pruned:
        return Outcome(trial, STOPPED, finished.summary, pruned), curve
    return Outcome(trial, INTERRUPTED, finished.summary, f"after step {finished.step}"), curve


def clearly_worse(curve: dict[int, float], rival: dict[int, float], step: int) -> str:
    """Why a trial is clearly worse than the best one at a step; empty if it is not.

    Both began at their base's loss. The trial is clearly worse if it has gained less than half
    of what the best one had gained by the same step, from the second validation on.
    """
    if 0 not in curve or 0 not in rival or step not in rival or len(curve) < 3:
        return ""
    gained, wanted = curve[0] - curve[step], rival[0] - rival[step]
    if gained >= PRUNE_SHARE * wanted:
        return ""
    return f"after step {step} it had gained {gained:.4f} over its base, the best one {wanted:.4f}"


def _load(run: RunConfig, fetching: Progress | None) -> Base:
    return Base.open(run.model.base, fetching).in_memory(backend.resolve_dtype(run.model.dtype))


def _curve_of(folder: Path) -> dict[int, float]:
    lines = read_metrics(folder / METRICS_FILE)
    return {line["step"]: line["loss"] for line in lines if line["event"] == "validation"}


def _open(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The record of a sweep: a new one, or the one that began in the folder.

    Raises:
        TrainingError: the folder holds something else, or another sweep.
    """
    path = out / SWEEP_FILE
    if path.is_file():
        record: dict[str, Any] = read_json(path)
        if record.get("settings") != json.loads(json.dumps(settings)):
            raise TrainingError(
                f"{out} holds another sweep.\nGive this one another folder, or remove that one.",
                "out",
            )
        return record
    if out.exists() and contents(out):
        raise TrainingError(
            f"{out} is not empty and holds no sweep.\nChoose another folder.", "out"
        )
    record = {"settings": settings, "trials": {}}
    _write(out, record)
    return record


def _write(out: Path, record: dict[str, Any]) -> None:
    with atomic_file(out / SWEEP_FILE) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _summary(folder: Path) -> Summary | None:
    path = folder / SUMMARY_FILE
    return Summary(**read_json(path)) if path.is_file() else None


def settings_of(runs: Sequence[RunConfig], num_seeds: int, space: Space | None) -> dict[str, Any]:
    """What makes a sweep the same one."""
    return {
        "runs": [to_toml(run) for run in runs],
        "seeds": num_seeds,
        "space": asdict(space) if space else None,
    }
