"""What a row means: its keys, and its messages, in the forms that people have them.

Case, spaces and hyphens in a key do not matter. Where two readings are possible, none is
taken.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from interviewmate_mlx.errors import brief
from interviewmate_mlx.files import is_utf8

ROLES = ("system", "user", "assistant")
LABELS = ("id", "category", "difficulty", "follow_up")
MESSAGES = ("messages", "conversations", "conversation")
_QUESTIONS = ("question", "query")
_ANSWERS = ("answer", "response", "output")
_INPUTS = ("input", "context")  # beside an instruction
_SYSTEM = ("system", "system_prompt")
# What ShareGPT, and those who followed it, call the roles.
_ROLE_NAMES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "developer": "system",
}
_TOOL_ROLES = ("tool", "function", "function_call", "function_response", "observation", "ipython")
_TOOL_KEYS = ("tools", "functions", "tool_calls", "function_call")
_MEDIA_KEYS = ("image", "images", "audio", "audios", "video", "videos")
_UNTRAINED = frozenset([*_TOOL_KEYS, *_MEDIA_KEYS])
_MAX_KEYS = 10  # in a message
# Of a conversation. Each answer is rendered with all that comes before it, which takes seconds
# for so many, and hours for as many short ones as a row of 1 MB may hold.
MAX_MESSAGES = 500


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: `system`, `user` or `assistant`.
        content: its text.
        input: the end of `content` that an Alpaca row has apart, as `input`; "" if none.
    """

    role: str
    content: str
    input: str = ""


class UnknownKeysError(ValueError):
    """The keys of a row have no meaning here."""

    advice = (
        "Rename the keys of these rows; those of a table are the names of its columns, in row 1."
    )


@dataclass(frozen=True)
class Reading:
    """How the keys of a row are understood.

    Attributes:
        form: `messages`, `question`, `prompt`, `instruction` or `text`.
        keys: a row's own key for each that counts: `question`, `answer`, `prompt`,
            `completion`, `instruction`, `input`, `text`, `messages`, `system`, and the labels.
    """

    form: str
    keys: dict[str, str]

    def __str__(self) -> str:
        """As in `question from 'Query', answer from 'Response'`."""
        said = []
        for name, key in self.keys.items():
            if name not in LABELS:
                said.append(name if name == key else f"{name} from {key!r}")
        return ", ".join(said)


@lru_cache(maxsize=1024)
def read_keys(present: tuple[str, ...], null: tuple[str, ...]) -> Reading:
    """Understand the keys of a row.

    Args:
        present: keys with a value.
        null: keys without one; they count only if nothing else can be meant.

    Raises:
        UnknownKeysError: no form is found.
        ValueError: more than one is.
    """
    names = _by_name(present)
    reading = _find_form(names) or _find_form(names | _by_name(null, names))
    if reading is None:
        given = (*present, *null)
        keys = ", ".join(brief(key) for key in given[:_MAX_KEYS]) or "(none)"
        more = f" and {len(given) - _MAX_KEYS} more" if len(given) > _MAX_KEYS else ""
        raise UnknownKeysError(
            f"got the keys {keys}{more}, expected 'question' and 'answer' "
            "(or messages, prompt and completion, instruction and output, text)"
        )
    extra = {name: names[name] for name in LABELS if name in names}
    systems = [name for name in _SYSTEM if name in names]
    if systems and reading.form not in ("prompt", "text"):
        extra["system"] = names[_only(names, systems, "system message")]
    return Reading(reading.form, reading.keys | extra)


def refuse_untrained(row: Mapping[str, Any]) -> None:
    """Refuse a row that holds more than text.

    Raises:
        ValueError: it has tools or images, under one of their usual keys.
    """
    for key, value in row.items():
        if value and _name_of(key) in _UNTRAINED and value not in ("[]", "{}", "null", "None"):
            raise ValueError(f"{key}: tool calls, images and sound are not trained on here")


def _name_of(key: str) -> str:
    return key.strip().casefold().replace(" ", "_").replace("-", "_")


def _by_name(keys: Iterable[str], taken: Mapping[str, str] | None = None) -> dict[str, str]:
    """A row's own keys by the names that they are taken for."""
    names: dict[str, str] = {}
    for key in keys:
        name = _name_of(key)
        if name in names and name in _KNOWN:
            both = f"{brief(names[name])} and {brief(key)}"
            raise ValueError(f"got the keys {both}, which mean the same, expected one of them")
        if name not in (taken or {}):
            names.setdefault(name, key)
    return names


def _find_form(names: Mapping[str, str]) -> Reading | None:
    """The first form whose keys are all there."""
    if several := [name for name in MESSAGES if name in names]:
        return Reading("messages", {"messages": names[_only(names, several, "conversation")]})
    answers = [name for name in _ANSWERS if name in names]
    questions = [name for name in _QUESTIONS if name in names]
    if questions and answers:
        questions += [name for name in ("instruction",) if name in names]
        asked, answer = _pair(names, questions, answers)
        if "context" in names:
            raise ValueError(
                f"{names['context']!r} can belong to the question or not: two readings; name it "
                "input, and the question instruction, or remove it"
            )
        return Reading("question", {"question": asked, "answer": answer})
    if "prompt" in names and "completion" in names:
        return Reading("prompt", {name: names[name] for name in ("prompt", "completion")})
    if "instruction" in names and answers:
        keys = {"instruction": names["instruction"]}
        if inputs := [name for name in _INPUTS if name in names]:
            keys["input"] = names[_only(names, inputs, "input")]
        return Reading("instruction", keys | {"output": names[_only(names, answers, "answer")]})
    if "input" in names and answers:
        asked, answer = _pair(names, ["input"], answers)
        return Reading("question", {"question": asked, "answer": answer})
    if "prompt" in names and answers:
        answer = names[answers[0]]
        raise ValueError(
            f"the keys {names['prompt']!r} and {answer!r} can be read in two ways: as question and "
            "answer, with a template around them, or as prompt and completion, as they stand; "
            "name them so"
        )
    return Reading("text", {"text": names["text"]}) if "text" in names else None


def _pair(names: Mapping[str, str], questions: list[str], answers: list[str]) -> tuple[str, str]:
    asked = names[_only(names, questions, "question")]
    return asked, names[_only(names, answers, "answer")]


def _only(names: Mapping[str, str], found: list[str], what: str) -> str:
    if len(found) > 1:
        keys = " or ".join(repr(names[name]) for name in found)
        raise ValueError(f"the {what} can be {keys}: two readings; remove or rename one of them")
    return found[0]


_TEXTS = ("prompt", "completion", "instruction", "text")
_KNOWN = frozenset([*LABELS, *MESSAGES, *_QUESTIONS, *_ANSWERS, *_INPUTS, *_SYSTEM, *_TEXTS])


def read_messages(value: object, key: str = "messages") -> tuple[Message, ...]:
    """A list of messages: with `role` and `content`, or with ShareGPT's `from` and `value`.

    Args:
        value: as it stands in the row.
        key: of the row, for messages.

    Raises:
        ValueError: it is something else, or holds tool calls or images.
    """
    if not isinstance(value, list) or not all(isinstance(m, dict) for m in value):
        raise ValueError(f"{key}: expected a list of objects with role and content")
    return tuple(_read_message(message, key) for message in value)


def check_turns(messages: tuple[Message, ...], key: str = "messages") -> None:
    """Refuse a conversation in which user and assistant do not take turns, the user first.

    Raises:
        ValueError: the roles are in another order, or there are too many messages.
    """
    if len(messages) > MAX_MESSAGES:
        raise ValueError(
            f"{key}: got {len(messages)} messages, expected at most {MAX_MESSAGES}: "
            "make several rows of this conversation"
        )
    roles = [message.role for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    expected = ["user", "assistant"] * (len(turns) // 2)
    if not turns or turns != expected:
        raise ValueError(
            f"{key}: got the roles {', '.join(roles[:10]) or '(none)'}, "
            "expected user and assistant in turn, the user first and the assistant last"
        )


def _read_message(message: dict[str, Any], key: str) -> Message:
    given = {name: value for name, value in message.items() if value is not None}
    for name in _TOOL_KEYS:
        if given.get(name):
            raise ValueError(f"{key}: got {name}, and tool calls are not trained on here")
    is_sharegpt = "from" in given and "role" not in given
    name, text = ("from", "value") if is_sharegpt else ("role", "content")
    role = as_text(given, name)
    if role in _TOOL_ROLES:
        raise ValueError(
            f"{key}: got the role {role!r}, expected {', '.join(ROLES)}: "
            "tool calls are not trained on here"
        )
    role = _ROLE_NAMES.get(role, role)
    if role not in ROLES:
        raise ValueError(f"{key}: got the role {brief(role)}, expected {', '.join(ROLES)}")
    if isinstance(given.get(text), list):
        given = given | {text: _join_parts(given[text], f"{key}: {text}")}
    return Message(role, as_text(given, text).strip())


def _join_parts(parts: list[Any], key: str) -> str:
    """The text of a content that is given in parts."""
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if kind != "text":
            got = brief(kind if kind else part)
            raise ValueError(f"{key}: got a part of the kind {got}, expected text: nothing else "
                             "is trained on here")  # fmt: skip
        texts.append(as_text(part, "text", may_be_empty=True))
    return "".join(texts)


def as_text(row: dict[str, Any], key: str, may_be_empty: bool = False) -> str:
    """A row's text.

    Raises:
        ValueError: it is no text, empty, or not Unicode.
    """
    value = row.get(key)
    if not isinstance(value, str):
        got = "nothing" if value is None else brief(value)
        raise ValueError(f"{key}: got {got}, expected a string")
    if not value.strip() and not may_be_empty:
        raise ValueError(f"{key}: got an empty string")
    if not is_utf8(value):
        raise ValueError(f"{key}: got half a surrogate pair, expected valid Unicode")
    return value
