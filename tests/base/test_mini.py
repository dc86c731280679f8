"""The shipped base: complete, equal to transformers, and found by its name."""

import hashlib
import json
import shutil
import socket
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm.generate import generate_step
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from interviewmate_mlx.adapter.folder import Adapter
from interviewmate_mlx.base.base import Base, fetch_base
from interviewmate_mlx.config import shipped
from interviewmate_mlx.data.prompts import encode_question
from interviewmate_mlx.data.records import load_splits
from interviewmate_mlx.errors import ModelError

MAX_BYTES = 20_000_000
QUESTION = "What is overfitting?"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*arguments):
        raise AssertionError(f"mini needs no network, but something connected: {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def mini() -> Path:
    return fetch_base("mini")


@pytest.fixture(scope="module")
def reference(mini):
    """The model of transformers, loaded from the shipped folder."""
    return AutoModelForCausalLM.from_pretrained(mini, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts(mini) -> list[list[int]]:
    opened = Base.open(mini)
    _, tokenizer = opened.load(mx.float32), opened.tokenizer
    rows = load_splits(shipped("data/interview"))["test"][:3]
    return [encode_question(tokenizer, row.messages[0].content) for row in rows]


def test_folder_matches_its_checksums_and_is_small_enough(mini):
    lines = (mini / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
    files = {path.name: path for path in mini.iterdir() if path.name != "SHA256SUMS"}
    assert {n: hashlib.sha256(p.read_bytes()).hexdigest() for n, p in files.items()} == sums
    assert sum(path.stat().st_size for path in files.values()) <= MAX_BYTES
    assert {path.suffix for path in files.values()} == {".json", ".jinja", ".md", ".safetensors"}


def test_weights_are_bfloat16_and_the_tied_head_is_stored_once(mini):
    weights = mx.load(str(mini / "model.safetensors"))
    assert {array.dtype for array in weights.values()} == {mx.bfloat16}
    assert "lm_head.weight" not in weights
    assert sum(array.size for array in weights.values()) > 1_000_000


def test_card_has_figures_sources_and_limits(mini):
    card = (mini / "README.md").read_text(encoding="utf-8")
    for what in (
        "held out of ml_prose.txt.xz",
        "held out of ml_core.txt.xz",
        "nats a token, perplexity",
        "tokens seen",
        "## Limits",
        "BSD-3-Clause",
    ):
        assert what in card, what


def test_logits_equal_transformers(mini, reference, prompts):
    model = Base.open(mini).load(mx.float32)
    for ids in prompts:
        with torch.no_grad():
            expected = reference(torch.tensor([ids])).logits.numpy()
        got = np.array(model(mx.array([ids])))
        np.testing.assert_allclose(got, expected, atol=1e-4)


def test_greedy_text_equals_transformers(mini, reference, prompts):
    opened = Base.open(mini)
    model, tokenizer = opened.load(mx.float32), opened.tokenizer
    end = tokenizer.eos_token_id
    for ids in prompts:
        given = {"max_new_tokens": 48, "do_sample": False, "pad_token_id": end}
        expected = reference.generate(torch.tensor([ids]), **given)[0, len(ids) :].tolist()
        steps = generate_step(mx.array(ids), model, max_tokens=48)
        got = [token for token, _ in steps]
        if end in got:
            got = got[: got.index(end) + 1]
        assert got == expected


def test_tokenizer_equals_that_of_transformers(mini):
    theirs, ours = AutoTokenizer.from_pretrained(mini), Base.open(mini).tokenizer
    config = json.loads((mini / "config.json").read_text(encoding="utf-8"))
    assert len(theirs) == config["vocab_size"]
    assert theirs.eos_token_id == ours.eos_token_id == config["eos_token_id"] > 0
    for row in load_splits(shipped("data/interview"))["test"]:
        text = "\n".join(message.content for message in row.messages)
        assert theirs.encode(text) == ours.encode(text)
        assert theirs.decode(theirs.encode(text)) == text


# `mini` as a name, in each command that takes a base.


def test_mini_is_a_name_even_if_there_is_a_folder_of_that_name(
    mini, tiny_base, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_base, "mini")
    assert fetch_base("mini") == mini
    assert fetch_base("./mini") == Path("mini")
    with pytest.raises(ModelError, match="Give mini"):
        fetch_base("Mini")


def test_convert_mini_writes_a_folder_that_mlx_lm_takes(imate, mini):
    imate("convert", "mini")
    made_of = json.loads(Path("models/mini/conversion.json").read_text(encoding="utf-8"))
    assert made_of["source"] == "mini"
    assert Path("models/mini/falcon.py").is_file()
    one, other = (mx.load(str(f / "model.safetensors")) for f in (mini, Path("models/mini")))
    assert set(one) == set(other)
    assert all(mx.array_equal(one[name], other[name]).item() for name in one)


def test_run_a_on_mini_lowers_the_loss_on_rows_it_has_not_seen(imate):
    for split, count in (("train", 48), ("valid", 12)):
        rows = (shipped("data/interview") / f"{split}.jsonl").read_text(encoding="utf-8")
        few = "".join(rows.splitlines(keepends=True)[:count])
        Path("few").mkdir(exist_ok=True)
        Path("few", f"{split}.jsonl").write_text(few, encoding="utf-8")
    words = ["train", "--run", "A", "--model", "mini", "--set", "data.path=few"]
    said = json.loads(imate(*words, "--set", "train.epochs=1", "--json").stdout)
    assert (said["base"], said["steps"]) == ("mini", 12)
    assert said["best_valid_loss"] < said["base_valid_loss"]


def test_adapter_on_mini_names_it_and_loads_in_any_folder(
    imate, mini, reference, prompts, questions, tmp_path, monkeypatch
):
    shutil.copytree(mini, "mini")  # a folder of that name does not make it a path
    words = ["train", "--run", "mini", "--set", f"data.path={questions / 'train.jsonl'}"]
    imate(*words, "--set", "train.epochs=5", "--out", "adapter")
    imate("export", "adapter", "--out", "elsewhere/adapter")
    exported = tmp_path / "elsewhere" / "adapter"
    config = json.loads((exported / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "mini"
    assert all(str(tmp_path).encode() not in path.read_bytes() for path in exported.iterdir())
    card = (exported / "README.md").read_text(encoding="utf-8")
    assert 'from_pretrained("models/mini")' in card
    assert "imate-mlx convert mini" in card

    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    ask = ["generate", QUESTION, "--adapter", exported, "--max-tokens", 24]
    assert imate(*ask).stdout == imate(*ask, "--model", "mini").stdout

    model = Base.open(mini).load(mx.float32)
    before = np.array(model(mx.array([prompts[0]])))
    Adapter.open(exported).apply(model)
    got = np.array(model.eval()(mx.array([prompts[0]])))
    theirs = PeftModel.from_pretrained(reference, exported).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor([prompts[0]])).logits.numpy()
    theirs.unload()
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert np.abs(got - before).max() > 0.1


def test_bench_takes_mini(imate):
    options = ["--steps", 1, "--warmup", 0, "--json"]
    said = json.loads(imate("bench", "--model", "mini", *options).stdout)
    assert (said["base"], said["steps"]) == ("mini", 1)


def test_preview_takes_mini(imate):
    said = imate("data", "preview", "interview", "--model", "mini").stdout
    assert "tokens," in said
    assert "[with loss]" in said
