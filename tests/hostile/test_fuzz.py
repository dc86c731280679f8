"""A short, fixed part of what `scripts/fuzz.py` does for as long as one likes."""

import re
import subprocess
import sys
from pathlib import Path

import fuzzing
import pytest

ROOT = Path(__file__).parents[2]


def test_broken_files_are_read_or_refused_within_bounds(tmp_path):
    words = [sys.executable, str(ROOT / "scripts/fuzz.py"), "--examples", "50"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == list(fuzzing.TARGETS)
    for line in lines:
        read, refused = map(int, re.search(r"(\d+) read, (\d+) refused", line).groups())
        assert read > 0 < refused, line
        assert read + refused >= 40, line


@pytest.mark.parametrize("fault", [KeyError("x"), RecursionError(), MemoryError()], ids=repr)
def test_a_fault_that_is_not_ours_is_found(tmp_path, fault):
    def read(path: Path) -> None:
        raise fault

    target = fuzzing.Target("x", fuzzing.config_target().contents, read)
    with pytest.raises(type(fault)):
        fuzzing.is_refused(target, b"", tmp_path)
