"""Merges adapters into their base, and says what is left of them where that is quantised."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from interviewmate_mlx import __version__, backend
from interviewmate_mlx.adapter.card import CARD_FILE, base_in_words
from interviewmate_mlx.adapter.folder import RUN_FILE, Adapter
from interviewmate_mlx.adapter.merge import combine, read_biases, read_updates
from interviewmate_mlx.base.base import Base, public_name
from interviewmate_mlx.base.converted import set_chat_template
from interviewmate_mlx.base.merged import quantize_merged, write_merged
from interviewmate_mlx.base.quantization import Quantization
from interviewmate_mlx.base.record import origin_of
from interviewmate_mlx.coach.generate import open_base, warn_of_other_weights
from interviewmate_mlx.data.templates import own_template
from interviewmate_mlx.errors import AdapterError
from interviewmate_mlx.evaluation.evaluate import (
    common_base,
    common_cut,
    common_data,
    common_template,
    read_questions,
)
from interviewmate_mlx.evaluation.survival import Survival, measure_survival
from interviewmate_mlx.files import Progress, atomic_folder
from interviewmate_mlx.training.folder import read_run


@dataclass(frozen=True)
class Merged:
    """A merged model.

    Attributes:
        path: its folder.
        nbytes: of its weights.
        survival: what quantising left of the adapter; None if it is not quantised.
    """

    path: Path
    nbytes: int
    survival: Survival | None


def merge(
    adapters: Sequence[Path],
    out: Path,
    *,
    weights: Sequence[float] = (),
    base: str | None = None,
    dtype: str | None = None,
    quantization: Quantization | None = None,
    data: str | None = None,
    replace: bool = False,
    progress: Progress | None = None,
) -> Merged:
    """Merge adapters into their base, as a model folder. `out` appears whole or not at all.

    Args:
        adapters: PEFT folders of one base; several are combined, see `combine`.
        out: the folder to write.
        weights: of the adapters; by default 1 each.
        base: its name; by default the one that all adapters name.
        dtype: `float32`, `bfloat16` or `float16`; None keeps the base's own.
        quantization: of the merged weights; None leaves them plain.
        data: whose validation rows say what is left of the adapter once it is quantised; by
            default those that it was trained beside.
        replace: `out` may be a model that was merged before.
        progress: called with bytes done and bytes in all.

    Raises:
        AdapterError: an adapter does not fit, less than half of its effect would be left, or
            `out` exists and may not be replaced.
        InterviewMateError: something is missing or does not fit.
    """
    _check_out(out, replace)
    opened = [Adapter.open(folder) for folder in adapters]
    opened_base = open_base(base or common_base(opened), opened[0] if not base else None, progress)
    for adapter in opened:
        warn_of_other_weights(adapter, opened_base)
    factors = list(weights) or [1.0] * len(opened)
    network = opened_base.build(mx.float32)
    updates = [read_updates(adapter, network) for adapter in opened]
    is_alone = len(opened) == 1 and factors == [1.0]
    if not is_alone and any(adapter.config.bias != "none" for adapter in opened):
        raise AdapterError(
            "An adapter that brings biases (lora.bias) is not combined with others or weighted.\n"
            "Merge it alone, and train the others on the merged base."
        )
    combined = updates[0] if is_alone else combine(updates, factors)
    biases = read_biases(opened[0]) if is_alone else {}
    template = common_template(opened, opened_base.tokenizer)
    rows = None
    if quantization:
        runs = [read_run(one.folder) for one in opened if RUN_FILE in one.files]
        if not runs and not data:
            raise AdapterError(
                f"{opened[0].folder} does not say what it was trained on, so there are no rows to "
                "measure on what quantising leaves of it.\nName the data.",
                "data",
            )
        rows = read_questions(
            opened_base.tokenizer,
            data or common_data(runs),
            "valid",
            0,
            common_cut(runs),
            False,
            progress,
            template,
        )
    survival = None
    with atomic_folder(out, replace=replace) as folder:
        nbytes = write_merged(folder, opened_base, combined, dtype, progress, biases)
        if template != own_template(opened_base.tokenizer):
            set_chat_template(folder, template.text)
        _write_card(folder, opened, factors, opened_base)
        if quantization and rows:
            kind = backend.resolve_dtype("auto")
            merged = Base.open(folder)
            survival = measure_survival(opened_base, merged, quantization, kind, rows.examples)
            nbytes = quantize_merged(folder, opened_base, quantization)
    return Merged(out, nbytes, survival)


def _check_out(out: Path, replace: bool) -> None:
    """Refuse to replace what no merge wrote.

    Raises:
        AdapterError: there is something else.
    """
    if not out.exists() or (out.is_dir() and not os.listdir(out)):
        return
    card = out / CARD_FILE
    is_merged = card.is_file() and _MARK in card.read_text(encoding="utf-8", errors="replace")
    if not is_merged:
        raise AdapterError(
            f"{out} exists, and no merge wrote it; nothing else is replaced.\n"
            "Choose another folder.",
            "out",
        )
    if not replace:
        raise AdapterError(f"{out} exists.\nReplace it, or choose another folder.", "force", "out")


_MARK = "Merged with InterviewMate"


def _write_card(
    folder: Path, adapters: Sequence[Adapter], weights: Sequence[float], base: Base
) -> None:
    origin = origin_of(base.folder)
    name = public_name(base.name)
    listed = "\n".join(
        f"- `{adapter.folder.resolve().name}`, weight {weight:g}: rank {adapter.config.rank}, "
        f"alpha {adapter.config.alpha:g}"
        for adapter, weight in zip(adapters, weights, strict=True)
    )
    header = f"license: {origin.licence}\n" if origin.licence else ""
    is_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    header += f"base_model: {name}\n" if is_hub_id else ""
    text = f"""---
{header}tags: [mlx, interviewmate, merged]
---

# {folder.name}

{_MARK} (`interviewmate_mlx` {__version__}): these adapters are in the weights.

{listed}

## Base

{base_in_words(name if is_hub_id else Path(name).name, origin)}

This is a small model. It can be wrong and still sound sure. Check its answers before an interview.
"""
    (folder / CARD_FILE).write_text(text, encoding="utf-8")
