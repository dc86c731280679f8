"""The yardstick: it runs, all contenders do the same work, and one that does not is refused."""

import json
import math

import numpy as np
import peers
import peers_report
import pytest
import random_base
from contender import Contender, Result
from transformers import AutoConfig, FalconForCausalLM

from interviewmate_mlx.base.base import Base
from interviewmate_mlx.data.batches import epoch_steps
from interviewmate_mlx.formats.safetensors_file import read_safetensors_header

PRODUCTS = ("qkv", "dense", "up", "down", "head")


def result(losses, dtype="float32", seconds=1.0) -> Result:
    return Result(
        losses=list(losses),
        seconds=seconds,
        padded_tokens=256,
        head_tokens=128,
        peak_process_bytes=10**9,
        peak_device_bytes=None,
        products={name + end: 1e-3 for name in PRODUCTS for end in ("", "'")},
        dtype=dtype,
        device="cpu",
        versions={},
    )


@pytest.mark.usefixtures("with_torch")
def test_contenders_do_the_same_work(tiny_base, questions, capsys, tmp_path):
    # 4 is what 5 is, in float32.
    words = ["--model", str(tiny_base), "--data", str(questions), "--only", "1,2,3,5"]
    small = ["--rounds", "1", "--updates", "1", "--device", "cpu", "--threads", "1"]
    written = tmp_path / "results.md"

    code = peers.main([*words, *small, "--write", str(written)])

    out, err = capsys.readouterr()
    assert code == 0, err
    *table, last = out.splitlines()
    assert written.read_text() == "\n" + "\n".join(table[:-1]) + "\n"
    facts = json.loads(last)
    assert list(facts["contenders"]) == ["1", "2", "3", "5"]
    losses = np.array([of["losses"] for of in facts["contenders"].values()])
    assert losses.shape == (4, 2)  # the warm-up's row again, after one update
    np.testing.assert_allclose(losses[:3] - losses[:1], 0, atol=1e-4)
    np.testing.assert_allclose(losses[3] - losses[0], 0, atol=3e-2)
    assert (losses[:, 1] < losses[:, 0]).all()
    for of in facts["contenders"].values():
        assert of["tokens_per_s"] == pytest.approx(of["samples_per_s"] * facts["tokens"] / 4)
        assert 0 < of["products_needed_share"] <= of["products_as_run_share"]
        assert of["padded_tokens"] >= facts["tokens"] - 4  # a last token is never an input
        assert of["peak_bytes"] > 10**8
    seed = facts["contenders"]["3"]
    assert seed["padded_tokens"] == 4 * 256


@pytest.mark.parametrize(
    ("losses", "dtype", "agrees"),
    [
        ([3.0004, 2.0], "float32", True),
        ([3.002, 2.0], "float32", False),
        ([3.002, 2.1], "bfloat16", True),
        ([3.02, 2.0], "bfloat16", False),
        ([3.0, 2.02], "float32", False),
        ([3.0, 3.0], "bfloat16", False),  # learns nothing
        ([3.0, math.nan], "float32", False),
    ],
)
def test_a_wrong_loss_is_refused_and_shown(
    losses, dtype, agrees, tiny_base, questions, monkeypatch, capsys
):
    def answer(job, script):
        return result(losses, dtype) if "tuned" in job.name else result([3.0, 2.0])

    monkeypatch.setattr(peers, "run_contender", answer)
    words = ["--model", str(tiny_base), "--data", str(questions), "--rounds", "1", "--updates", "1"]

    code = peers.main([*words, "--only", "1,3,4"])

    out, err = capsys.readouterr()
    assert code == (0 if agrees else 1)
    assert bool(out) == agrees
    if not agrees:
        assert "update 1: off by" in err or "update 2: off by" in err
        assert f"{losses[0]:.5f}" in err


def test_a_contender_that_fails_is_named(tiny_base, questions, monkeypatch, capsys, tmp_path):
    (tmp_path / "broken.py").write_text("raise SystemExit('no such thing here')")
    monkeypatch.setattr(peers, "HERE", tmp_path)
    monkeypatch.setitem(peers.CONTENDERS, 4, Contender("PEFT broken", "broken.py", "float32"))

    assert peers.main(["--model", str(tiny_base), "--data", str(questions), "--only", "4"]) == 1

    assert "PEFT broken ended with 1:\nno such thing here" in capsys.readouterr().err


def test_speeds_are_medians_and_ratios_of_the_same_round():
    # In the second round everything took twice as long, so no ratio changes.
    rounds = [
        {1: result([1.0], seconds=2 * slow), 4: result([1.0], seconds=6 * slow)}
        for slow in (1, 2, 1)
    ]
    shape = {"C": 8, "F": 32, "V": 100, "layers": 3}

    ours = peers_report.speeds(1, rounds, rows=4, tokens=200, predicted=100, shape=shape)
    theirs = peers_report.speeds(4, rounds, rows=4, tokens=200, predicted=100, shape=shape)

    assert (ours["samples_per_s"], ours["samples_per_s_range"]) == (2.0, [1.0, 2.0])
    assert theirs["ours_is_faster_by"] == 3.0
    # Four products a layer, forward and backward, but for the first layer's last one; the head.
    needed = (200 - 4) * (3 * 8 - 1) * 1e-3 + 100 * 2e-3
    assert ours["products_needed_share"] == pytest.approx(needed / 2)


def test_chosen_updates_are_whole_and_as_long_as_the_split_s(tiny_base):
    run = peers.load_run("A", ["lora.dropout=0", "data.max_length=2048"])
    tokenizer = Base.open(tiny_base).tokenizer
    records = peers.load_splits(peers.fetch_data("interview"))["train"]
    examples, _ = peers.encode_records(tokenizer, records, 2048, "answer")
    lengths = [len(example) for example in examples]

    steps, first = peers.choose_steps(run, tiny_base, 3)

    order = epoch_steps(lengths, 4, run.train.seed, epoch=0)
    expected = [
        [examples[row].tokens.tolist() for row in step] for step in order[first : first + 3]
    ]
    assert [[row.tokens for row in rows] for rows in steps] == expected
    mean = np.mean([len(row.tokens) for rows in steps for row in rows])
    assert mean == pytest.approx(np.mean(lengths), rel=0.03)
    for rows, step in zip(steps, order[first : first + 3], strict=True):
        for row, number in zip(rows, step, strict=True):
            assert examples[number].loss_mask.tolist() == [
                index >= row.num_prompt for index in range(len(row.tokens))
            ]


def test_random_base_is_the_hub_s_shape_and_the_same_each_time(monkeypatch, tmp_path, questions):
    small = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    monkeypatch.setattr(random_base, "CONFIG", random_base.CONFIG | small | {"vocab_size": 5120})
    monkeypatch.setattr(random_base, "NUM_TOKENS", 5000)

    folder = random_base.random_base(tmp_path / "cache", None, None)

    config = AutoConfig.from_pretrained(folder)
    model = FalconForCausalLM(config)
    header = read_safetensors_header(folder / "model.safetensors")
    names = {name for name in model.state_dict() if name != "lm_head.weight"}
    assert {name: entry.shape for name, entry in header.tensors.items()} == {
        name: tuple(model.state_dict()[name].shape) for name in names
    }
    assert len(Base.open(folder).tokenizer.get_vocab()) == 5000
    written = (folder / "model.safetensors").read_bytes()
    again = tmp_path / "again.safetensors"
    random_base.write_weights(again, random_base.CONFIG)
    assert again.read_bytes() == written

    # Another source of the tokenizer changes that alone.
    text = tmp_path / "text.txt"
    text.write_text("zyzzyva zyzzyva\n" * 50)
    changed = (folder / "model.safetensors").stat().st_mtime_ns
    random_base.random_base(tmp_path / "cache", None, text)
    assert "zyzzyva" in (folder / "tokenizer.json").read_text()
    assert (folder / "model.safetensors").stat().st_mtime_ns == changed
