"""Lines that a user types, or that come through a pipe."""

import sys
from collections.abc import Collection
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import click

EDIT = "/edit"


class Typed:
    """Reads from stdin, line by line. At a terminal a line can be edited, with a history."""

    def __init__(self, history: Path | None = None) -> None:
        """
        Args:
            history: a file for what was typed at a terminal; None keeps it in memory.
        """
        self.is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._session: Any = None
        if self.is_terminal:
            from prompt_toolkit import PromptSession
            from prompt_toolkit.history import FileHistory, InMemoryHistory

            with suppress(OSError):  # no folder for it: a history in memory
                if history:
                    history.parent.mkdir(parents=True, exist_ok=True)
                    history.touch(mode=0o600)
            is_file = history is not None and history.is_file()
            self._session = PromptSession(
                history=FileHistory(str(history)) if is_file else InMemoryHistory()
            )
        elif isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")

    def line(self, prompt: str) -> str:
        """The next line; the prompt is shown at a terminal only.

        Raises:
            EOFError: there are no more.
            KeyboardInterrupt: Ctrl-C.
        """
        if self._session:
            return str(self._session.prompt(prompt))
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")

    def text(self, prompt: str, commands: Collection[str] = ()) -> str:
        """Several lines, up to an empty one or the end; `/edit` opens $EDITOR with them.

        Args:
            prompt: shown at a terminal.
            commands: words that are returned at once if they are the first line.

        Raises:
            EOFError: there are no more lines.
        """
        lines: list[str] = []
        while True:
            try:
                line = self.line(prompt if not lines else " " * len(prompt))
            except EOFError:
                if lines:
                    break
                raise
            if line.strip() == EDIT and self.is_terminal:
                return (click.edit("\n".join(lines) + "\n") or "").strip()
            if not lines and line.strip() in commands:
                return line.strip()
            if not line.strip():
                break
            lines.append(line)
        return "\n".join(lines).strip()
