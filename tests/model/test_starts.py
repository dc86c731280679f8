"""PiSSA and OLoRA against PEFT: start, updates, and what is saved for the untouched base."""

import copy
import json

import mlx.core as mx
import numpy as np
import pytest
import torch
from checkpoints import our_model, tiny_falcon
from peft import LoraConfig, PeftModel, get_peft_model
from peft_training import CLIP, DECAY, random_rows, steps_of, train_in_torch
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

from interviewmate_mlx.adapter.folder import Adapter
from interviewmate_mlx.base.base import Base
from interviewmate_mlx.base.convert import convert
from interviewmate_mlx.base.quantization import Quantization
from interviewmate_mlx.config import load_run
from interviewmate_mlx.data.batches import collate, split_step
from interviewmate_mlx.errors import AdapterError, ConfigError
from interviewmate_mlx.model.lora import add_lora, lora_layers
from interviewmate_mlx.model.starts import start_from_weights
from interviewmate_mlx.training.loop import train
from interviewmate_mlx.training.metrics import read_metrics
from interviewmate_mlx.training.optimizer import adamw, learning_rate_at
from interviewmate_mlx.training.step import Step

STEPS, PEAK, TARGETS = 20, 1e-3, ["query_key_value", "dense_h_to_4h"]
KINDS = ["pissa", "olora"]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_start_and_twenty_updates_equal_peft_s(kind, rslora):
    base = tiny_falcon(6, 8, layers=2)
    model = our_model(base)
    add_lora(model, TARGETS, rank=4, alpha=8, rslora=rslora)
    start_from_weights(model, kind)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "use_rslora": rslora}
    lora = LoraConfig(**settings, init_lora_weights=kind, task_type="CAUSAL_LM")
    theirs = get_peft_model(copy.deepcopy(base), lora).eval()
    modules = dict(theirs.base_model.model.named_modules())
    for path, layer in lora_layers(model):
        other = modules[path]
        # A column of B and its row of A may both have the other sign.
        product = other.lora_B["default"].weight @ other.lora_A["default"].weight
        ours = np.array(layer.lora_B.weight @ layer.lora_A.weight)
        np.testing.assert_allclose(ours, product.detach().numpy(), atol=1e-5)
        rest = other.base_layer.weight.detach().numpy()
        np.testing.assert_allclose(np.array(layer.base_layer.weight), rest, atol=1e-5)
    steps = steps_of(random_rows(12), STEPS)
    expected = train_in_torch(theirs, steps, get_linear_schedule_with_warmup, PEAK)
    step, losses = Step(model.train(), adamw(DECAY), CLIP), []
    for number, rows in enumerate(steps):
        step.accumulate([collate(group) for group in split_step(rows, 128)], [0, number])
        rate = learning_rate_at(number, STEPS, PEAK, "linear", warmup_ratio=0.25)
        losses.append(step.update(rate)["loss"].item())
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert losses[-1] < losses[0] - 0.02


def run_of(base, data, kind, *settings):
    words = [f"model.base={base}", f"data.path={data}", f"lora.init={kind}", "lora.dropout=0.2"]
    return load_run("A", [*words, "train.learning_rate=3e-3", "train.epochs=2", *settings])


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_plain_and_resume_is_exact(
    tiny_base, tiny_checkpoint, questions, tmp_path, kind, rslora
):
    run = run_of(tiny_base, questions, kind, f"lora.rslora={str(rslora).lower()}")
    whole, out = tmp_path / "whole", tmp_path / "parts"
    events = list(train(run, whole))
    list(train(run, out, stop=lambda: len(read_metrics(out / "metrics.jsonl")) > 2))
    list(train(run, out, resume=True))
    name = "adapter_model.safetensors"
    assert (out / name).read_bytes() == (whole / name).read_bytes()
    config = json.loads((whole / "adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"]) == (16, True)
    # The validation loss of what was kept is that of the folder on the untouched base.
    ids = np.random.default_rng(0).integers(0, 384, (2, 9))
    model = Base.open(tiny_base).load(mx.float32)
    plain = np.array(model(mx.array(ids)))
    Adapter.open(whole).apply(model)
    logits = np.array(model.eval()(mx.array(ids)))
    assert np.abs(logits - plain).max() > 0.01
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_checkpoint), whole)
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(ids)).logits.float().numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    more = run.replace(
        lora={
            "init": "default",
            "rank": 16,
            "alpha": config["lora_alpha"],
            "start_from": str(whole),
        }
    )
    going_on = next(e for e in train(more, tmp_path / "more") if type(e).__name__ == "Validated")
    assert going_on.loss == pytest.approx(events[-1].summary.best_valid_loss, rel=1e-4)


def test_what_cannot_be_is_refused(tiny_base, questions, tmp_path):
    for other in ("dora=true", "start_from=x"):
        with pytest.raises(ConfigError, match=r"lora.init: got 'pissa'"):
            run_of(tiny_base, questions, "pissa", f"lora.{other}")
    convert(tiny_base, tmp_path / "packed", quantization=Quantization.of(8, 64))
    with pytest.raises(AdapterError, match="is quantised, whose layers"):
        list(train(run_of(tmp_path / "packed", questions, "pissa"), tmp_path / "out"))
    with pytest.raises(AdapterError, match="got rank 40, expected at most 32"):
        list(train(run_of(tiny_base, questions, "olora", "lora.rank=40"), tmp_path / "out"))
