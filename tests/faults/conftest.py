"""Real `imate-mlx` processes that break where a test asks for it."""

import json
import os
import queue
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from networks import write_network

LAUNCHER = Path(__file__).with_name("launcher.py")


@dataclass(frozen=True)
class Ended:
    """An `imate-mlx` process that is gone."""

    code: int  # negative: killed by that signal
    stdout: str
    stderr: str
    moments: list[str]  # what it changed, in order


@dataclass
class Process:
    """An `imate-mlx` process, running or stopped."""

    launcher: subprocess.Popen[str]
    free: "queue.Queue[subprocess.Popen[str]]"
    files: dict[str, str]
    first_report: dict[str, int] | None = None

    def stopped(self) -> int:
        """Wait until it has stopped itself; return its process id."""
        self.first_report = self._report()
        return self.first_report["stopped"]

    def wait(self) -> Ended:
        report = self._report()
        self.free.put(self.launcher)
        texts = [Path(self.files[name]).read_text() for name in ("stdout", "stderr", "trace")]
        assert "Traceback" not in texts[1], texts[1]
        return Ended(report["code"], texts[0], texts[1], texts[2].splitlines())

    def _report(self) -> dict[str, int]:
        assert self.launcher.stdout
        return json.loads(self.launcher.stdout.readline())


class Launchers:
    """Starts `imate-mlx`, as many processes at once as the machine has cores.

    Attributes:
        stride: of the moments to try. What is saved, and when, is the same for all networks, so
            it is larger for all but one.
    """

    def __init__(self, base: Path, data: Path, folder: Path, stride: int = 1) -> None:
        self.folder, self.count, self.stride = folder, 0, stride
        # 12 rows, two epochs of three steps; saved after 2, 3, 4 and 6. Rows of one length: a
        # single variant to compile.
        self.words = ["--model", str(base), "--out", "run"]
        for setting in (
            f"data.path={data}",
            "train.epochs=2",
            "train.save_every=2",
            "train.learning_rate=1e-2",
            "lora.dropout=0.3",
            "data.max_length=16",
            "data.train_on=all",
        ):
            self.words += ["--set", setting]
        self.free: queue.Queue[subprocess.Popen[str]] = queue.Queue()
        self.all = []
        for _ in range(max(2, min(4, os.cpu_count() or 1))):
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            launcher = subprocess.Popen([sys.executable, LAUNCHER, base], text=True, **pipes)
            self.all.append(launcher)
            self.free.put(launcher)

    def start(
        self,
        work: Path,
        *options: str,
        at: int = -1,
        act: str = "SIGKILL",
        unprivileged: bool = False,
        largest_file: int = 0,
    ) -> Process:
        """Start `imate-mlx train` in a folder; it writes to `run` there.

        Args:
            work: the folder, made when it is not there.
            options: beside those of the shared run.
            at: the moment to act at, from 0; -1 for none.
            act: a signal's name; `tear` (leave half a file and die); `fill` (the disk, from then).
            unprivileged: without root's right to write everywhere.
            largest_file: bytes that a file may have; 0 for any.
        """
        work.mkdir(parents=True, exist_ok=True)
        self.count += 1
        files = {
            name: f"{self.folder / name}-{self.count}" for name in ("stdout", "stderr", "trace")
        }
        job = {
            "words": ["train", *self.words, *options],
            "cwd": str(work),
            "folder": str(work),
            "at": at,
            "act": act,
            "unprivileged": unprivileged,
            "largest_file": largest_file,
        }
        launcher = self.free.get(timeout=120)  # a failed test may have left its own stopped
        assert launcher.stdin
        launcher.stdin.write(json.dumps(job | files) + "\n")
        launcher.stdin.flush()
        return Process(launcher, self.free, files)

    def train(self, work: Path, *options: str, **fault: Any) -> Ended:
        return self.start(work, *options, **fault).wait()

    def go_on(self, work: Path, **fault: Any) -> Ended:
        """Resume as a user does, or train where the process died before the run began."""
        began = (work / "run" / "run.toml").exists()
        return self.train(work, *(["--resume"] if began else []), **fault)

    def whole(self, work: Path, *options: str) -> "Whole":
        """The run that nothing interrupts."""
        ended = self.train(work, *options)
        assert ended.code == 0, ended.stderr
        return Whole(contents(work), ended.moments)

    def each(self, check: Callable[[Any], str], values: Iterable[Any]) -> None:
        """Check all values, several at once; a check returns what is wrong, or nothing."""
        with ThreadPoolExecutor(len(self.all)) as pool:
            faults = list(filter(None, pool.map(check, values)))
        assert not faults, "\n".join(faults)


@pytest.fixture(scope="session", params=["falcon", "llama"])
def launchers(
    request: pytest.FixtureRequest,
    tiny_base: Path,
    questions: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Launchers]:
    base, stride = tiny_base, 1
    if request.param == "llama":
        stride = 3
        base = tmp_path_factory.mktemp("networks") / "llama"
        write_network(base, "llama", num_hidden_layers=1)
    started = Launchers(base, questions, tmp_path_factory.mktemp("said"), stride)
    yield started
    for launcher in started.all:
        launcher.communicate()  # closes its stdin, and so it ends


def contents(work: Path) -> dict[str, Any]:
    """All of a run's folder that does not depend on the clock, by path."""
    out = work / "run"
    held: dict[str, Any] = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        held[str(path.relative_to(out))] = path.read_bytes()
    held["metrics.jsonl"] = [
        {key: value for key, value in json.loads(line).items() if key != "timing"}
        for line in held["metrics.jsonl"].splitlines()
    ]
    return held | {"summary.json": None, "README.md": None}


@dataclass(frozen=True)
class Whole:
    """The run that nothing interrupted."""

    contents: dict[str, Any]
    moments: list[str]

    def compare(self, work: Path, what: str, same_names: bool = True) -> str:
        """How a run that was interrupted differs from it; nothing if it does not."""
        got = contents(work)
        names = set(self.contents) | set(got) if same_names else set(self.contents) & set(got)
        differing = [name for name in sorted(names) if got.get(name) != self.contents.get(name)]
        return f"{what}: differs in {', '.join(differing)}" if differing else ""


@pytest.fixture(scope="session")
def whole(launchers: Launchers, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return launchers.whole(tmp_path_factory.mktemp("whole"))
