"""InterviewMate: turn Falcon-RW-1B into an interview coach with MLX and a hand-written LoRA."""

__version__ = "0.1.0"
