"""transformers and PEFT: as the seed ran them, or tuned, in float32, bfloat16 or float16.

Both use the sdpa attention (the only one of transformers' that is right for
ALiBi), labels of -100 on prompt and padding, no cache, and a loss divided by
the tokens of the whole update. In half precision the weights have it and the
LoRA matrices are float32: PEFT's default.
"""

import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from contender import Job, Result, Row, lora_start, peak_process_bytes, reset_peak, time_products
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

# Never reached: mlx-lm's trainer clips nothing, and all must take the same steps.
MAX_GRAD_NORM = 1e9


def main(job: Job) -> Result:
    torch.set_num_threads(job.threads)
    device = _device(job)
    dtype: torch.dtype = getattr(torch, job.dtype)
    if not job.one_row_padded_to:
        torch.set_float32_matmul_precision("high")  # no effect on a CPU; TF32 on CUDA
    base = AutoModelForCausalLM.from_pretrained(
        job.base, dtype=dtype, attn_implementation="sdpa", use_cache=False
    )
    config = LoraConfig(
        r=job.rank,
        lora_alpha=job.alpha,
        lora_dropout=0.0,
        target_modules=job.targets,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config).to(device).train()
    _set_start(model, job)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job.learning_rate, weight_decay=0.0)

    wait = _wait(device)
    reset_peak()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    losses, padded = [], 0
    for number, rows in enumerate(job.all_steps):
        if number == job.warmup:
            wait()
            start, padded = time.perf_counter(), 0
        num_predicted = sum(len(row.tokens) - row.num_prompt for row in rows)
        sums = []
        for group in [[row] for row in rows] if job.one_row_padded_to else [rows]:
            batch = collate(group, job.one_row_padded_to)
            padded += batch["input_ids"].numel()
            on_device = {name: tensor.to(device) for name, tensor in batch.items()}
            loss = model(**on_device, num_items_in_batch=num_predicted).loss
            loss.backward()
            sums.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(torch.stack(sums).sum())
    wait()
    seconds = time.perf_counter() - start
    return Result(
        losses=[loss.item() for loss in losses],
        seconds=seconds,
        padded_tokens=padded,
        head_tokens=padded,
        peak_process_bytes=peak_process_bytes(),
        peak_device_bytes=_peak_device_bytes(device),
        products=_time_torch_products(job, device, dtype),
        dtype=str(dtype).removeprefix("torch."),
        device=f"{device}: {torch.cuda.get_device_name()}" if device == "cuda" else device,
        versions={name: metadata.version(name) for name in ("torch", "transformers", "peft")},
    )


def collate(rows: list[Row], least_width: int) -> dict[str, torch.Tensor]:
    """Pad rows on the right to the longest of them, or to `least_width`.

    A row longer than `least_width` stays whole (the seed cut it): with other tokens there
    would be another loss.
    """
    width = max(least_width, *(len(row.tokens) for row in rows))
    batch = {
        "input_ids": torch.zeros((len(rows), width), dtype=torch.long),
        "attention_mask": torch.zeros((len(rows), width), dtype=torch.long),
        "labels": torch.full((len(rows), width), -100),
    }
    for number, row in enumerate(rows):
        tokens = torch.tensor(row.tokens)
        batch["input_ids"][number, : len(tokens)] = tokens
        batch["attention_mask"][number, : len(tokens)] = 1
        batch["labels"][number, row.num_prompt : len(tokens)] = tokens[row.num_prompt :]
    return batch


def _set_start(model: Any, job: Job) -> None:
    ending = ".lora_A.default.weight"
    matrices = {
        name.removeprefix("base_model.model.").removesuffix(ending): parameter
        for name, parameter in model.named_parameters()
        if name.endswith(ending)
    }
    with torch.no_grad():
        inputs = {path: matrix.shape[1] for path, matrix in matrices.items()}
        for path, start in lora_start(job.rank, inputs):
            matrices[path].copy_(torch.from_numpy(start))


def _device(job: Job) -> str:
    if job.device == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _wait(device: str) -> Callable[[], None]:
    return {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device, lambda: None)


def _peak_device_bytes(device: str) -> int | None:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    # On MPS what is held at the end: caches are not given back, so it is near the peak.
    return torch.mps.driver_allocated_memory() if device == "mps" else None


def _time_torch_products(job: Job, device: str, dtype: torch.dtype) -> dict[str, float]:
    wait = _wait(device)

    def make(rows: int, into: int, out: int, is_out_in: bool) -> Callable[[], None]:
        x = torch.randn(rows, into, device=device, dtype=dtype)
        shape = (out, into) if is_out_in else (into, out)
        weight = torch.randn(shape, device=device, dtype=dtype)

        def multiply() -> None:
            _ = x @ (weight.T if is_out_in else weight)
            wait()

        return multiply

    return time_products(job, make)


if __name__ == "__main__":
    job = Job.read(sys.argv[1])
    main(job).write(job.result)
