"""The speed of answers is that of whole answers, one line each."""

import re
import sys

import generate


def test_a_line_an_answer(tiny_base, capsys, monkeypatch):
    words = ["generate.py", "--model", str(tiny_base), "--tokens", "4", "--answers", "2"]
    monkeypatch.setattr(sys, "argv", words)
    generate.main()
    _, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(re.fullmatch(r"[1-4] tokens, \d+ tokens/s", line) for line in lines)
