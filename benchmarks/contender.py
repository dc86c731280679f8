"""Who the contenders are, what they are told, and what they answer.

Imports no framework, for each brings a BLAS of its own.

A contender is a script that is run in a process of its own with one argument,
a file of JSON: a `Job`. It writes a `Result` to the job's `result`.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Contender:
    """A script, and what its job says beside the work."""

    name: str
    script: str
    dtype: str
    one_row_padded_to: int = 0  # 0: all rows of an update in one batch


CONTENDERS = {
    1: Contender("this package", "contender_ours.py", "auto"),
    2: Contender("mlx-lm's trainer", "contender_mlx_lm.py", "auto"),
    3: Contender("PEFT as in the seed, fp32", "contender_peft.py", "float32", 256),
    4: Contender("PEFT tuned, fp32", "contender_peft.py", "float32"),
    5: Contender("PEFT tuned, bf16", "contender_peft.py", "bfloat16"),
    6: Contender("PEFT tuned, fp16", "contender_peft.py", "float16"),
}


@dataclass(frozen=True)
class Row:
    """Token ids, and how many of them are the prompt: there is no loss on those."""

    tokens: list[int]
    num_prompt: int


@dataclass(frozen=True)
class Job:
    """One contender's share of a round.

    Attributes:
        name: of the contender.
        base: the folder of the base.
        steps: the rows of each timed update.
        warmup: how many of `steps` are run first, untimed.
        first_step: the number of `steps[0]` in the run, for who finds the rows by itself.
        overrides: `table.key=value` of the run, for the same one.
        dtype: of weights and activations; `auto` is the framework's own choice.
        one_row_padded_to: a width; 0 for all rows of an update in one batch.
        device: `cpu`, or `auto` for the GPU where there is one.
        threads: of the CPU.
        targets: names of the layers that get a LoRA.
        result: the file to write.
    """

    name: str
    base: str
    steps: list[list[Row]]
    warmup: int
    first_step: int
    overrides: list[str]
    dtype: str
    one_row_padded_to: int
    device: str
    threads: int
    rank: int
    alpha: float
    targets: list[str]
    learning_rate: float
    result: str

    @classmethod
    def read(cls, path: str) -> "Job":
        fields = json.loads(Path(path).read_text())
        steps = [[Row(**row) for row in rows] for rows in fields.pop("steps")]
        return cls(steps=steps, **fields)

    @property
    def all_steps(self) -> list[list[Row]]:
        """Those of the warm-up, and the timed ones: the warm-up's rows come twice."""
        return self.steps[: self.warmup] + self.steps

    @property
    def num_tokens(self) -> int:
        """Real tokens of the timed updates, without padding."""
        return sum(len(row.tokens) for rows in self.steps for row in rows)

    @property
    def num_predicted(self) -> int:
        """Tokens with a loss of the timed updates."""
        return self.num_tokens - sum(row.num_prompt for rows in self.steps for row in rows)


@dataclass(frozen=True)
class Result:
    """What one process measured.

    Attributes:
        losses: of each update, warm-up first: nats a token with a loss.
        seconds: of the timed updates together.
        padded_tokens: that went through the blocks in them, padding included.
        head_tokens: that went through the head, likewise.
        peak_process_bytes: resident memory of the process, at its highest in the updates.
        peak_device_bytes: what the framework had allocated on its device at its highest;
            None where it does not count.
        products: seconds a token of each matrix product, by its name in `products`.
        dtype: of the weights.
        device: in words.
        versions: of the libraries.
    """

    losses: list[float]
    seconds: float
    padded_tokens: int
    head_tokens: int
    peak_process_bytes: int
    peak_device_bytes: int | None
    products: dict[str, float]
    dtype: str
    device: str
    versions: dict[str, str]

    def write(self, path: str) -> None:
        Path(path).write_text(json.dumps(asdict(self)))


def shape_of(base: str) -> dict[str, int]:
    """C, V and the number of layers of a base, from its `config.json`."""
    config = json.loads((Path(base) / "config.json").read_text())
    return {
        "C": config["hidden_size"],
        "F": config.get("ffn_hidden_size") or 4 * config["hidden_size"],
        "V": config["vocab_size"],
        "layers": config["num_hidden_layers"],
    }


def lora_start(rank: int, inputs: dict[str, int]) -> Iterator[tuple[str, np.ndarray]]:
    """The same A (rank, in) for every contender, by the path of its layer. B starts at zero.

    Args:
        rank: of the LoRA.
        inputs: the input size of each target, by path.
    """
    rng = np.random.default_rng(0)
    for path in sorted(inputs):
        bound = inputs[path] ** -0.5
        yield path, rng.uniform(-bound, bound, (rank, inputs[path])).astype(np.float32)


def reset_peak() -> None:
    """Forget the peak of loading, where the system can (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_process_bytes() -> int:
    """The highest resident memory since `reset_peak`; of the whole process where it cannot."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def products(shape: dict[str, int]) -> dict[str, tuple[int, int]]:
    """The matrix products of a training step, (in, out) each; the backward ones end in "'".

    The weights are frozen, so there is one product backward for each forward.
    """
    C, F, V = shape["C"], shape["F"], shape["V"]
    forward = {"qkv": (C, 3 * C), "dense": (C, C), "up": (C, F), "down": (F, C), "head": (C, V)}
    return forward | {name + "'": (out, into) for name, (into, out) in forward.items()}


def time_products(
    job: Job, make: Callable[[int, int, int, bool], Callable[[], None]]
) -> dict[str, float]:
    """Seconds a token of each of `products`, the best of three, at the rows of a mean update.

    Args:
        job: whose tokens an update say how many rows a product has.
        make: takes rows, in, out, and whether the weight lies (out, in); gives a function
            that multiplies once and waits for it.
    """
    seconds = {}
    for name, (into, out) in products(shape_of(job.base)).items():
        total = job.num_predicted if name.startswith("head") else job.num_tokens
        rows = round(total / len(job.steps))
        multiply = make(rows, into, out, not name.endswith("'"))
        multiply()
        times = []
        for _ in range(3):
            start = time.perf_counter()
            multiply()
            times.append(time.perf_counter() - start)
        seconds[name] = min(times) / rows
    return seconds
