"""How messages become the text that a model reads, and where in it the answers are.

A template is Jinja, as transformers has it: ours, one that a base brings, or one from a
file. Training, generation and the exported chat template use the same one. An answer is what
follows the text that generation gives the model (`add_generation_prompt`), up to the token
that ends it.

Some templates show an earlier answer otherwise than it was said: without its reasoning, say.
Then a conversation makes several rows, each with the text that generation would see before
one of the answers. A template in which an answer cannot be found exactly is refused.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from interviewmate_mlx.data.forms import MAX_MESSAGES, Message
from interviewmate_mlx.errors import ConfigError, DataError, InterviewMateError, ModelError, brief
from interviewmate_mlx.files import read_bounded
from interviewmate_mlx.formats.jinja_file import MAX_TEXT_CHARS, TemplateFault, read_template

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from transformers import PreTrainedTokenizerBase

Tokenizer: TypeAlias = "TokenizerWrapper | PreTrainedTokenizerBase"

QUESTION = "Question: {}\nAnswer:"
ANSWER = " {}"
SYSTEM = "{}\n\n"

# A question's text ends in "Answer:", so there is nothing to add for `add_generation_prompt`.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    + SYSTEM.format("{{ message['content'] | trim }}")
    + "{% endif %}"
    "{% if message['role'] == 'user' %}"
    + QUESTION.format("{{ message['content'] | trim }}")
    + "{% endif %}"
    "{% if message['role'] == 'assistant' %}"
    + ANSWER.format("{{ message['content'] | trim }}")
    + "{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
# As in Stanford's Alpaca; a system message takes the place of its first sentence.
_ALPACA = (
    "{% for message in messages %}"
    "{% set content = message['content'] | trim %}"
    "{% if message['role'] == 'system' %}{{ content + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}"
    "{% set input = message['input'] | default('') | trim %}"
    "{% if loop.first %}{{ 'Below is an instruction that describes a task' }}"
    "{% if input %}{{ ', paired with an input that provides further context' }}{% endif %}"
    "{{ '. Write a response that appropriately completes the request.\\n\\n' }}{% endif %}"
    "{% if input %}"
    "{{ '### Instruction:\\n' + content[:-(input | length)] | trim + '\\n\\n' }}"
    "{{ '### Input:\\n' + input + '\\n\\n### Response:\\n' }}"
    "{% else %}{{ '### Instruction:\\n' + content + '\\n\\n### Response:\\n' }}{% endif %}"
    "{% else %}{{ content + eos_token }}{% if not loop.last %}{{ '\\n\\n' }}{% endif %}{% endif %}"
    "{% endfor %}"
)
# {} is the token that ends an answer.
_CHATML = (
    "{{% for message in messages %}}"
    "{{{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim }}}}"
    "{{{{ {end} if message['role'] == 'assistant' else '<|im_end|>' }}}}{{{{ '\\n' }}}}"
    "{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\\n' }}}}{{% endif %}}"
)
_IM_END = "<|im_end|>"
_START = "{{ bos_token }}"
AUTO = "auto"
NAMES = (AUTO, "plain", "alpaca", "chatml")
_MAX_GIVEN_CHARS = 100  # of an answer, which a template gives the model
_PRIVATE = range(0xF0000, 0xFFFFE)  # characters that no text has


@dataclass(frozen=True)
class Template:
    """How a conversation is put to a model.

    Attributes:
        name: `plain`, `alpaca`, `chatml`, `own` for a base's (or `own, without thinking`), or a
            file's name; `verbatim` for no template: texts as they stand.
        text: Jinja; "" for `verbatim`.
    """

    name: str
    text: str = ""

    def __str__(self) -> str:
        return "the base's chat template" if self.is_own else f"the template {brief(self.name)}"

    @property
    def is_own(self) -> bool:
        """Whether a base brings it."""
        return self.name in (_OWN, _WITHOUT_THINKING)

    def fault(self, reason: object) -> InterviewMateError:
        """The error of a template that cannot be used."""
        return (ModelError if self.is_own else ConfigError)(
            f"{self} cannot be used: {reason}.\n"
            "Choose another one: data.template = plain, alpaca, chatml, or a file of Jinja."
        )


_OWN = "own"
_WITHOUT_THINKING = "own, without thinking"
_NO_THINKING = "{% set enable_thinking = false %}{% set thinking = false %}"
VERBATIM = Template("verbatim")
PLAIN = Template("plain", CHAT_TEMPLATE)


@dataclass(frozen=True)
class Special:
    """A tokenizer's special tokens.

    Attributes:
        ids: by text.
        values: what a template knows of them: `eos_token`, `bos_token` and others.
        pattern: finds one in a text.
        start: the token that the tokenizer puts before every text; "" if none.
    """

    ids: dict[str, int]
    values: dict[str, str]
    pattern: re.Pattern[str]
    start: str

    @cached_property
    def numbers(self) -> set[int]:
        """The ids that only a special token has; a token for what is unknown stands for text."""
        return {number for text, number in self.ids.items() if text != self.values.get("unk_token")}

    def hide(self, texts: Iterable[str]) -> dict[str, str]:
        """A character for each special token that stands in texts, which is not in them."""
        whole = "".join(texts)
        found = sorted(set(self.pattern.findall(whole)))
        return dict(zip(found, _unused(whole), strict=False))


@lru_cache(maxsize=8)
def special_of(tokenizer: "Tokenizer") -> Special:
    """A tokenizer's special tokens; those of the last few tokenizers are kept."""
    added = tokenizer.added_tokens_decoder.items()
    ids = {token.content: number for number, token in added if token.special}
    longest_first = sorted(ids, key=len, reverse=True)
    pattern = "|".join(map(re.escape, longest_first)) or r"(?!)"
    named = {name: str(text) for name, text in tokenizer.special_tokens_map.items() if text}
    begins = tokenizer.encode("", add_special_tokens=True)
    has_start = named.get("bos_token") and begins[:1] == [tokenizer.bos_token_id]
    start = named["bos_token"] if has_start else ""
    return Special(ids, named, re.compile(pattern), start)


def choose_template(setting: str, tokenizer: "Tokenizer") -> Template:
    """The template of a run.

    Args:
        setting: `auto`, `plain`, `alpaca`, `chatml`, or the path of a file of Jinja.
        tokenizer: the base's.

    Raises:
        ConfigError: there is no such template, or its file cannot be read.
        ModelError: `auto`, and the base's own is not text.
    """
    start = _START if special_of(tokenizer).start else ""
    match setting:
        case "auto":
            return own_template(tokenizer)
        case "plain":
            return Template("plain", start + CHAT_TEMPLATE)
        case "alpaca":
            return Template("alpaca", start + _ALPACA)
        case "chatml":
            known = special_of(tokenizer).ids
            end = repr(_IM_END) if _IM_END in known else "eos_token"
            return Template("chatml", start + _CHATML.format(end=end))
    path = Path(setting).expanduser()
    try:
        if not path.is_file():
            raise FileNotFoundError(2, "there is no such file")
        text = read_bounded(path, MAX_TEXT_CHARS).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(
            f"data.template: got {brief(setting, 200)}, expected {', '.join(NAMES)}, or the path "
            f"of a file of Jinja that can be read: {reason}.\nCorrect it."
        ) from error
    return Template(path.name, text.removesuffix("\n"))


def own_template(tokenizer: "Tokenizer") -> Template:
    """The chat template that a base brings; ours, if it brings none or ours.

    Raises:
        ModelError: it is not text, or there are several and none is the default.
    """
    found = _own_text(tokenizer)
    if found is None or found == CHAT_TEMPLATE:
        return choose_template("plain", tokenizer)
    if not isinstance(found, str):
        raise Template(_OWN).fault(f"got {brief(found)}, expected a text, or one named default")
    return _answering(found, tokenizer)


@lru_cache(maxsize=8)
def _answering(text: str, tokenizer: "Tokenizer") -> Template:
    """A base's template; without thinking, if answers do not fit it otherwise.

    Some begin to think for the model, where it is asked, and not where it has answered.
    """
    own, quiet = Template(_OWN, text), Template(_WITHOUT_THINKING, _NO_THINKING + text)
    return own if _is_usable(own, tokenizer) or not _is_usable(quiet, tokenizer) else quiet


def _is_usable(template: Template, tokenizer: "Tokenizer") -> bool:
    try:
        lay_out(template, tokenizer, [Message("user", "?"), Message("assistant", "!")])
    except InterviewMateError:
        return False
    return True


def text_beside(template: Template, tokenizer: "Tokenizer") -> str:
    """The Jinja that an adapter takes along: "" if it is the base's own, or `verbatim`."""
    return "" if template.text == _own_text(tokenizer) else template.text


def _own_text(tokenizer: "Tokenizer") -> Any:
    found: Any = tokenizer.chat_template
    if isinstance(found, list):
        found = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
    return found.get("default", found) if isinstance(found, dict) else found


def end_ids(template: Template | None, tokenizer: "Tokenizer") -> set[int]:
    """The tokens that end an answer: the tokenizer's, and the template's own.

    A template that cannot be used adds none; it is refused where it is used.

    Args:
        template: None for the base's own.
        tokenizer: the base's.
    """
    ids = {tokenizer.eos_token_id}
    if template == VERBATIM:
        return ids
    try:
        template = template or own_template(tokenizer)
        layout = lay_out(template, tokenizer, [Message("user", "?"), Message("assistant", "!")])
    except InterviewMateError:
        return ids
    return ids | {special_of(tokenizer).ids[layout.rows[-1][-1].end]}


@dataclass(frozen=True)
class Turn:
    """A stretch of text that is given, and perhaps the answer to it.

    Attributes:
        prompt: what is given; in it and in the answer, special tokens are the template's.
        answer: without its end token; "" if none has been given yet.
        end: the token that ends the answer.
    """

    prompt: str
    answer: str = ""
    end: str = ""


@dataclass(frozen=True)
class Layout:
    """The text of a conversation, in parts.

    Attributes:
        rows: of turns that follow each other; only the last may be without an answer. More than
            one, if the template shows earlier answers otherwise than they were given.
        hidden: characters that stand for special tokens which somebody wrote into a message:
            they are text.
        start: a special token before all of it that no text holds; "" if none.
    """

    rows: list[list[Turn]]
    hidden: dict[str, str]
    start: str = ""


def lay_out(template: Template, tokenizer: "Tokenizer", messages: Sequence[Message]) -> Layout:
    """Put a conversation into a template.

    Args:
        template: not `verbatim`.
        tokenizer: the base's.
        messages: of which answers are found, and what comes before each.

    Raises:
        ConfigError, ModelError: the template cannot be used.
        DataError: it cannot be used for these messages.
    """
    if len(messages) > MAX_MESSAGES:
        raise DataError(
            f"{template} cannot show {len(messages)} messages, at most {MAX_MESSAGES}.\n"
            "Begin a new conversation, or make several of this one."
        )
    special = special_of(tokenizer)
    hidden = special.hide(text for message in messages for text in (message.content, message.input))
    shown = [_as_values(message, hidden, special) for message in messages]
    show = _Shown(template, special, shown)
    rows: list[list[Turn]] = []
    turns: list[Turn] = []
    done = ""
    for number, message in enumerate(messages):
        if message.role == "assistant":
            before = show.before(number)
            if not before.startswith(done):  # an earlier answer is shown otherwise now
                rows.append(turns)
                turns, done = [], ""
            answer, end = show.answer(number, before)
            turns.append(Turn(before[len(done) :], answer, end))
            done = before + answer + end
    if messages and messages[-1].role != "assistant":
        before = show.before(len(messages))
        if not before.startswith(done):
            rows.append(turns)
            turns, done = [], ""
        turns.append(Turn(before[len(done) :]))
    return Layout([*rows, turns], {char: token for token, char in hidden.items()})


@dataclass(frozen=True)
class _Shown:
    """Messages as a template shows them."""

    template: Template
    special: Special
    messages: list[dict[str, str]]

    def before(self, number: int, prompts: bool = True) -> str:
        """The text that generation sees before a message."""
        return self._render(self.messages[:number], prompts)

    def answer(self, number: int, before: str) -> tuple[str, str]:
        """The text of an answer, and the token that ends it."""
        content = self.messages[number]["content"]
        probe = next(_unused(self.template.text + "".join(m["content"] for m in self.messages)))
        said, tried = (
            self._render([*self.messages[:number], {"role": "assistant", "content": text}], False)
            for text in (content, probe)
        )
        for text in (said, tried):
            if not text.startswith(before):
                raise self._refuse(
                    "an answer does not begin where generation does: "
                    f"expected {brief(_end_of(before))}, got {_difference(text, before)}"
                )
        head, found, tail = tried[len(before) :].partition(probe)
        rest = said[len(before) :]
        if not found:
            raise self._refuse("it leaves answers out")
        if head.strip() and before == self.before(number, prompts=False):
            raise self._refuse(
                f"it adds nothing for add_generation_prompt, and answers begin with {brief(head)}"
            )
        end = self.special.pattern.search(tail)
        if end is None:
            raise self._refuse("no special token ends an answer, so a model never learns to stop")
        if not (rest.endswith(tail) and _holds(before, rest.removesuffix(tail), content)):
            raise DataError(
                f"{self.template} changes an answer: "
                f"got {brief(content)}, shown as {brief(rest)}.\n"
                "Change the answer, or choose another data.template."
            )
        return rest[: len(rest) - len(tail)] + tail[: end.start()], end[0]

    def _render(self, messages: list[dict[str, str]], prompts: bool) -> str:
        try:
            return read_template(self.template.text).render(
                messages,
                tools=None,
                documents=None,
                add_generation_prompt=prompts,
                **self.special.values,
            )
        except TemplateFault as fault:
            raise DataError(
                f"{self.template} cannot show these messages: {fault}\n"
                "Change the messages, or choose another data.template."
            ) from fault

    def _refuse(self, reason: str) -> InterviewMateError:
        return self.template.fault(reason)


def _holds(before: str, rest: str, content: str) -> bool:
    """Whether an answer is in the text that is learned, but for white space.

    It may begin in the text before: `<think>` may be given to the model.
    """
    content, rest = ("".join(text.split()) for text in (content, rest))
    if content in rest:
        return True
    given = "".join(before[-_MAX_GIVEN_CHARS:].split())
    most = min(len(content), len(given) + 1)
    starts = (number for number in range(1, most) if given.endswith(content[:number]))
    return any(content[number:] in rest for number in starts)


def _as_values(message: Message, hidden: dict[str, str], special: Special) -> dict[str, str]:
    """A message as a template gets it: what somebody wrote holds no special token."""
    texts = {"content": message.content.strip(), "input": message.input.strip()}
    shown = {
        key: special.pattern.sub(lambda found: hidden[found[0]], text) if hidden else text
        for key, text in texts.items()
        if text or key == "content"
    }
    return {"role": message.role} | shown


def _unused(text: str) -> Iterator[str]:
    """Characters that a text does not have."""
    return (chr(code) for code in _PRIVATE if chr(code) not in text)


def _end_of(text: str) -> str:
    return text if len(text) <= 40 else "..." + text[-40:]


def _difference(text: str, before: str) -> str:
    """Where a text leaves another one, for a message."""
    pairs = zip(text, before, strict=False)
    same = next((n for n, (one, other) in enumerate(pairs) if one != other), len(text))
    return brief(text[max(0, same - 20) : same + 40])
