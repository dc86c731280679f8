"""The header of MLX's CPU kernels, read by g++ once for all of them.

MLX compiles each fused kernel by itself, and most of that time is the same header: 0.14 s a
kernel instead of 0.59. The tests meet some hundreds that a new machine has not compiled yet.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def precompiled() -> Iterator[None]:
    """While the block runs, g++ finds the header as it has parsed it.

    Afterwards it does not: g++ would not see that another MLX has brought another header.
    """
    spec = importlib.util.find_spec("mlx")
    folders = spec.submodule_search_locations if spec else None
    header = Path(*folders or "", "include/mlx/backend/cpu/compiled_preamble.h")
    if sys.platform != "linux" or not header.is_file() or not shutil.which("g++"):
        yield
        return
    parsed, own = (header.with_name(f"{header.name}{end}") for end in (".gch", f".{os.getpid()}"))
    # With the options that MLX passes: with others g++ reads the header itself.
    command = ["g++", "-std=c++17", "-O3", "-Wall", "-fPIC", "-x", "c++-header"]
    command += ["-I", str(header.parents[3]), str(header), "-o", str(own)]
    if subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0:
        own.rename(parsed)
    try:
        yield
    finally:
        parsed.unlink(missing_ok=True)
