"""DoRA against PEFT's: trained, saved, loaded, merged, side by side; also on a quantised base."""

import copy
import gc
import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from checkpoints import our_model, tiny_falcon
from conftest import write_rows
from peft import LoraConfig, PeftModel, get_peft_model
from peft_training import CLIP, DECAY, our_name, random_rows, steps_of, train_in_torch
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

from interviewmate_mlx import backend
from interviewmate_mlx.adapter.folder import Adapter, adapter_weights
from interviewmate_mlx.adapter.merge import combine, read_updates
from interviewmate_mlx.base.base import Base
from interviewmate_mlx.config import load_run
from interviewmate_mlx.data.batches import collate, split_step
from interviewmate_mlx.errors import AdapterError
from interviewmate_mlx.model.cpu_kernels import use_cpu_kernels
from interviewmate_mlx.model.dora import place_dora, start_magnitudes
from interviewmate_mlx.model.lora import add_lora, lora_layers, merge_lora, remove_lora
from interviewmate_mlx.model.recompute import use_gradient_checkpointing
from interviewmate_mlx.model.switched_lora import SwitchedModel
from interviewmate_mlx.training.events import Stepped
from interviewmate_mlx.training.loop import train
from interviewmate_mlx.training.metrics import read_metrics
from interviewmate_mlx.training.optimizer import adamw, learning_rate_at
from interviewmate_mlx.training.step import Step

STEPS, TARGETS = 50, ["query_key_value", "dense_h_to_4h"]


def dora_name(name):
    """Our path of a parameter of PEFT's: its magnitude is a module's weight."""
    name = our_name(name)
    return name.removesuffix(".weight") if "magnitude" in name else name


def with_dora(model, dropout=0.0):
    add_lora(model, TARGETS, rank=4, alpha=8, dropout=dropout)
    place_dora(model)
    start_magnitudes(model)
    return model


@pytest.mark.parametrize("paths", [[], [use_cpu_kernels, use_gradient_checkpointing]])
def test_fifty_updates_equal_peft_s(paths):
    base = tiny_falcon(6, 8, layers=2)
    model = with_dora(our_model(base))
    lora = LoraConfig(
        r=4, lora_alpha=8, target_modules=TARGETS, use_dora=True, task_type="CAUSAL_LM"
    )
    reference = get_peft_model(copy.deepcopy(base), lora)
    start = {name: np.array(array) for name, array in adapter_weights(model).items()}
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if parameter.requires_grad:
                mine = torch.tensor(start[dora_name(name)])
                if "magnitude" in name:
                    torch.testing.assert_close(parameter.data, mine)  # the first values are PEFT's
                parameter.copy_(mine)
    steps, peak = steps_of(random_rows(22), STEPS), 5e-3
    expected = train_in_torch(reference, steps, get_cosine_schedule_with_warmup, peak)
    for use in paths:
        use(model)
    step, losses = Step(model.train(), adamw(DECAY), CLIP), []
    for number, rows in enumerate(steps):
        groups = split_step(rows, token_budget=128)
        step.accumulate([collate(group) for group in groups], [0, number])
        rate = learning_rate_at(number, STEPS, peak, "cosine", warmup_ratio=0.1)
        losses.append(step.update(rate)["loss"].item())
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert losses[-1] < losses[0] - 0.1
    ours = adapter_weights(model)
    trained = {n: p.detach().numpy() for n, p in reference.named_parameters() if p.requires_grad}
    assert {dora_name(name) for name in trained} == set(ours)
    moved = max(
        np.abs(np.array(ours[name]) - start[name]).max() for name in ours if "magnitude" in name
    )
    assert moved > 1e-3
    for name, matrix in trained.items():
        np.testing.assert_allclose(np.array(ours[dora_name(name)]), matrix, atol=1e-3)

    ids = np.random.default_rng(0).integers(0, 384, (1, 9))
    before = np.array(model.eval()(mx.array(ids)))
    merge_lora(model)
    np.testing.assert_allclose(np.array(model(mx.array(ids))), before, atol=1e-4)
    merged = reference.merge_and_unload()
    theirs = dict(merged.named_parameters())
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path.endswith(tuple(TARGETS)):
            weight = theirs[f"{path}.weight"].detach().numpy()
            np.testing.assert_allclose(np.array(module.weight), weight, atol=1e-3)


@pytest.fixture(scope="module")
def run(tiny_base, questions):
    settings = [f"model.base={tiny_base}", f"data.path={questions}", "lora.dora=true"]
    settings += ["train.learning_rate=1e-2", "train.epochs=2", "lora.dropout=0.2"]
    return load_run("A", settings)


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    """A DoRA on `tiny_base`. Read only."""
    out = tmp_path_factory.mktemp("dora") / "out"
    list(train(run, out))
    return out


def test_peft_loads_what_training_wrote_and_answers_alike(trained, tiny_base, tiny_checkpoint):
    assert json.loads((trained / "adapter_config.json").read_text())["use_dora"] is True
    ids = np.random.default_rng(0).integers(0, 384, (2, 9))
    model = Base.open(tiny_base).load(mx.float32)
    plain = np.array(model(mx.array(ids)))
    Adapter.open(trained).apply(model)
    logits = np.array(model.eval()(mx.array(ids)))
    assert np.abs(logits - plain).max() > 0.05
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_checkpoint), trained
    )
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(ids)).logits.float().numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_what_peft_saved_is_loaded(tiny_base, tiny_checkpoint, tmp_path):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=TARGETS, use_dora=True, task_type="CAUSAL_LM")
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_checkpoint), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
        ids = torch.arange(9)[None]
        expected = theirs(input_ids=ids).logits.float().numpy()
    theirs.save_pretrained(tmp_path / "peft")
    model = Base.open(tiny_base).load(mx.float32)
    Adapter.open(tmp_path / "peft").apply(model)
    logits = np.array(model.eval()(mx.array(ids.numpy())))
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_resume_repeats_it_and_a_plain_lora_does_not_start_from_it(run, trained, tmp_path):
    out = tmp_path / "parts"
    list(train(run, out, stop=lambda: len(read_metrics(out / "metrics.jsonl")) > 2))
    list(train(run, out, resume=True))
    name = "adapter_model.safetensors"
    assert (out / name).read_bytes() == (trained / name).read_bytes()
    plain = run.replace(lora={"dora": False, "start_from": str(trained)})
    with pytest.raises(AdapterError, match="lora_magnitude_vector: got nothing"):
        list(train(plain, tmp_path / "plain"))


def test_rows_of_a_batch_may_have_a_dora_another_adapter_or_none(
    trained, random_adapter, tiny_base
):
    ids = mx.array(np.random.default_rng(0).integers(0, 384, (1, 9)))
    network, alone, updates = Base.open(tiny_base).load(mx.float32), {0: None}, {}
    alone[0] = np.array(network(ids))
    for number, folder in ((1, trained), (2, random_adapter)):
        Adapter.open(folder).apply(network)
        alone[number] = np.array(network.eval()(ids))
        updates[number] = dict(lora_layers(network))
        remove_lora(network)
    model = SwitchedModel(network)
    for number, layers in updates.items():
        model.add(number, layers)
    for number, expected in alone.items():
        logits = np.array(model(ids, model.make_cache(number)))
        np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_it_merges_alone_and_is_not_combined(trained, tiny_base):
    network = Base.open(tiny_base).load(mx.float32)
    weights = {path: m.weight for path, m in network.named_modules() if isinstance(m, nn.Linear)}
    updates = read_updates(Adapter.open(trained), network)
    Adapter.open(trained).apply(network)
    merge_lora(network)
    modules = dict(network.named_modules())
    for path, update in updates.items():
        got = np.array(update.added_to(weights[path]))
        np.testing.assert_allclose(got, np.array(modules[path].weight), atol=1e-6)
    with pytest.raises(AdapterError, match="A DoRA cannot be combined"):
        combine([updates], [0.5])


def test_on_a_quantised_base_the_first_forward_is_the_base_s_and_merging_keeps_it():
    model = our_model(tiny_falcon(2, 64, layers=1))
    nn.quantize(model, group_size=64, bits=8)
    ids = mx.array(np.random.default_rng(0).integers(0, 384, (1, 9)))
    plain = np.array(model(ids))
    with_dora(model)
    np.testing.assert_allclose(np.array(model.eval()(ids)), plain, atol=1e-4)
    for _, layer in lora_layers(model):
        layer.lora_B.weight = 0.05 * mx.random.normal(layer.lora_B.weight.shape)
        layer.lora_magnitude_vector = 1.1 * layer.lora_magnitude_vector
    turned = np.array(model(ids))
    assert np.abs(turned - plain).max() > 0.01
    merge_lora(model)
    np.testing.assert_allclose(np.array(model(ids)), turned, atol=1e-3)


@pytest.mark.parametrize("path", ["cpu", "gpu"])
def test_peak_is_what_was_planned(tmp_path, monkeypatch, path):
    if backend.machine().device != "cpu":
        pytest.skip("measured on MLX's CPU backend")
    monkeypatch.setenv("INTERVIEWMATE_PATH", "gpu" if path == "gpu" else "")
    monkeypatch.setattr(backend, "_num_streams", lambda: 0)
    rows = [{"question": "Why?", "answer": "because it is learned " * 24}] * 8
    data = write_rows(tmp_path / "train.jsonl", rows)
    settings = ["model.base=mini", f"data.path={data}", "train.epochs=1", "lora.dora=true"]
    run = load_run("A", [*settings, "lora.targets=all-linear"])
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    started, *events = train(run, tmp_path / "out")
    taken = [event for event in events if isinstance(event, Stepped)][-1].peak_bytes - before
    assert 0.8 * started.peak_bytes < taken < 1.2 * started.peak_bytes
