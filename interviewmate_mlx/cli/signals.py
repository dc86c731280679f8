"""What a signal means to a training run."""

import os
import signal
from types import FrameType

import click


class StopOnSignal:
    """The first SIGINT or SIGTERM asks for a stop after the step; the second stops at once.

    SIGHUP (the terminal was closed) asks too, however often it comes. From then on nothing
    is printed: there is nowhere to print to. Under `nohup` it stays ignored.
    """

    def __init__(self) -> None:
        self.wanted = False
        self.is_set = False

    def __enter__(self) -> "StopOnSignal":
        asking = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            asking.append(signal.SIGHUP)
        self._terminals = [stream for stream in (1, 2) if os.isatty(stream)]
        self.is_set = True
        self._previous = {number: signal.signal(number, self._ask) for number in asking}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            for stream in self._terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        elif self.wanted:
            raise KeyboardInterrupt
        if not self.wanted:
            self.wanted = True
            click.echo("\nfinishing this step, then saving; once more to stop at once", err=True)
