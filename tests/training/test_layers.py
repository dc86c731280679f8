"""LoRA on some of the blocks alone, as PEFT's `layers_to_transform` has it."""

import json

import mlx.core as mx
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from interviewmate_mlx.adapter.folder import Adapter
from interviewmate_mlx.base.base import Base
from interviewmate_mlx.config import load_run, parse_run, to_toml
from interviewmate_mlx.errors import AdapterError
from interviewmate_mlx.training.loop import train


@pytest.mark.parametrize(("layers", "numbers"), [("1", [1]), ("[0]", [0]), ("[1, 0]", [1, 0])])
def test_adapter_of_some_blocks_is_peft_s(
    tiny_base, tiny_checkpoint, questions, tmp_path, layers, numbers
):
    out = tmp_path / "out"
    settings = [f"model.base={tiny_base}", f"data.path={questions}", f"lora.layers={layers}"]
    run = load_run("A", [*settings, "train.learning_rate=1e-2", "train.epochs=2"])
    assert parse_run(run.name, to_toml(run)) == run
    list(train(run, out))
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["layers_to_transform"] == numbers
    changed = {name.split(".")[4] for name in mx.load(str(out / "adapter_model.safetensors"))}
    assert changed == {str(number) for number in numbers}

    ids = np.random.default_rng(0).integers(0, 384, (2, 9))
    model = Base.open(tiny_base).load(mx.float32)
    Adapter.open(out).apply(model)
    model.eval()
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_checkpoint), out)
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(ids)).logits.float().numpy()
    np.testing.assert_allclose(np.array(model(mx.array(ids))), expected, atol=1e-4)
    assert f"| blocks | {', '.join(map(str, numbers))} |" in (out / "README.md").read_text()


@pytest.mark.parametrize(("layers", "got"), [("3", "3"), ("[1, 2, 7]", "2, 7")])
def test_blocks_that_the_base_has_not_are_refused(tiny_base, questions, tmp_path, layers, got):
    settings = [f"model.base={tiny_base}", f"data.path={questions}", f"lora.layers={layers}"]
    with pytest.raises(AdapterError) as caught:
        list(train(load_run("A", settings), tmp_path / "out"))
    assert f"lora.layers: got {got}, and the base has 2 blocks, 0 to 1" in str(caught.value)
