"""What bfloat16 costs a LoRA's gradients: of a base in it, and of products with LoRA in it, too.

    python benchmarks/gradient_error.py

The error is the norm of the difference from a float32 run's gradients, by their norm: a mean over
the matrices of Run A on `mini`, three steps' rows, two starts with a B that is not 0.
"""

import argparse
import os
from unittest import mock

import numpy as np

from interviewmate_mlx import backend as backend  # its BLAS must be loaded before MLX

# isort: split
import mlx.core as mx

from interviewmate_mlx.config import load_run
from interviewmate_mlx.model.lora import LoRALinear, lora_layers
from interviewmate_mlx.model.tree import named_arrays
from interviewmate_mlx.training.loop import rows_of_steps
from interviewmate_mlx.training.optimizer import adamw
from interviewmate_mlx.training.step import Step
from interviewmate_mlx.training.task import prepare

STEPS = 3


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print("LoRA's products in float32: {:.4f}, in bfloat16: {:.4f}".format(*errors([0, 1])))


def errors(seeds: list[int]) -> tuple[float, float]:
    """The mean error with LoRA's products in float32, and with those in bfloat16."""
    found: dict[str, list[float]] = {"wide": [], "narrow": []}
    with mock.patch.dict(os.environ, {"INTERVIEWMATE_PATH": "gpu"}):
        for seed in seeds:
            truth = gradients("float32", seed)
            for name, dtype in (("wide", mx.float32), ("narrow", mx.bfloat16)):
                ours = gradients("bfloat16", seed, dtype)
                found[name] += [
                    float(np.linalg.norm(ours[path] - array) / np.linalg.norm(array))
                    for path, array in truth.items()
                ]
    return float(np.mean(found["wide"])), float(np.mean(found["narrow"]))


def gradients(dtype: str, seed: int, of_lora: mx.Dtype = mx.float32) -> dict[str, np.ndarray]:
    """The sums over three steps' rows, by parameter path.

    Args:
        dtype: of the base.
        seed: of LoRA's B.
        of_lora: what LoRA's products are computed in.
    """
    task = prepare(load_run("A", [f"model.dtype={dtype}", "model.base=mini"]))
    mx.random.seed(seed)
    for _, layer in lora_layers(task.model):
        layer.lora_B.weight = 0.02 * mx.random.normal(layer.lora_B.weight.shape)
    with mock.patch.object(LoRALinear, "dtype_for", return_value=of_lora):
        step = Step(task.model, adamw(), 1.0, task.executor)
        for number, rows in rows_of_steps(task, 0, STEPS):
            groups = task.executor.split(rows, task.memory.token_budget)
            step.accumulate(task.objective.collate(groups, rows), [0, number])
    return {path: np.array(array) for path, array in named_arrays(step.sums[-1]).items()}


if __name__ == "__main__":
    main()
