"""Dropout does not see how a step is split, whatever has a LoRA and in whatever dtype."""

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import our_model, tiny_falcon

from interviewmate_mlx.data.batches import collate
from interviewmate_mlx.data.prompts import Example
from interviewmate_mlx.data.records import Record
from interviewmate_mlx.model.dora import place_dora, start_magnitudes
from interviewmate_mlx.model.lora import add_lora, lora_layers, working_copies
from interviewmate_mlx.model.recompute import use_gradient_checkpointing
from interviewmate_mlx.model.tree import named_arrays
from interviewmate_mlx.training.optimizer import adamw
from interviewmate_mlx.training.step import Step, total_loss

KINDS = ["plain", "head", "dora", "bfloat16", "checkpointing"]


def rows_of_unequal_length() -> list[Example]:
    rng = np.random.default_rng(0)
    return [
        Example(Record("row"), rng.integers(0, 384, n).astype(np.int32), np.arange(n) >= prompt)
        for n, prompt in ((50, 40), (9, 2), (70, 5), (20, 19))
    ]


def model_of(kind: str, dropout: float = 0.3):
    model = our_model(tiny_falcon(tie_word_embeddings=False))
    mx.random.seed(0)
    if kind == "bfloat16":
        model.set_dtype(mx.bfloat16)
    targets = ["query_key_value", "dense_4h_to_h", *(["lm_head"] if kind == "head" else [])]
    add_lora(model, targets, rank=4, alpha=8, dropout=dropout)
    for _, layer in lora_layers(model):
        layer.lora_B.weight = 0.1 * mx.random.normal(layer.lora_B.weight.shape)
    if kind == "dora":
        place_dora(model)
        start_magnitudes(model)
    if kind == "checkpointing":
        use_gradient_checkpointing(model)
    return model.train()


def gradients(kind: str, groups: list[list[int]]) -> dict[str, np.ndarray]:
    rows, step = rows_of_unequal_length(), Step(model_of(kind), adamw())
    step.accumulate([collate([rows[i] for i in group]) for group in groups], [5, 7])
    return {path: np.array(array) for path, array in named_arrays(step.sums[-1]).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_one_microbatch(kind):
    expected = gradients(kind, [[0, 1, 2, 3]])
    for groups in ([[0], [1], [2], [3]], [[3, 0, 2], [1]]):
        for path, array in gradients(kind, groups).items():
            assert array.dtype == np.float32
            error = np.linalg.norm(array - expected[path]) / np.linalg.norm(expected[path])
            # Roundings; another mask at p = 0.3 gives half of the norm and more.
            assert error < (0.03 if kind == "bfloat16" else 1e-5), path


@pytest.mark.parametrize("kind", KINDS)
def test_loss_before_the_step_is_that_of_validation(kind):
    """The rounding of LoRA's matrices included: else a preference's reference would be another."""
    model, batch = model_of(kind, dropout=0.0), collate(rows_of_unequal_length())
    loss_sum, num_tokens = total_loss(model.eval())([batch])
    step = Step(model.train(), adamw())
    step.accumulate([batch], [0, 0])
    assert step.update(1e-3)["loss"].item() == pytest.approx(loss_sum / num_tokens, rel=1e-6)


def test_copies_follow_the_matrices():
    model, batch = model_of("bfloat16", dropout=0.0), collate(rows_of_unequal_length())
    assert working_copies(model_of("plain")) == working_copies(model_of("dora")) == {}
    step, losses = Step(model, adamw()), []
    for number in range(20):
        step.accumulate([batch], [0, number])
        losses.append(step.update(1e-2)["loss"].item())
    assert losses[-1] < losses[0] - 0.5
    trained = named_arrays(model.trainable_parameters())
    assert {array.dtype for array in trained.values()} == {mx.float32}
