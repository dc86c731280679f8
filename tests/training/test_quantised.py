"""Training on a quantised base equals training on its dequantised copy."""

import json
from pathlib import Path

import pytest
from checkpoints import tiny_falcon, write_checkpoint
from networks import write_network

from interviewmate_mlx.adapter.folder import Adapter
from interviewmate_mlx.base.base import Base
from interviewmate_mlx.base.convert import convert
from interviewmate_mlx.base.merged import write_merged
from interviewmate_mlx.base.quantization import Quantization
from interviewmate_mlx.config import load_run
from interviewmate_mlx.training.events import Stepped
from interviewmate_mlx.training.loop import train


def losses(base: Path, questions: Path, out: Path) -> list[float]:
    run = load_run(
        "A",
        [
            f"model.base={base}",
            f"data.path={questions}",
            "train.epochs=7",
            "train.learning_rate=5e-3",
            "lora.targets=all-linear",
        ],
    )
    return [event.loss for event in train(run, out) if isinstance(event, Stepped)]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("model_type", ["falcon", "qwen2"])
def test_training_equals_that_on_the_dequantised_copy(model_type, bits, questions, tmp_path):
    source = tmp_path / "source"
    if model_type == "falcon":
        write_checkpoint(source, tiny_falcon(heads=4, head_dim=16, layers=2))
    else:
        write_network(source, model_type, num_hidden_layers=2, initializer_range=0.05)
    quantised, plain = tmp_path / "quantised", tmp_path / "plain"
    convert(source, quantised, dtype="float32", quantization=Quantization.of(bits, 32))
    plain.mkdir()
    write_merged(plain, Base.open(quantised), {})
    assert "quantization" not in json.loads((plain / "config.json").read_text())
    expected = losses(plain, questions, tmp_path / "one")
    got = losses(quantised, questions, tmp_path / "two")
    assert len(got) == 21
    assert got == pytest.approx(expected, rel=1e-3)
    assert got[-1] < got[0] - 0.3
    adapter = Adapter.open(tmp_path / "two")
    assert adapter.base_hash == Base.open(quantised).weights_hash != ""
