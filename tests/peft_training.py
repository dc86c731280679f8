"""A training run of PEFT and torch, a row at a time: what ours is compared with."""

import numpy as np
import torch

from interviewmate_mlx.adapter.folder import PREFIX
from interviewmate_mlx.data.batches import epoch_steps
from interviewmate_mlx.data.prompts import Example
from interviewmate_mlx.data.records import Record

BATCH, CLIP, DECAY = 4, 0.5, 0.01


def random_rows(count: int) -> list[Example]:
    """Rows of unequal length with answers of unequal length."""
    rng = np.random.default_rng(3)
    rows = []
    for _ in range(count):
        length = int(rng.integers(8, 60))
        prompt = int(rng.integers(2, length - 2))
        tokens = rng.integers(0, 384, length).astype(np.int32)
        rows.append(Example(Record("row"), tokens, np.arange(length) >= prompt))
    return rows


def steps_of(rows: list[Example], count: int) -> list[list[Example]]:
    """The rows of so many steps, epoch after epoch."""
    lengths, epoch, steps = [len(row) for row in rows], 0, []
    while len(steps) < count:
        steps += [[rows[i] for i in s] for s in epoch_steps(lengths, BATCH, 0, epoch)]
        epoch += 1
    return steps[:count]


def train_in_torch(model, steps, schedule, peak) -> list[float]:
    """A row at a time; the sum of the losses divided by the tokens of the whole step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=peak, weight_decay=DECAY)
    scheduler = schedule(optimizer, num_warmup_steps=5, num_training_steps=len(steps))
    losses = []
    for rows in steps:
        num_tokens = sum(int(row.loss_mask.sum()) for row in rows)
        total = 0.0
        for row in rows:
            ids = torch.tensor(row.tokens[None].astype(np.int64))
            labels = torch.where(torch.tensor(row.loss_mask[None]), ids, -100)
            logits = model(input_ids=ids).logits
            loss = torch.nn.functional.cross_entropy(
                logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum"
            )
            (loss / num_tokens).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(total / num_tokens)
    return losses


def start_alike(reference: torch.nn.Module, start: dict[str, np.ndarray]) -> None:
    """Give PEFT's matrices our values."""
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.tensor(start[our_name(name)]))


def our_name(name: str) -> str:
    """Our path of a parameter of PEFT's."""
    return name.removeprefix(PREFIX).replace(".default", "")
