"""A checkpoint's cost is that of a true one, beside a true step."""

import re
import sys

import checkpoint


def test_cost_of_a_checkpoint_is_a_share_of_an_epoch(tiny_base, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["checkpoint.py", "--model", str(tiny_base)])
    checkpoint.main()
    line = capsys.readouterr().out.splitlines()[-1]
    found = re.fullmatch(
        r"checkpoint \(([\d.]+) MB\) and adapter: ([\d.]+) s; a step: ([\d.]+) s; "
        r"so ([\d.]+)% of an epoch of 53 steps",
        line,
    )
    assert found, line
    megabytes, _, _, percent = map(float, found.groups())  # the times may be rounded to 0.00
    assert megabytes > 0
    assert percent > 0
