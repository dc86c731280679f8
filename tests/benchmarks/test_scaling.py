"""The table of cost by tokens a row and rows an update."""

import json

import pytest
import scaling


def test_every_cell_is_measured_on_rows_of_its_length(tiny_base, capsys):
    words = ["--model", str(tiny_base), "--lengths", "32,64", "--batches", "1,3"]

    assert scaling.main([*words, "--set", "train.gradient_checkpointing=true"]) == 0

    *tables, last = capsys.readouterr().out.splitlines()
    cells = json.loads(last)["cells"]
    places = [(cell["tokens_per_row"], cell["rows_per_update"]) for cell in cells]
    assert places == [(32, 1), (32, 3), (64, 1), (64, 3)]
    for cell in cells:
        tokens = cell["tokens_per_s"] * cell["seconds"]
        assert round(tokens) == cell["tokens_per_row"] * cell["rows_per_update"]
        assert cell["peak_bytes"] > cell["weight_bytes"] > 0
    assert "| tokens/s: tokens a row | 1 rows | 3 rows |" in tables


def test_a_plot_that_cannot_be_drawn_is_refused_before_anything_is_measured(
    capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(scaling, "find_spec", lambda name: None)  # not installed

    with pytest.raises(SystemExit) as refused:
        scaling.main(["--plot", str(tmp_path / "plot.png")])

    assert refused.value.code == 2
    assert 'pip install "interviewmate-mlx[plots]"' in capsys.readouterr().err


def test_a_key_of_the_run_that_is_not_known_is_said(tiny_base, capsys):
    words = ["--model", str(tiny_base), "--lengths", "32", "--batches", "1"]

    assert scaling.main([*words, "--set", "train.gradient_checkpoint=true"]) == 1

    assert "train.gradient_checkpointing" in capsys.readouterr().err  # the nearest one
