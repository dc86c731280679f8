"""Adapters beside their base: what is found, what is written, and what is refused."""

import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import pytest

from interviewmate_mlx.adapter.card import set_section
from interviewmate_mlx.adapter.folder import Adapter, adapter_weights, save_adapter
from interviewmate_mlx.coach.generate import answer, answer_all, load_coach
from interviewmate_mlx.coach.sampling import Sampling
from interviewmate_mlx.config import load_run
from interviewmate_mlx.data.prompts import encode_question
from interviewmate_mlx.errors import ConfigError, DataError
from interviewmate_mlx.evaluation.evaluate import common_data, evaluate
from interviewmate_mlx.files import locked
from interviewmate_mlx.training import loop, task
from interviewmate_mlx.training.loss import token_loss
from interviewmate_mlx.training.step import total_of

QUESTIONS = ["What is a loss?", "Why?", "How does a model learn from rows that have labels?"]


@pytest.fixture
def learned(tiny_adapter, tmp_path) -> Path:
    """A copy of the adapter that may be written to."""
    folder = tmp_path / "learned"
    shutil.copytree(tiny_adapter, folder)
    return folder


@pytest.mark.parametrize("with_adapter", [False, True])
@pytest.mark.parametrize("count", [1, 3, 20])
def test_answers_side_by_side_are_those_one_by_one(tiny_base, tiny_adapter, with_adapter, count):
    model, tokenizer = load_coach(str(tiny_base), tiny_adapter if with_adapter else None)
    asked = [QUESTIONS[n % 3] + " Please." * (n // 3) for n in range(count)]
    sampling, seen = Sampling(max_tokens=24), []
    prompts = [encode_question(tokenizer, question) for question in asked]
    got = answer_all(model, tokenizer, prompts, sampling, lambda *counts: seen.append(counts))
    assert seen[-1] == (count, count)
    for question, found in zip(asked, got, strict=True):
        assert found.text.strip() == answer(model, tokenizer, question, sampling)
    if with_adapter:
        assert any(found.has_ended for found in got)
    assert not answer_all(model, tokenizer, [], sampling)


def test_draws_follow_their_seed(tiny_base):
    model, tokenizer = load_coach(str(tiny_base))
    prompts = [encode_question(tokenizer, question) for question in QUESTIONS]
    one, again, other = (
        answer_all(model, tokenizer, prompts, Sampling(16, temperature=1.0, seed=seed))
        for seed in (1, 1, 2)
    )
    assert one == again != other


def test_loss_of_an_adapter_is_its_validation_loss(tiny_base, questions, learned):
    _, (base, own) = evaluate([learned], data=str(questions), split="valid", sampling=None)
    run = load_run("A", [f"model.base={tiny_base}", f"data.path={questions}"])
    prepared = task.prepare(run)
    prepared.model.eval()
    loss = loop.validate(
        prepared, 0, total_of(prepared.model, token_loss)
    ).loss  # a fresh LoRA changes nothing
    assert base.loss.loss == pytest.approx(loss, rel=1e-5)
    assert base.difference is None
    assert own.loss.rows == 4
    assert own.loss.loss != base.loss.loss
    assert own.difference.loss == pytest.approx(own.loss.loss - base.loss.loss)


def test_each_adapter_meets_the_base_as_it_was(questions, learned, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(learned, other)
    _, (base, one, two) = evaluate([learned, other], data=str(questions), sampling=Sampling(8))
    assert (one.loss, one.texts, one.difference) == (two.loss, two.texts, two.difference)
    _, (alone, _) = evaluate([learned], data=str(questions), sampling=Sampling(8))
    assert (alone.loss, alone.texts) == (base.loss, base.texts)
    assert one.texts != base.texts


def test_what_was_learned_is_seen(questions, learned):
    """The training rows are asked again."""
    folder = questions.parent / "again"
    folder.mkdir(exist_ok=True)
    for name in ("train", "test"):
        shutil.copy(questions / "train.jsonl", folder / f"{name}.jsonl")
    _, (base, own) = evaluate([learned], data=str(folder), sampling=Sampling(64))
    assert own.answers.longest_copy > base.answers.longest_copy
    assert own.answers.rougeL > 2 * base.answers.rougeL
    assert own.answers.ended > 0.5
    assert own.loss.loss < base.loss.loss - 1
    assert own.difference.is_significant
    assert own.difference.rows_better == own.difference.rows == 12


def test_labels_are_scored_apart(tiny_base, tmp_path):
    rows = [
        {"question": f"What is {n}?", "answer": f"It is {n} times one.", "category": c, **more}
        for n, (c, more) in enumerate([("a", {}), ("b", {"difficulty": "beginner"}), ("a", {})])
    ]
    for split in ("train", "test"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{split}.jsonl").write_text(text)
    _, (base,) = evaluate([], str(tiny_base), data=str(tmp_path), sampling=None)
    categories = base.by_label["category"]
    assert {label: found.rows for label, found in categories.items()} == {"a": 2, "b": 1}
    nats = sum(found.loss * found.tokens for found in categories.values())
    assert nats / base.loss.tokens == pytest.approx(base.loss.loss)
    assert list(base.by_label["difficulty"]) == ["beginner"]


def test_command_writes_into_the_adapter_and_its_card(imate, questions, learned):
    card = learned / "README.md"
    edited = card.read_text() + "\nA line of mine.\n"
    card.write_text(edited)
    words = ["evaluate", learned, "--data", questions]
    said = imate(*words, "--max-tokens", 8).stdout
    facts = json.loads((learned / "evaluation.json").read_text())
    assert f"{facts['adapter']['loss']['loss']:.4f}" in said
    weights = (learned / "adapter_model.safetensors").read_bytes()
    assert facts["adapter_sha256"] == hashlib.sha256(weights).hexdigest()
    assert (facts["split"], facts["rows"]) == ("test", 3)
    lines = [json.loads(line) for line in (learned / "answers.jsonl").read_text().splitlines()]
    assert [line.keys() for line in lines] == 3 * [{"id", "question", "written", "base", "adapter"}]
    assert str(learned) not in (learned / "evaluation.json").read_text()

    text = card.read_text()
    assert f"| loss | {facts['base']['loss']['loss']:.4f} |" in text
    assert text.index("## Evaluation\n") < text.index("## Use\n")
    assert "A line of mine.\n" in text
    imate(*words, "--no-answers")  # again: the section is replaced
    again = card.read_text()
    assert again.count("## Evaluation\n") == 1
    assert "ROUGE" in text
    assert "ROUGE" not in again
    assert again.replace(again[again.index("## Ev") : again.index("## Use")], "") == edited


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("# A\n\ntext\n\n## Use\n\nso\n", "# A\n\ntext\n\n## X\n\nnew\n\n## Use\n\nso\n"),
        ("# A\n", "# A\n\n## X\n\nnew\n"),
        ("# A\n\n## X\n\nold\n\n### More\n\n## Use\n", "# A\n\n## X\n\nnew\n\n## Use\n"),
        ("# A\n\n## X\n\nold\n", "# A\n\n## X\n\nnew\n\n"),
    ],
)
def test_section_of_a_card(card, expected):
    assert set_section(card, "X", "new\n") == expected


def test_base_alone_is_written_where_asked(imate, questions, tiny_base):
    words = ["evaluate", "--model", tiny_base, "--data", questions, "--no-answers"]
    assert not list(Path().iterdir())
    imate(*words)
    assert not list(Path().iterdir())
    imate(*words, "--out", "base")
    assert [path.name for path in Path("base").iterdir()] == ["evaluation.json"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("evaluate", 2, "Name an adapter's folder, or a base with --model."),
        ("evaluate LEARNED LEARNED", 2, "An adapter is named twice."),
        ("evaluate LEARNED --out x", 2, "--out is for a base"),
        ("evaluate LEARNED --seed 1", 2, "need a --temperature above 0"),
        ("evaluate LEARNED --no-answers --max-tokens 9", 2, "leave out --max-tokens"),
        ("evaluate nowhere", 1, "AdapterError: No adapter in nowhere"),
        ("evaluate LEARNED --data TRAIN", 1, "has no test rows to evaluate on; it has train"),
        ("evaluate LEARNED --data TEXTS", 1, "nothing to answer"),
        ("evaluate LEARNED --data nowhere", 1, "DataError: No data at nowhere"),
        ("evaluate LEARNED OTHER", 1, "different bases"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    imate, words, code, said, learned, questions, tmp_path
):
    texts = tmp_path / "texts"
    texts.mkdir()
    for split in ("train", "test"):
        (texts / f"{split}.jsonl").write_text('{"text": "A text of some words."}\n')
    other = tmp_path / "other"
    shutil.copytree(learned, other)
    config = json.loads((other / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "mini"
    (other / "adapter_config.json").write_text(json.dumps(config))
    places = {
        "LEARNED": learned,
        "TRAIN": questions / "train.jsonl",
        "TEXTS": texts,
        "OTHER": other,
    }
    listed = [places.get(word, word) for word in words.split()]
    before = sorted(path.name for path in learned.iterdir())
    result = imate(*listed, code=code)
    assert said in result.stderr
    assert result.stdout == ""
    assert sorted(path.name for path in learned.iterdir()) == before


def test_texts_have_a_loss_though_nothing_can_be_asked(imate, learned, tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text('{"text": "A text of some words."}\n')
    words = ["evaluate", learned, "--data", tmp_path, "--no-answers", "--json"]
    (base, own) = json.loads(imate(*words).stdout)["evaluations"]
    assert base["loss"]["tokens"] == own["loss"]["tokens"] > 0
    assert own["answers"] is None


def test_missing_extra_is_said_before_anything_is_read(monkeypatch):
    monkeypatch.setattr("interviewmate_mlx.evaluation.overlap.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"\[scores\]"):
        evaluate([Path("nowhere")])


def test_adapter_that_trains_just_now_is_left_alone(imate, questions, learned):
    with locked(learned):
        said = imate("evaluate", learned, "--data", questions, "--no-answers", code=1).stderr
    assert f"in use: process {os.getpid()}" in said
    assert not (learned / "evaluation.json").exists()


def test_adapter_of_other_weights_is_warned_of(learned, tiny_base, questions, tmp_path):
    opened = Adapter.open(learned)
    model, _ = load_coach(str(tiny_base), learned)
    save_adapter(learned, adapter_weights(model), opened.config, base_hash="another")
    with pytest.warns(UserWarning, match="trained on other weights"):
        evaluate([learned], data=str(questions), sampling=None)


def test_verbatim_rows_are_asked_as_they_stand(tiny_base, tmp_path):
    rows = [{"prompt": "A mean is", "completion": " a sum by a count."}] * 2
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked, (base,) = evaluate([], str(tiny_base), data=str(tmp_path), sampling=Sampling(4))
    _, tokenizer = load_coach(str(tiny_base))
    assert tokenizer.decode(asked.prompts[0]) == "A mean is"
    assert math.isfinite(base.loss.loss)


def test_bfloat16_is_near_float32(tiny_base, questions):
    wide, narrow = (
        evaluate([], str(tiny_base), data=str(questions), sampling=None, dtype=dtype)[1][0]
        for dtype in ("float32", "bfloat16")
    )
    # Two layers: a loss of some nats is off by some hundred roundings of 2**-9 at the most.
    assert narrow.loss.loss == pytest.approx(wide.loss.loss, abs=0.2)
    assert narrow.loss.loss != wide.loss.loss


def test_empty_split_is_named(tmp_path, tiny_base):
    (tmp_path / "train.jsonl").write_text('{"question": "a?", "answer": "b"}\n')
    with pytest.raises(DataError, match="has no valid rows"):
        evaluate([], str(tiny_base), data=str(tmp_path), split="valid", sampling=None)


def test_an_adapter_of_preferences_needs_rows_with_answers():
    run = load_run("dpo")
    with pytest.raises(ConfigError, match="was trained on preferences by dpo") as caught:
        common_data([run])
    assert caught.value.arguments == ("data",)
    assert common_data([load_run("A")]) == "interview"
