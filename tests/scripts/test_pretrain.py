"""The recipe of a small base, on a tiny text: what it writes, and that it can be interrupted."""

import hashlib
import importlib
import json
import math
import os
import re
import signal
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import numpy as np
import pytest
import torch
from checkpoints import CORPUS
from pretrain_unlikelihood import repeat_unlikelihood
from transformers import AutoModelForCausalLM, AutoTokenizer

from interviewmate_mlx.base.base import Base
from interviewmate_mlx.data.batches import collate
from interviewmate_mlx.data.prompts import pack_texts
from interviewmate_mlx.data.records import load_splits
from interviewmate_mlx.model.falcon import cross_entropy
from interviewmate_mlx.training.events import Stepped
from interviewmate_mlx.training.metrics import read_metrics

SCRIPTS = Path(__file__).parents[2] / "scripts"
_SHAPE = {"vocab": 320, "hidden": 32, "layers": 2, "heads": 2, "width": 16, "rows": 4}
SIZES = [word for name, n in _SHAPE.items() for word in (f"--{name}", str(n))]
STEPS = 12
TOKENS = ["--tokens", str(STEPS * 4 * 16)]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        return importlib.import_module("pretrain")


@pytest.fixture(autouse=True)
def _signals_as_before():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n<|endoftext|>\n".join(CORPUS * 3), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def made(script: ModuleType, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder from a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("made") / "small"
    sources = text.with_name("SOURCES.md")
    sources.write_text("# Sources\n\nNine lines of the tests, Apache-2.0.", encoding="utf-8")
    words = [str(text), "--out", str(out), "--sources", str(sources), *SIZES, *TOKENS]
    assert script.main(words) == 0
    return out


def interrupted(script: ModuleType, words: list[str], stage: int, step: int) -> None:
    """Run until a step of a stage, and send a signal in it."""
    show, stages = script.show, []

    def interrupt(events, console):
        stages.append(events)
        for event in show(events, console):
            if len(stages) == stage and isinstance(event, Stepped) and event.step == step:
                os.kill(os.getpid(), signal.SIGTERM)
            yield event

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "show", interrupt)
        assert script.main(words) == 130


def test_interrupted_and_resumed_run_ends_in_the_same_weights(script, text, made, tmp_path, capsys):
    out = tmp_path / "small"
    words = [str(text), "--out", str(out), *SIZES, *TOKENS]
    interrupted(script, words, stage=1, step=5)
    assert "interrupted after step 5" in capsys.readouterr().err
    assert not out.exists()
    prepared = out.with_name("small.work") / "text_0/train.jsonl"
    before = prepared.stat().st_mtime_ns
    assert script.main(words) == 1
    assert "Go on with --resume" in capsys.readouterr().err
    assert script.main([*words, "--resume"]) == 0
    assert prepared.stat().st_mtime_ns == before
    for name in ("model.safetensors", "tokenizer.json"):
        assert (out / name).read_bytes() == (made / name).read_bytes()


def test_second_stage_joins_in_and_is_repeated_by_a_resumed_run(script, text, tmp_path, capsys):
    core = tmp_path / "core.txt"
    core.write_text("\n<|endoftext|>\n".join([*CORPUS[:2], *CORPUS[4:7]] * 2), encoding="utf-8")
    stages = ["--then", str(core), "--then-tokens", str(6 * 4 * 16), "--then-share", "0.5"]
    words = [str(text), *SIZES, *TOKENS, *stages, "--out"]
    assert script.main([*words, str(tmp_path / "whole/small")]) == 0
    # The first document of the text is held out, and so it is in its cut.
    assert "core.txt: 8 documents to learn from, 2 held out" in capsys.readouterr().err
    card = (tmp_path / "whole/small/README.md").read_text()
    assert "the last 6 steps, 50% of their tokens from core.txt" in card
    assert f"{STEPS + 6} steps of 4 packed rows of 16 tokens" in card
    assert "| held out of core.txt |" in card
    work = tmp_path / "whole/small.work"
    own, core_rows, mixed = (
        (work / name / "train.jsonl").read_text(encoding="utf-8").splitlines()
        for name in ("text_0", "text_1", "mixed")
    )
    assert set(core_rows) < set(mixed) <= {*core_rows, *own}
    added = mixed[len(core_rows) :]
    assert sum(map(len, added)) == pytest.approx(sum(map(len, core_rows)), rel=0.3)

    rates = [
        [line["learning_rate"] for line in read_metrics(work / f"stage_{n}/metrics.jsonl")]
        for n in (0, 1)
    ]
    assert rates[0] == [0.0] + [5e-3] * (STEPS - 1)  # level after the warmup
    assert rates[1] == pytest.approx([5e-3 * (1 - n / 6) for n in range(6)])

    parts = [*words, str(tmp_path / "parts/small")]
    interrupted(script, parts, stage=2, step=3)
    assert script.main([*parts, "--resume"]) == 0
    for name in ("model.safetensors", "README.md"):
        whole, parts = ((tmp_path / p / "small" / name).read_bytes() for p in ("whole", "parts"))
        assert whole == parts


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--then", "{text}"], "--then and --then-tokens go together"),
        (["--tokens", "0"], "--tokens 0 leaves nothing to train on"),
        (["--blend", "0.5"], "--blend mixes with the weights of --from"),
        (["--then-share", "0"], "--then-share: got 0, expected above 0, at most 1"),
        (["--then-share", "1.5"], "--then-share: got 1.5, expected above 0, at most 1"),
        (["--width", "100", "--unlikelihood", "1"], "--width: got 100, expected a multiple of 16"),
        (["--vocab", "30000"], "expected 30000"),
        (
            ["--then", "{text}", "--then-tokens", "64", "--then-share", "0.1"],
            "the first text is too short",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_training(script, text, tmp_path, capsys, options, said):
    options = [word.format(text=text) for word in options]
    words = [str(text), *SIZES, *TOKENS, "--out", str(tmp_path / "small")]
    assert script.main([*words, *options]) == 1
    assert said in capsys.readouterr().err
    work = tmp_path / "small.work"
    assert not list(work.glob("stage_*"))
    if "--vocab" in options:  # and the next try begins afresh
        assert script.main(words) == 0


def test_run_goes_on_from_a_base(script, text, made, tmp_path):
    """With steps too small for bfloat16 it ends where it began; so others begin there too."""
    words = [str(text), "--from", str(made), "--width", "16", "--rows", "4", *TOKENS]
    assert script.main([*words, "--learning-rate", "1e-12", "--out", str(tmp_path / "same")]) == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "same" / name).read_bytes() == (made / name).read_bytes()
    old, new = ((folder / "README.md").read_text() for folder in (made, tmp_path / "same"))
    assert "learning rate 0.005 after 2% warmup, then linear to 0" in old
    assert set(re.findall(r"^\| .*", old, re.M)) <= set(new.splitlines())
    assert "| afterwards: tokens seen | 768: 12 steps of 4 packed rows of 16 tokens |" in new
    assert "learning rate 1e-12 after 2% warmup" in new

    assert script.main([*words, "--out", str(tmp_path / "better")]) == 0
    before, after = (perplexity(folder) for folder in (made, tmp_path / "better"))
    assert after < 0.95 * before
    assert script.main([*words, "--blend", "0.25", "--out", str(tmp_path / "blend")]) == 0
    assert "25% of the weights after this, 75% before" in (tmp_path / "blend/README.md").read_text()
    one, other, got = (
        mx.load(str(folder / "model.safetensors"))
        for folder in (made, tmp_path / "better", tmp_path / "blend")
    )
    for name, array in got.items():
        expected = 0.75 * one[name].astype(mx.float32) + 0.25 * other[name].astype(mx.float32)
        # Two roundings to bfloat16, each of 2**-9.
        np.testing.assert_allclose(array.astype(mx.float32), expected, rtol=2**-8, atol=1e-4)

    words[2] = str(tmp_path / "better")
    assert script.main([*words, "--learning-rate", "1e-12", "--out", str(tmp_path / "third")]) == 0
    third = (tmp_path / "third" / "README.md").read_text()
    rates = re.findall(r"^\| (.*)optimizer .* learning rate (\S+)", third, re.M)
    assert rates == [("", "0.005"), ("afterwards: ", "0.005"), ("afterwards again: ", "1e-12")]


def perplexity(folder: Path) -> float:
    card = (folder / "README.md").read_text()
    return float(card.partition("a token, perplexity ")[2].partition(",")[0])


def test_base_of_another_shape_or_kind_is_refused(script, text, made, tiny_base, tmp_path, capsys):
    words = [str(text), "--out", str(tmp_path / "small"), *TOKENS, "--from"]
    assert script.main([*words, str(made), "--hidden", "64"]) == 1
    assert f"--hidden 64: {made} has 32" in capsys.readouterr().err
    assert script.main([*words, str(tiny_base)]) == 1
    assert f"{tiny_base} is no base of this script" in capsys.readouterr().err


def test_unlikelihood_makes_repetition_less_likely(script, text, made, tmp_path):
    words = [str(text), "--from", str(made), "--width", "16", "--rows", "4", *TOKENS]
    records = load_splits(made.with_name("small.work") / "text_0")["train"]
    batch = collate(pack_texts(Base.open(made).tokenizer, records, 17)[:-1])
    terms = []
    for weight in (0, 1000):
        out = tmp_path / f"weight_{weight}"
        assert script.main([*words, "--unlikelihood", str(weight), "--out", str(out)]) == 0
        logits = Base.open(out).load(mx.float32)(batch.inputs).reshape(-1, 320)
        losses = cross_entropy(logits, batch.targets)
        terms.append(repeat_unlikelihood(logits, batch.targets, losses, 16).sum().item())
        assert ("pair the row has already, times 1000" in (out / "README.md").read_text()) == (
            weight == 1000
        )
    assert 0 < terms[1] < 0.8 * terms[0]


def test_loss_of_the_tiny_text_falls(made):
    lines = read_metrics(made.with_name("small.work") / "stage_0/metrics.jsonl")
    losses = [line["loss"] for line in lines]
    assert len(losses) == STEPS
    assert losses[0] == pytest.approx(math.log(320), rel=0.01)
    assert losses[-1] < losses[0] - 0.1


def test_transformers_loads_the_folder_and_agrees(made):
    model = Base.open(made).load(mx.float32)
    reference = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32).eval()
    assert reference.config.eos_token_id == reference.generation_config.eos_token_id == 319
    tokens = np.random.default_rng(0).integers(0, 320, (2, 24))
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits.numpy()
    got = np.array(model(mx.array(tokens.astype(np.int32))))
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_transformers_tokenizer_gives_the_ids_that_were_trained_on(made):
    tokenizer = AutoTokenizer.from_pretrained(made)
    ids = [tokenizer.encode(text.strip("\n")) for text in CORPUS * 3]
    end = tokenizer.eos_token_id
    assert end == tokenizer.bos_token_id == 319
    assert tokenizer.encode("<|endoftext|>") == [end]
    work = made.with_name("small.work")
    for place, documents in (("held_out_0.jsonl", ids[:1]), ("text_0", ids[1:])):
        records = load_splits(work / place)["train"]
        first, *rows = pack_texts(Base.open(made).tokenizer, records, 17)
        trained = [*first.tokens, *(token for row in rows for token in row.tokens[1:])]
        assert trained == [token for document in documents for token in (*document, end)]
    for text in ("A mean\n\n  of 3 values — naïve, 模型", *CORPUS):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_folder_fits_its_checksums_and_has_a_card(made):
    lines = (made / "SHA256SUMS").read_text().splitlines()
    sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
    assert set(sums) == {path.name for path in made.iterdir()} - {"SHA256SUMS"}
    for name, digest in sums.items():
        assert hashlib.sha256((made / name).read_bytes()).hexdigest() == digest
    card = (made / "README.md").read_text()
    assert "Nine lines of the tests, Apache-2.0." in card
    assert "# Sources\n" not in card
    assert f"{STEPS} steps of 4 packed rows of 16 tokens" in card
    assert "> **Gradient descent is**" in card


def test_held_out_figures_are_those_of_the_stored_weights(made):
    """Computed again by transformers, row by row."""
    reference = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32).eval()
    stream = np.array([*AutoTokenizer.from_pretrained(made).encode(CORPUS[0].strip("\n")), 319])
    total = 0.0
    for start in range(0, len(stream) - 1, 16):
        row = torch.tensor(stream[start : start + 17].astype(np.int64))
        with torch.no_grad():
            logits = reference(row[None, :-1]).logits[0]
        total += torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").item()
    bits = total / np.log(2) / len(CORPUS[0].encode())
    card = (made / "README.md").read_text()
    mean = total / (len(stream) - 1)
    figures = f"{mean:.4f} nats a token, perplexity {np.exp(mean):.2f}, {bits:.4f} bits a byte"
    assert f"| held out of text.txt | {figures} |" in card


def test_config_has_what_tells_a_falcon_rw(made):
    config = json.loads((made / "config.json").read_text())
    assert config["architectures"] == ["FalconForCausalLM"]
    assert (config["alibi"], config["bias"]) == (True, True)
    for key in ("multi_query", "parallel_attn", "new_decoder_architecture"):
        assert config[key] is False
    template = json.loads((made / "tokenizer_config.json").read_text())["chat_template"]
    assert template == (made / "chat_template.jinja").read_text()


def test_existing_folder_is_not_replaced(script, text, made, capsys):
    assert script.main([str(text), "--out", str(made), *SIZES, *TOKENS]) == 1
    assert "exists already" in capsys.readouterr().err


def test_resume_refuses_another_recipe(script, text, made, capsys, tmp_path):
    out = tmp_path / "small"
    work = out.with_name("small.work")
    (work / "stage_0").mkdir(parents=True)
    (work / "recipe.json").write_text((made.with_name("small.work") / "recipe.json").read_text())
    words = [str(text), "--out", str(out), *SIZES, *TOKENS, "--seed", "1", "--resume"]
    assert script.main(words) == 1
    assert "began with other values of: seed" in capsys.readouterr().err
