"""This package, as `imate-mlx train` runs it: `run_steps` over a prepared task."""

import sys
import time

from contender import Job, Result, lora_start, peak_process_bytes, reset_peak
from contender_mlx import time_mlx_products, versions

from interviewmate_mlx import backend

# isort: split
import mlx.core as mx

from interviewmate_mlx.config import load_run
from interviewmate_mlx.data.batches import collate, epoch_steps
from interviewmate_mlx.model.lora import lora_layers
from interviewmate_mlx.training.loop import run_steps
from interviewmate_mlx.training.optimizer import adamw
from interviewmate_mlx.training.step import Step
from interviewmate_mlx.training.task import Task, prepare


def main(job: Job) -> Result:
    here = backend.machine()
    task = prepare(load_run("A", job.overrides))
    layers = dict(lora_layers(task.model))
    inputs = {path: layer.lora_A.weight.shape[1] for path, layer in layers.items()}
    for path, start in lora_start(job.rank, inputs):
        layers[path].lora_A.weight = mx.array(start)
    with task.memory_limits(), task.executor.opened():
        step = Step(task.model, adamw(), task.run.train.max_grad_norm, task.executor)

        def run(count: int) -> tuple[list[float], float]:
            start = time.perf_counter()
            first, last = job.first_step, job.first_step + count
            events = run_steps(task, step, first, last, lambda: False)
            losses = [event.loss for event in events]
            return losses, time.perf_counter() - start

        reset_peak()
        mx.reset_peak_memory()
        losses, _ = run(job.warmup)
        timed_losses, seconds = run(len(job.steps))
    padded, head = _work(task, job)
    return Result(
        losses=losses + timed_losses,
        seconds=seconds,
        padded_tokens=padded,
        head_tokens=head,
        peak_process_bytes=peak_process_bytes(),
        peak_device_bytes=mx.get_peak_memory(),
        products=time_mlx_products(job, task.model.dtype),
        dtype=str(task.model.dtype).removeprefix("mlx.core."),
        device=f"{here.device}: {here.device_name}",
        versions=versions("interviewmate-mlx", "mlx"),
    )


def _work(task: Task, job: Job) -> tuple[int, int]:
    """Padded tokens through the blocks and through the head, in the timed updates."""
    train = task.run.train
    order = epoch_steps(list(map(len, task.rows.train)), train.effective_batch, train.seed, epoch=0)
    steps = order[job.first_step : job.first_step + len(job.steps)]
    microbatches = [
        collate(group)
        for step in steps
        for group in task.executor.split(
            [task.rows.train[row] for row in step], task.memory.token_budget
        )
    ]
    return sum(m.inputs.size for m in microbatches), sum(m.positions.size for m in microbatches)


if __name__ == "__main__":
    job = Job.read(sys.argv[1])
    main(job).write(job.result)
