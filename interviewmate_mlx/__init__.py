"""InterviewMate: turn Falcon-RW-1B into an interview coach with MLX and a hand-written LoRA.

What most people need can be imported from here. It is loaded when it is first used, so
that importing the package starts nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interviewmate_mlx.coach.generate import answer as answer
    from interviewmate_mlx.coach.generate import load_coach as load_coach
    from interviewmate_mlx.coach.generate import stream_answer as stream_answer
    from interviewmate_mlx.coach.sampling import Sampling as Sampling
    from interviewmate_mlx.config import load_run as load_run
    from interviewmate_mlx.training.loop import train as train

__version__ = "0.1.0"

_HOME = {
    "Sampling": "coach.sampling",
    "answer": "coach.generate",
    "load_coach": "coach.generate",
    "load_run": "config",
    "stream_answer": "coach.generate",
    "train": "training.loop",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
