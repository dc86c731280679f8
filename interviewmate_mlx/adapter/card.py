"""Writes the model card of an adapter: the README.md that the Hub shows."""

import json
import re
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCardData

from interviewmate_mlx.adapter.config import AdapterConfig
from interviewmate_mlx.data.templates import PLAIN, QUESTION, VERBATIM, Template
from interviewmate_mlx.files import atomic_file

CARD_FILE = "README.md"
CHAT_TEMPLATE_FILE = "chat_template.jinja"  # where transformers looks for it
_ASKED = "What is overfitting?"
_PLAIN_HOW = (
    "Ask it with this template, `Question: ...` and `Answer:`: the adapter was trained with it."
)
_VERBATIM_HOW = (
    "Give it the beginning of a text like those in its data, as it stands: the adapter was trained "
    "without a template, and continues the text."
)
_OWN_HOW = "Ask it with the base's own chat template: the adapter was trained with it."
_OTHER_HOW = "Ask it with the chat template of this folder: the adapter was trained with it."
# How a tokenizer makes the prompt: of a text, and of a question by the template that it has.
VERBATIM_PROMPT = 'prompt = tokenizer("Overfitting is", return_tensors="pt")'
CHAT_PROMPT = f"""prompt = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "{_ASKED}"}}],
    add_generation_prompt=True,
    return_dict=True,
    return_tensors="pt",
)"""
_TITLE = "a LoRA adapter for {}"
_LOAD = 'from_pretrained("{}")'


def write_card(
    folder: Path,
    name: str,
    config: AdapterConfig,
    facts: dict[str, str],
    *,
    trained_on: str,
    base_hub_id: str | None,
    base_folder: str,
    base_hint: str = "",
    template: Template = PLAIN,
    end_ids: Collection[int] = (),
) -> None:
    """Write the card of an adapter.

    Args:
        folder: the adapter's folder.
        name: of the run that trained it.
        config: the adapter's; the text names its `base`.
        facts: further rows of the card's table.
        trained_on: a sentence about the training data; `rows_in_words` says what the rows are.
        base_hub_id: for the card's header; None if the base is not on the Hub.
        base_folder: the folder or Hub id that transformers loads the base from.
        base_hint: how to get that folder, if that takes a step.
        template: of the rows that the adapter was trained on.
        end_ids: the tokens that end an answer, if the tokenizer's own is not the only one.

    Raises:
        StorageError: it cannot be written.
    """
    header = ModelCardData(
        library_name="peft", tags=["lora", "mlx", "interviewmate"], base_model=base_hub_id
    )
    table = {
        "targets": ", ".join(config.targets),
        "rank, alpha, dropout": f"{config.rank}, {config.alpha:g}, {config.dropout:g}",
        **facts,
    }
    hint = f"# {base_hint}\n" if base_hint else ""
    prompt, how = _asking(template, (folder / CHAT_TEMPLATE_FILE).is_file())
    ends = str(sorted(end_ids)) if end_ids else "tokenizer.eos_token_id"
    text = f"""---
{header.to_yaml()}
---

# {name}: {_TITLE.format(config.base)}

{trained_on} `run.toml` in this folder repeats the run.

| | |
|---|---|
{chr(10).join(f"| {key} | {value} |" for key, value in table.items())}

## Use

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

{hint}base = AutoModelForCausalLM.{_LOAD.format(base_folder)}
tokenizer = AutoTokenizer.{_LOAD.format(base_folder)}
model = PeftModel.from_pretrained(base, "PATH_OR_HUB_ID_OF_THIS_FOLDER")
{prompt}
answer = model.generate(**prompt, max_new_tokens=200, eos_token_id={ends})
print(tokenizer.decode(answer[0]))
```

{how}

This is a small model. It can be wrong and still sound sure. Check its answers before an interview.
"""
    with atomic_file(folder / CARD_FILE) as temporary:
        temporary.write_text(text, encoding="utf-8")


def rows_in_words(template: Template) -> str:
    """What the rows that an adapter was trained on are, as in "trained on 12 ..."."""
    if template == VERBATIM:
        return "verbatim rows, without a template"
    return "question-and-answer rows"


def _asking(template: Template, has_file: bool) -> tuple[str, str]:
    """Lines that make the prompt, as in training, and what the reader must know of it."""
    if template == VERBATIM:
        return VERBATIM_PROMPT, _VERBATIM_HOW
    if template == PLAIN and not has_file:
        text = json.dumps(QUESTION.format(_ASKED))
        return f'prompt = tokenizer({text}, return_tensors="pt")', _PLAIN_HOW
    read = f'tokenizer.chat_template = open("PATH_OF_THIS_FOLDER/{CHAT_TEMPLATE_FILE}").read()\n'
    return (read if has_file else "") + CHAT_PROMPT, _OTHER_HOW if has_file else _OWN_HOW


def set_section(card: str, title: str, text: str) -> str:
    """A card with a section of this title: in the place of the old one, or before `## Use`.

    Args:
        card: anybody's; the rest of it stays as it is.
        title: without its `##`.
        text: of the section, Markdown.
    """
    section = f"## {title}\n\n{text.strip()}\n\n"
    old = re.search(rf"(?ms)^## {re.escape(title)}\n.*?(?=^## |\Z)", card)
    if old:
        return card[: old.start()] + section + card[old.end() :]
    before, use, after = card.partition("## Use\n")
    return f"{before.rstrip()}\n\n{section}{use}{after}".rstrip() + "\n"


@dataclass(frozen=True)
class Origin:
    """Where a base comes from, as far as its folder says.

    Attributes:
        source: a Hub id, `mini` or a path; "" if unknown.
        revision: its commit on the Hub; "" if unknown.
        licence: as on the Hub, such as `apache-2.0`; "" if unknown.
    """

    source: str = ""
    revision: str = ""
    licence: str = ""


def add_to_card(folder: Path, title: str, text: str) -> None:
    """Put a section into the card of a folder, as `set_section` does; nothing without a card."""
    path = folder / CARD_FILE
    if path.is_file():
        with suppress(UnicodeDecodeError):  # not written here: it stays as it is
            card = set_section(path.read_text(encoding="utf-8"), title, text)
            path.write_text(card, encoding="utf-8")


def base_in_words(name: str, origin: Origin) -> str:
    """The base that an adapter or a merged model stands on, for its card."""
    at = f" at revision `{origin.revision}`" if origin.revision else ", of an unknown revision"
    under = (
        f"Its licence is `{origin.licence}`, which what is made of it has to follow."
        if origin.licence
        else "Its licence is not known here: look it up before you hand this on."
    )
    return f"`{name}`{at}. {under}"


def rename_base(card: str, names: Collection[str], base: str) -> str:
    """A card with another name of the base, in the places where `write_card` puts it.

    Args:
        card: what `write_card` wrote. In any other card nothing is found.
        names: that the card may have.
        base: the new name; a Hub id also goes to the card's header.
    """
    is_hub_id = base.count("/") == 1
    for name in names:
        for place, new in ((_TITLE, base), (_LOAD, base if is_hub_id else f"models/{base}")):
            card = card.replace(f"{place.format(name)}\n", f"{place.format(new)}\n")
    if is_hub_id and card.startswith("---\n") and "\nbase_model:" not in card:
        card = card.replace("---\n", f"---\nbase_model: {base}\n", 1)
    return card
