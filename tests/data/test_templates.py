"""Chat templates: ours, a base's, a file's; held against transformers' own rendering."""

import itertools
import json
import re
from collections.abc import Sequence

import jinja2
import pytest
from chat_templates import CHATML, ENDS, SHAPES, chat_tokenizer
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from interviewmate_mlx.data.prompts import Example, encode_messages, encode_record, encode_records
from interviewmate_mlx.data.records import Message, Record, scan_records
from interviewmate_mlx.data.templates import (
    CHAT_TEMPLATE,
    PLAIN,
    VERBATIM,
    Template,
    choose_template,
    end_ids,
    own_template,
    text_beside,
)
from interviewmate_mlx.errors import ConfigError, DataError, ModelError

SYSTEM = Message("system", "Be brief.")
ONE = (Message("user", "What is a loss?"), Message("assistant", "How far off it is."))
TWO = (Message("user", "And a gradient?"), Message("assistant", "Where it falls.\n\nFastest."))
THREE = (Message("user", "Thanks, bye"), Message("assistant", "Bye."))
CONVERSATIONS = {
    "one turn": ONE,
    "with a system message": (SYSTEM, *ONE),
    "three turns": (*ONE, *TWO, *THREE),
    "three turns and a system message": (SYSTEM, *ONE, *TWO, *THREE),
}
KINDS = ("byte level", "metaspace")
BUILT_IN = ("plain", "alpaca", "chatml")


@pytest.fixture(scope="module")
def tokenizers() -> dict[tuple[str, str], PreTrainedTokenizerFast]:
    return {(shape, kind): chat_tokenizer(shape, kind) for shape in SHAPES for kind in KINDS}


def as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in messages]


def rendered(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], template: str, prompt: bool
) -> list[int]:
    """Transformers' own ids of a conversation."""
    ids = tokenizer.apply_chat_template(
        as_dicts(messages),
        chat_template=template,
        add_generation_prompt=prompt,
        tokenize=True,
        return_dict=False,
    )
    return list(ids)


def is_refused(shape: str, messages: Sequence[Message]) -> bool:
    return shape == "gemma" and messages[0].role == "system"


def naive_examples(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], template: str, ends: set[int]
) -> list[tuple[list[int], list[int]]]:
    """Ids before each answer, and of the answer with the token that ends it.

    The whole conversation up to an answer is rendered anew for each of them.
    """
    found = []
    for number, message in enumerate(messages):
        if message.role == "assistant":
            before = rendered(tokenizer, messages[:number], template, prompt=True)
            whole = rendered(tokenizer, messages[: number + 1], template, prompt=False)
            assert whole[: len(before)] == before
            answer = whole[len(before) :]
            last = max(n for n, token in enumerate(answer) if token in ends)
            # After the last words only ends follow; the first of them counts.
            while last and answer[last - 1] in ends:
                last -= 1
            found.append((before, answer[: last + 1]))
    return found


def learned(examples: list[Example]) -> list[tuple[list[int], list[int]]]:
    """Ids before each answer, and of the answer, as training has them."""
    found = []
    for example in examples:
        tokens, mask = example.tokens.tolist(), example.loss_mask.tolist()
        start = None
        for number in range(len(tokens) + 1):
            has_loss = number < len(tokens) and mask[number]
            if has_loss and start is None:
                start = number
            elif not has_loss and start is not None:
                found.append((tokens[:start], tokens[start:number]))
                start = None
    return found


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize(
    ("shape", "kind"),
    # The one that is left out merges an answer with its prompt: see the next test.
    [pair for pair in itertools.product(SHAPES, KINDS) if pair != ("vicuna", "metaspace")],
)
def test_loss_is_on_the_answers_of_transformers_rendering(tokenizers, shape, kind, messages):
    tokenizer = tokenizers[shape, kind]
    record = Record("row", messages=tuple(messages))
    if is_refused(shape, messages):
        with pytest.raises(DataError, match="System role not supported"):
            encode_record(tokenizer, record, 9999, "answer")
        return
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(ENDS.get(shape, "?"))}
    got = learned(encode_record(tokenizer, record, 9999, "answer"))
    assert got == naive_examples(tokenizer, messages, SHAPES[shape][0], ends)


def test_answer_that_a_tokenizer_merges_with_its_prompt_starts_a_token(tokenizers):
    tokenizer = tokenizers["vicuna", "metaspace"]
    before = rendered(tokenizer, ONE[:1], SHAPES["vicuna"][0], prompt=True)
    whole = rendered(tokenizer, ONE, SHAPES["vicuna"][0], prompt=False)
    assert whole[: len(before)] != before  # transformers' ids are no way to train: this is why
    (example,) = encode_record(tokenizer, Record("row", messages=ONE), 9999, "answer")
    assert example.tokens[: len(before)].tolist() == before
    assert tokenizer.decode(example.tokens) == tokenizer.decode(whole)


@pytest.mark.parametrize(
    ("shape", "num_rows"),
    [("chatml", 1), ("llama-3", 1), ("mistral", 3), ("qwen-3", 3), ("deepseek", 1), ("phi-3", 1)],
)
def test_template_that_shows_earlier_turns_otherwise_makes_a_row_of_each_answer(
    tokenizers, shape, num_rows
):
    messages = CONVERSATIONS["three turns and a system message"]
    record = Record("row", messages=messages)
    examples = encode_record(tokenizers[shape, "byte level"], record, 9999, "answer")
    assert len(examples) == num_rows
    if num_rows > 1:  # each row's record ends with the answer that is learned in it
        assert [len(example.record.messages) for example in examples] == [3, 5, 7]


@pytest.mark.parametrize("shape", ["chatml", "qwen-3"])
def test_last_answer_alone_is_one_row_in_every_template(tokenizers, shape):
    tokenizer = tokenizers[shape, "byte level"]
    record = Record("row", messages=(*ONE, *TWO, *THREE))
    (last,) = encode_record(tokenizer, record, 9999, "last")
    assert tokenizer.decode(last.tokens[last.loss_mask]).endswith("Bye.<|im_end|>")
    assert learned([last]) == learned(encode_record(tokenizer, record, 9999, "answer"))[-1:]


@pytest.mark.parametrize("shape", SHAPES)
def test_generation_stops_at_the_templates_end_token_too(tokenizers, shape):
    tokenizer = tokenizers[shape, "byte level"]
    ends = {tokenizer.eos_token, ENDS.get(shape, tokenizer.eos_token)}
    assert end_ids(None, tokenizer) == set(tokenizer.convert_tokens_to_ids(list(ends)))
    assert end_ids(VERBATIM, tokenizer) == {tokenizer.eos_token_id}


def test_reasoning_in_an_answer_is_learned_where_the_template_shows_it(tokenizers):
    reasoned = (ONE[0], Message("assistant", "<think>\nhm\n</think>\n\nFar off."))
    record = Record("row", messages=reasoned)
    (example,) = encode_record(tokenizers["qwen-3", "byte level"], record, 9999, "answer")
    text = tokenizers["qwen-3", "byte level"].decode(example.tokens[example.loss_mask])
    assert text == "<think>\nhm\n</think>\n\nFar off.<|im_end|>"
    with pytest.raises(DataError, match="changes an answer: got '<think>"):
        encode_record(tokenizers["deepseek", "byte level"], record, 9999, "answer")


THINKS_FIRST = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")


def test_answer_may_begin_in_what_is_given_to_the_model():
    """As Qwen 3.5's: `<think>` is put before every answer, in training and in generation."""
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = THINKS_FIRST.replace(
        "message['content'] +",
        "(message['content'] if message['role'] != 'assistant' else message['content'] if "
        "message['content'].startswith('<think>') else '<think>\n</think>' + message['content']) +",
    )
    for answer, said in (
        ("<think>\nhm\n</think>\nFar off.", "hm\n</think>\nFar off.<|im_end|>"),
        ("Far off.", "</think>Far off.<|im_end|>"),
    ):
        record = Record("row", messages=(ONE[0], Message("assistant", answer)))
        (example,) = encode_record(tokenizer, record, 999, "answer")
        assert tokenizer.decode(example.tokens[example.loss_mask]) == said


def test_base_that_thinks_before_it_answers_is_asked_without_if_answers_fit_only_so():
    """As Nemotron 3's: `<think>` is given where it is asked, and is closed in its answers."""
    tokenizer = chat_tokenizer("chatml")
    text = CHATML.replace(
        "assistant\n' }}",
        "assistant\n' + ('<think></think>' if enable_thinking is defined and not enable_thinking "
        "else '<think>\n') }}",
    ).replace(
        "'\n' + message['content']",
        "'\n' + ('<think></think>' if message['role'] == 'assistant' else '') + message['content']",
    )
    assert text.count("<think></think>") == 2
    tokenizer.chat_template = text
    template = own_template(tokenizer)
    assert template.name == "own, without thinking"
    (example,) = encode_record(tokenizer, Record("row", messages=ONE), 999, "answer")
    prompt = tokenizer.apply_chat_template(
        as_dicts(ONE[:1]),
        add_generation_prompt=True,
        enable_thinking=False,
        tokenize=True,
        return_dict=False,
    )
    assert learned([example]) == [(prompt, example.tokens[len(prompt) :].tolist())]
    assert text_beside(template, tokenizer) == template.text  # it goes out with the adapter
    with pytest.raises(ModelError, match="an answer does not begin where generation does"):
        encode_record(tokenizer, Record("row", messages=ONE), 999, "answer", Template("own", text))


# our own templates


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ["chatml", "llama-2", "gemma"])
@pytest.mark.parametrize("name", BUILT_IN)
def test_our_templates_are_those_that_are_exported(tokenizers, shape, kind, name):
    tokenizer = tokenizers[shape, kind]
    template = choose_template(name, tokenizer)
    for messages in CONVERSATIONS.values():
        (example,) = encode_record(
            tokenizer, Record("row", messages=tuple(messages)), 9999, "answer", template
        )
        text = tokenizer.apply_chat_template(
            as_dicts(messages), chat_template=text_beside(template, tokenizer), tokenize=False
        )
        ids = tokenizer.encode(text.rstrip(), add_special_tokens=False)
        if name != "plain" or kind == "byte level":  # where nothing is merged
            assert ids == example.tokens.tolist()
        assert (example.tokens == (tokenizer.bos_token_id or -1)).sum() == bool(tokenizer.bos_token)


def test_alpaca_is_stanfords(tokenizers):
    tokenizer = tokenizers["zephyr", "byte level"]
    template = choose_template("alpaca", tokenizer)

    def text(*messages: Message) -> str:
        (example,) = encode_record(
            tokenizer, Record("row", messages=messages), 9999, "answer", template
        )
        return str(tokenizer.decode(example.tokens))

    assert text(Message("user", "Add.\n\n1 and 2", "1 and 2"), Message("assistant", "3")) == (
        "<s>Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n3</s>"
    )
    assert text(Message("user", "Say hi."), Message("assistant", "hi"), *ONE) == (
        "<s>Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nSay hi.\n\n### Response:\nhi</s>\n\n"
        "### Instruction:\nWhat is a loss?\n\n### Response:\nHow far off it is.</s>"
    )
    assert text(SYSTEM, *ONE).startswith("<s>Be brief.\n\n### Instruction:\nWhat is a loss?")


def test_chatml_ends_in_the_tokenizers_end_where_that_has_no_im_end(tokenizers):
    ids = {}
    for shape in ("chatml", "zephyr"):
        tokenizer = tokenizers[shape, "byte level"]
        template = choose_template("chatml", tokenizer)
        (example,) = encode_record(tokenizer, Record("row", messages=ONE), 9999, "answer", template)
        ids[shape] = tokenizer.decode(example.tokens)
    whole = "<|im_start|>user\nWhat is a loss?<|im_end|>\n<|im_start|>assistant\nHow far off it is."
    assert ids == {"chatml": f"{whole}<|im_end|>", "zephyr": f"<s>{whole}</s>"}


def test_base_without_a_template_or_with_ours_is_asked_with_ours(tokenizers):
    tokenizer = chat_tokenizer("phi-3")
    for own in (None, CHAT_TEMPLATE):
        tokenizer.chat_template = own
        assert own_template(tokenizer) == PLAIN == choose_template("auto", tokenizer)
        assert text_beside(PLAIN, tokenizer) == (CHAT_TEMPLATE if own is None else "")
    assert text_beside(VERBATIM, tokenizer) == ""


def test_several_templates_are_asked_for_the_default():
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = {"default": CHATML, "tool_use": "x"}
    assert own_template(tokenizer).text == CHATML
    tokenizer.chat_template = [{"name": "default", "template": CHATML}, {"name": "rag"}]
    assert own_template(tokenizer).text == CHATML
    for wrong in ({"tool_use": CHATML}, [7], 7, {}):
        tokenizer.chat_template = wrong
        with pytest.raises(ModelError, match="expected a text, or one named default"):
            own_template(tokenizer)


def test_file_of_jinja_is_a_template(tokenizers, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("\ufeff" + CHATML + "\n", encoding="utf-8")
    tokenizer = tokenizers["chatml", "byte level"]
    assert choose_template(str(path), tokenizer) == Template("mine.jinja", CHATML)
    assert choose_template("auto", tokenizer) == Template("own", CHATML)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00", b"x" * (1 << 18)])
def test_file_that_cannot_be_read_is_refused(tokenizers, tmp_path, content):
    path = tmp_path / "mine.jinja"
    if content:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"^data\.template: got .*, expected auto, plain"):
        choose_template(str(path), tokenizers["chatml", "byte level"])


def test_conversation_of_too_many_messages_is_refused_before_it_is_rendered(tokenizers, tmp_path):
    """Each answer is rendered with all before it: a row of short messages could take hours."""
    tokenizer = tokenizers["chatml", "byte level"]
    turns = [message for n in range(250) for message in (Message("user", f"{n}?"), ONE[1])]
    template = own_template(tokenizer)
    assert len(
        learned(encode_record(tokenizer, Record("r", messages=tuple(turns)), 99999, "answer"))
    )
    for count in (501, 30_000):
        said = [ONE[0]] * count
        with pytest.raises(DataError, match=rf"cannot show {count} messages, at most 500\.\nBegin"):
            encode_messages(tokenizer, said, template)
    rows = [{"messages": as_dicts(turns)}, {"messages": as_dicts([*turns, *ONE])}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records, (fault,) = scan_records(tmp_path / "rows.jsonl")
    assert len(records) == 1
    assert fault.message == (
        "messages: got 502 messages, expected at most 500: make several rows of this conversation"
    )


# templates that cannot be met

WRONG = {
    "no end": (
        "{% for m in messages %}{{ m.content + '\n' }}{% endfor %}",
        "no special token ends an answer",
    ),
    "no prompt": (
        CHATML.partition("{% if add")[0],
        r"adds nothing for add_generation_prompt, and answers begin with '<\|im_start\|>assistant",
    ),
    "another prompt": (
        CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}"),
        r"does not begin where generation does: expected '.*<think>\\n', got '",
    ),
    "no answers": ("{% for m in messages %}{{ m.role }}{% endfor %}", "it leaves answers out"),
}


@pytest.mark.parametrize(("text", "reason"), WRONG.values(), ids=WRONG)
def test_template_without_an_answer_of_its_own_is_refused(tokenizers, text, reason):
    tokenizer = tokenizers["chatml", "byte level"]
    with pytest.raises(ConfigError, match=rf"^the template 'mine' cannot be used: .*{reason}"):
        encode_record(tokenizer, Record("r", messages=ONE), 99, "answer", Template("mine", text))
    assert end_ids(Template("mine", text), tokenizer) == {tokenizer.eos_token_id}


def test_rows_that_a_template_cannot_take_are_named_together(tokenizers):
    tokenizer = tokenizers["gemma", "byte level"]
    records = [
        Record(f"rows.jsonl line {n}", messages=(SYSTEM, *ONE) if n % 2 else ONE) for n in range(6)
    ]
    with pytest.raises(DataError) as caught:
        encode_records(tokenizer, records, 99, "answer")
    assert re.search(
        r"rows\.jsonl: the base's chat template cannot show these messages: it says: System role "
        r"not supported: 3 rows \(lines 1, 3, 5\)",
        str(caught.value),
    )


# any template, any messages


PIECES = [
    *("a", "loss", " ", "\n", "  ", "\t", "é", "漢", "\u0301", "🙂", "'s", "{{ x }}", "{% if %}"),
    *("<|im_end|>", "<|im_start|>", "</s>", "<s>", "[INST]", "<|end|>", "<think>", "</think>"),
    *("<|", "|>", "<", ">", "Answer:", "### Response:\n", "ASSISTANT:", "\U000f0000", "\x00"),
]
TEXTS = st.lists(
    st.sampled_from(PIECES) | st.characters(codec="utf-8"), min_size=1, max_size=8
).map(lambda pieces: "".join(pieces).strip())


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    texts = draw(st.lists(TEXTS.filter(bool), min_size=2, max_size=7))
    has_system = draw(st.booleans()) and len(texts) % 2
    roles = ["system"] * bool(has_system) + ["user", "assistant"] * len(texts)
    return [Message(role, text) for role, text in zip(roles, texts, strict=False)]


# Text between the parts of a conversation, as a template may have it.
MARKS = st.lists(
    st.sampled_from(["\n", " ", "<|im_start|>", "<|im_end|>", "user", "Q: ", "▁", "[", "  "]),
    max_size=3,
).map("".join)


@st.composite
def templates(draw: st.DrawFn) -> str:
    """A template whose answers can be found: marks of any kind, and an end after answers."""
    first, system, user, after_user, prompt, space, after, last = (draw(MARKS) for _ in range(8))
    trim = draw(st.sampled_from(["", " | trim"]))
    moved = draw(st.booleans())  # a mark that only the last question has
    mark = "{% if loop.index >= messages | length - 1 %}!{% endif %}" if moved else ""
    return (
        f"{first!s}{{% for m in messages %}}"
        f"{{% if m.role == 'system' %}}{system}{{{{ m.content{trim} }}}}"
        f"{{% elif m.role == 'user' %}}{user}{mark}{{{{ m.content{trim} }}}}{after_user}"
        f"{{% else %}}{prompt}{{{{ {space!r} + m.content{trim} }}}}<|im_end|>{after}{{% endif %}}"
        f"{{% endfor %}}{{% if add_generation_prompt %}}{prompt}{{% else %}}{last}{{% endif %}}"
    )


def check_prompts(
    tokenizer: PreTrainedTokenizerFast, template: Template, messages: list[Message]
) -> None:
    """The ids that generation sees before each answer are the first of a training row."""
    answers = [n for n, message in enumerate(messages) if message.role == "assistant"]
    assume(answers)
    record = Record("row", messages=tuple(messages[: answers[-1] + 1]))
    try:
        examples = encode_record(tokenizer, record, 99999, "answer", template)
    except (DataError, ConfigError, ModelError):
        assume(False)
    rows = learned(examples)
    assert len(rows) == len(answers)  # every answer is learned once
    for (before, answer), number in zip(rows, answers, strict=True):
        assert encode_messages(tokenizer, messages[:number], template) == before
        assert answer[-1] in end_ids(template, tokenizer)
        said = "".join(tokenizer.decode(answer[:-1]).split())
        assert "".join(messages[number].content.split()) in said


@settings(max_examples=150, deadline=None)
@given(messages=conversations(), shape=st.sampled_from(list(SHAPES)), kind=st.sampled_from(KINDS))
def test_prompt_is_the_start_of_a_training_row_in_every_shape(tokenizers, messages, shape, kind):
    tokenizer = tokenizers[shape, kind]
    assume(not is_refused(shape, messages))
    check_prompts(tokenizer, own_template(tokenizer), messages)


@settings(max_examples=150, deadline=None)
@given(messages=conversations(), text=templates(), kind=st.sampled_from(KINDS))
def test_prompt_is_the_start_of_a_training_row_in_any_template(tokenizers, messages, text, kind):
    check_prompts(tokenizers["chatml", kind], Template("made up", text), messages)


@settings(max_examples=100, deadline=None)
@given(messages=conversations(), shape=st.sampled_from(["chatml", "llama-3", "phi-3", "qwen-3"]))
def test_special_tokens_are_the_templates_and_never_a_writers(tokenizers, messages, shape):
    tokenizer = tokenizers[shape, "byte level"]
    blank = [Message(message.role, "x") for message in messages]
    special = {n for n, token in tokenizer.added_tokens_decoder.items() if token.special}

    def count(given: list[Message]) -> list[int]:
        return [n for n in encode_messages(tokenizer, given) if n in special]

    end = len(messages) - (messages[-1].role == "assistant")
    try:
        got = count(messages[:end])
    except DataError:
        assume(False)
    assert got == count(blank[:end])


def test_naive_jinja_gives_the_text_of_our_template(tokenizers):
    text = (
        jinja2.Environment()
        .from_string(CHAT_TEMPLATE)
        .render(messages=as_dicts((SYSTEM, *ONE)), eos_token="</s>")
    )
    assert text == ("Be brief.\n\nQuestion: What is a loss?\nAnswer: How far off it is.</s>")
