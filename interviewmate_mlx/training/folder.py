"""A run's folder: which process holds it, which run is in it, and what may be done to it."""

import shutil
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from interviewmate_mlx.adapter.card import rows_in_words, write_card
from interviewmate_mlx.adapter.config import AdapterConfig
from interviewmate_mlx.adapter.folder import WEIGHTS_FILE
from interviewmate_mlx.config import RunConfig, parse_run, to_toml
from interviewmate_mlx.data.templates import Template
from interviewmate_mlx.errors import ConfigError, TrainingError, list_faults
from interviewmate_mlx.files import LOCK_FILE, atomic_file, clear_leftovers, contents, locked
from interviewmate_mlx.hub.names import is_hub_id, local_path, shipped_base
from interviewmate_mlx.training import whole
from interviewmate_mlx.training.checkpoint import FOLDER, PATTERN, checkpoints
from interviewmate_mlx.training.events import Summary

RUN_FILE = "run.toml"
_LENGTH = {"train.epochs", "train.max_steps"}
# What a run that goes on may be given differently. Base, data and first adapter must be the same by
# their content.
_CHANGEABLE = (
    "model.base",
    "data.path",
    "lora.start_from",
    *sorted(_LENGTH),
    "train.save_every",
    "train.keep_checkpoints",
    "validate.every",
    "validate.early_stop_patience",
    "log.to",
    "log.project",
)


@contextmanager
def lock_run(out: Path) -> Iterator[None]:
    """Lock a run's folder for this process while the block runs.

    Raises:
        TrainingError: another process trains in it, or it is a file.
        StorageError: it cannot be written to.
    """
    if out.is_file():
        raise TrainingError(f"{out} is a file.\nChoose another folder.", "out")
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(out))
        except BlockingIOError as error:
            raise TrainingError(
                f"{out} is in use: {error.strerror}.\n"
                "Wait until it ends, stop it, or choose another folder.",
                "out",
            ) from error
        yield


def check_out(out: Path, resume: bool, replace: bool = False) -> None:
    """Refuse to mix a new run with an old one, and to replace what is not a run.

    A run that was killed before its first checkpoint can be resumed too: it starts again.

    Raises:
        TrainingError: `out` holds something already, or, to resume, nothing.
    """
    has_run = (out / RUN_FILE).is_file()
    if resume:
        if not has_run:
            raise TrainingError(f"Nothing to resume in {out}: it holds no run.\nTrain a new one.")
        has_weights = (out / WEIGHTS_FILE).exists() or (out / whole.WEIGHTS_FILE).exists()
        if not checkpoints(out) and has_weights:
            raise TrainingError(
                f"Nothing to resume in {out}: its checkpoints are gone.\n"
                "Restore them, or train again into another folder.",
                "out",
            )
        clear_leftovers(out / FOLDER / PATTERN)
        return
    clear_leftovers(out / "*")
    if all(path.name == LOCK_FILE for path in contents(out)):
        return
    if not replace:
        raise TrainingError(
            f"{out} is not empty.\nResume its run, replace it, or choose another folder.",
            "resume",
            "replace",
            "out",
        )
    if not has_run:
        raise TrainingError(
            f"{out} holds no run of this package, so it is not replaced.\n"
            "Remove it yourself, or choose another folder.",
            "out",
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
    """The run that began in a folder.

    Raises:
        TrainingError: the folder holds no `run.toml`, or it is damaged.
    """
    path = out / RUN_FILE
    if not path.is_file():
        raise TrainingError(f"Nothing to resume in {out}: it holds no run.\nTrain a new one.")
    try:
        text = path.read_text(encoding="utf-8")
        if not text.strip():
            raise ValueError("it is empty")
        return parse_run(out.name, text)
    except (OSError, ValueError, ConfigError) as error:  # a TOML or Unicode error is a ValueError
        reason = error.strerror if isinstance(error, OSError) else error
        raise TrainingError(
            f"Cannot read {path}: {reason}\nRestore it, or train again into another folder.", "out"
        ) from error


def check_same_run(run: RunConfig, began: RunConfig, out: Path) -> None:
    """Refuse to go on with settings that would make another run of it.

    Raises:
        TrainingError: keys that differ and may not, all of them.
    """
    faults = [
        f"{key}: got {got!r}, expected {expected!r}"
        for key, got, expected in _differences(run, began)
        if key not in _CHANGEABLE
    ]
    if faults:
        raise TrainingError(
            f"{out} began as another run:\n{list_faults(faults)}\n"
            f"Resume it with its own values, or train again into another folder.\n"
            f"What may change: {', '.join(_CHANGEABLE)}.",
            "out",
        )


def changed_settings(run: RunConfig, began: RunConfig) -> list[str]:
    """Say which settings are not those of the last checkpoint."""
    changes = [f"{key} {was!r} -> {now!r}" for key, now, was in _differences(run, began)]
    if not changes:
        return []
    follows = _LENGTH & {key for key, *_ in _differences(run, began)}
    schedule = "; the learning rate follows the new number of steps" if follows else ""
    return [f"changed on purpose: {', '.join(changes)}{schedule}"]


def _differences(run: RunConfig, began: RunConfig) -> list[tuple[str, Any, Any]]:
    """Keys, and their values in both, where two runs differ; names are no difference."""
    ours, theirs = asdict(run), asdict(began)
    return [
        (f"{table}.{key}", value, theirs[table][key])
        for table, keys in ours.items()
        if table != "name"
        for key, value in keys.items()
        if value != theirs[table][key]
    ]


def write_run(run: RunConfig, out: Path) -> None:
    """Keep the resolved run beside its adapter."""
    with atomic_file(out / RUN_FILE) as temporary:
        temporary.write_text(to_toml(run), encoding="utf-8")


def adapter_config(
    run: RunConfig, targets: tuple[str, ...], layer_numbers: tuple[int, ...] | None
) -> AdapterConfig:
    """What the adapter's folder says of it.

    Args:
        run: the run.
        targets: the names of the layers.
        layer_numbers: of the blocks; None for all.
    """
    lora, base = run.lora, run.model.base
    # A folder by its whole path: the adapter is loaded from other folders too.
    if not shipped_base(base) and local_path(base).exists():
        base = str(local_path(base).resolve())
    return AdapterConfig(
        base,
        lora.rank,
        lora.alpha,
        lora.dropout,
        targets,
        lora.rslora,
        layer_numbers=layer_numbers,
        dora=lora.dora,
        bias=lora.bias,
    )


def write_run_card(
    out: Path,
    run: RunConfig,
    config: AdapterConfig | None,
    summary: Summary,
    template: Template,
    end_ids: Collection[int],
) -> None:
    """Write the card of a run's adapter, or model.

    Args:
        out: the run's folder, with its `chat_template.jinja` if it has one.
        run: the run.
        config: the adapter's; None if all weights of the base were trained.
        summary: its numbers.
        template: how prompts are put to the model.
        end_ids: the tokens that end an answer, if the tokenizer's own is not the only one.
    """
    base = run.model.base
    start, numbers = run.lora.start_from, config.layer_numbers if config else None
    kind, is_part = "adapter" if config else "model", run.lora.init != "default"
    facts = {
        **({"blocks": ", ".join(map(str, numbers))} if numbers else {}),
        **({"started as": f"{run.lora.init}, of rank {run.lora.rank}"} if is_part else {}),
        **({"trained biases": run.lora.bias} if run.lora.bias != "none" else {}),
        **({"started from": f"the adapter {start}"} if start else {}),
        "trainable parameters": f"{summary.trainable_parameters:,} ({summary.trainable_share:.2%})",
        "steps, epochs": f"{summary.steps}, {summary.epochs:.2f}",
        f"training loss, first and last {_steps(summary.loss_window_steps)}": (
            f"{summary.first_loss:.4f}, {summary.final_loss:.4f}"
        ),
    }
    if summary.base_valid_loss is not None and summary.best_valid_loss is not None:
        began = "the adapter it began as" if start else "base"
        facts[f"validation loss, {began}"] = f"{summary.base_valid_loss:.4f}"
        facts[f"validation loss, {kind} (step {summary.best_step})"] = (
            f"{summary.best_valid_loss:.4f}"
        )
    measured = summary.best_valid_measures
    if "margin" in measured:
        facts["validation margin of rewards"] = f"{measured['margin']:.4f}"
    trained_on = (
        f"Trained with InterviewMate (`interviewmate_mlx` {summary.package_version}) on "
        f"{summary.train_rows} {_rows_in_words(run, template)} ({run.data.path})."
    )
    if config is None:
        whole.write_model_card(out, run.name, base, facts, trained_on, template, end_ids)
        return
    is_shipped = shipped_base(base) is not None
    write_card(
        out,
        run.name,
        replace(config, base=base),
        facts,
        trained_on=trained_on,
        base_hub_id=base if is_hub_id(base) else None,
        # transformers needs the folder of a shipped base; its name means something here alone.
        base_folder=f"models/{base}" if is_shipped else base,
        base_hint=f"The base is shipped: `imate-mlx convert {base}` first." if is_shipped else "",
        template=template,
        end_ids=end_ids,
    )


def _rows_in_words(run: RunConfig, template: Template) -> str:
    if run.train.method == "sft":
        return f"{'packed ' if run.data.pack else ''}{rows_in_words(template)}"
    kind = "answers with a label" if run.train.method == "kto" else "pairs of answers"
    return f"{kind}, by {run.train.method.upper()}"


def _steps(count: int) -> str:
    return "step" if count == 1 else f"{count} steps"
