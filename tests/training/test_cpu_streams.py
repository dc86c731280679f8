"""Streams side by side: what each gets, in which order it is started, and how cores are shared."""

import mlx.core as mx
import numpy as np
from checkpoints import our_model

from interviewmate_mlx import backend
from interviewmate_mlx.data.batches import Microbatch, collate
from interviewmate_mlx.data.prompts import Example
from interviewmate_mlx.data.records import Record
from interviewmate_mlx.model.lora import add_lora
from interviewmate_mlx.training import cpu_streams
from interviewmate_mlx.training.cpu_streams import CpuStreams, deal, in_turn
from interviewmate_mlx.training.optimizer import adamw
from interviewmate_mlx.training.step import Step


def example(length: int) -> Example:
    tokens = np.arange(1, length + 1, dtype=np.int32) % 300
    return Example(Record(f"row of {length}"), tokens, np.arange(length) >= 3)


def test_streams_share_a_step_of_enough_tokens():
    rows = [example(length) for length in (257, 250, 200, 225)]
    groups = CpuStreams(4).split(rows, 100_000)
    assert sorted(len(row) for group in groups for row in group) == [200, 225, 250, 257]
    assert [len(group) for group in groups] == [1, 1, 1, 1]
    assert [len(group) for group in CpuStreams(2).split(rows, 100_000)] == [2, 2]
    unequal = [example(length) for length in (353, 100, 100, 100)]
    assert [len(group) for group in CpuStreams(2).split(unequal, 100_000)] == [1, 3]
    short = [example(length) for length in (33, 30, 20, 9)]
    assert [len(group) for group in CpuStreams(4).split(short, 100_000)] == [4]
    assert [len(group) for group in CpuStreams(1).split(rows, 100_000)] == [4]


def test_a_stream_s_microbatch_fits_in_caches():
    groups = CpuStreams(2).split([example(513) for _ in range(16)], 10**6)
    assert [len(group) for group in groups] == [4] * 4


def test_streams_share_the_budget_too():
    rows = [example(129) for _ in range(8)]
    assert [len(group) for group in CpuStreams(4).split(rows, 1024)] == [2] * 4
    assert [len(group) for group in CpuStreams(4).split(rows, 512)] == [1] * 8


def test_microbatches_are_dealt_so_that_no_stream_has_much_more_to_do():
    hands = deal([collate([example(n)]) for n in (50, 9, 70, 20)], 2)
    assert [[m.inputs.shape[1] for m in hand] for hand in hands] == [[80, 16], [64, 32]]


def test_no_more_streams_than_there_is_room_for_rows():
    assert [CpuStreams(4).limited_to(n).num_streams for n in (0, 1, 3, 9)] == [1, 1, 3, 4]


def test_cores_are_shared_by_as_many_microbatches_as_there_are(monkeypatch):
    threads = []
    monkeypatch.setattr(backend, "_blas_threads_setter", lambda: threads.append)
    monkeypatch.setattr(backend, "_num_cores", lambda: 6)
    model = our_model().train()
    add_lora(model, ["query_key_value"], rank=2, alpha=4)
    executor = CpuStreams(2)
    with executor.opened():
        step = Step(model, adamw(), 1.0, executor)
        step.accumulate([collate([example(50)])], [0, 0])
        step.accumulate([collate([example(50)]), collate([example(20)])], [0, 1])
        mx.eval(step.update(1e-3))
    assert threads == [6, 3, 6]


def test_share_of_the_cores_stays_while_microbatches_run(monkeypatch):
    """Another one would round the products of those that are under way otherwise, by chance."""
    shares: list[int] = []
    monkeypatch.setattr(backend, "share_cores", shares.append)

    def compile_one():
        return lambda microbatch: ((mx.array(1.0),), [mx.array(1.0)])

    total = CpuStreams(2).sum_of(compile_one)
    for count in (1, 2, 3, 5):
        (found,) = total([collate([example(20 + 9 * n)]) for n in range(count)])
        assert found.item() == count
    assert shares == [1, 2, 2, 2]


def test_streams_take_turns_and_nothing_is_kept():
    results = [["a1", "a2", "a3"], ["b1"], ["c1", "c2"]]
    taken = in_turn(results)
    assert [next(taken), next(taken), next(taken)] == ["a1", "b1", "c1"]
    assert results == [["a3", "a2"], [], ["c2"]]
    assert list(taken) == ["a2", "c2", "a3"]
    assert results == [[], [], []]


def test_stream_has_work_while_the_next_one_s_microbatch_is_traced(monkeypatch):
    done = []
    monkeypatch.setattr(mx, "async_eval", lambda array: done.append(f"start {array.item():.0f}"))
    monkeypatch.setattr(backend, "share_cores", lambda num_streams: None)

    def compile_one():
        def compute(microbatch: Microbatch):
            number = microbatch.inputs.shape[1]
            done.append(f"trace {number}")
            return (mx.array(number + 2.0),), [mx.array(number + 0.0), mx.array(number + 1.0)]

        return compute

    total = CpuStreams(2).sum_of(compile_one)
    (found,) = total([collate([example(30)]), collate([example(60)])])
    assert done == [
        "trace 64",
        "start 64",
        "trace 32",
        "start 32",
        "start 65",
        "start 33",
        "start 66",
        "start 34",
    ]
    assert found.item() == 66 + 34


def test_each_thread_has_streams_of_its_own():
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(cpu_streams._own_streams, 2).result()
    ours = cpu_streams._own_streams(2)
    assert cpu_streams._own_streams(1) == ours[:1]
    assert not any(stream == other for stream in ours for other in theirs)
