"""A report's sentences follow from its numbers, and its page shows them safely."""

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from interviewmate_mlx.config import load_run
from interviewmate_mlx.errors import StorageError, TrainingError
from interviewmate_mlx.results import findings, plots
from interviewmate_mlx.results import report as report_module
from interviewmate_mlx.results.page import as_html, as_markdown, write_report
from interviewmate_mlx.results.report import Plot, build_report
from interviewmate_mlx.results.runs import FinishedRun, read_runs, smoothed
from interviewmate_mlx.training.events import Summary

STEPS_PER_EPOCH = 40


def finished(
    name: str,
    losses: list[float],
    valid: list[float],
    *,
    grad_norm: float = 0.5,
    steps_done: int | None = None,
    **tables,
) -> FinishedRun:
    """A run with these training losses, and validation losses at epochs 0, 1, 2, ..."""
    settings = {"model": {"base": "mini"}, "train": {"epochs": len(losses) / STEPS_PER_EPOCH}}
    for table, values in tables.items():
        settings[table] = settings.get(table, {}) | values
    run = load_run("A").replace(name, **settings)
    losses = losses[:steps_done]
    best = min(range(1, len(valid)), key=valid.__getitem__) if len(valid) > 1 else None
    steps = [
        {
            "event": "step",
            "step": number,
            "loss": loss,
            "learning_rate": 1e-4,
            "grad_norm": grad_norm,
            "num_rows": 4,
            "num_tokens": 800,
            "timing": {"elapsed_s": 3.0, "peak_bytes": 10**9},
        }
        for number, loss in enumerate(losses, start=1)
    ]
    summary = Summary(
        run=name,
        base=run.model.base,
        steps=len(losses),
        epochs=len(losses) / STEPS_PER_EPOCH,
        first_loss=losses[0],
        final_loss=losses[-1],
        loss_window_steps=1,
        base_valid_loss=valid[0] if valid else None,
        best_valid_loss=None if best is None else valid[best],
        best_step=None if best is None else best * STEPS_PER_EPOCH,
        stopped_early=False,
        train_rows=160,
        valid_rows=20 if valid else 0,
        trainable_parameters=1000,
        total_parameters=100_000,
        training_s=3.0 * len(losses),
        samples_per_s=4 / 3,
        tokens_per_s=800 / 3,
        peak_gb=1.0,
        package_version="0.1.0",
        machine="a chip, float32, MLX 0",
    )
    validations = [(number * STEPS_PER_EPOCH, loss) for number, loss in enumerate(valid)]
    return FinishedRun(Path("adapters") / name, run, summary, steps, validations, None, {})


def falling(first: float, last: float, epochs: int = 3) -> list[float]:
    count = epochs * STEPS_PER_EPOCH
    return [first + (last - first) * n / (count - 1) for n in range(count)]


def flat(level: float, epochs: int = 3) -> list[float]:
    return [level] * (epochs * STEPS_PER_EPOCH)


def said(sentences: list[str]) -> str:
    return " ".join(sentences)


def test_best_run_is_the_one_with_the_lowest_validation_loss_and_not_the_first():
    one = finished("one", falling(5, 3), [5, 4.6, 4.5, 4.4])
    two = finished("two", falling(5, 4), [5, 4.5, 4.3, 4.2], lora={"rank": 4})
    assert findings.best_run([one, two]) is two
    text = said(findings.which_to_use([one, two]))
    assert text.startswith("Use two: its validation loss of 4.2000 is the lowest.")
    assert "no run was repeated with other seeds" in text
    assert "falls most in one" in findings.curve_title([one, two])
    assert "lowest in two: 4.2000" in findings.validation_title([one, two])


def test_difference_within_the_spread_of_seeds_is_not_called_one():
    a, b = (
        finished(f"a{seed}", falling(5, 4), [5, 4.5, loss], train={"seed": seed, "epochs": 2})
        for seed, loss in ((1, 4.20), (2, 4.26))
    )
    near, far = (
        finished(name, falling(5, 4), [5, 4.6, loss], lora={"rank": 4}, train={"epochs": 2})
        for name, loss in (("near", 4.24), ("far", 4.40))
    )
    assert "cannot be told apart" in said(findings.which_to_use([a, b, near]))
    sure = said(findings.which_to_use([a, b, far]))
    assert "far, is 0.2000 above it, more than seeds make (0.0600)" in sure
    assert "a1, a2 differ in their seed alone: validation loss 4.2300" in said(
        findings.seeds_in_words([a, b, far])
    )


def test_adapter_that_is_no_better_than_its_base_is_called_that():
    run = finished("worse", flat(5), [4.0, 4.1, 4.2, 4.3])
    assert "no better than none" in said(findings.which_to_use([run]))


def test_runs_with_different_data_or_bases_are_not_compared():
    one = finished("one", falling(5, 4), [5, 4.5, 4.4, 4.3])
    other = finished("other", falling(5, 4), [3, 2.5, 2.4, 2.3], data={"path": "mine"})
    text = said(findings.which_to_use([one, other]))
    assert "cannot be compared" in text
    assert "different data: interview, mine" in text
    assert findings.best_run([one, other]) is None
    assert findings.effects([one, other]) == []
    third = finished("third", falling(5, 4), [3, 2.5], model={"base": "x/y"})
    assert "different bases: mini, x/y" in said(findings.which_to_use([one, third]))


def test_one_run_alone_is_not_called_the_lowest():
    run = finished("alone", falling(5, 4), [5, 4.5, 4.4, 4.3])
    text = said(findings.which_to_use([run]))
    assert text.startswith("There is one run, alone, with a validation loss of 4.3000.")
    assert "lowest" not in text
    assert "goes from 5.000 to 4.000" in findings.curve_title([run])


def test_run_without_validation_rows_is_not_ranked():
    run = finished("blind", falling(5, 4), [])
    assert "No run has validation rows" in said(findings.which_to_use([run]))
    assert findings.validation_title([run]) == "No run has validation rows"


def test_setting_that_differs_alone_has_an_effect_and_others_are_confounded():
    one = finished("one", falling(5, 4), [5, 4.5, 4.4, 4.3])
    two = finished("two", falling(5, 4), [5, 4.5, 4.4, 4.1], lora={"rank": 16})
    (effect,) = findings.effects([one, two])
    assert effect.startswith("lora.rank 8 -> 16, all else alike (one, two): validation loss 4.3000")
    assert "(-0.2000)" in effect
    both = finished(
        "both", falling(5, 4), [5, 4.5, 4.4, 4.0], lora={"rank": 4}, train={"learning_rate": 1e-3}
    )
    (mixed,) = findings.effects([one, both])
    assert mixed.startswith("lora.rank and train.learning_rate changed together")
    assert "confounded" in mixed


def test_rules_of_what_to_try_next():
    overfit = finished("o", falling(5, 2), [5, 4.2, 4.3, 4.5])
    (text,) = findings.next_steps(overfit)
    assert "learned its rows by heart after step 40" in text
    assert "4.2000 to 4.5000" in text
    assert "saved up to 4.0 minutes" in text  # 80 steps of 3 seconds

    (text,) = findings.next_steps(finished("f", falling(5, 3), [5, 4.5, 4.2, 4.0]))
    assert "still learning at its end" in text

    done = [*falling(5, 4, 2), *flat(4, 1)]
    assert findings.next_steps(finished("d", done, [5, 4.5, 4.2, 4.0])) == []

    clipped = finished("c", done, [5, 4.5, 4.2, 4.0], grad_norm=3.0)
    assert "In 100% of the steps of c the gradient was clipped to 1" in said(
        findings.next_steps(clipped)
    )
    unclipped = finished("u", done, [5, 4.5, 4.2, 4.0], grad_norm=3.0, train={"max_grad_norm": 0})
    assert findings.next_steps(unclipped) == []

    (text,) = findings.next_steps(finished("s", flat(5), [5, 4.99, 4.99, 4.98]))
    assert "hardly moved" in text

    stopped = finished("i", falling(5, 4), [5, 4.5, 4.4], steps_done=80)
    assert "interrupted after 80 of 120 steps: imate-mlx train --resume --out adapters/i" in said(
        findings.next_steps(stopped)
    )


def test_losses_are_compared_at_the_same_epochs():
    run = finished("one", falling(5, 4), [5, 4.5, 4.4, 4.3], steps_done=60)
    curve = smoothed(run.curve("loss"))
    assert run.loss_at(0.2) == curve[7][1]
    assert run.loss_at(1.0) == curve[39][1]
    assert run.loss_at(2.0) is None
    # In the middle of a straight line the mean of the neighbours is the number itself.
    assert run.loss_at(1.0) == pytest.approx(run.steps[39]["loss"])


# The page.


@pytest.fixture
def runs() -> list[FinishedRun]:
    one = finished("one", falling(5, 4), [5, 4.5, 4.4, 4.3])
    two = finished("two", falling(5, 4), [5, 4.5, 4.4, 4.2], lora={"rank": 4})
    hostile = {"<b>Why?</b> | `x`": {"written": "<script>alert(1)</script>", "base": "a\n\nb"}}
    answers = {question: line | {"adapter": "*bold* & more"} for question, line in hostile.items()}
    return [replace(one, answers=answers), replace(two, answers=answers)]


class Checker(HTMLParser):
    """Finds what is opened and not closed, loaded from elsewhere, or there twice."""

    VOID = ("meta", "path", "use", "rect", "line")

    def __init__(self) -> None:
        super().__init__()
        self.open, self.tags, self.ids, self.sources = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.sources += [v for name, v in attrs if name in ("src", "href") and v[:1] != "#"]
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_one_sound_file_that_loads_nothing(runs):
    page = as_html(build_report(runs))
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert "script" not in checker.tags
    assert checker.sources == []
    assert len(checker.ids) == len(set(checker.ids))
    assert not re.search(r"@import|url\((?!#)", page)
    assert checker.tags.count("svg") == 5
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert 'name="viewport"' in page
    assert "prefers-color-scheme: dark" in page


def test_every_plot_has_a_title_and_its_numbers(runs):
    found = [p for s in build_report(runs).sections for p in s.parts if isinstance(p, Plot)]
    assert len(found) == 5
    for plot in found:
        assert plot.title
        assert len(plot.numbers.rows) == 2
        root = ElementTree.fromstring(plot.svg)
        assert root.get("viewBox")
        assert "#010203" not in plot.svg


def test_numbers_on_the_page_are_those_of_the_runs(runs):
    text = re.sub(r"<svg.*?</svg>", "", as_html(build_report(runs)), flags=re.DOTALL)
    for number in ("4.3000", "4.2000", "5.0000", "1,000 (1.00%)", "12 min 0 s"):
        assert number in text, number
    assert "a chip, float32, MLX 0" in text


def test_markdown_escapes_what_is_not_its_own_and_names_its_pictures(runs, tmp_path):
    report = build_report(runs)
    text = as_markdown(report)
    assert r"\*bold\* & more" in text
    assert r"\<script\>" in text
    write_report(report, tmp_path / "out")
    pictures = re.findall(r"\]\((\w+\.svg)\)", text)
    assert len(pictures) == 5
    for name in pictures:
        ElementTree.parse(tmp_path / "out" / name)
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")


def test_without_matplotlib_there_are_tables_and_it_says_how_to_get_pictures(runs, monkeypatch):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    page = as_html(build_report(runs))
    assert "<svg" not in page
    assert "interviewmate-mlx[plots]" in page
    assert page.count("<figcaption>") == 5


def test_report_is_the_same_each_time(runs):
    assert as_html(build_report(runs)) == as_html(build_report(runs))


def test_report_replaces_a_report_and_nothing_else(runs, tmp_path):
    out = tmp_path / "out"
    write_report(build_report(runs), out)
    write_report(build_report(runs[:1]), out)
    assert json.loads((out / "report.json").read_text())["best"] == "one"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").touch()
    with pytest.raises(StorageError, match="holds no report"):
        write_report(build_report(runs), tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["a.txt"]


# From real folders.


@pytest.fixture(scope="module")
def trained(tiny_base, questions, tmp_path_factory) -> Path:
    """A sweep of two runs."""
    from interviewmate_mlx.results.sweep import settings_of, sweep, trials_of_runs

    out = tmp_path_factory.mktemp("sweeps") / "two"
    settings = [f"model.base={tiny_base}", f"data.path={questions}", "train.epochs=2"]
    chosen = [load_run(name, settings) for name in ("A", "B")]
    for _ in sweep(trials_of_runs(chosen), out, settings=settings_of(chosen, 1, None)):
        pass
    return out


def test_command_reports_on_a_sweep_with_its_evaluation(imate, trained, questions, tmp_path):
    copy = tmp_path / "sweep"
    shutil.copytree(trained, copy)
    said = imate("report", copy).stdout
    assert said == "report/report.html\n"
    page = Path("report/report.html").read_text(encoding="utf-8")
    assert "Not evaluated yet" in page
    adapters = [copy / "run_A", copy / "run_B"]
    imate("evaluate", *adapters, "--max-tokens", 8)
    facts = json.loads(imate("report", copy, "--out", "other", "--json").stdout)
    assert [run["name"] for run in facts["runs"]] == ["run_A", "run_B"]
    page = Path("other/report.html").read_text(encoding="utf-8")
    evaluation = facts["runs"][0]["evaluation"]
    assert f"{evaluation['adapter']['loss']['loss']:.4f}" in page
    assert "What they answer" in page
    assert "On 3 test rows of" in page
    # One of an adapter that is no longer there is not shown.
    weights = copy / "run_A" / "adapter_model.safetensors"
    shutil.copy(copy / "run_B" / "adapter_model.safetensors", weights)
    facts = json.loads(imate("report", adapters[0], "--json").stdout)
    assert facts["runs"][0]["evaluation"] is None


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda run: shutil.rmtree(run), "No run in "),
        (lambda run: (run / "run.toml").unlink(), "it has no run.toml"),
        (lambda run: (run / "summary.json").unlink(), "has no summary.json"),
        (lambda run: (run / "metrics.jsonl").unlink(), "holds no steps"),
        (lambda run: (run / "metrics.jsonl").write_text("nonsense\n"), "is damaged"),
        (lambda run: (run / "summary.json").write_text('{"new": 1}'), "it has new"),
        (lambda run: (run / "summary.json").write_text("{}"), "not one that this version reads"),
    ],
)
def test_run_that_cannot_be_read_is_named(imate, trained, tmp_path, damage, said):
    copy = tmp_path / "sweep"
    shutil.copytree(trained, copy)
    damage(copy / "run_A")
    result = imate("report", copy / "run_A", copy / "run_B", code=1)
    assert said in result.stderr
    assert not Path("report").exists()


def test_torn_last_line_of_metrics_is_left_out(trained, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(trained / "run_A", copy)
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "st')
    (run,) = read_runs([copy])
    assert len(run.steps) == run.summary.steps


def test_runs_of_one_name_are_told_apart_by_their_folders(trained, tmp_path):
    for name in ("first", "second"):
        shutil.copytree(trained / "run_A", tmp_path / name)
    runs = read_runs([tmp_path / "first", tmp_path / "second"])
    assert [run.name for run in runs] == ["first", "second"]


def test_all_runs_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(TrainingError, match=r"(?s)No run in .*one.*No run in .*two"):
        read_runs([tmp_path / "one", tmp_path / "two"])


def test_data_that_is_not_here_is_said(runs, monkeypatch):
    assert "45 valid" in report_module._data_in_words("interview")
    assert "cannot be checked now" in report_module._data_in_words("./nowhere")
    assert report_module._data_in_words("owner/name") == "on the Hub; not looked at again"


def test_trial_that_diverged_is_named_and_left_out(imate, trained, tmp_path):
    copy = tmp_path / "sweep"
    shutil.copytree(trained, copy)
    record = json.loads((copy / "sweep.json").read_text())
    record["trials"]["wild"] = {"status": "diverged", "message": "Step 3: not finite"}
    (copy / "sweep.json").write_text(json.dumps(record))
    imate("report", copy)
    page = Path("report/report.html").read_text(encoding="utf-8")
    assert "Left out: wild, diverged (Step 3: not finite)." in page
    record["trials"] = {"wild": record["trials"]["wild"]}
    (copy / "sweep.json").write_text(json.dumps(record))
    assert "has trained to an end yet" in imate("report", copy, code=1).stderr


def test_evaluations_on_different_rows_are_not_compared(runs):
    loss = {"loss": 4.0, "perplexity": 54.6, "accuracy": 0.2, "rows": 3, "tokens": 90}
    found = {"loss": -0.1, "low": -0.2, "high": 0.1, "is_significant": False}
    found |= {"rows_better": 2, "rows": 3}
    side = {"loss": loss, "answers": None, "difference": found}
    with_labels = side | {"by_label": {"category": {"coding": loss}}}
    without = side | {"by_label": {}}
    one, two = (
        replace(run, evaluation={"data": data, "split": "test", "rows": 3, "base": s, "adapter": s})
        for run, data, s in zip(runs, ("a", "b"), (with_labels, without), strict=True)
    )
    page = as_html(build_report([one, two]))
    assert "evaluated on different rows" in page
    assert "not significant" in page
