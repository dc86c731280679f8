"""What is typed at a real terminal: a pseudo-terminal with a process of its own."""

import json
import os
import pty
import re
import select
import sys
import time
from contextlib import contextmanager

import pytest

_WAIT_S = 60.0
_WHERE = b"\x1b[6n"  # prompt_toolkit asks where the cursor is


class Terminal:
    """A process at a terminal, and all that it has shown."""

    def __init__(self, pid: int, descriptor: int) -> None:
        self._pid, self._descriptor = pid, descriptor
        self.shown = ""
        self._seen = 0  # characters of it, up to what was waited for last

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def wait_for(self, text: str) -> None:
        """Read until a text is shown after what was waited for before."""
        deadline = time.monotonic() + _WAIT_S
        while (place := self.shown.find(text, self._seen)) < 0:
            assert time.monotonic() < deadline, self.shown
            if select.select([self._descriptor], [], [], 0.1)[0]:
                data = os.read(self._descriptor, 65536)
                if _WHERE in data:
                    os.write(self._descriptor, b"\x1b[1;1R")
                self.shown += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", data.decode(errors="replace"))
        self._seen = place + len(text)

    def exit_code(self) -> int:
        deadline = time.monotonic() + _WAIT_S
        while True:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            assert time.monotonic() < deadline
            if select.select([self._descriptor], [], [], 0.1)[0]:
                try:
                    os.read(self._descriptor, 65536)
                except OSError:  # it has closed its end
                    time.sleep(0.05)


@pytest.fixture
def terminal(tmp_path):
    @contextmanager
    def start(*words, **environment):
        command = [sys.executable, "-m", "interviewmate_mlx", *map(str, words)]
        pid, descriptor = pty.fork()
        if pid == 0:
            os.chdir(tmp_path)
            settings = {"XDG_DATA_HOME": str(tmp_path / "data"), "TERM": "xterm"}
            os.execve(sys.executable, command, os.environ | settings | environment)
        try:
            yield Terminal(pid, descriptor)
        finally:
            os.close(descriptor)

    return start


# pytest warns of a fork in a process with threads; the child is another program at once.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


def test_ctrl_c_stops_the_answer_and_not_the_chat(terminal, tiny_base, tmp_path):
    # By this seed the answer has all its 1,900 tokens, which take a second at least.
    words = ["--max-tokens", 1900, "--temperature", 1, "--seed", 0, "--dtype", "float32"]
    with terminal("chat", "--model", tiny_base, *words) as chat:
        chat.wait_for("tiny>")
        chat.type("What is it all?\r")
        chat.wait_for("\n")
        time.sleep(0.3)
        chat.type("\x03")
        chat.wait_for("[stopped]")
        chat.wait_for("tiny>")
        chat.type("\x03")  # at the prompt it clears the line
        chat.type("/save said.jsonl\r")
        chat.wait_for("saved: 2 messages")
        chat.type("/quit\r")
        assert chat.exit_code() == 0
    row = json.loads((tmp_path / "said.jsonl").read_text())
    assert row["messages"][0]["content"] == "What is it all?"
    history = tmp_path / "data" / "interviewmate" / "chat_history"
    assert "What is it all?" in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600


def test_answer_from_the_editor(terminal, tmp_path):
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\nprintf "From the editor,\\n\\nwith an empty line." > "$1"\n')
    editor.chmod(0o755)
    with terminal("interview", "--count", 1, EDITOR=str(editor), VISUAL=str(editor)) as interview:
        interview.wait_for("Question 1 of 1")
        interview.wait_for(">")
        interview.type("/edit\r")
        interview.wait_for("points")
        interview.wait_for("A follow-up")
        interview.type("\r")
        interview.wait_for("How well did you know it?")
        interview.type("nonsense\r")
        interview.wait_for("expected one of")
        interview.type("hard\r")
        interview.wait_for("This question returns in")
        assert interview.exit_code() == 0
    with terminal("interview", "--export") as export:
        export.wait_for("with an empty line.")
        assert export.exit_code() == 0
