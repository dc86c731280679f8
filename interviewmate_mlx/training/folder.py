"""A run's folder: which process has it, which run is in it, and what may be done to it."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from interviewmate_mlx.config import RunConfig, parse_run, to_toml
from interviewmate_mlx.errors import ConfigError, TrainingError, list_faults
from interviewmate_mlx.files import LOCK_FILE, atomic_file, clear_leftovers, locked
from interviewmate_mlx.training.checkpoint import FOLDER, PATTERN, checkpoints
from interviewmate_mlx.weights.peft import WEIGHTS_FILE

RUN_FILE = "run.toml"


@contextmanager
def hold(out: Path) -> Iterator[None]:
    """Keep a run's folder to this process while it runs.

    Raises:
        TrainingError: another process trains in it, or it is a file.
    """
    if out.is_file():
        raise TrainingError(f"{out} is a file.\nChoose another --out.")
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(out))
        except BlockingIOError as error:
            raise TrainingError(
                f"{out} is in use: {error.strerror}.\n"
                "Wait until it ends, stop it, or choose another --out."
            ) from error
        yield


def check_out(out: Path, resume: bool, replace: bool = False) -> None:
    """Refuse to mix a new run with an old one, and to replace what is no run.

    A run that was killed before its first checkpoint can be resumed too: it begins anew.

    Raises:
        TrainingError: `out` holds something already, or, to resume, nothing.
    """
    has_run = (out / RUN_FILE).is_file()
    if resume:
        if not has_run:
            raise TrainingError(f"Nothing to resume in {out}: it holds no run.\nTrain anew.")
        if not checkpoints(out) and (out / WEIGHTS_FILE).exists():
            raise TrainingError(
                f"Nothing to resume in {out}: its checkpoints are gone, and only they can be.\n"
                "Restore them, or train anew with another --out."
            )
        clear_leftovers(out / FOLDER / PATTERN)
        return
    clear_leftovers(out / RUN_FILE)
    if all(path.name == LOCK_FILE for path in out.iterdir()):
        return
    if not replace:
        raise TrainingError(
            f"{out} is not empty.\n"
            "Go on with --resume, replace it with --force, or choose another --out."
        )
    if not has_run:
        raise TrainingError(
            f"{out} holds no run of this package, so it is not replaced.\n"
            "Remove it yourself, or choose another --out."
        )


def clear(out: Path) -> None:
    """Empty a run's folder. Its run.toml goes last: until then it can be replaced again."""
    kept = (LOCK_FILE, RUN_FILE)
    for path in [path for path in out.iterdir() if path.name not in kept]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    (out / RUN_FILE).unlink(missing_ok=True)


def read_run(out: Path) -> RunConfig:
    """The run that began in a folder, by the folder's name.

    Raises:
        TrainingError: the folder holds no `run.toml`, or it is damaged.
    """
    path = out / RUN_FILE
    try:
        text = path.read_text(encoding="utf-8")
        if not text.strip():
            raise ValueError("it is empty")
        return parse_run(out.name, text)
    except (OSError, ValueError, ConfigError) as error:  # a TOML or Unicode error is a ValueError
        reason = error.strerror if isinstance(error, OSError) else error
        raise TrainingError(
            f"Cannot read {path}: {reason}\nRestore it, or train anew with another --out."
        ) from error


def check_same_run(run: RunConfig, out: Path) -> None:
    """Refuse to go on with other settings than those the run began with.

    Raises:
        TrainingError: keys that differ from `out/run.toml`, all of them.
    """
    began = read_run(out)
    tables = {"got": asdict(run), "expected": asdict(began)}
    faults = [
        f"{table}.{key}: got {value!r}, expected {tables['expected'][table][key]!r}"
        for table, keys in tables["got"].items()
        if isinstance(keys, dict)
        for key, value in keys.items()
        if value != tables["expected"][table][key]
    ]
    if faults:
        raise TrainingError(
            f"{out} began as another run:\n{list_faults(faults)}\n"
            "Resume with what it began with, or train anew with another --out."
        )


def write_run(run: RunConfig, out: Path) -> None:
    """Keep the resolved run beside its adapter."""
    with atomic_file(out / RUN_FILE) as temporary:
        temporary.write_text(to_toml(run), encoding="utf-8")
