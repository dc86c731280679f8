"""What keeps a run on another base from starting, each said before the weights are read."""

import json

import pytest
from networks import write_network

from interviewmate_mlx.base.base import Base
from interviewmate_mlx.config import load_run
from interviewmate_mlx.errors import AdapterError, DataError
from interviewmate_mlx.training.loop import train


def start(base, data, tmp_path, *settings):
    words = [f"model.base={base}", f"data.path={data}", *settings]
    next(train(load_run("A", words), tmp_path / "out"))


def test_rows_longer_than_a_window_that_is_not_computed_are_refused(tmp_path):
    base = tmp_path / "base"
    write_network(base, "gemma2", sliding_window=24)
    row = {"question": "What is a loss?", "answer": "It tells how far the answers are. " * 8}
    data = tmp_path / "rows.jsonl"
    data.write_text(f"{json.dumps(row)}\n" * 4, encoding="utf-8")
    with pytest.raises(DataError, match=r"mlx-lm computes gemma2 only up to 24.*") as refused:
        start(base, data, tmp_path)
    assert "Set data.max_length to 24" in str(refused.value)
    assert not (tmp_path / "out").exists()
    start(base, data, tmp_path, "data.max_length=24")


def test_layers_that_the_checkpoint_names_otherwise_are_refused(tmp_path, questions, monkeypatch):
    """PEFT could not load an adapter of them."""
    base = tmp_path / "base"
    write_network(base, "llama", num_hidden_layers=1)
    names = {n for n in Base.open(base).tensor_names if "k_proj" not in n}
    monkeypatch.setattr(Base, "tensor_names", names)
    with pytest.raises(AdapterError, match="does not have these layers under the names") as refused:
        start(base, questions, tmp_path)
    assert "model.layers.0.self_attn.k_proj" in str(refused.value)
    assert "q_proj" not in str(refused.value)


def test_all_linear_in_a_mixture_of_experts_is_refused(tmp_path, questions):
    base = tmp_path / "base"
    write_network(base, "mixtral", num_hidden_layers=1)
    with pytest.raises(AdapterError, match="the base is a mixture of experts"):
        start(base, questions, tmp_path, "lora.targets=all-linear")
