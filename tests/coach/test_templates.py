"""An adapter is asked with the template that it was trained with, wherever it goes."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from interviewmate_mlx.adapter.folder import Adapter, template_for
from interviewmate_mlx.base.base import Base
from interviewmate_mlx.coach.generate import load_coach, prompt_for
from interviewmate_mlx.coach.panel import Panel
from interviewmate_mlx.data.prompts import encode_messages
from interviewmate_mlx.data.records import Message
from interviewmate_mlx.data.templates import PLAIN, VERBATIM, Template, choose_template
from interviewmate_mlx.errors import AdapterError, ConfigError
from interviewmate_mlx.evaluation.evaluate import evaluate
from interviewmate_mlx.formats.safetensors_file import load_tensors, save_tensors

OWN = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<u>' + m.content + '</u>' }}"
    "{% else %}{{ '<a>' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
)
ASKED = "What is a loss?"


@pytest.fixture(scope="module")
def trained(tiny_base, questions, tmp_path_factory):
    """Train one step with a template; the folder of the adapter."""
    from interviewmate_mlx.config import load_run
    from interviewmate_mlx.training.loop import train

    made: dict[tuple[str, Path], Path] = {}

    def of(template: str, base: Path = tiny_base, data: Path = questions) -> Path:
        key = (template, base)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("adapters") / "trained"
            words = [f"model.base={base}", f"data.path={data}", f"data.template={template}"]
            for _ in train(
                load_run("A", [*words, "train.max_steps=1", "train.warmup_ratio=0"]), made[key]
            ):
                pass
        return made[key]

    return of


@pytest.fixture(scope="module")
def own_base(tiny_base, tmp_path_factory) -> Path:
    """`tiny_base` with a chat template of its own. Read only."""
    folder = tmp_path_factory.mktemp("models") / "own"
    shutil.copytree(tiny_base, folder)
    (folder / "chat_template.jinja").write_text(OWN)
    return folder


@pytest.mark.parametrize("name", ["plain", "alpaca", "chatml"])
def test_adapter_is_asked_as_it_was_trained(trained, tiny_base, name):
    folder = trained(name)
    tokenizer = Base.open(tiny_base).tokenizer
    template = choose_template(name, tokenizer)
    assert Adapter.open(folder).template == template
    coach, _ = load_coach(tiny_base, folder)
    expected = encode_messages(tokenizer, [Message("user", ASKED)], template)
    assert prompt_for(coach, tokenizer, ASKED) == expected
    (voice,) = [v for v in Panel.load(tiny_base, {"x": folder}).voices.values() if v.number]
    assert voice.prompt(tokenizer, [Message("user", ASKED)]) == expected


@pytest.mark.parametrize("name", ["alpaca", "chatml"])
def test_template_that_is_not_the_bases_goes_out_beside_the_adapter(
    trained, tiny_base, imate, name
):
    """transformers makes the same prompt with the file that lies beside the weights."""
    imate("export", trained(name), "--out", "copy")
    theirs = AutoTokenizer.from_pretrained(tiny_base)
    text = Path("copy/chat_template.jinja").read_text()
    ids = theirs.apply_chat_template(
        [{"role": "user", "content": ASKED}],
        chat_template=text,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )
    coach, tokenizer = load_coach(tiny_base, Path("copy"))
    assert prompt_for(coach, tokenizer, ASKED) == ids
    card = Path("copy/README.md").read_text()
    assert 'open("PATH_OF_THIS_FOLDER/chat_template.jinja").read()' in card
    assert "tokenizer.apply_chat_template(" in card
    assert "Question:" not in card


def test_template_that_the_base_has_does_not_go_out(trained, own_base):
    assert not (trained("plain") / "chat_template.jinja").exists()
    folder = trained("auto", own_base)
    assert not (folder / "chat_template.jinja").exists()
    assert "with the base's own chat template" in (folder / "README.md").read_text()


def test_base_with_a_template_is_trained_and_asked_with_it(trained, own_base, imate):
    folder = trained("auto", own_base)
    assert Adapter.open(folder).template == Template("own", OWN)
    coach, tokenizer = load_coach(own_base)
    assert tokenizer.decode(prompt_for(coach, tokenizer, ASKED)) == f"<u>{ASKED}</u><a>"
    shown = imate("data", "preview", "interview", "--model", own_base)
    assert shown.stdout.startswith("<u>")
    assert shown.stderr.endswith("template: own\n")


def test_adapter_is_asked_as_it_was_trained_on_a_base_whose_template_has_changed(
    trained, own_base, tmp_path
):
    other = shutil.copytree(own_base, tmp_path / "other")
    (other / "chat_template.jinja").write_text(OWN.replace("<u>", "<user>"))
    coach, tokenizer = load_coach(other, trained("auto", own_base))
    assert tokenizer.decode(prompt_for(coach, tokenizer, ASKED)) == f"<u>{ASKED}</u><a>"


def test_template_of_the_adapters_metadata_is_checked(trained, tmp_path):
    folder = shutil.copytree(trained("alpaca"), tmp_path / "copy")
    weights = folder / "adapter_model.safetensors"
    tensors = load_tensors(weights)
    save_tensors(tmp_path / "new.safetensors", tensors, {"format": "pt", "template": "alpaca"})
    shutil.move(tmp_path / "new.safetensors", weights)
    with pytest.raises(AdapterError, match="got 'alpaca', expected one of questions, verbatim"):
        Adapter.open(folder)
    save_tensors(tmp_path / "new.safetensors", tensors, {"format": "pt"})
    shutil.move(tmp_path / "new.safetensors", weights)
    assert Adapter.open(folder).template is None  # PEFT's: the base's own is taken


def test_adapters_of_different_templates_are_not_compared(trained, tiny_base, questions):
    with pytest.raises(ConfigError, match=r"different templates(.|\n)*: plain\n(.|\n)*: alpaca"):
        evaluate([trained("plain"), trained("alpaca")], data=str(questions), sampling=None)
    asked, (base, own) = evaluate([trained("alpaca")], data=str(questions), sampling=None)
    tokenizer = Base.open(tiny_base).tokenizer
    assert "### Instruction:" in tokenizer.decode(asked.examples[0].tokens)
    assert base.loss.tokens == own.loss.tokens


def test_template_without_a_conversation_has_no_effect_and_says_so(imate, tiny_base):
    Path("rows.jsonl").write_text(json.dumps({"text": "A mean is a sum by its number."}) + "\n")
    words = ["--set", "data.template=alpaca", "--set", "train.warmup_ratio=0", "--out", "adapter"]
    said = imate("train", "--model", tiny_base, "--set", "data.path=rows.jsonl", *words).stderr
    assert "data.template has no effect: no row is a conversation" in said
    opened = Adapter.open("adapter")
    assert opened.template == VERBATIM
    assert not Path("adapter/chat_template.jinja").exists()


def test_base_alone_is_asked_with_its_own_template(tiny_base):
    coach, tokenizer = load_coach(tiny_base)
    assert template_for(coach, tokenizer) == PLAIN


def test_unknown_template_is_refused_before_training(imate, tiny_base, questions):
    words = ["--set", f"data.path={questions}", "--set", "data.template=alpacca", "--out", "x"]
    said = imate("train", "--model", tiny_base, *words, code=1).stderr
    assert "data.template: got 'alpacca', expected auto, plain, alpaca, chatml" in said
