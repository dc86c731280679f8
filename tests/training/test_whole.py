"""Training of all weights against torch's AdamW, and the model that it writes, everywhere."""

import gc
import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
import torch
from checkpoints import our_model, tiny_falcon
from conftest import write_rows
from mlx_lm.utils import load as mlx_lm_load
from networks import random_network, write_network
from peft_training import CLIP, random_rows, steps_of
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    get_linear_schedule_with_warmup,
)

from interviewmate_mlx import backend
from interviewmate_mlx.base.base import Base
from interviewmate_mlx.base.convert import convert
from interviewmate_mlx.base.quantization import Quantization
from interviewmate_mlx.config import load_run
from interviewmate_mlx.data.batches import collate, split_step
from interviewmate_mlx.data.templates import CHAT_TEMPLATE
from interviewmate_mlx.errors import AdapterError, BackendError, ConfigError, ModelError
from interviewmate_mlx.evaluation.evaluate import evaluate
from interviewmate_mlx.model.cpu_kernels import use_cpu_kernels
from interviewmate_mlx.model.recompute import use_gradient_checkpointing
from interviewmate_mlx.model.tree import named_arrays
from interviewmate_mlx.results.report import build_report
from interviewmate_mlx.results.runs import read_runs
from interviewmate_mlx.training.events import Started, Stepped, Validated
from interviewmate_mlx.training.loop import train
from interviewmate_mlx.training.metrics import read_metrics
from interviewmate_mlx.training.optimizer import adamw, decays, learning_rate_at
from interviewmate_mlx.training.step import Step

STEPS, PEAK, DECAY = 20, 1e-3, 0.1


def train_in_torch(model, steps) -> list[float]:
    """As transformers' Trainer groups parameters: norms and biases do not decay."""
    decaying = Trainer.get_decay_parameter_names(None, model)
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if n in decaying], "weight_decay": DECAY},
        {"params": [p for n, p in named.items() if n not in decaying], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK)
    scheduler = get_linear_schedule_with_warmup(optimizer, 5, len(steps))
    losses = []
    for rows in steps:
        count, total = sum(int(row.loss_mask.sum()) for row in rows), 0.0
        for row in rows:
            ids = torch.tensor(row.tokens[None].astype(np.int64))
            labels = torch.where(torch.tensor(row.loss_mask[None]), ids, -100)[0, 1:]
            logits = model(input_ids=ids).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            (loss / count).backward()
            total += loss.item() / count
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def train_here(model, steps, token_budget=128) -> list[float]:
    step, losses = Step(model.train(), adamw(DECAY), CLIP), []
    for number, rows in enumerate(steps):
        groups = split_step(rows, token_budget)
        step.accumulate([collate(group) for group in groups], [0, number])
        rate = learning_rate_at(number, len(steps), PEAK, "linear", warmup_ratio=0.25)
        losses.append(step.update(rate)["loss"].item())
    return losses


@pytest.mark.parametrize("kind", ["falcon", "falcon, other paths", "llama", "llama, tied"])
def test_twenty_updates_equal_torch_s(kind, tmp_path):
    if kind.startswith("falcon"):
        reference = tiny_falcon(6, 8, layers=2)
        model = our_model(reference)
        for use in (use_cpu_kernels, use_gradient_checkpointing) if "other" in kind else ():
            use(model)
    else:
        # transformers' embedding gives a padding token no gradient.
        changes = {"num_hidden_layers": 2, "pad_token_id": None}
        changes["tie_word_embeddings"] = "tied" in kind
        reference = write_network(tmp_path, "llama", **changes)
        model = Base.open(tmp_path).load(mx.float32)
    decaying = set(Trainer.get_decay_parameter_names(None, reference))
    decaying &= dict(reference.named_parameters()).keys()  # a tied head is there once
    ours = named_arrays(model.trainable_parameters())
    assert {name for name, array in ours.items() if decays(name, array)} == decaying
    start = {name: np.array(array) for name, array in ours.items()}
    steps = steps_of(random_rows(12), STEPS)
    expected = train_in_torch(reference, steps)
    losses = train_here(model, steps)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert losses[-1] < losses[0] - 0.5
    theirs = dict(reference.named_parameters())
    ours = named_arrays(model.parameters())
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert np.abs(np.array(array) - start[name]).max() > 1e-3
        # Adam's step is about the rate, whatever the gradient: where that is all but 0, its sign
        # is the rounding's.
        np.testing.assert_allclose(
            np.array(array), theirs[name].detach().numpy(), atol=STEPS * PEAK / 2
        )


@pytest.mark.parametrize(("dtype", "within"), [(mx.float32, 1e-5), (mx.bfloat16, 2e-2)])
def test_any_split_of_a_step_gives_the_same_update(dtype, within):
    rows = steps_of(random_rows(12), 6)
    found = []
    for budget in (64, 1024):
        model = our_model(tiny_falcon(6, 8, layers=2))
        model.set_dtype(dtype)
        found.append(train_here(model, rows, budget))
    np.testing.assert_allclose(found[0], found[1], rtol=within)


def test_masters_take_the_steps_that_bfloat16_would_lose():
    """The weights are what torch's float32 AdamW has, rounded, also after 200 tiny steps."""
    rng = np.random.default_rng(0)
    start = rng.normal(size=(8, 16)).astype(np.float32)
    narrow = mx.array(start).astype(mx.bfloat16)
    wide = torch.nn.Parameter(torch.tensor(np.array(narrow.astype(mx.float32))))
    theirs = torch.optim.AdamW([wide], lr=1e-5, weight_decay=DECAY)
    optimizer, parameters = adamw(DECAY), {"weight": narrow}
    optimizer.init(parameters)
    optimizer.learning_rate = 1e-5
    for _ in range(200):
        gradient = rng.normal(loc=0.5, size=start.shape).astype(np.float32)
        parameters = optimizer.apply_gradients({"weight": mx.array(gradient)}, parameters)
        mx.eval(parameters, optimizer.state)
        wide.grad = torch.tensor(gradient)
        theirs.step()
    state = optimizer.state["weight"]
    assert {array.dtype for array in state.values()} == {mx.float32}
    expected = wide.detach().numpy()
    np.testing.assert_allclose(np.array(state["master"]), expected, atol=1e-6)
    assert mx.array_equal(parameters["weight"], state["master"].astype(mx.bfloat16))
    assert np.abs(expected - np.array(narrow.astype(mx.float32))).max() > 1e-3


@pytest.fixture(scope="module")
def bases(tiny_base, tmp_path_factory):
    """By name. Read only."""
    folder = tmp_path_factory.mktemp("bases")
    for name, tied in (("llama", False), ("llama, tied", True)):
        changes = {"num_hidden_layers": 2, "tie_word_embeddings": tied}
        write_network(folder / name, "llama", **changes)
    return {"falcon": tiny_base, "mini": "mini"} | {
        name: folder / name for name in ("llama", "llama, tied")
    }


def run_on(base, data, *settings):
    words = [f"model.base={base}", f"data.path={data}", "train.weights=all", "train.epochs=2"]
    words += ["train.learning_rate=3e-3", "train.weight_decay=0.1", "train.save_every=2"]
    return load_run("A", [*words, *settings])


@pytest.mark.parametrize("name", ["falcon", "llama", "llama, tied", "mini"])
def test_model_that_is_written_is_one_everywhere(bases, name, questions, tmp_path, imate):
    out = tmp_path / "out"
    events = list(train(run_on(bases[name], questions), out))
    losses = [event.loss for event in events if isinstance(event, Validated)]
    assert min(losses) < losses[0] - 0.1
    summary = events[-1].summary
    assert summary.trainable_parameters == summary.total_parameters
    written = mx.load(str(out / "model.safetensors"))
    assert ("lm_head.weight" in written) == (name == "llama")
    base = Base.open(out)
    # A base without a template was asked with ours, and is from now on.
    own = Base.open(bases[name]).tokenizer.chat_template
    assert base.tokenizer.chat_template == (own or CHAT_TEMPLATE)
    ids = np.random.default_rng(1).integers(3, 380, (2, 24))
    logits = np.array(base.load(mx.float32)(mx.array(ids)))
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(logits, expected, atol=2e-4)
    before = np.array(Base.open(bases[name]).load(mx.float32)(mx.array(ids)))
    assert np.abs(logits - before).max() > 0.05
    stock, tokenizer = mlx_lm_load(str(out), trust_remote_code=True)
    np.testing.assert_allclose(np.array(stock(mx.array(ids))), expected, atol=2e-4)
    assert tokenizer.eos_token_id == base.tokenizer.eos_token_id
    assert AutoTokenizer.from_pretrained(out).encode("A b.") == tokenizer.encode("A b.")
    assert imate("generate", "Why?", "--model", out, "--max-tokens", 3).exit_code == 0
    imate("evaluate", "--model", out, "--data", questions, "--no-answers", "--out", tmp_path / "e")
    # A LoRA takes it as its base, and it is no adapter.
    lora = load_run("A", [f"model.base={out}", f"data.path={questions}", "train.max_steps=2"])
    assert list(train(lora, tmp_path / "lora"))[-1].step == 2
    with pytest.raises(AdapterError, match="It is a model: name it as the base"):
        list(train(lora.replace(lora={"start_from": str(out)}), tmp_path / "other"))
    assert "license" in (out / "README.md").read_text() or name != "mini"
    report = build_report(read_runs([out]))
    said = json.dumps([[str(part) for part in s.parts] for s in report.sections])
    assert "all weights" in said
    assert f"imate-mlx evaluate --model {out} --out {out}" in said
    assert f"evaluate {out}" not in said


@pytest.mark.parametrize(
    ("dtype", "optimizer"), [("float32", "adamw"), ("bfloat16", "adamw"), ("bfloat16", "muon")]
)
def test_resumed_it_ends_in_the_same_bytes(bases, questions, tmp_path, dtype, optimizer):
    settings = [f"model.dtype={dtype}", "train.learning_rate=0.05", "validate.every=1"]
    settings += [f"train.optimizer={optimizer}"]
    settings += ["train.schedule=constant"]
    run, whole, out = run_on(bases["falcon"], questions, *settings), tmp_path / "a", tmp_path / "b"
    events = list(train(run, whole))
    assert 0 < events[-1].best_step < events[-1].step  # so that the best is not the last
    written = mx.load(str(whole / "model.safetensors"))
    assert {str(array.dtype) for array in written.values()} == {f"mlx.core.{dtype}"}
    for count in (3, 8):
        list(
            train(
                run,
                out,
                resume=count == 8,
                stop=lambda count=count: len(read_metrics(out / "metrics.jsonl")) > count,
            )
        )
    list(train(run, out, resume=True))
    names = [path.name for path in whole.iterdir() if path.suffix in (".safetensors", ".json")]
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(names)
    for name in set(names) - {"summary.json"}:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize(("dtype", "optimizer"), [("float32", "adamw"), ("bfloat16", "muon")])
def test_disk_is_planned(bases, questions, tmp_path, dtype, optimizer):
    settings = [f"model.dtype={dtype}", f"train.optimizer={optimizer}", "train.max_steps=4"]
    run = run_on(bases["mini"], questions, *settings)
    started, *_ = train(run, tmp_path / "out")
    assert isinstance(started, Started)
    kept = [path.stat().st_size for path in (tmp_path / "out").glob("checkpoints/*")]
    model = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert len(kept) == 2
    # One checkpoint and one model more exist while they are written.
    assert sum(kept) + kept[0] + 2 * model == pytest.approx(started.disk_bytes, rel=0.01)


def test_packed_texts_are_learned_and_evaluated_as_such(bases, tmp_path):
    texts = [{"text": f"Sentence {n} of a text. " * (3 * n + 1)} for n in range(6)]
    for split, rows in (("train", texts), ("valid", texts[:3])):
        write_rows(tmp_path / "rows" / f"{split}.jsonl", rows)
    settings = ["data.pack=true", "data.max_length=16", "train.optimizer=muon"]
    out = tmp_path / "out"
    started, *events = train(run_on(bases["falcon"], tmp_path / "rows", *settings), out)
    assert started.num_truncated_rows == 0
    valid = [event for event in events if isinstance(event, Validated)]
    assert min(event.loss for event in valid) < valid[0].loss - 0.1
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"on {started.num_train_rows} packed verbatim rows" in card
    assert 'tokenizer("Overfitting is"' in card
    assert "apply_chat_template" not in card

    lora = load_run("A", [f"model.base={out}", f"data.path={tmp_path / 'rows'}", *settings[:2]])
    *_, finished = train(lora.replace(train={"max_steps": 2}), tmp_path / "lora")
    _, (_, own) = evaluate([tmp_path / "lora"], split="valid", sampling=None)
    assert own.loss.loss == pytest.approx(finished.summary.best_valid_loss, rel=1e-5)


def test_preferences_are_learned_with_all_weights(bases, tmp_path):
    rows = [{"prompt": f"{n}?", "chosen": "A b c.", "rejected": f"D e {n}."} for n in range(6)]
    for split in ("train", "valid"):
        write_rows(tmp_path / "rows" / f"{split}.jsonl", rows)
    run = run_on(bases["falcon"], tmp_path / "rows", "train.method=dpo")
    events = [event for event in train(run, tmp_path / "out") if isinstance(event, Validated)]
    assert events[0].loss == pytest.approx(0.693147, abs=1e-4)
    assert events[-1].measures["margin"] > 0.05


IDLE = {
    "rank": (["lora.rank=4"], "lora.rank: got 4, and train.weights all has no LoRA; expected 8"),
    "start": (["lora.start_from=x"], "lora.start_from: got 'x'"),
    "dora": (["lora.dora=true"], "lora.dora: got True"),
    "float16": (["model.dtype=float16"], "small gradients would be 0 in it"),
}


@pytest.mark.parametrize(("settings", "fault"), IDLE.values(), ids=IDLE)
def test_a_key_of_a_lora_is_refused(questions, settings, fault):
    with pytest.raises(ConfigError) as caught:
        run_on("mini", questions, *settings)
    assert fault in str(caught.value)


def test_a_base_that_cannot_be_trained_whole_is_refused(bases, questions, tmp_path):
    write_network(tmp_path / "experts", "mixtral", num_hidden_layers=1)
    with pytest.raises(ModelError, match="could not load them again") as caught:
        list(train(run_on(tmp_path / "experts", questions), tmp_path / "out"))
    assert "block_sparse_moe" in str(caught.value)
    quantization = Quantization.of(8, 32)
    convert(bases["llama"], tmp_path / "packed", quantization=quantization)
    with pytest.raises(ModelError, match="is quantised, to 8 bits"):
        list(train(run_on(tmp_path / "packed", questions), tmp_path / "out"))
    with pytest.raises(BackendError, match="all weights, their gradients and moments") as refused:
        list(train(run_on("mini", questions, "train.memory_gb=0.2"), tmp_path / "out"))
    # Shorter or narrower rows would not help: the update alone is too large.
    advice = str(refused.value).splitlines()[1]
    assert advice == "No row would fit: train a smaller base, or a LoRA (train.weights lora)."
    assert not (tmp_path / "out").exists()


def test_a_run_does_not_write_over_its_own_base(bases, questions, tmp_path):
    out = tmp_path / "out"
    list(train(run_on(bases["llama"], questions, "train.max_steps=2"), out))
    again = run_on(out, questions)
    with pytest.raises(ModelError, match="would write over its base"):
        list(train(again, out, replace=True))
    shutil.rmtree(out / "checkpoints")
    assert Base.open(out)


def test_every_network_that_can_be_trained_whole_is_known(tmp_path):
    """Those whose tensors mlx-lm renames or stacks are refused; all others are as they lie."""
    assert random_network("llama")
    for model_type, same in (("qwen3", True), ("gemma2", True), ("olmoe", False), ("phi3", True)):
        write_network(tmp_path / model_type, model_type, num_hidden_layers=2)
        base = Base.open(tmp_path / model_type)
        assert (base.stored_otherwise(base.build(mx.float32)) == []) == same, model_type


@pytest.mark.parametrize("streams", [0, 2])
@pytest.mark.parametrize("path", ["cpu", "gpu"])
@pytest.mark.parametrize(("words", "optimizer"), [(4, "muon"), (96, "adamw")])
def test_peak_is_what_was_planned(tmp_path, monkeypatch, path, words, optimizer, streams):
    if backend.machine().device != "cpu":
        pytest.skip("measured on MLX's CPU backend")
    if streams > backend.machine().cpu_streams or (streams and path == "gpu"):
        pytest.skip("streams need two cores and a known BLAS, and are a CPU's")
    monkeypatch.setenv("INTERVIEWMATE_PATH", "gpu" if path == "gpu" else "")
    monkeypatch.setattr(backend, "_num_streams", lambda: streams)
    rows = [{"question": "Why?", "answer": "because it is learned " * (words // 4)}] * 8
    data = write_rows(tmp_path / "rows" / "train.jsonl", rows)
    write_rows(tmp_path / "rows" / "valid.jsonl", rows[:2])
    run = run_on("mini", data.parent, "train.epochs=1", f"train.optimizer={optimizer}")
    if path == "gpu":
        run = run.replace(model={"dtype": "bfloat16"})
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    started, *events = train(run, tmp_path / "out")
    taken = [event for event in events if isinstance(event, Stepped)][-1].peak_bytes - before
    said = f"{taken / 1e6:.0f} MB, {started.peak_bytes / 1e6:.0f} planned"
    print(said)
    assert 0.8 * started.peak_bytes < taken < 1.2 * started.peak_bytes, said
