"""Processes that are ranks of one run, and what they have trained."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from interviewmate_mlx.training.metrics import read_metrics

# Sums of up to some hundred gradients in another order: each step's rounding, 2^-24 a sum, is
# carried through nine updates of Adam, which divides by small numbers.
LOSS, MATRIX = 1e-5, 1e-3


IMATE = ("-m", "interviewmate_mlx")


def start(
    words: Sequence[str],
    size: int,
    places: list[Path] | None = None,
    program: Sequence[str] = IMATE,
) -> list[subprocess.Popen[str]]:
    """The ranks of a command, without a launcher, so that each can be told apart."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(size)]
    ring = json.dumps([[f"127.0.0.1:{s.getsockname()[1]}"] for s in sockets])
    for one in sockets:
        one.close()
    hosts = Path("hosts").absolute()
    hosts.write_text(ring, encoding="utf-8")
    return [
        subprocess.Popen(
            [sys.executable, *program, *words],
            env=os.environ
            | ({"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)} if size > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=places[rank] if places else None,
        )
        for rank in range(size)
    ]


def finish(ranks: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Of each rank: its exit status, stdout and stderr."""
    try:
        said = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, *texts) for rank, texts in zip(ranks, said, strict=True)]


def outcome(out: str, file: str = "adapter_model.safetensors") -> tuple[list[float], np.ndarray]:
    losses = [line["loss"] for line in read_metrics(Path(out, "metrics.jsonl"))]
    tensors = mx.load(f"{out}/{file}")
    return losses, np.concatenate([np.array(a).reshape(-1) for a in tensors.values()])
