"""A run's numbers on TensorBoard, Weights & Biases and Trackio.

Each board is fed by a thread of its own, so training waits for none of them. One that fails or
does not answer is reported once, and the run goes on.
"""

import math
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from interviewmate_mlx.config import RunConfig
from interviewmate_mlx.errors import ConfigError, redact_secrets
from interviewmate_mlx.files import atomic_file
from interviewmate_mlx.training.events import Event, Finished, Started, Stepped, Validated

FOLDER = "boards"  # in the run's own; what the boards keep there
_ID_FILE = "id"  # by which a resumed run finds itself again
# How long the end of a run waits for a board.
_PATIENCE_S = 20.0

Numbers = dict[str, float]
Report = Callable[[str], None]


class Board(Protocol):
    """Where numbers go. Each call may fail, or hang."""

    def add(self, step: int, numbers: Numbers) -> None:
        """Numbers after so many updates, by name."""

    def finish(self) -> None:
        """The run has ended, or is interrupted."""


def check_installed(run: RunConfig) -> None:
    """Refuse a run whose boards are not installed.

    Raises:
        ConfigError: one is missing.
    """
    missing = [name for name in run.log.to if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"log.to: {', '.join(missing)} is not installed.\n"
            f'Install it: pip install "interviewmate-mlx[{",".join(missing)}]".'
        )


def logged(events: Iterator[Event], run: RunConfig, out: Path, report: Report) -> Iterator[Event]:
    """Pass a run's events on, while their numbers go to the boards of `[log] to`.

    Args:
        events: of `loop.train`.
        run: what is trained.
        out: its folder.
        report: called with what is wrong with a board; once each.
    """
    feeders: list[_Feeder] = []
    try:
        for event in events:
            if isinstance(event, Started):
                feeders += [_Feeder(name, run, out, event.step, report) for name in run.log.to]
            elif isinstance(event, Stepped | Validated):
                for feeder in feeders:
                    feeder.add(event.step, numbers_of(event))
            elif isinstance(event, Finished):
                _finish(feeders)
            yield event
    finally:
        _finish(feeders)


def numbers_of(event: Stepped | Validated) -> Numbers:
    """An event's numbers, under the names that people look for."""
    if isinstance(event, Validated):
        if event.measures:  # a loss over preferences has no perplexity
            return {"eval/loss": event.loss, **_under("eval", event.measures)}
        perplexity = math.exp(event.loss) if event.loss < 700 else math.inf
        return {"eval/loss": event.loss, "eval/perplexity": perplexity}
    return {
        "train/loss": event.loss,
        "train/learning_rate": event.learning_rate,
        "train/grad_norm": event.grad_norm,
        "train/tokens_per_s": event.num_tokens / event.elapsed_s,
        "train/epoch": event.epoch,
        **_under("train", event.measures),
    }


def _under(name: str, measures: dict[str, float]) -> Numbers:
    return {f"{name}/{measure}": value for measure, value in measures.items()}


class _Feeder:
    """Feeds a board from a thread, for as long as it takes what it is given."""

    def __init__(self, name: str, run: RunConfig, out: Path, step: int, report: Report) -> None:
        self._name, self._report = name, report
        self._open = lambda: _BOARDS[name](run, out / FOLDER, step)
        self._entries: queue.SimpleQueue[tuple[int, Numbers] | None] = queue.SimpleQueue()
        # A daemon: a board that hangs does not keep the process from ending.
        self._thread = threading.Thread(target=self._feed, daemon=True)
        self._thread.start()

    def add(self, step: int, numbers: Numbers) -> None:
        if self._thread.is_alive():
            self._entries.put((step, numbers))

    def end(self) -> None:
        self._entries.put(None)

    def wait(self, seconds: float) -> None:
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._report(f"{self._name} does not answer: the last numbers may be missing there")

    def _feed(self) -> None:
        try:
            board = self._open()
            while entry := self._entries.get():
                board.add(*entry)
            board.finish()
        except BaseException as error:  # whatever it is: training must not end by it
            reason = redact_secrets(f"{type(error).__name__}: {error}")
            self._report(f"{self._name} has failed and gets no more numbers: {reason}")


def _finish(feeders: list[_Feeder]) -> None:
    for feeder in feeders:
        feeder.end()
    end = time.monotonic() + _PATIENCE_S
    for feeder in feeders:
        feeder.wait(max(0.0, end - time.monotonic()))
    feeders.clear()


def _run_id(folder: Path, step: int) -> str:
    """The id of a run on its boards: a new one at its start, the same when it goes on."""
    path = folder / _ID_FILE
    if not step or not path.is_file():
        with atomic_file(path) as temporary:
            temporary.write_text(secrets.token_hex(4), encoding="utf-8")
    return path.read_text(encoding="utf-8")


class _TensorBoard:
    """Event files in the run's folder; TensorBoard shows several as one curve."""

    def __init__(self, run: RunConfig, folder: Path, step: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2  # noqa: PLC0415  an extra
        from tensorboard.summary.writer.event_file_writer import (  # noqa: PLC0415
            EventFileWriter,
        )

        self._events, self._summaries = event_pb2, summary_pb2
        self._writer = EventFileWriter(str(folder / "tensorboard"))
        if step:
            # What came after the checkpoint that the run goes on from happens again.
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(step + 1, session_log=start)

    def add(self, step: int, numbers: Numbers) -> None:
        value = self._summaries.Summary.Value
        values = [value(tag=name, simple_value=number) for name, number in numbers.items()]
        self._write(step, summary=self._summaries.Summary(value=values))

    def finish(self) -> None:
        self._writer.close()

    def _write(self, step: int, **content: Any) -> None:
        event = self._events.Event(step=step, wall_time=time.time(), **content)
        self._writer.add_event(event)


class _Wandb:
    """A run on Weights & Biases."""

    def __init__(self, run: RunConfig, folder: Path, step: int) -> None:
        import wandb  # noqa: PLC0415  an extra

        mode = wandb.setup().settings.mode
        if mode == "online" and not wandb.api.api_key:  # it would ask on the terminal
            raise ConfigError("nobody is logged in (wandb login, or WANDB_MODE=offline)")
        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=run.log.project,
            name=run.name,
            id=_run_id(folder, step),
            resume="allow" if step else None,
            config=asdict(run),
            dir=str(folder),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def add(self, step: int, numbers: Numbers) -> None:
        self._run.log(numbers, step=step)

    def finish(self) -> None:
        self._run.finish()


class _Trackio:
    """A run on Trackio, which keeps it on this machine."""

    def __init__(self, run: RunConfig, folder: Path, step: int) -> None:
        import trackio  # noqa: PLC0415  an extra

        for module in (trackio, trackio.run, trackio.utils):
            # It writes on stdout, which is for the results of a command, and has no switch.
            vars(module)["print"] = lambda *_, **__: None
        self._run = trackio.init(
            project=run.log.project,
            name=f"{run.name}-{_run_id(folder, step)}",
            resume="allow" if step else "never",
            config=asdict(run),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def add(self, step: int, numbers: Numbers) -> None:
        self._run.log(numbers, step=step)

    def finish(self) -> None:
        self._run.finish()


_BOARDS: dict[str, Callable[[RunConfig, Path, int], Board]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
}
