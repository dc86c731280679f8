"""A table of bad inputs, each held to its error, its words, and to leaving nothing behind."""

import hashlib
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from click.testing import CliRunner

from interviewmate_mlx.cli import main

# For a process of its own, with an address space of 8 GB: the libraries map half of that. macOS
# knows no such limit.
LIMITED = """
import resource, sys
if sys.platform == "linux":
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
from interviewmate_mlx.cli import main
main()
"""


@dataclass(frozen=True)
class Bad:
    """A bad input.

    Attributes:
        name: of the case.
        make: writes it into an empty folder.
        words: of the command, which runs in another empty folder; IN is the first.
        error: the class that the message begins with; "" for wrong usage.
        says: what the message holds: file, place, expected, got.
    """

    name: str
    make: Callable[[Path], object]
    words: str
    error: str
    says: tuple[str, ...]

    def __str__(self) -> str:
        return self.name


def listing(folder: Path) -> dict[str, str]:
    """Everything in a folder: what it is, and what a file holds, or how long a large one is."""
    found = {}
    for path in sorted(folder.rglob("*")):
        state = path.lstat()
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file() and state.st_size <= 1 << 24:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            content = str(state.st_size) if path.is_file() else ""
        found[str(path)] = f"{state.st_mode:o} {content}"
    return found


def prepare(bad: Bad, root: Path, places: dict[str, Path]) -> list[str]:
    """Make the input, and the empty folder to work in; the words of the command."""
    (root / "in").mkdir()
    (root / "work").mkdir()
    bad.make(root / "in")
    names = {"IN": root / "in"} | places
    pattern = r"\b(" + "|".join(names) + r")\b"
    return [re.sub(pattern, lambda m: str(names[m[0]]), w) for w in shlex.split(bad.words)]


def assert_refused(bad: Bad, code: int, stdout: str, stderr: str, root: Path) -> None:
    """The contract of every command, whatever is wrong with its input."""
    assert "Traceback" not in stderr
    assert code == (1 if bad.error else 2), stderr
    assert stdout == ""
    assert stderr.startswith(f"{bad.error}: " if bad.error else "Usage: imate-mlx"), stderr
    assert all(char.isprintable() or char in "\n\t" for char in stderr)
    assert len(stderr) < 10_000
    says = [re.sub(r"\bIN\b", f"{root}/in", said) for said in bad.says]
    missing = [said for said in says if said not in stderr]
    assert not missing, f"{missing} not in: {stderr}"


def check(bad: Bad, root: Path, places: dict[str, Path] | None = None) -> None:
    """Run the command on the bad input in this process."""
    words = prepare(bad, root, places or {})
    before, here = listing(root), os.getcwd()
    os.chdir(root / "work")
    try:
        # What the command line does not turn into a message is raised here.
        result = CliRunner().invoke(main, words, prog_name="imate-mlx", catch_exceptions=False)
    finally:
        os.chdir(here)
    assert_refused(bad, result.exit_code, result.stdout, result.stderr, root)
    assert listing(root) == before, "something was written"
