"""Biases trained beside a LoRA, against PEFT's: trained, saved, loaded, merged, or refused."""

import copy
import json

import mlx.core as mx
import numpy as np
import pytest
import torch
from checkpoints import our_model, tiny_falcon
from mlx_lm.utils import load as mlx_lm_load
from networks import write_network
from peft import LoraConfig, PeftModel, get_peft_model
from peft_training import our_name, random_rows, start_alike, steps_of
from transformers import AutoModelForCausalLM, Trainer

from interviewmate_mlx.adapter.folder import Adapter, adapter_weights
from interviewmate_mlx.base.base import Base
from interviewmate_mlx.base.convert import convert
from interviewmate_mlx.base.quantization import Quantization
from interviewmate_mlx.coach.panel import Panel
from interviewmate_mlx.config import load_run
from interviewmate_mlx.data.batches import collate
from interviewmate_mlx.errors import AdapterError
from interviewmate_mlx.evaluation.merge import merge
from interviewmate_mlx.model.cpu_kernels import use_cpu_kernels
from interviewmate_mlx.model.lora import add_lora, merge_lora, remove_lora, train_biases
from interviewmate_mlx.model.tree import named_arrays
from interviewmate_mlx.training.loop import train
from interviewmate_mlx.training.metrics import read_metrics
from interviewmate_mlx.training.optimizer import adamw
from interviewmate_mlx.training.step import Step

RATE, DECAY, TARGETS = 2e-3, 0.1, ["query_key_value", "dense_h_to_4h"]
KINDS = ["lora_only", "all"]
IDS = np.random.default_rng(0).integers(0, 384, (2, 9))


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_updates_equal_peft_s(kind):
    """With AdamW as transformers' trainer groups it: no decay of biases."""
    base = tiny_falcon(6, 8, layers=2)
    model = our_model(base)
    add_lora(model, TARGETS, rank=4, alpha=8)
    train_biases(model, kind)
    use_cpu_kernels(model)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, bias=kind, task_type="CAUSAL_LM")
    reference = get_peft_model(copy.deepcopy(base), lora)
    start = {name: np.array(array) for name, array in adapter_weights(model).items()}
    trained = {n: p for n, p in reference.named_parameters() if p.requires_grad}
    assert {our_name(name) for name in trained} == start.keys()
    start_alike(reference, start)
    decaying = Trainer.get_decay_parameter_names(None, reference)
    groups = [
        {"params": [p for n, p in trained.items() if n in decaying], "weight_decay": DECAY},
        {"params": [p for n, p in trained.items() if n not in decaying], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, lr=RATE)
    step = Step(model.train(), adamw(DECAY), 0.0)
    losses, expected = [], []
    for number, rows in enumerate(steps_of(random_rows(22), 20)):
        count, total = sum(int(row.loss_mask.sum()) for row in rows), 0.0
        for row in rows:
            ids = torch.tensor(row.tokens[None].astype(np.int64))
            labels = torch.where(torch.tensor(row.loss_mask[None]), ids, -100)[0, 1:]
            logits = reference(input_ids=ids).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            (loss / count).backward()
            total += loss.item() / count
        theirs.step()
        theirs.zero_grad()
        expected.append(total)
        step.accumulate([collate(rows)], [0, number])
        losses.append(step.update(RATE)["loss"].item())
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    ours = adapter_weights(model)
    for name, parameter in trained.items():
        found = np.array(ours[our_name(name)])
        # A step of Adam is about the rate, whatever the gradient.
        np.testing.assert_allclose(found, parameter.detach().numpy(), atol=10 * RATE)
        assert np.abs(found - start[our_name(name)]).max() > RATE


def run_of(base, data, *settings):
    words = [f"model.base={base}", f"data.path={data}", "train.learning_rate=1e-2"]
    return load_run("A", [*words, "train.epochs=2", "lora.dropout=0.2", *settings])


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tiny_base, questions, tmp_path_factory):
    """A run with biases, and its folder. Read only."""
    run = run_of(tiny_base, questions, f"lora.bias={request.param}", "train.save_every=2")
    out = tmp_path_factory.mktemp("bias") / "out"
    list(train(run, out))
    return run, out


def logits_of(model):
    return np.array(model.eval()(mx.array(IDS)))


def test_peft_loads_it_and_answers_alike_and_it_leaves_no_trace(
    trained, tiny_base, tiny_checkpoint
):
    run, out = trained
    assert json.loads((out / "adapter_config.json").read_text())["bias"] == run.lora.bias
    model = Base.open(tiny_base).load(mx.float32)
    plain = logits_of(model)
    Adapter.open(out).apply(model)
    logits = logits_of(model)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_checkpoint), out)
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(IDS)).logits.float().numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    remove_lora(model)
    np.testing.assert_array_equal(logits_of(model), plain)
    Adapter.open(out).apply(model)
    merge_lora(model)
    np.testing.assert_allclose(logits_of(model), expected, atol=1e-4)


def test_in_bfloat16_biases_stay_so_and_resume_is_exact(trained, tmp_path):
    run, _ = trained
    run = run.replace(model={"dtype": "bfloat16"})
    whole, out = tmp_path / "whole", tmp_path / "parts"
    list(train(run, whole))
    list(train(run, out, stop=lambda: len(read_metrics(out / "metrics.jsonl")) > 2))
    list(train(run, out, resume=True))
    name = "adapter_model.safetensors"
    assert (out / name).read_bytes() == (whole / name).read_bytes()
    model = Base.open(run.model.base).load(mx.bfloat16)
    Adapter.open(out).apply(model)
    dtypes = {a.dtype for n, a in named_arrays(model.parameters()).items() if "lora_" not in n}
    assert dtypes == {mx.bfloat16}


def test_what_peft_saved_is_loaded_and_a_run_goes_on_from_it(
    trained, tiny_base, tiny_checkpoint, questions, tmp_path
):
    run, _ = trained
    torch.manual_seed(0)
    names = ["query_key_value"]
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=names, bias=run.lora.bias, task_type="CAUSAL_LM"
    )
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_checkpoint), config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        expected = theirs(input_ids=torch.tensor(IDS)).logits.float().numpy()
    theirs.save_pretrained(tmp_path / "peft")
    model = Base.open(tiny_base).load(mx.float32)
    Adapter.open(tmp_path / "peft").apply(model)
    np.testing.assert_allclose(logits_of(model), expected, atol=1e-4)
    start = run.replace(lora={"start_from": str(tmp_path / "peft")})
    assert list(train(start, tmp_path / "out"))[-1].step == 6
    with pytest.raises(AdapterError, match=r"bias: got nothing, expected"):
        list(train(start.replace(lora={"bias": "none"}), tmp_path / "plain"))


def test_it_merges_alone_and_is_refused_where_it_cannot_be(trained, tiny_base, tmp_path):
    _, out = trained
    model = Base.open(tiny_base).load(mx.float32)
    Adapter.open(out).apply(model)
    expected = logits_of(model)
    merge([out], tmp_path / "merged")
    np.testing.assert_allclose(
        logits_of(Base.open(tmp_path / "merged").load(mx.float32)), expected, atol=1e-4
    )
    stock, _ = mlx_lm_load(str(tmp_path / "merged"), trust_remote_code=True)
    np.testing.assert_allclose(np.array(stock(mx.array(IDS))), expected, atol=1e-4)
    with pytest.raises(AdapterError, match="is not combined with others"):
        merge([out], tmp_path / "half", weights=[0.5])
    with pytest.raises(AdapterError, match="cannot be switched from row to row"):
        Panel.load(str(tiny_base), {"mine": out})
    with pytest.raises(AdapterError, match="mlx-lm cannot hold"):
        Adapter.open(out).export_as_mlx_lm(
            tmp_path / "theirs", Base.open(tiny_base).load(mx.float32)
        )
    assert Adapter.open(Adapter.open(out).export(tmp_path / "copy")).config.bias != "none"


def test_bases_without_such_biases_are_refused(tiny_base, questions, tmp_path):
    write_network(tmp_path / "llama", "llama", num_hidden_layers=1)
    convert(tiny_base, tmp_path / "packed", quantization=Quantization.of(8, 64))
    for base, fault in (("llama", "has no such bias"), ("packed", "is quantised, whose layers")):
        run = run_of(tmp_path / base, questions, "lora.bias=lora_only")
        with pytest.raises(AdapterError, match=fault):
            list(train(run, tmp_path / "out"))
