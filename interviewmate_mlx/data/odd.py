"""Finds what can be learned, and should not be: personal data, secrets, marks of a template.

An adapter remembers its rows, and says them to whoever asks. Patterns find what has a form; a
name or a story has none, so a set without findings may still be about somebody.
"""

import re
from collections.abc import Iterable, Iterator

from interviewmate_mlx.data.faults import Fault
from interviewmate_mlx.data.records import Record
from interviewmate_mlx.data.templates import QUESTION

# End tokens of well-known models. A base's own comes from its tokenizer.
_END_TOKENS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|end|>",
    "<|return|>",
    "<end_of_turn>",
    "<eos>",
    "</s>",
)
# The forms of secrets that are known by their beginning, with the letters that follow.
_SECRETS = (
    r"hf_[A-Za-z0-9]{30,}"  # Hugging Face
    r"|sk-(?:[a-z]+-)*[A-Za-z0-9_-]{20,}"  # OpenAI, Anthropic
    r"|gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{50,}"
    r"|glpat-[\w-]{20,}"  # GitLab
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}"  # AWS
    r"|AIza[\w-]{35}"  # Google
    r"|xox[abprs]-[\w-]{10,}"  # Slack
    r"|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"  # a JSON web token
)
# Not at domains that are reserved for examples, or of one letter.
_MAIL = re.compile(
    r"(?<![\w.+-])[\w.+-]{1,64}@(?!example\.)(?:[\w-]{1,63}\.){0,8}[\w-]{2,63}\."
    r"(?!(?:example|test|invalid|localhost)\b)[A-Za-z]{2,24}\b"
)
_PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----")
# With a country, or with the usual brackets and breaks; not every long number.
_TELEPHONE = re.compile(
    r"(?<![\w+.])(?:\+[1-9]\d{0,2}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{2,4}(?:[ .-]?\d{2,4}){2,3}"
    r"|\(\d{3}\) ?\d{3}-\d{4}|\d{3}-\d{3}-\d{4})(?![\w.-]?\d)"
)
_BYTE = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"
_NETWORK_ADDRESS = re.compile(
    r"(?<![\w.])(?!127\.|10\.|0\.|192\.168\.|172\.(?:1[6-9]|2\d|3[01])\.|192\.0\.2\.|255\.)"
    rf"(?:{_BYTE}\.){{3}}{_BYTE}(?![\w.])"
)
_CARD = re.compile(r"(?<![\w-])[3-6]\d{3}(?:[ -]?\d{4}){2}[ -]?\d{3,4}\b")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}(?: ?[A-Z0-9]{1,3})?\b")
# By kind: the pattern, and what a text must hold for it to be tried at all.
_KINDS = {
    "an e-mail address": (_MAIL, re.compile("@")),
    "a key or token": (re.compile(rf"(?<![\w-])(?:{_SECRETS})"), re.compile(r"[\w-]{16}")),
    "a private key": (_PRIVATE_KEY, re.compile("-----")),
    "a telephone number": (_TELEPHONE, re.compile(r"\d\d")),
    "an address on the internet": (_NETWORK_ADDRESS, re.compile(r"\d\.\d")),
    "the number of a payment card": (_CARD, re.compile(r"\d{4}")),
    "the number of a bank account": (_IBAN, re.compile(r"[A-Z]\d\d")),
}


def odd_rows(records: Iterable[Record], own_end: str) -> Iterator[Fault]:
    """Rows that can be trained on, and probably should not be as they are.

    Args:
        records: any.
        own_end: the text of the base's end token; "" if there is no base.
    """
    end_tokens = list(dict.fromkeys([*filter(None, [own_end]), *_END_TOKENS]))
    for record in records:
        yield from _ends_of_text(record, end_tokens)
        yield from _templates_in_text(record)
        yield from _personal(record)


def find_personal(text: str) -> Iterator[tuple[str, str]]:
    """What is found in a text: its kind, and its first characters, without the rest."""
    for kind, (pattern, needed) in _KINDS.items():
        if needed.search(text):
            for found in pattern.finditer(text):
                if _is_likely(pattern, found[0]):
                    yield kind, found[0][:4].strip() + "..."
                    break  # one of a kind is enough to look at the row


def _is_likely(pattern: re.Pattern[str], text: str) -> bool:
    plain = text.replace(" ", "").replace("-", "")
    if pattern is _CARD:  # Luhn's check digit
        digits = [int(digit) for digit in reversed(plain)]
        doubled = [sum(divmod(2 * digit, 10)) for digit in digits[1::2]]
        return (sum(digits[::2]) + sum(doubled)) % 10 == 0
    if pattern is _IBAN:  # ISO 13616: the remainder by 97 is 1
        moved = plain[4:] + plain[:4]
        return int("".join(str(int(char, 36)) for char in moved)) % 97 == 1
    return True


def _answers(record: Record) -> list[str]:
    """The texts that are learned."""
    said = [message.content for message in record.messages if message.role == "assistant"]
    return said if record.messages else [record.completion]


def _ends_of_text(record: Record, end_tokens: list[str]) -> Iterator[Fault]:
    """Answers that end in the text of an end token. Training adds the token itself."""
    endings = [answer.rstrip() for answer in _answers(record)]
    for token in end_tokens:
        if any(ending.endswith(token) for ending in endings):
            yield Fault(
                record.source,
                f"an answer ends in the text {token!r}, which the model would learn to write "
                "out; training adds an end token by itself",
                "Remove this text from the answers.",
            )


def _templates_in_text(record: Record) -> Iterator[Fault]:
    """Conversations that hold the words of the template, which would then stand there twice."""
    asks, answers = (word.strip() for word in QUESTION.split("{}"))
    roles = {"user": asks, "assistant": answers}
    for role, word in roles.items():
        said = [m.content.strip() for m in record.messages if m.role == role]
        if any(text.startswith(word) for text in said):
            yield Fault(
                record.source,
                f"a text of the {role} begins with {word!r}, which the template adds",
                "Remove these words from the texts.",
            )


def _personal(record: Record) -> Iterator[Fault]:
    """Rows with addresses, numbers or keys, which an adapter would remember."""
    texts = [message.content for message in record.messages]
    whole = "\n".join([*texts, record.prompt, record.completion, record.follow_up])
    for kind, start in find_personal(whole):
        yield Fault(
            record.place,
            f"holds what looks like {kind} ({start}), which an adapter would remember",
            "Remove personal data, or write an invented one, such as name@example.com.",
            f"holds what looks like {kind}, which an adapter would remember",
        )
