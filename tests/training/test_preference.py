"""Losses over preferences against TRL's, and that splits and padding never matter."""

import copy
import warnings
from dataclasses import replace

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
import torch
from checkpoints import our_model, tiny_falcon
from peft import LoraConfig, get_peft_model
from peft_training import our_name, start_alike

from interviewmate_mlx.adapter.folder import adapter_weights
from interviewmate_mlx.data.batches import split_step
from interviewmate_mlx.data.pairs import Judged, Pair, collate_judged, collate_pairs, rotated
from interviewmate_mlx.data.prompts import Example
from interviewmate_mlx.data.records import Record
from interviewmate_mlx.model.lora import add_lora
from interviewmate_mlx.training import preference
from interviewmate_mlx.training.optimizer import adamw
from interviewmate_mlx.training.preference import (
    divergence_of,
    log_probabilities,
    objective_of,
)
from interviewmate_mlx.training.step import OneStream, Step

with warnings.catch_warnings(action="ignore"):  # TRL says what is experimental in it
    from trl_training import train_with_trl

STEPS, ROWS, PEAK, CLIP = 20, 4, 5e-3, 1.0
TARGETS = ["query_key_value", "dense_h_to_4h"]


def answers(rng, prompt, count):
    """A prompt with several answers of unequal length."""
    found = []
    for _ in range(count):
        tokens = np.concatenate([prompt, rng.integers(0, 384, rng.integers(3, 25))])
        mask = np.arange(len(tokens)) >= len(prompt)
        found.append(Example(Record("row"), tokens.astype(np.int32), mask))
    return found


def some_pairs(count, *, learns_all=False):
    rng = np.random.default_rng(5)
    pairs = []
    for _ in range(count):
        prompt = rng.integers(0, 384, rng.integers(2, 20))
        chosen, rejected = answers(rng, prompt, 2)
        learned = np.arange(len(chosen)) > 0 if learns_all else chosen.loss_mask
        pairs.append(Pair(chosen, rejected, learned))
    return pairs


def some_judged(count, group=ROWS):
    rng = np.random.default_rng(6)
    prompts = [rng.integers(0, 384, rng.integers(2, 20)).astype(np.int32) for _ in range(count)]
    examples = [answers(rng, prompt, 1)[0] for prompt in prompts]
    rows = []
    for number, place in enumerate(rotated(count, group)):
        answer = examples[place].tokens[examples[place].loss_mask]
        tokens = np.concatenate([prompts[number], answer])
        other = Example(Record("other"), tokens, np.arange(len(tokens)) >= len(prompts[number]))
        rows.append(Judged(examples[number], bool(rng.integers(0, 2)), other))
    return rows


def some_rows(method, count):
    if method == "kto":
        return some_judged(count)
    return some_pairs(count, learns_all=method == "orpo")


def tiny_model(base=None, start=None):
    """A tiny model whose LoRA already does something: the reference is that, and not the base."""
    model = our_model(base)
    mx.random.seed(3)
    add_lora(model, TARGETS, rank=4, alpha=8)
    weights = start or {
        name: 0.3 * mx.random.normal(array.shape) for name, array in adapter_weights(model).items()
    }
    model.load_weights(list(weights.items()), strict=False)
    return model


def with_references(model, rows):
    compared = [answer for row in rows for answer in row.compared]
    found = log_probabilities(model, compared, OneStream(), 256).reshape(-1, 2)
    return [row.with_references(values) for row, values in zip(rows, found.tolist(), strict=True)]


def objective(model, method, beta=0.1, smoothing=0.0, normalized=False, margin=0.5):
    divergence = divergence_of(model, OneStream(), 128)
    return objective_of(method, beta, smoothing, normalized, margin, divergence)


def train(model, rows, chosen, optimizer, budget=256, rate=PEAK):
    """The losses of one update for each four rows."""
    step = Step(model.train(), optimizer, CLIP, loss=chosen.loss)
    losses = []
    for number in range(len(rows) // ROWS):
        of_step = rows[number * ROWS : (number + 1) * ROWS]
        groups = split_step(of_step, budget)
        model.train()
        step.accumulate(chosen.collate(groups, of_step), [0, number])
        losses.append(step.update(rate)["loss"].item())
    return losses


CASES = [
    ("dpo", {}, "dpo", {"loss_type": "sigmoid"}),
    ("dpo", {"normalized": True}, "dpo", {"loss_type": "sigmoid_norm"}),
    ("ipo", {}, "dpo", {"loss_type": "ipo"}),
    ("orpo", {}, "orpo", {}),
    ("simpo", {"beta": 2.0}, "cpo", {"loss_type": "simpo", "simpo_gamma": 0.5, "cpo_alpha": 0.0}),
    (
        "simpo",
        {"beta": 2.0, "smoothing": 0.2, "margin": 1.0},
        "cpo",
        {"loss_type": "simpo", "simpo_gamma": 1.0, "cpo_alpha": 0.0, "label_smoothing": 0.2},
    ),
    ("kto", {}, "kto", {}),
]


@pytest.mark.parametrize(
    ("method", "ours", "kind", "theirs"),
    CASES,
    ids=["dpo", "dpo_mean", "ipo", "orpo", "simpo", "simpo_smoothed", "kto"],
)
@pytest.mark.filterwarnings("ignore")
def test_twenty_updates_equal_trl_s(method, ours, kind, theirs, tmp_path):
    base = tiny_falcon(6, 8, layers=2)
    model = tiny_model(base)
    start = {name: np.array(array) for name, array in adapter_weights(model).items()}
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")
    reference = get_peft_model(copy.deepcopy(base), lora)
    start_alike(reference, start)

    # The same rows again and again: the model leaves its reference.
    rows = some_rows(method, 2 * ROWS) * (STEPS // 2)
    steps = [rows[i : i + ROWS] for i in range(0, len(rows), ROWS)]
    beta = {"beta": ours.get("beta", 0.1)}
    expected = train_with_trl(kind, reference, steps, tmp_path, PEAK, CLIP, **beta, **theirs)

    rows = with_references(model, rows)
    losses = train(model, rows, objective(model, method, **ours), adamw(), budget=64)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert losses[-1] < losses[1] - 0.02  # and something was learned
    trained = {n: p for n, p in reference.named_parameters() if p.requires_grad}
    ours_now = adapter_weights(model)
    for name, parameter in trained.items():
        matrix = parameter.detach().numpy()
        np.testing.assert_allclose(np.array(ours_now[our_name(name)]), matrix, atol=1e-3)


METHODS = ["dpo", "ipo", "orpo", "simpo", "kto"]
# SGD is as exact as the gradients, whose norm is clipped to 1; two updates add them up 1 + 1.9
# times, at a rate of 1e-2. A log-probability of 150 nats is known to 150 * 2**-24 * 5 = 4.5e-5,
# and a tenth of that (beta) is the error of a row's share in the gradient. The rows' gradients
# point in opposite directions: what is left of them may be 20 times smaller than they are.
ALLOWED = 20 * 0.1 * 4.5e-5 * 2.9 * 1e-2


def two_updates(method, groups, width=None):
    model = tiny_model()
    rows = with_references(model, some_rows(method, ROWS))
    for array in adapter_weights(model).values():  # the model leaves its reference
        array *= 1.1
    chosen = objective(model, method)
    step = Step(model.train(), optim.SGD(0.0, momentum=0.9), 1.0, loss=chosen.loss)
    for number in range(2):
        dealt = [[rows[i] for i in group] for group in groups]
        batches = chosen.collate(dealt, rows)
        if width:
            batches = [
                wider(group, batch, width) for group, batch in zip(dealt, batches, strict=True)
            ]
        model.train()
        step.accumulate(batches, [0, number])
        numbers = step.update(1e-2)
    mx.eval(numbers, model.parameters())
    return adapter_weights(model), numbers


def wider(rows, batch, width):
    """The same rows, padded to another width."""
    if isinstance(rows[0], Judged):
        return collate_judged(rows, batch.of_rows["divergence"], width)
    return collate_pairs(rows, batch.of_rows["tokens_per_pair"].item(), width)


def assert_same(got, expected):
    weights, numbers = got
    for name, array in expected[0].items():
        error = np.abs(np.array(weights[name]) - np.array(array)).max()
        assert error <= ALLOWED + 2 * 2**-24 * np.abs(np.array(array)).max(), name
    assert numbers["loss"].item() == pytest.approx(expected[1]["loss"].item(), rel=1e-5)
    for name, (total, count) in expected[1]["measures"].items():
        mine = numbers["measures"][name]
        assert mine[1].item() == count.item()
        assert mine[0].item() == pytest.approx(total.item(), rel=1e-4, abs=1e-4), name


@pytest.mark.parametrize("method", METHODS)
def test_neither_splits_nor_padding_change_an_update(method):
    expected = two_updates(method, [[0, 1, 2, 3]])
    for groups in ([[0], [1], [2], [3]], [[3, 0], [1, 2]]):
        assert_same(two_updates(method, groups), expected)
    assert_same(two_updates(method, [[0, 1, 2, 3]], width=80), expected)


def test_label_smoothing_is_the_mean_of_both_orders():
    """The loss of DPO with smoothing 0.2: 0.8 times as labelled, 0.2 times the wrong way round."""
    model = tiny_model().eval()
    rows = with_references(tiny_model().eval(), some_pairs(ROWS))
    for array in adapter_weights(model).values():
        array *= 1.1
    turned = [Pair(p.rejected, p.chosen, p.rejected.loss_mask) for p in rows]

    def loss(rows, smoothing):
        chosen = objective(model, "dpo", smoothing=smoothing)
        total, count, _ = preference.total_of(model, chosen.loss)(chosen.collate([rows], rows))
        return total.item() / count.item()

    expected = 0.8 * loss(rows, 0.0) + 0.2 * loss(turned, 0.0)
    assert loss(rows, 0.0) != pytest.approx(expected, rel=1e-3)
    assert loss(rows, 0.2) == pytest.approx(expected, rel=1e-5)


def test_log_probabilities_are_torch_s():
    base = tiny_falcon(6, 8, layers=2)
    model, pairs = our_model(base), some_pairs(6)
    rows = [side for pair in pairs for side in pair.sides]
    rows.append(rows[0])  # once more
    found = log_probabilities(model, rows, OneStream(), 64)
    for row, got in zip(rows, found, strict=True):
        ids = torch.tensor(row.tokens[None].astype(np.int64))
        with torch.no_grad():
            logps = torch.log_softmax(base(input_ids=ids).logits[0, :-1], -1)
        expected = logps.gather(1, ids[0, 1:, None])[:, 0][torch.tensor(row.loss_mask[1:])].sum()
        assert got == pytest.approx(expected.item(), abs=1e-3)


@pytest.mark.parametrize(("count", "group"), [(8, 4), (7, 3), (5, 8), (9, 4)])
def test_each_row_of_kto_takes_the_answer_of_the_one_before_it_in_its_group(count, group):
    places = rotated(count, group)
    assert sorted(places) == list(range(count))
    assert all(place != number for number, place in enumerate(places))
    assert places[:group] == [min(group, count) - 1, *range(min(group, count) - 1)] or count == 5


def test_divergence_is_the_mean_rise_of_other_answers_and_never_below_0():
    model = tiny_model()
    rows = with_references(model, some_judged(ROWS))
    divergence = divergence_of(model, OneStream(), 64)
    assert divergence(rows).item() == pytest.approx(0, abs=1e-4)
    sunk = [
        replace(row, other=replace(row.other, reference=row.other.reference - 3)) for row in rows
    ]
    assert divergence(sunk).item() == pytest.approx(3, abs=1e-4)
    risen = [replace(row, other=replace(row.other, reference=0.0)) for row in rows]
    assert divergence(risen).item() == 0


def test_odds_of_sure_and_of_hopeless_answers_are_exact():
    values = np.array([-1e-6, -0.1, -0.693, -0.7, -5.0, -80.0])
    got = np.array(preference._log_of_the_rest(mx.array(values)))
    np.testing.assert_allclose(got, np.log(-np.expm1(values)), rtol=2e-6, atol=1e-30)
