"""OpenAI's routes, by OpenAI's own client; and what is beside them."""

import json
import math
import re
import signal
import subprocess
import threading
import time

import httpx2
import numpy as np
import openai
import pytest

from interviewmate_mlx.coach.feedback import Feedback
from interviewmate_mlx.coach.generate import answer, load_coach, stream_answer
from interviewmate_mlx.coach.sampling import Sampling
from interviewmate_mlx.data.prompts import encode_messages, encode_prompt
from interviewmate_mlx.data.records import Message
from interviewmate_mlx.data.templates import VERBATIM

QUESTION = "What is a validation set?"
ASKED = [{"role": "user", "content": QUESTION}]
GREEDY = {"temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def coaches(tiny_base, tiny_adapter, random_adapter):
    folders = {"tiny": None, "learned": tiny_adapter, "random": random_adapter}
    return {name: load_coach(tiny_base, folder) for name, folder in folders.items()}


def test_models_are_the_base_and_each_adapter(client):
    assert [model.id for model in client.models.list()] == ["tiny", "learned", "random"]


@pytest.mark.parametrize("name", ["tiny", "learned", "random"])
def test_chat_answers_as_generate_does(client, coaches, name):
    found = client.chat.completions.create(model=name, messages=ASKED, **GREEDY)
    model, tokenizer = coaches[name]
    expected = answer(model, tokenizer, QUESTION, Sampling(24))
    (choice,) = found.choices
    assert choice.message.content.strip() == expected
    assert choice.message.role == "assistant"
    assert found.model == name
    ids = encode_messages(tokenizer, [Message("user", QUESTION)])
    assert found.usage.prompt_tokens == len(ids)
    assert found.usage.total_tokens == len(ids) + found.usage.completion_tokens
    assert 0 < found.usage.completion_tokens <= 24
    assert choice.finish_reason == ("length" if found.usage.completion_tokens == 24 else "stop")


def test_without_a_model_the_first_adapter_answers(served):
    assert served.post("/v1/chat/completions", {"messages": ASKED, **GREEDY}).json()["model"] == (
        "learned"
    )


def test_conversation_with_a_system_text(client, coaches):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": QUESTION}]},
        {"role": "assistant", "content": "Rows apart."},
        {"role": "user", "content": "Why?"},
    ]
    found = client.chat.completions.create(model="learned", messages=messages, **GREEDY)
    model, tokenizer = coaches["learned"]
    said = [("system", "Be brief."), ("user", QUESTION), ("assistant", "Rows apart.")]
    prompt = encode_messages(tokenizer, [Message(*m) for m in [*said, ("user", "Why?")]])
    expected = "".join(stream_answer(model, tokenizer, "", Sampling(24), prompt))
    assert found.choices[0].message.content.strip() == expected.strip()


def test_stream_is_the_same_text_with_its_usage(client):
    whole = client.chat.completions.create(model="learned", messages=ASKED, **GREEDY)
    parts = list(
        client.chat.completions.create(
            model="learned",
            messages=ASKED,
            stream=True,
            stream_options={"include_usage": True},
            **GREEDY,
        )
    )
    assert parts[0].choices[0].delta.role == "assistant"
    *texts, last = parts
    text = "".join(part.choices[0].delta.content or "" for part in texts)
    assert text == whole.choices[0].message.content
    assert texts[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.choices == []
    assert last.usage == whole.usage
    assert len({part.id for part in parts}) == 1


def test_stream_ends_as_openai_s_does(served):
    body = {"messages": ASKED, "stream": True, **GREEDY}
    response = served.post("/v1/chat/completions", body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("data: [DONE]\n\n")
    assert all(line == "" or line.startswith("data: ") for line in response.text.split("\n"))


def test_completion_goes_on_from_the_text_as_it_stands(client, coaches):
    prompts = ["A mean is", "Question: What"]
    found = client.completions.create(model="learned", prompt=prompts, **GREEDY)
    model, tokenizer = coaches["learned"]
    for prompt, choice in zip(prompts, found.choices, strict=True):
        ids = encode_prompt(tokenizer, prompt, VERBATIM)
        expected = "".join(stream_answer(model, tokenizer, "", Sampling(24), ids))
        assert choice.text == expected
    streamed = client.completions.create(model="learned", prompt=prompts, stream=True, **GREEDY)
    texts = ["", ""]
    for part in streamed:
        texts[part.choices[0].index] += part.choices[0].text
    assert texts == [choice.text for choice in found.choices]


def test_seed_repeats_a_draw_and_choices_differ(client):
    def draw(seed, n=3):
        found = client.chat.completions.create(
            model="random", messages=ASKED, max_tokens=16, temperature=1.5, seed=seed, n=n
        )
        assert [choice.index for choice in found.choices] == list(range(n))
        return [choice.message.content for choice in found.choices]

    first = draw(7)
    assert draw(7) == first
    assert draw(7, n=1) == first[:1]  # alone as in company
    assert len(set(first)) > 1
    assert draw(8) != first
    assert draw(-1) == draw(2**32 - 1)


def test_unseeded_draws_differ(client):
    texts = {
        client.chat.completions.create(model="random", messages=ASKED, max_tokens=16, temperature=2)
        .choices[0]
        .message.content
        for _ in range(4)
    }
    assert len(texts) > 1


def test_stop_text_is_not_part_of_the_answer(client):
    whole = client.completions.create(model="random", prompt="A mean is", **GREEDY)
    text = whole.choices[0].text
    stop = text[5:8]
    found = client.completions.create(
        model="random", prompt="A mean is", stop=["never there", stop], **GREEDY
    )
    assert found.choices[0].text == text[: text.index(stop)]
    assert found.choices[0].finish_reason == "stop"
    assert found.usage.completion_tokens < 24
    streamed = client.completions.create(
        model="random", prompt="A mean is", stop=stop, stream=True, **GREEDY
    )
    assert "".join(part.choices[0].text for part in streamed) == text[: text.index(stop)]


def test_logprobs_are_the_network_s(client, coaches):
    import mlx.core as mx
    import mlx.nn as nn

    found = client.completions.create(
        model="learned", prompt="A mean is", logprobs=3, temperature=0, max_tokens=8
    )
    logprobs = found.choices[0].logprobs
    model, tokenizer = coaches["learned"]
    ids = encode_prompt(tokenizer, "A mean is", VERBATIM)
    for text, logprob, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        row = np.array(nn.log_softmax(model(mx.array([ids]))[0, -1]))
        token = int(row.argmax())
        assert text == tokenizer.decode([token])
        # Keys read one by one or together: a few roundings of float32.
        assert logprob == pytest.approx(row[token], abs=1e-4)
        likely = sorted(row, reverse=True)[:3]
        assert sorted(top.values(), reverse=True) == pytest.approx(likely, abs=1e-4)
        ids.append(token)
    assert logprobs.text_offset[0] == 0
    assert "".join(logprobs.tokens) == found.choices[0].text
    chat = client.chat.completions.create(
        model="learned", messages=ASKED, logprobs=True, top_logprobs=2, **GREEDY
    )
    for token in chat.choices[0].logprobs.content:
        assert len(token.top_logprobs) == 2
        assert token.top_logprobs[0].logprob == token.logprob <= 0
        assert bytes(token.bytes).decode() == token.token


def test_penalties_and_cuts_change_what_is_drawn(client):
    def draw(**settings):
        return (
            client.completions.create(model="random", prompt="A mean is", max_tokens=24, **settings)
            .choices[0]
            .text
        )

    greedy = draw(temperature=0)
    assert draw(temperature=1, seed=1, top_p=1e-6) == greedy
    for own in ({"top_k": 1}, {"min_p": 0.9999}):
        assert draw(temperature=1, seed=1, extra_body=own) == greedy
    assert draw(temperature=1.9, seed=1) != greedy
    # One token would only be given up for another that is nearly as likely: draws show it too.
    plain = draw(temperature=1, seed=3)
    changed = [
        draw(temperature=1, seed=3, presence_penalty=2),
        draw(temperature=1, seed=3, frequency_penalty=2),
        draw(temperature=1, seed=3, extra_body={"repetition_penalty": 5.0}),
    ]
    assert all(text != plain for text in changed)


def test_many_at_once_answer_as_alone(client, served, coaches):
    names = ["tiny", "learned", "random"]
    asked = [(name, f"What is {word}?") for name in names for word in ("a", "loss", "it all")]
    asked *= 4
    results = {}

    def ask(number):
        name, question = asked[number]
        messages = [{"role": "user", "content": question}]
        found = client.chat.completions.create(model=name, messages=messages, **GREEDY)
        results[number] = found.choices[0].message.content.strip()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {(n, q): answer(*coaches[n], q, Sampling(24)) for n, q in set(asked)}
    assert results == {number: expected[key] for number, key in enumerate(asked)}
    assert served.metric("imate_running") == served.metric("imate_waiting") == 0


@pytest.mark.parametrize(
    ("change", "status", "param", "message"),
    [
        ({"model": "other"}, 404, "model", "expected one of: tiny, learned, random"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "not supported here"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format", "not supported"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias", "not supported"),
        ({"temperature": 3}, 400, "temperature", "less than or equal to 2"),
        ({"temperature": "1"}, 400, "temperature", "valid number"),
        ({"max_tokens": -1}, 400, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 4096}, 400, "messages", "the model takes 2048 in all"),
        ({"n": 17}, 400, "n", "less than or equal to 16"),
        ({"n": True}, 400, "n", "valid integer"),
        ({"top_logprobs": 2}, 400, None, "allowed with logprobs only"),
        ({"stream_options": {"include_usage": True}}, 400, None, "allowed with stream only"),
        ({"messages": []}, 400, "messages", "at least 1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role", "Input should"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, None, "a user's last"),
        ({"messages": [{"role": "user", "content": " "}]}, 400, None, "a message is empty"),
        ({"messages": ASKED * 2}, 400, None, "user and assistant in turn"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, None, "text"),
        ({"stop": [""]}, 400, None, "at least 1 character"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, 400, None, "give one of them"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(served, change, status, param, message):
    response = served.post("/v1/chat/completions", {"messages": ASKED, "max_tokens": 4} | change)
    assert response.status_code == status
    error = response.json()["error"]
    assert message in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    if param:
        assert error["param"] == param


def test_client_sees_the_errors_it_knows(client):
    with pytest.raises(openai.NotFoundError, match="No such model here"):
        client.chat.completions.create(model="other", messages=ASKED)
    with pytest.raises(openai.BadRequestError, match="not supported here"):
        client.chat.completions.create(model="tiny", messages=ASKED, tools=[{"type": "function"}])


def test_keys_that_are_off_are_no_request_for_them(served):
    off = {
        "tools": [],
        "tool_choice": "none",
        "logit_bias": {},
        "functions": None,
        "store": False,
        "response_format": {"type": "text"},
        "service_tier": "auto",
    }
    assert served.post("/v1/chat/completions", {"messages": ASKED, **GREEDY} | off).is_success


def test_curl_is_answered(served):
    body = json.dumps({"messages": ASKED, **GREEDY})
    command = ["curl", "-sS", f"{served.url}/v1/chat/completions", "--data", body]
    command += ["-H", "Content-Type: application/json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"]


def test_client_that_leaves_frees_its_place(served):
    """Asked for 2,000 tokens and gone after the first: far fewer are made."""
    body = {"model": "random", "messages": ASKED, "max_tokens": 2000, "temperature": 0}
    body |= {"n": 8, "stream": True, "stop": ["never there"]}
    name = 'imate_answer_tokens_total{adapter="random"}'
    before = served.metric(name)
    with httpx2.stream("POST", f"{served.url}/v1/chat/completions", json=body) as response:
        next(response.iter_lines())
    wait_until(lambda: served.metric("imate_running") == 0)
    assert served.metric(name) - before < 8 * 1000
    with pytest.raises(httpx2.ReadTimeout):  # the same without a stream
        httpx2.post(f"{served.url}/v1/chat/completions", json=body | {"stream": False}, timeout=0.3)
    wait_until(lambda: served.metric("imate_running") == 0)
    assert served.metric(name) - before < 8 * 2000
    assert re.search(r" 499 .* end=left", served.log.read_text())


def wait_until(holds, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_feedback_and_conversations_are_kept(served, client):
    found = client.chat.completions.create(model="learned", messages=ASKED, n=2, **GREEDY)
    for index, thumbs in enumerate(["up", "down"]):
        answer_id = f"{found.id}-{index}" if index else found.id
        body = {"answer": answer_id, "thumbs": thumbs, "better": "Rows <b>apart</b>."}
        assert served.post("/feedback", body).json() == {"status": "kept"}
    unknown = served.post("/feedback", {"answer": "chatcmpl-0", "thumbs": "up"})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "answer_not_found")
    with Feedback.open(served.log.parent / "kept.sqlite") as feedback:
        rated = feedback.rated()
    assert [(each.thumbs, each.better) for each in rated] == [
        (1, "Rows <b>apart</b>."),
        (-1, "Rows <b>apart</b>."),
    ]
    assert rated[0].answer == found.choices[0].message.content
    assert served.metric('imate_ratings_total{adapter="learned",thumbs="up"}') == 1


def test_log_and_metrics_tell_no_words(served, client):
    secret = "xylophone"
    messages = [{"role": "user", "content": f"What is a {secret}?"}]
    client.chat.completions.create(model="learned", messages=messages, **GREEDY)
    assert secret not in served.get("/metrics").text
    log = served.log.read_text()
    assert secret not in log
    line = re.compile(
        r"POST /v1/chat/completions 200 [\d.]+s adapter=learned prompt=\d+ tokens=\d+ "
        r"first=[\d.]+s end=(stop|length)"
    )
    assert line.search(log)
    count = served.metric('imate_first_token_seconds_count{adapter="learned"}')
    assert count > 0
    assert math.isfinite(served.metric('imate_token_seconds_sum{adapter="learned"}'))


def test_interview_by_its_routes(served):
    found = served.get("/interview/questions?count=3").json()
    assert found["keeps"] is True
    assert len(found["questions"]) == 3
    question = found["questions"][0]
    assert "reference" not in question
    body = {"question": question["id"], "answer": "The rows that it has not seen."}
    compared = served.post("/interview/compare", body).json()
    assert compared["points"]
    assert compared["reference"]
    due = served.post("/interview/grade", body | {"grade": "good"}).json()["due"]
    assert due > "2026"
    again = served.get("/interview/questions?count=100").json()["questions"]
    assert again[-1]["id"] == question["id"]  # not due yet
    assert served.get("/interview/questions?count=0").status_code == 400
    assert served.get("/interview/questions?category=none").status_code == 400
    assert served.post("/interview/compare", body | {"question": "x"}).status_code == 404
    assert served.post("/interview/grade", body | {"grade": "bad"}).status_code == 400


def test_nothing_is_kept_unless_it_is_asked_for(serve, tiny_base, questions):
    with serve("--model", tiny_base, "--data", questions) as served:
        found = served.post("/v1/chat/completions", {"messages": ASKED, **GREEDY}).json()
        rating = served.post("/feedback", {"answer": found["id"], "thumbs": "up"})
        assert (rating.status_code, rating.json()["error"]["code"]) == (409, "nothing_kept")
        asked = served.get("/interview/questions").json()
        assert asked["keeps"] is False
        body = {"question": asked["questions"][0]["id"], "answer": "x", "grade": "good"}
        assert served.post("/interview/grade", body).status_code == 409
        assert [path.name for path in served.log.parent.iterdir()] == ["log.txt"]


def test_queue_and_time_have_limits(serve, tiny_base):
    with serve("--model", tiny_base, "--queue", 0, "--timeout", 1.5) as served:
        body = {"messages": ASKED, "max_tokens": 2000, "temperature": 0, "n": 16}
        body |= {"stop": ["never"], "frequency_penalty": 0.5}
        codes = []

        def ask():
            response = served.post("/v1/chat/completions", body)
            codes.append((response.status_code, response.headers.get("retry-after")))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (429, "5") in codes
        assert {code for code, _ in codes} <= {200, 429, 504}
        wait_until(lambda: served.metric("imate_running") == 0)
        late = served.post("/v1/chat/completions", body | {"n": 16, "max_tokens": 2000})
        streamed = served.post("/v1/chat/completions", body | {"stream": True})
        if late.status_code == 504:  # a machine may be fast enough
            assert late.json()["error"]["code"] == "timeout"
            assert '"code": "timeout"' in streamed.text or "[DONE]" in streamed.text


def test_sigterm_finishes_what_runs_and_exits_0(serve, tiny_base):
    with serve("--model", tiny_base) as served:
        body = {"messages": ASKED, "max_tokens": 400, "temperature": 0, "stream": True}
        with httpx2.stream("POST", f"{served.url}/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            served.process.send_signal(signal.SIGTERM)
            rest = list(lines)
        assert rest[-2:] == ["data: [DONE]", ""] or "data: [DONE]" in rest
        assert served.process.wait(timeout=30) == 0


def test_ctrl_c_exits_130(serve, tiny_base):
    with serve("--model", tiny_base) as served:
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(timeout=30) == 130
