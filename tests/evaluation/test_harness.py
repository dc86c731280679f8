"""lm-eval's tasks on our model, against lm-eval's own Hugging Face model with merged weights."""

import json
import textwrap
from pathlib import Path

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from interviewmate_mlx.coach.generate import load_coach
from interviewmate_mlx.errors import ConfigError
from interviewmate_mlx.evaluation import harness
from interviewmate_mlx.evaluation.harness import as_lm, check_installed, run_tasks

# lm-eval and what it brings.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

CHOICES = {
    "task": "choices",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{right}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
TEXTS = {
    "task": "texts",
    "output_type": "generate_until",
    "test_split": "test",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "{{choices[0]}}",
    "generation_kwargs": {"until": ["the", "\n"], "max_gen_toks": 24, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}
DOCS = [
    {"question": "What is a loss?", "choices": [" It tells how far.", " A part."], "right": 0},
    {"question": "What is a token?", "choices": [" A mean.", " Part of a word."], "right": 1},
    {"question": "What is a model and what does it have?", "choices": [" A", " B"], "right": 0},
    {"question": "What is an epoch?", "choices": [" One pass over every row."] * 2, "right": 1},
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A folder with two small tasks on rows that lie beside them."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    files = {"data_files": {"test": str(folder / "docs.jsonl")}}
    for task in (CHOICES, TEXTS):
        content = {"dataset_path": "json", "dataset_kwargs": files, **task}
        # JSON is YAML.
        (folder / f"{task['task']}.yaml").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def theirs(tiny_base, tiny_adapter):
    """lm-eval's model of transformers, with the adapter merged by PEFT."""
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, tiny_adapter).merge_and_unload()
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    return HFLM(pretrained=merged, tokenizer=tokenizer, device="cpu", max_length=2048)


@pytest.fixture(scope="module")
def coach(tiny_base, tiny_adapter):
    return load_coach(str(tiny_base), tiny_adapter)


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]


def test_log_probabilities_are_theirs(theirs, coach):
    pairs = [(f"Question: {d['question']}\nAnswer:", c) for d in DOCS for c in d["choices"]]
    pairs += [("", "It tells"), ("A trailing space ", "moves to the right"), ("x " * 1200, "far")]
    asked, seen = requests("loglikelihood", pairs), []
    got = as_lm(*coach, lambda *counts: seen.append(counts)).loglikelihood(asked)
    for (ours, is_ours), (wanted, is_theirs) in zip(got, theirs.loglikelihood(asked), strict=True):
        assert ours == pytest.approx(wanted, abs=1e-3)
        assert is_ours == is_theirs
    assert seen[-1] == (len(pairs), len(pairs))


def test_rolling_log_probabilities_are_theirs(theirs, coach):
    texts = [("A short one.",), ("Longer than what goes in at once. " * 220,), ("x",)]
    asked = requests("loglikelihood_rolling", texts)
    lengths = [len(coach[1].encode(text)) for (text,) in texts]
    assert max(lengths) > harness.MAX_LENGTH
    got, wanted = (lm.loglikelihood_rolling(asked) for lm in (as_lm(*coach), theirs))
    for ours, reference, length in zip(got, wanted, lengths, strict=True):
        assert ours == pytest.approx(reference, abs=1e-3 * max(1, length / 50))


def test_greedy_texts_are_theirs(theirs, coach):
    settings = {"until": ["the", "\n\n"], "max_gen_toks": 32, "do_sample": False}
    other = {"until": [], "max_gen_toks": 8, "do_sample": False}
    asked = requests(
        "generate_until",
        [(f"Question: {d['question']}\nAnswer:", s) for d in DOCS for s in (settings, other)],
    )
    got = as_lm(*coach).generate_until(asked)
    assert got == theirs.generate_until(asked)
    assert all("the" not in text for text in got[::2])


def test_tasks_give_what_they_give_there(theirs, coach, tasks):
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    names = ["choices", "texts"]
    wanted = simple_evaluate(theirs, tasks=names, task_manager=manager, bootstrap_iters=0)
    got = run_tasks(*coach, names, include=tasks)
    for name, metrics in got.items():
        assert metrics
        for metric, value in metrics.items():
            key = metric if metric in wanted["results"][name] else f"{metric},none"
            assert value == pytest.approx(wanted["results"][name][key])
    assert run_tasks(*coach, ["choices"], include=tasks, limit=1)["choices"]["acc"] in (0, 1)


def test_settings_that_would_be_ignored_are_refused(coach):
    asked = requests("generate_until", [("a", {"until": [], "num_beams": 4})])
    with pytest.raises(ValueError, match="num_beams"):
        as_lm(*coach).generate_until(asked)


def test_unknown_task_is_named(coach, tmp_path):
    """Beside a group of the folder, and a task of lm-eval's own."""
    (tmp_path / "both.yaml").write_text(json.dumps({"group": "both", "task": ["arc_easy"]}))
    with pytest.raises(ConfigError, match=r"lm-eval has no task nonsense\."):
        run_tasks(*coach, ["both", "arc_easy", "nonsense"], include=tmp_path)


def test_task_without_its_data_is_named(coach, tmp_path):
    files = {"data_files": {"test": str(tmp_path / "absent.jsonl")}}
    content = {"dataset_path": "json", "dataset_kwargs": files, **CHOICES}
    (tmp_path / "choices.yaml").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="lm-eval could not run choices: "):
        run_tasks(*coach, ["choices"], include=tmp_path)


def test_missing_extra_is_named(monkeypatch):
    check_installed()
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"\[harness\]"):
        check_installed()


def test_command_shows_and_keeps_the_tasks(imate, tiny_base, questions, tasks):
    words = ["evaluate", "--model", tiny_base, "--data", questions, "--no-answers"]
    said = imate(*words, "--tasks", "choices", "--tasks-from", tasks, "--out", "found").stdout
    kept = json.loads(Path("found/evaluation.json").read_text())["base"]["tasks"]
    assert kept.keys() == {"choices"}
    assert f"{kept['choices']['acc']:.4f}" in said
    assert "choices, acc" in textwrap.dedent(said)
    imate(*words, "--tasks-from", tasks, code=2)
