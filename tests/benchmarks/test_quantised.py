"""Fewer bits are smaller, and move the logits further."""

import re
import sys

import quantised


def test_a_line_for_each_number_of_bits(tiny_checkpoint, capsys, monkeypatch):
    words = ["quantised.py", str(tiny_checkpoint), "--group-size", "32", "--tokens", "8"]
    monkeypatch.setattr(sys, "argv", words)
    quantised.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["bfloat16", "8 bits", "4 bits"]
    moved = [float(re.search(r"moved by ([\d.]+) of", line)[1]) for line in lines]
    assert moved[0] == 0 < moved[1] < moved[2]
