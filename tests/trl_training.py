"""Runs of TRL's trainers over rows of token ids: what our preference losses are compared with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import write_tokenizer
from datasets import Dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from interviewmate_mlx.data.pairs import Judged, Pair
from interviewmate_mlx.data.prompts import Example


def train_with_trl(
    kind: str,
    model: torch.nn.Module,
    steps: Sequence[Sequence[Any]],
    folder: Path,
    peak: float,
    clip: float,
    **settings: Any,
) -> list[float]:
    """The losses of one update a step, by AdamW at a level learning rate.

    Args:
        kind: `dpo`, `kto`, `orpo` or `cpo`: the trainer.
        model: PEFT's.
        steps: of as many rows each.
        folder: to write to.
        peak: the learning rate.
        clip: the largest norm of the gradient.
        settings: of the trainer's config.
    """
    config, trainer, collate, keys = {
        "dpo": (DPOConfig, DPOTrainer, _collate_pairs, ("chosen", "rejected")),
        "kto": (KTOConfig, KTOTrainer, _collate_judged, ("completion", "label")),
        "orpo": (ORPOConfig, ORPOTrainer, _collate_sides, ("chosen", "rejected")),
        "cpo": (CPOConfig, CPOTrainer, _collate_sides, ("chosen", "rejected")),
    }[kind]
    rows = [row for step in steps for row in step]
    texts = {"prompt": "a", "chosen": "b", "rejected": "c", "completion": "b", "label": True}
    content = {key: [texts[key]] * len(rows) for key in ("prompt", *keys)}
    if kind == "kto":
        content["label"] = [row.is_good for row in rows]
    dataset = Dataset.from_dict(content | {"number": list(range(len(rows)))})
    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(folder / "tokenizer"))
    tokenizer.pad_token = tokenizer.eos_token
    arguments = config(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=len(steps[0]),
        max_steps=len(steps),
        learning_rate=peak,
        lr_scheduler_type="constant",
        max_grad_norm=clip,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        **settings,
    )
    losses: list[float] = []

    class Recorded(trainer):
        def compute_loss(self, *given: Any, **also: Any) -> Any:
            loss = super().compute_loss(*given, **also)
            losses.append((loss[0] if isinstance(loss, tuple) else loss).item())
            return loss

    Recorded(
        model=model,
        args=arguments,
        train_dataset=dataset,
        processing_class=tokenizer,
        # Our own token ids, in place of those of the texts.
        data_collator=lambda found: collate([rows[row["number"]] for row in found]),
    ).train()
    return losses


def _padded(sequences: Sequence[np.ndarray], filler: int) -> torch.Tensor:
    width = max(map(len, sequences))
    padded = [np.pad(s, (0, width - len(s)), constant_values=filler) for s in sequences]
    return torch.tensor(np.stack(padded).astype(np.int64))


def _fields(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    return {
        "input_ids": _padded([e.tokens for e in examples], 0),
        "attention_mask": _padded([np.ones(len(e)) for e in examples], 0),
        "completion_mask": _padded([e.loss_mask for e in examples], 0),
    }


def _collate_pairs(pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
    return _fields([pair.chosen for pair in pairs] + [pair.rejected for pair in pairs])


def _collate_judged(rows: Sequence[Judged]) -> dict[str, torch.Tensor]:
    others = {f"KL_{name}": t for name, t in _fields([row.other for row in rows]).items()}
    labels = torch.tensor([row.is_good for row in rows])
    return {**_fields([row.example for row in rows]), **others, "label": labels}


def _collate_sides(pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
    found = {}
    for side in ("chosen", "rejected"):
        examples = [getattr(pair, side) for pair in pairs]
        found[f"{side}_input_ids"] = _padded([e.tokens for e in examples], 0)
        found[f"{side}_attention_mask"] = _padded([np.ones(len(e)) for e in examples], 0)
        labels = [np.where(e.loss_mask, e.tokens, -100) for e in examples]
        found[f"{side}_labels"] = _padded(labels, -100)
    return found
