"""A conversation: what was read is kept, and the answers are those of a fresh start."""

import json
from dataclasses import replace

import pytest

from interviewmate_mlx.coach.chat import Chat
from interviewmate_mlx.coach.generate import load_coach, stream_answer
from interviewmate_mlx.coach.panel import Panel
from interviewmate_mlx.coach.sampling import Sampling
from interviewmate_mlx.data.prompts import encode_messages
from interviewmate_mlx.data.records import Message
from interviewmate_mlx.errors import ConfigError

TURNS = ["What is a loss?", "What is a mean?", "What is the gradient?"]
GREEDY = Sampling(max_tokens=16)


@pytest.fixture(scope="module")
def panel(tiny_base, tiny_adapter, random_adapter):
    return Panel.load(tiny_base, {"learned": tiny_adapter, "random": random_adapter})


@pytest.fixture
def chat(panel):
    return Chat(panel, GREEDY, panel.voice("learned"))


def said(pieces) -> str:
    return "".join(pieces).strip()


def fresh_answer(tiny_base, adapter, messages, sampling=GREEDY) -> str:
    """The answer of a network that has read nothing before."""
    model, tokenizer = load_coach(tiny_base, adapter)
    return said(stream_answer(model, tokenizer, "", sampling, encode_messages(tokenizer, messages)))


def test_answers_are_those_of_a_fresh_start(chat, tiny_base, tiny_adapter):
    for turn in TURNS:
        before = [*chat.messages, Message("user", turn)]
        assert said(chat.ask(turn)) == fresh_answer(tiny_base, tiny_adapter, before)
    assert [m.role for m in chat.messages] == ["user", "assistant"] * 3


def test_only_what_is_new_is_read(chat, panel):
    """An answer may be read again: its text can have other tokens than those that were drawn."""
    said(chat.ask(TURNS[0]))
    first = len(encode_messages(panel.tokenizer, [Message("user", TURNS[0])]))
    assert chat.num_read == first
    whole = len(encode_messages(panel.tokenizer, [*chat.messages, Message("user", TURNS[1])]))
    said(chat.ask(TURNS[1]))
    assert chat.num_read <= whole - first
    said(chat.retry())
    assert chat.num_read == 1  # all of it was read before; it goes on from the last token


def test_switching_and_comparing_leave_the_conversation_right(
    chat, panel, tiny_base, tiny_adapter, random_adapter
):
    said(chat.ask(TURNS[0]))
    message = Message("user", TURNS[1])
    before = [*chat.messages, message]
    expected = {
        name: fresh_answer(tiny_base, folder, before)
        for name, folder in {"learned": tiny_adapter, "random": random_adapter}.items()
    }
    got = {name: said(chat.answer(panel.voice(name), message)) for name in expected}
    assert got == expected
    assert len(chat.messages) == 2  # comparing keeps nothing
    chat.voice = panel.voice("random")
    assert said(chat.ask(TURNS[1])) == expected["random"]


def test_undo_and_retry(chat, panel):
    first = said(chat.ask(TURNS[0]))
    second = said(chat.ask(TURNS[1]))
    assert said(chat.retry()) == second  # greedy
    assert len(chat.messages) == 4
    assert chat.undo() == TURNS[1]
    assert said(chat.ask(TURNS[1])) == second
    assert chat.messages[1].content == first
    warm = Chat(panel, Sampling(16, temperature=1.5, seed=3), panel.voice("learned"))
    answers = [said(warm.ask(TURNS[0])), said(warm.retry()), said(warm.retry())]
    assert len(set(answers)) > 1
    assert len(warm.messages) == 2
    warm.system = "why " * 3000
    with pytest.raises(ConfigError, match="expected at most"):
        said(warm.retry())
    assert warm.messages[-1].content == answers[-1]  # no answer: the one before stays
    warm.undo()
    with pytest.raises(ConfigError, match="Nothing was said yet"):
        warm.undo()


def test_stopped_answer_is_kept_and_what_follows_is_right(chat, tiny_base, tiny_adapter):
    pieces = chat.ask(TURNS[2])
    begun = "".join(next(pieces) for _ in range(3))
    pieces.close()
    assert chat.messages[-1].content == begun.strip()
    expected = fresh_answer(tiny_base, tiny_adapter, [*chat.messages, Message("user", TURNS[1])])
    assert said(chat.ask(TURNS[1])) == expected


def test_system_text_comes_first(chat, tiny_base, tiny_adapter):
    chat.system = "Be brief."
    messages = [Message("system", "Be brief."), Message("user", TURNS[0])]
    assert said(chat.ask(TURNS[0])) == fresh_answer(tiny_base, tiny_adapter, messages)
    row = json.loads(chat.to_row())
    assert [m["role"] for m in row["messages"]] == ["system", "user", "assistant"]


def test_oldest_turns_go_where_the_conversation_outgrows_the_model(panel, tiny_base, tiny_adapter):
    small = replace(panel, context=80)
    chat = Chat(small, GREEDY, panel.voice("learned"), "Be brief.")
    forgotten = []
    for turn in TURNS * 3:
        kept = chat.messages
        got = said(chat.ask(turn))
        forgotten.append(chat.num_forgotten)
        messages = [*kept[chat.num_forgotten :], Message("user", turn)]
        prompt = [Message("system", "Be brief."), *messages]
        assert len(encode_messages(panel.tokenizer, prompt)) <= 80 - 16
        assert got == fresh_answer(tiny_base, tiny_adapter, prompt)
    assert forgotten[0] == 0
    assert forgotten[-1] > 0
    assert all(number % 2 == 0 for number in forgotten)


def test_message_that_is_too_long_alone_is_refused(panel):
    chat = Chat(replace(panel, context=40), GREEDY, panel.base)
    with pytest.raises(ConfigError, match=r"The message has \d+ tokens, expected at most 24"):
        said(chat.ask("why " * 100))
    assert chat.messages == []
    assert said(chat.ask("Why?")) is not None


def test_stop_text_ends_an_answer_before_it(panel):
    whole = said(Chat(panel, GREEDY, panel.voice("learned")).ask(TURNS[0]))
    word = whole[1:]
    stopped = Chat(panel, Sampling(16, stop=(word,)), panel.voice("learned"))
    assert said(stopped.ask(TURNS[0])) == whole[: whole.index(word)].strip()
