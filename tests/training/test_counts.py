"""What a step costs on the path of a GPU, counted on its graph and at its peak: bfloat16 on a CPU.

Counts hold on every machine, times on none.
"""

import gc
import re
from collections import Counter
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from interviewmate_mlx import backend
from interviewmate_mlx.config import load_run
from interviewmate_mlx.data.batches import Microbatch
from interviewmate_mlx.model import falcon, gpu_kernels
from interviewmate_mlx.model.falcon import Model, ModelArgs
from interviewmate_mlx.model.lora import add_lora, working_copies
from interviewmate_mlx.model.tree import named_arrays
from interviewmate_mlx.training.loop import run_steps
from interviewmate_mlx.training.loss import token_loss
from interviewmate_mlx.training.optimizer import adamw
from interviewmate_mlx.training.step import Step, _compile_gradients
from interviewmate_mlx.training.task import choose_kernels, prepare

HIDDEN, VOCAB = 256, 384


@pytest.fixture(autouse=True)
def _path_of_a_gpu(monkeypatch):
    if backend.machine().device != "cpu":
        pytest.skip("the graph of MLX's CPU backend is counted")
    monkeypatch.setenv("INTERVIEWMATE_PATH", "gpu")


def trained_model(layers: int, hidden: int = HIDDEN) -> Model:
    """As Run A has it, but for its size."""
    config = {"model_type": "falcon", "alibi": True, "bias": True, "multi_query": False}
    config |= {"parallel_attn": False, "new_decoder_architecture": False, "vocab_size": VOCAB}
    config |= {"hidden_size": hidden, "num_attention_heads": hidden // 64}
    model = Model(ModelArgs.from_dict(config | {"num_hidden_layers": layers}))
    model.set_dtype(mx.bfloat16)
    add_lora(model, ["query_key_value"], 8, 16, 0.05)
    choose_kernels(model, mx.bfloat16)
    mx.eval(model.train().state)
    return model


def gradients(model: Model, rows: int, length: int) -> tuple[mx.array, ...]:
    """The loss of some rows, and all gradients: compiled, not computed."""
    working = working_copies(model)
    mx.eval(working)
    compute = _compile_gradients(model, token_loss, lambda: working)
    targets, is_predicted = mx.zeros(8, mx.int32), mx.ones(8, mx.bool_)
    inputs, row_ids = mx.zeros((rows, length), mx.int32), np.arange(rows, dtype=np.uint32)
    batch = Microbatch(inputs, mx.arange(8), targets, is_predicted, row_ids)
    (loss, *_, slopes), _ = compute(batch)
    return loss, *(array for _, array in tree_flatten(slopes))


def operations(layers: int, folder: Path) -> Counter[str]:
    """What MLX computes for a step of a model, by name; what it fused is one."""
    mx.export_to_dot(str(folder / "graph.dot"), *gradients(trained_model(layers), 2, 16))
    text = (folder / "graph.dot").read_text()
    return Counter(re.findall(r'label ?= ?"([^"]*)", ?shape', text))


def of_a_layer(folder: Path) -> Counter[str]:
    """The operations of one of the layers in the middle."""
    return operations(4, folder) - operations(3, folder)


# Products, and what MLX does without a kernel, or together with the product that follows.
NOT_COUNTED = {"Matmul", "AddMM", "Broadcast", "ExpandDims", "Flatten", "Reshape", "Squeeze"}
NOT_COUNTED |= {"Transpose", "Unflatten"}
NOT_COUNTED |= {"CustomTransforms", "Depends", "Split", "Slice"}


def test_gelu_is_a_kernel_forward_and_one_backward(tmp_path):
    erf = {name: n for name, n in of_a_layer(tmp_path).items() if "Erf" in name}
    assert sorted(erf.values()) == [1, 1]
    # From bfloat16 to bfloat16: nothing float32 is written between.
    assert all(name.startswith("CompiledAsType") and name.endswith("AsType") for name in erf)


def test_kernels_of_a_layer(tmp_path, monkeypatch):
    """All but products, norms and attention, which have kernels of their own on a GPU."""

    matrix = mx.zeros((HIDDEN, HIDDEN), mx.bfloat16)
    mx.eval(matrix)

    @mx.custom_function
    def norm(x, weight):
        return x

    @norm.vjp
    def _(primals, cotangent, _):
        x, weight = primals
        # A product stands for the norm's own kernel, with which nothing is fused.
        return (cotangent * weight).astype(x.dtype) @ matrix, mx.zeros_like(weight)

    def attend(queries, keys, values, **_):
        return queries @ (keys.swapaxes(-1, -2) @ values)

    def gelu(x):
        wide = x.astype(mx.float32)
        return (0.5 * wide * (1 + mx.erf(wide * 0.5**0.5))).astype(x.dtype)

    def kernels() -> int:
        return sum(n for name, n in of_a_layer(tmp_path).items() if name not in NOT_COUNTED)

    monkeypatch.setattr(
        gpu_kernels._FrozenLayerNorm, "__call__", lambda self, x: norm(x, self.weight)
    )
    monkeypatch.setattr(gpu_kernels, "attention", attend)
    ours = kernels()
    monkeypatch.setattr(falcon, "exact_gelu", gelu)
    naive = kernels()
    monkeypatch.setattr(falcon, "exact_gelu", lambda x: x)
    without = kernels()
    assert ours - without == 2
    assert naive - without >= 2 * (ours - without)
    # Two for dropout (the backward one also has the first norm's weight), two for GELU, four sums,
    # one for the second norm's weight, and one that joins queries', keys' and values'.
    assert ours <= 10


def peak_bytes(layers: int, rows: int, length: int) -> int:
    """The most that a step of a model takes beside its weights."""
    model = trained_model(layers)
    mx.eval(model.state)
    gc.collect()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(gradients(model, rows, length))
    return mx.get_peak_memory() - before


def test_a_layer_keeps_32_bytes_a_token_and_channel_at_the_most():
    rows, length = 16, 64
    more = peak_bytes(6, rows, length) - peak_bytes(2, rows, length)
    assert 0 < more / 4 / (rows * length) / HIDDEN <= 32


def test_no_weight_is_copied_or_widened():
    """A float32 copy of the largest would take two thirds of what all of a layer's take."""
    model = trained_model(2, hidden=1024)
    weights = sum(array.nbytes for array in named_arrays(model.parameters()).values())
    mx.eval(model.state)
    gc.collect()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(gradients(model, 1, 8))
    assert mx.get_peak_memory() - before < 0.2 * weights


class Number:
    """An array whose reading is noted."""

    def __init__(self, array: mx.array, name: str, said: list[str]) -> None:
        self._array, self._name, self._said = array, name, said

    def item(self):
        self._said.append(self._name)
        return self._array.item()


def test_host_waits_for_nothing_but_the_numbers_of_the_step_before(
    tiny_base, questions, monkeypatch
):
    said: list[str] = []

    class Watched(Step):
        def update(self, learning_rate, *across):
            numbers = super().update(learning_rate, *across)
            said.append(f"dispatch {self.num_updates}")
            name = f"read {self.num_updates}"
            return numbers | {"loss": Number(numbers["loss"], name, said)}

    settings = [f"model.base={tiny_base}", f"data.path={questions}", "train.epochs=4"]
    task = prepare(load_run("A", settings))
    step = Watched(task.model, adamw(), 1.0, task.executor)
    for name in ("eval", "synchronize"):
        monkeypatch.setattr(mx, name, lambda *_, name=name: said.append(name))
    events = list(run_steps(task, step, 0, 10, lambda: False))
    assert [event.step for event in events] == list(range(1, 11))
    expected = ["dispatch 1"]
    for number in range(2, 11):
        expected += [f"dispatch {number}", f"read {number - 1}"]
    assert said == [*expected, "read 10"]
