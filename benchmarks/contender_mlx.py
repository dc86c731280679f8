"""What the two contenders on MLX share: how its matrix products are timed, and its versions."""

from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from contender import Job, time_products

from interviewmate_mlx import backend

# isort: split
import mlx.core as mx


def time_mlx_products(job: Job, dtype: mx.Dtype) -> dict[str, float]:
    def make(rows: int, into: int, out: int, is_out_in: bool) -> Callable[[], None]:
        x = mx.random.normal((rows, into)).astype(dtype)
        weight = mx.random.normal((out, into) if is_out_in else (into, out)).astype(dtype)
        mx.eval(x, weight)
        return lambda: mx.eval(x @ (weight.T if is_out_in else weight))

    return time_products(job, make)


def versions(*names: str) -> dict[str, str]:
    """Of libraries, and the BLAS that is loaded, by name."""
    blas = Path(backend.machine().blas or "MLX's own").name
    return {name: metadata.version(name) for name in names} | {"blas": blas}
