"""The table of cost by tokens a row and rows an update."""

import json
import sys

import scaling


def test_every_cell_is_measured_on_rows_of_its_length(tiny_base, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # not installed: no plot, the rest stands
    words = ["--model", str(tiny_base), "--lengths", "32,64", "--batches", "1,3"]

    assert scaling.main([*words, "--plot", str(tmp_path / "plot.png")]) == 0

    out, err = capsys.readouterr()
    *tables, last = out.splitlines()
    cells = json.loads(last)["cells"]
    places = [(cell["tokens_per_row"], cell["rows_per_update"]) for cell in cells]
    assert places == [(32, 1), (32, 3), (64, 1), (64, 3)]
    for cell in cells:
        tokens = cell["tokens_per_s"] * cell["seconds"]
        assert round(tokens) == cell["tokens_per_row"] * cell["rows_per_update"]
        assert cell["peak_bytes"] > 0
    assert "| tokens/s: tokens a row | 1 rows | 3 rows |" in tables
    assert 'pip install "interviewmate-mlx[plots]"' in err
    assert not (tmp_path / "plot.png").exists()
