"""`python -m interviewmate_mlx` is `imate-mlx`."""

from interviewmate_mlx.cli import main

main(prog_name="imate-mlx")
