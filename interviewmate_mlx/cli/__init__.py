"""The `imate-mlx` command: one file a command, loaded when it is called.

A command parses, calls one function and prints. Results go to stdout, progress and
messages to stderr. Exit codes: 0 done, 1 a user's mistake or a missing thing, 2 wrong
usage, 130 interrupted.

Only here do imports stand inside functions, so that `--help` answers at once.
"""

from interviewmate_mlx.cli.main import main as main
