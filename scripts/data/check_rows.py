"""Recompute what the rows of data/interview-1000 claim: arithmetic, code, small simulations.

    .venv/bin/python scripts/data/check_rows.py [statistics coding-24 ...]

Without names, all of them. numpy and torch are needed; checks that use MLX or pandas are left out
where these are not installed. Ends with 1 if a check fails.
"""

import importlib
import pkgutil
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Beside this file; also where it is imported and not run.
sys.path.insert(0, str(Path(__file__).parent))

import row_checks
from row_checks.rows import ROWS

SLOW_S = 3.0  # longer than this is worth a line


def find_checks() -> dict[str, Callable[[], None]]:
    """The checks by the id of their row."""
    checks = {}
    for module in pkgutil.iter_modules(row_checks.__path__):
        for name, check in vars(importlib.import_module(f"row_checks.{module.name}")).items():
            if found := re.fullmatch(r"check_(\w+)_(\d+)", name):
                checks[f"{found[1].replace('_', '-')}-{found[2]}"] = check
    return checks


def main(names: list[str]) -> int:
    checks = find_checks()
    unknown = [row_id for row_id in checks if row_id not in ROWS]
    for row_id in unknown:
        print(f"{row_id}: has a check, but there is no such row")
    if names:
        checks = {
            row_id: check
            for row_id, check in checks.items()
            if row_id in names or row_id.rpartition("-")[0] in names
        }
    num_failed = 0
    started = time.perf_counter()
    for row_id, check in checks.items():
        check_started = time.perf_counter()
        try:
            check()
        except Exception as error:
            num_failed += 1
            print(f"{row_id}: {type(error).__name__}: {error}")
        elapsed_s = time.perf_counter() - check_started
        if elapsed_s > SLOW_S:
            print(f"{row_id}: took {elapsed_s:.0f} s")
    elapsed_s = time.perf_counter() - started
    print(f"{len(checks)} checks of {len(ROWS)} rows, {num_failed} failed, {elapsed_s:.0f} s")
    return int(bool(num_failed or unknown or not checks))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
