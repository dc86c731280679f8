"""The engine by itself: what goes wrong for one answer leaves the others alone."""

import logging
import queue
import subprocess
import sys
import time

import pytest

from interviewmate_mlx.coach.generate import answer, load_coach
from interviewmate_mlx.coach.panel import Panel
from interviewmate_mlx.coach.sampling import Sampling
from interviewmate_mlx.data.prompts import encode_question
from interviewmate_mlx.serve.engine import BusyError, Ended, Engine, Job

QUESTION = "What is a loss?"


@pytest.fixture(scope="module")
def panel(tiny_base, tiny_adapter):
    return Panel.load(tiny_base, {"learned": tiny_adapter})


def make_job(panel, prompt=None, seconds=60.0, **sampling):
    events = queue.SimpleQueue()
    prompt = encode_question(panel.tokenizer, QUESTION) if prompt is None else prompt
    voice, deadline = panel.voice("learned"), time.monotonic() + seconds
    return Job(voice, prompt, Sampling(24, **sampling), events.put, deadline), events


def result(events):
    text = ""
    while not isinstance(event := events.get(timeout=60), Ended):
        text += event.text
    return text.strip(), event.reason


def test_job_that_cannot_begin_leaves_the_others_alone(panel, tiny_base, tiny_adapter, caplog):
    expected = answer(*load_coach(tiny_base, tiny_adapter), QUESTION, Sampling(24))
    with caplog.at_level(logging.CRITICAL), Engine(panel, 4) as engine:
        bad, bad_events = make_job(panel, prompt=[])
        good, good_events = make_job(panel)
        engine.submit([bad, good])
        assert result(bad_events) == ("", "error")
        assert result(good_events)[0] == expected
    assert engine.num_jobs == 0


def test_network_that_fails_loses_its_answers_and_not_the_engine(panel, monkeypatch, caplog):
    original, calls = type(panel.model).__call__, []

    def fail_once(self, *arguments, **named):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("no memory left")
        return original(self, *arguments, **named)

    monkeypatch.setattr(type(panel.model), "__call__", fail_once)
    with caplog.at_level(logging.CRITICAL), Engine(panel, 4) as engine:
        first, first_events = make_job(panel)
        engine.submit([first])
        assert result(first_events)[1] == "error"
        second, second_events = make_job(panel)
        engine.submit([second])
        assert result(second_events)[1] in ("stop", "length")


def test_jobs_beyond_the_limit_are_refused_together(panel):
    engine = Engine(panel, 1)
    limit = engine.max_running + 1
    with pytest.raises(BusyError):
        engine.submit([make_job(panel)[0] for _ in range(limit + 1)])
    assert engine.num_jobs == 0  # all or none


def test_late_and_cancelled_jobs_end(panel):
    with Engine(panel, 4) as engine:
        late, late_events = make_job(panel, seconds=-1)
        engine.submit([late])
        assert result(late_events)[1] == "timeout"
        gone, _ = make_job(panel)
        engine.submit([gone])
        engine.cancel(gone)
        engine.cancel(gone)
        engine.cancel(late)  # ended already: nothing happens
        last, last_events = make_job(panel)
        engine.submit([last])
        assert result(last_events)[1] in ("stop", "length")
    assert engine.num_jobs == 0


def test_what_runs_is_finished_before_the_engine_closes(panel):
    with Engine(panel, 4) as engine:
        job, events = make_job(panel)
        engine.submit([job])
    assert result(events)[1] in ("stop", "length")


# What the engine's thread has compiled belongs to it, and ends with it.
LAST_WORDS = """
import sys, time
from interviewmate_mlx.coach.panel import Panel
from interviewmate_mlx.coach.sampling import Sampling
from interviewmate_mlx.serve.engine import Engine, Job
import mlx.core as mx

panel = Panel.load(sys.argv[1], {})
(voice,) = panel.voices.values()
compiled = [mx.compile(lambda x: mx.sin(x) * x) for _ in range(5)]
deliver = lambda event: mx.eval([function(mx.ones(4)) for function in compiled])
with Engine(panel, 4) as engine:
    engine.submit([Job(voice, [1, 2], Sampling(2), deliver, time.monotonic() + 60)])
"""


def test_process_that_ends_with_the_engine_ends_well(tiny_base):
    words = [sys.executable, "-c", LAST_WORDS, tiny_base]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
