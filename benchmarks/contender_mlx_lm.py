"""mlx-lm's trainer, unchanged, with this package's model file and the same BLAS.

What is handed to it is mended, so that it does the same work:
- Batches are made by its own `iterate_batches`, but from the rows of one update at a
  time: its length sort counts the wrong thing, and drops rows that fill no batch.
- A row's length is handed on less one, because its loss counts one pad token a row.
- AdamW corrects its bias, as torch's does.
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from contender import Job, Result, lora_start, peak_process_bytes, reset_peak
from contender_mlx import time_mlx_products, versions

from interviewmate_mlx import backend

# isort: split
import mlx.core as mx
import mlx.optimizers as optim
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.tuner.trainer import TrainingArgs, iterate_batches, train
from mlx_lm.tuner.utils import linear_to_lora_layers

from interviewmate_mlx.base.base import Base


class Clock(TrainingCallback):
    """Keeps the loss of each update and when it was there."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.times: list[float] = [time.perf_counter()]

    def on_train_loss_report(self, train_info: dict) -> None:
        self.losses.append(train_info["train_loss"])
        self.times.append(time.perf_counter())


def main(job: Job) -> Result:
    here = backend.machine()
    dtype = backend.resolve_dtype(job.dtype)
    model = Base.open(Path(job.base)).load(dtype)
    model.freeze()
    paths = [p for p, _ in model.layers[0].named_modules() if p.split(".")[-1] in job.targets]
    lora = {"rank": job.rank, "scale": job.alpha / job.rank, "dropout": 0.0, "keys": paths}
    linear_to_lora_layers(model, len(model.layers), lora)
    layers = {path: m for path, m in model.named_modules() if isinstance(m, LoRALinear)}
    inputs = {path: layer.lora_a.shape[0] for path, layer in layers.items()}
    for path, start in lora_start(job.rank, inputs):
        layers[path].lora_a = mx.array(start.T)

    batch_sizes: list[int] = []

    def batches_of_steps(**_: Any) -> Iterator[tuple[mx.array, mx.array]]:
        for rows in job.all_steps:
            dataset = [(row.tokens, row.num_prompt) for row in rows]
            for batch, spans in iterate_batches(dataset, len(rows), max_seq_length=1 << 20):
                batch_sizes.append(batch.shape[0] * (batch.shape[1] - 1))
                yield batch, spans - mx.array([0, 1])

    reset_peak()
    mx.reset_peak_memory()
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArgs(
            iters=len(job.all_steps),
            steps_per_report=1,
            steps_per_save=len(job.all_steps) + 1,
            adapter_file=f"{folder}/adapters.safetensors",
        )
        optimizer = optim.AdamW(job.learning_rate, weight_decay=0.0, bias_correction=True)
        train(
            model,
            optimizer,
            train_dataset=None,
            args=settings,
            iterate_batches=batches_of_steps,
            training_callback=clock,
        )
    padded = sum(batch_sizes[job.warmup :])
    return Result(
        losses=clock.losses,
        seconds=clock.times[-1] - clock.times[job.warmup],
        padded_tokens=padded,
        head_tokens=padded,
        peak_process_bytes=peak_process_bytes(),
        peak_device_bytes=mx.get_peak_memory(),
        products=time_mlx_products(job, dtype),
        dtype=str(dtype).removeprefix("mlx.core."),
        device=f"{here.device}: {here.device_name}",
        versions=versions("mlx-lm", "mlx"),
    )


if __name__ == "__main__":
    job = Job.read(sys.argv[1])
    main(job).write(job.result)
