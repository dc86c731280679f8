"""What `doctor` computes on this machine and compares with what transformers, torch and PEFT gave.

Their numbers lie in `doctor/`, with the ids and rows that they belong to. They were made once, in
float32 on a CPU, by `scripts/make_doctor.py`. Weights are not stored: both sides draw them from
numpy's PCG64. They have at most eight significant bits, so they are the same in float32, float16
and bfloat16, and an error is one of the arithmetic alone.

A check is a function of a dtype that returns a `Finding`; `CHECKS` names them all. What is allowed
is derived where it is computed, from the unit roundoff of the dtype: 2**-24, 2**-11 or 2**-8.
"""

import itertools
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step, stream_generate
from mlx_lm.models.cache import BatchKVCache

from interviewmate_mlx import backend
from interviewmate_mlx.adapter.folder import WEIGHTS_FILE, Adapter, adapter_weights, save_adapter
from interviewmate_mlx.base.base import Base
from interviewmate_mlx.config import RunConfig
from interviewmate_mlx.data.batches import collate
from interviewmate_mlx.data.prompts import Example
from interviewmate_mlx.data.records import Record
from interviewmate_mlx.formats.safetensors_file import load_tensors
from interviewmate_mlx.model import falcon, lora
from interviewmate_mlx.model.dropout import Dropout, token_seeds, tokens_seeded
from interviewmate_mlx.model.tree import named_arrays
from interviewmate_mlx.training.events import Started
from interviewmate_mlx.training.loop import train
from interviewmate_mlx.training.optimizer import adamw, learning_rate_at
from interviewmate_mlx.training.step import Step
from interviewmate_mlx.training.task import choose_executor, choose_kernels

FOLDER = Path(__file__).parents[1] / "doctor"
_UNIT_ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
_CONTRACT = 1e-4  # in float32, of logits and, relatively, of losses
_TF32_BITS = 11  # of a significand; float32 has 24
_WIDE, _ODD = "four_heads", "three_heads"  # three is not a power of two: ALiBi's other case
# Few tokens a microbatch, so that a step has several on every machine.
_TOKEN_BUDGET = 64


class Finding(NamedTuple):
    """What a check found: the error, the largest that the arithmetic explains, and where it is."""

    error: float
    allowed: float
    detail: str = ""


# Reference values.


@cache
def reference() -> dict[str, np.ndarray]:
    """The stored arrays by name, float32 or int32. `make_doctor.py` says what each is."""
    loaded = load_tensors(FOLDER / "reference.safetensors")
    return {name: np.array(array) for name, array in loaded.items()}


@cache
def settings() -> dict[str, Any]:
    """The networks' configurations, and the settings of the training run and the optimizer."""
    content: dict[str, Any] = json.loads((FOLDER / "settings.json").read_text(encoding="utf-8"))
    return content


def integers(seed: int, number: int, shape: tuple[int, ...]) -> np.ndarray:
    """Whole numbers from -128 to 127, the same in every version of numpy: (shape) float32."""
    raw = np.random.PCG64([seed, number]).random_raw(math.prod(shape))
    return ((raw >> np.uint64(56)).astype(np.float32) - 128).reshape(shape)


def draw_weights(seed: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Weights of a Falcon-RW, in sizes that give activations of about 1: float32 by name."""
    weights = {}
    for number, name in enumerate(sorted(shapes)):
        drawn = integers(seed, number, shapes[name])
        if name.endswith(("layernorm.weight", "ln_f.weight")):
            weights[name] = 1 + np.floor(drawn / 8) * 2.0**-7
        else:  # what a block adds is large beside the embedding, or a text would repeat one token
            is_large = name.endswith(("embeddings.weight", ".dense.weight", "dense_4h_to_h.weight"))
            weights[name] = drawn * 2.0 ** (-9 if is_large else -10)
    return {name: array.astype(np.float32) for name, array in weights.items()}


def draw_lora(seed: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """LoRA matrices that change a model visibly: float32 by name."""
    return {
        name: integers(seed, number, shapes[name]) * 2.0 ** (-11 if "lora_A" in name else -9)
        for number, name in enumerate(sorted(shapes))
    }


def build_network(name: str, dtype: str) -> falcon.Model:
    """One of the networks in eval mode, its weights drawn."""
    config = settings()["networks"][name]
    model = falcon.Model(falcon.ModelArgs.from_dict(config))
    shapes = {path: array.shape for path, array in named_arrays(model.parameters()).items()}
    drawn = draw_weights(config["seed"], shapes)
    model.load_weights([(path, mx.array(array)) for path, array in drawn.items()])
    model.set_dtype(backend.resolve_dtype(dtype))
    model.eval()
    return model


def as_trained(model: Any, dtype: str) -> Any:
    """A network with the kernels that training takes here, in place."""
    choose_kernels(model, backend.resolve_dtype(dtype))
    return model


def in_float32(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32))


# What rounding explains.


def significant_bits() -> int:
    """How many bits of a float32 matrix product's numbers count on this device, up to 24.

    Found by products with the identity matrix, which must give back what can be represented.
    """
    identity = mx.eye(256)
    for bits in (24, _TF32_BITS, 8):
        x = 1 + 2.0 ** (1 - bits)
        if ((mx.full((256, 256), x) @ identity) == x).all().item():
            return bits
    return 0


def unit_roundoff(dtype: str) -> float:
    """The largest relative error of one rounding in a network of this dtype."""
    # float32 products are TF32 on some GPUs.
    return 2.0 ** -significant_bits() if dtype == "float32" else _UNIT_ROUNDOFF[dtype]


def allowed_error(dtype: str, model: falcon.Model, logits: np.ndarray) -> float:
    """The largest error of logits that rounding explains.

    In float32 it is 1e-4, this package's contract with transformers. Otherwise it is 5 standard
    deviations: what the largest of some thousand normal numbers stays below.
    """
    if unit_roundoff(dtype) == _UNIT_ROUNDOFF["float32"]:
        return _CONTRACT
    return 5 * deviation(dtype, model, logits)


def deviation(dtype: str, model: falcon.Model, logits: np.ndarray) -> float:
    """The standard deviation of the errors of logits.

    A block rounds what it adds to the residual stream ten times (two norms, qkv, scores, their
    softmax, attention, dense, two layers and GELU of the MLP), and its sums twice. With the
    embedding, the last norm and the head there are n = 12 * layers + 3 roundings, and two more
    with each LoRA. Each is a relative error of at most u, spread evenly: u / sqrt(3) in the mean
    square. They are independent, so logits err by sqrt(n / 3) * u of their root mean square. One
    thing is larger: a softmax turns the absolute error of scores, which exceed 1, into a
    relative one. That takes a factor of 1.5.
    """
    roundings = 12 * len(model.layers) + 3 + 2 * len(list(lora.lora_layers(model)))
    root_mean_square = float(np.sqrt(np.mean(np.square(logits))))
    return 1.5 * math.sqrt(roundings / 3) * unit_roundoff(dtype) * root_mean_square


def compare_logits(dtype: str, model: falcon.Model, found: dict[str, Any]) -> Finding:
    """The largest difference of logits from the reference, over all of `found`.

    Args:
        dtype: of the weights.
        model: that gave the logits.
        found: (..., V) logits by the name of the reference's.
    """
    expected = {key: reference()[key] for key in found}
    errors = {
        key: float(np.abs(in_float32(logits) - expected[key]).max())
        for key, logits in found.items()
    }
    every = np.concatenate([logits.ravel() for logits in expected.values()])
    return largest(errors, allowed_error(dtype, model, every))


def largest(errors: dict[str, float], allowed: float) -> Finding:
    """The largest of several errors, by where each is. NaN is larger than all."""
    worst = max(errors, key=lambda place: (math.isnan(errors[place]), errors[place]))
    return Finding(errors[worst], allowed, worst)


# Parts.


def check_products(dtype: str) -> Finding:
    """Matrix products, against float64.

    A sum of K products errs by at most K roundings in float32, relative to the sum of their
    sizes, whatever its order. TF32 rounds both factors first; the result is rounded once.
    """
    size, bits = 256, significant_bits()
    if bits < _TF32_BITS:
        raise ArithmeticError(f"float32 products keep {bits} bits, expected 24, or 11 with TF32")
    kind = backend.resolve_dtype(dtype)
    a, b = (
        mx.array(integers(0, n, (size, size)) + integers(0, n + 2, (size, size)) * 2.0**-8) / 128
        for n in range(2)
    )
    a, b = a.astype(kind), b.astype(kind)
    wide_a, wide_b = (in_float32(x).astype(np.float64) for x in (a, b))
    difference = np.abs(in_float32(a @ b) - wide_a @ wide_b)
    error = float((difference / (np.abs(wide_a) @ np.abs(wide_b))).max())
    allowed = size * 2.0**-24 + _UNIT_ROUNDOFF[dtype]
    if dtype == "float32" and bits < 24:
        allowed += 2 * 2.0**-bits
    return Finding(error, allowed, f"float32 products keep {bits} bits")


def _check_activation(dtype: str, exact: Callable[[float], float], order: int) -> Finding:
    """GELU or its derivative, of the network that answers and of the one that is trained.

    The error is what is left after the rounding of the result. Allowed are 2e-6: for |x| <= 8,
    erf, exp and the sum with 1 err by a few units of 2**-24, times |x|.
    """
    x = np.arange(-8, 8, 1 / 16)  # exact in every dtype
    expected = np.array([exact(number) for number in x])
    inputs = mx.array(x).astype(backend.resolve_dtype(dtype))
    errors = []
    for model in (build_network(_ODD, dtype), as_trained(build_network(_ODD, dtype), dtype)):
        activation = model.layers[0].mlp.activation
        if order == 0:
            y = activation(inputs)
        else:
            _, (y,) = mx.vjp(activation, [inputs], [mx.ones_like(inputs)])
        rounding = _UNIT_ROUNDOFF[dtype] * np.abs(expected)
        errors.append(np.maximum(0, np.abs(in_float32(y) - expected) - rounding))
    worst = np.max(errors, axis=0)
    return Finding(float(worst.max()), 2e-6, f"at {x[worst.argmax()]:g}")


def check_gelu(dtype: str) -> Finding:
    """The exact GELU, x * Phi(x), against Python's erf in float64."""
    return _check_activation(dtype, lambda x: x * _cumulative(x), order=0)


def check_gelu_slope(dtype: str) -> Finding:
    """Its derivative, Phi(x) + x * phi(x)."""

    def slope(x: float) -> float:
        return _cumulative(x) + x * math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    return _check_activation(dtype, slope, order=1)


def _cumulative(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def check_alibi(dtype: str) -> Finding:
    """ALiBi's bias of far and near keys, for 3, 4 and 32 heads, against transformers' own.

    Relative to the bias, or to 1 where it is smaller; rounded once to the dtype.
    """
    positions = reference()["alibi/positions"]
    keys = mx.array(positions)[None]
    errors = {}
    for heads in settings()["alibi_heads"]:
        bias = reference()[f"alibi/{heads}"]  # (H, L), of the keys alone
        slopes, kind = falcon.alibi_slopes(heads), backend.resolve_dtype(dtype)
        mask = falcon.alibi_mask(slopes, keys, keys, 0.125, kind)
        expected = (bias[:, None, :] - bias[:, :, None]) * 0.125
        visible = positions[None, :] <= positions[:, None]
        difference = np.abs(in_float32(mask[0]) - expected) / np.maximum(1, np.abs(expected))
        errors[f"{heads} heads"] = float(np.where(visible, difference, 0).max())
    return largest(errors, _UNIT_ROUNDOFF[dtype])


def check_dropout_share(_: str) -> Finding:
    """The share of numbers that dropout keeps: within five standard deviations of n draws."""
    p = 0.05
    left = _left_by_dropout(p, backend.resolve_dtype("auto"))
    share = float(np.mean(left != 0))
    return Finding(abs(share - (1 - p)), 5 * math.sqrt(p * (1 - p) / left.size))


def check_dropout_scale(_: str) -> Finding:
    """What dropout multiplies them by: two roundings in float32, whatever the network's dtype."""
    kept = _left_by_dropout(0.05, mx.float32)
    error = float(np.abs(kept[kept != 0] * 0.95 - 1).max())
    return Finding(error, 2 * 2.0**-24 + 2.0**-24)


def _left_by_dropout(p: float, dtype: mx.Dtype) -> np.ndarray:
    """Dropout of ones in the device's default dtype, into another."""
    ones = mx.ones((16, 64, 1024), backend.resolve_dtype("auto"))
    with tokens_seeded(token_seeds(np.arange(16, dtype=np.uint32), 64, 0)):
        left = mx.compile(partial(Dropout(p).train(), dtype=dtype))(ones)
    return in_float32(left).astype(np.float64)


def check_optimizer(_: str) -> Finding:
    """Five steps of AdamW with weight decay, against torch's.

    A step rounds the parameter twice, and some sixteen numbers of the size of the learning rate.
    Larger is the error of the second moment's correction, 1 - 0.999**t: 0.999 and its power are
    rounded, two roundings of a number near 1, so the difference errs by 2 u / 0.001 of itself.
    The root halves that.
    """
    rate, decay = (settings()["optimizer"][key] for key in ("learning_rate", "weight_decay"))
    # As a matrix: vectors do not decay.
    parameters = {"x": mx.array(reference()["optimizer/start"])[None]}
    optimizer = adamw(decay)
    optimizer.init(parameters)
    after = []
    for gradient in reference()["optimizer/gradients"]:
        optimizer.state["learning_rate"] = mx.array(rate)
        parameters = optimizer.apply_gradients({"x": mx.array(gradient)[None]}, parameters)
        after.append(in_float32(parameters["x"][0]))
    expected = reference()["optimizer/after"]
    errors = np.abs(np.stack(after) - expected).max(axis=1)
    step = int(errors.argmax())
    size = float(np.abs(expected).max())
    allowed = len(after) * 2.0**-24 * (2 * size + 16 * rate + rate / 0.001)
    return Finding(float(errors[step]), allowed, f"after step {step + 1}")


# The network.


def check_mask(dtype: str) -> Finding:
    """The logits before a token must not change with it.

    Not by a bit: what a query may not see has a probability of 0, and adding 0 rounds nothing.
    """
    model = build_network(_WIDE, dtype)
    ids = reference()["greedy/ids"][:40].copy()
    before = in_float32(model(mx.array(ids)[None]))
    errors = {}
    for position in (1, 20, 39):
        changed = ids.copy()
        changed[position] = (changed[position] + 1) % model.args.vocab_size
        after = in_float32(model(mx.array(changed)[None]))
        errors[f"token {position}"] = float(np.abs(after - before)[:, :position].max())
    return largest(errors, 0.0)


def check_logits(dtype: str) -> Finding:
    """Logits at several lengths, against transformers'; four heads, as in generation."""
    return _check_logits(_WIDE, dtype, build_network(_WIDE, dtype))


def check_odd_logits(dtype: str) -> Finding:
    """The same with three heads, as in training."""
    return _check_logits(_ODD, dtype, as_trained(build_network(_ODD, dtype), dtype))


def _check_logits(network: str, dtype: str, model: falcon.Model) -> Finding:
    found = {}
    for length in settings()["lengths"]:
        key = f"{network}/{length}"
        logits = model(mx.array(reference()[f"{key}/ids"])[None])
        found[f"{key}/logits"] = logits[0, mx.array(reference()[f"{key}/positions"])]
    return compare_logits(dtype, model, found)


def check_greedy(dtype: str) -> Finding:
    """The likeliest token, step by step through mlx-lm's generation, against transformers' text.

    Where another token comes, one of two logits is wrong by at least half of their difference in
    the reference: that is the error. The text then goes on from the reference's.
    """
    model = build_network(_WIDE, dtype)
    ids, logits = reference()["greedy/ids"], reference()["greedy/logits"]
    expected, first, errors = ids[-len(logits) :], 0, {"the same text": 0.0}
    while first < len(expected):
        prompt, count = mx.array(ids[: -len(logits) + first]), len(expected) - first
        text = [token for token, _ in generate_step(prompt, model, max_tokens=count)]
        first += int(np.cumprod(np.array(text) == expected[first:]).sum())
        if first < len(expected):
            right, other = expected[first], text[first - len(expected)]
            errors[f"token {first + 1}"] = float(logits[first, right] - logits[first, other]) / 2
        first += 1
    return largest(errors, allowed_error(dtype, model, logits))


def check_right_padding(dtype: str) -> Finding:
    """A batch that is padded on the right, as in training, against each row alone."""
    model = as_trained(build_network(_ODD, dtype), dtype)
    rows, more = _padded_rows()
    width = max(map(len, rows))
    batch = model(mx.array(np.stack([np.pad(row, (0, width - len(row))) for row in rows])))
    found = {
        f"padded/{number}/logits": batch[number, len(row) - more - 1 : len(row)]
        for number, row in enumerate(rows)
    }
    return compare_logits(dtype, model, found)


def check_left_padding(dtype: str) -> Finding:
    """A batch that is padded on the left and goes on a token at a time, as in generation."""
    model = build_network(_ODD, dtype)
    rows, more = _padded_rows()
    width = max(map(len, rows))
    padding = [width - len(row) for row in rows]
    batch = mx.array(np.stack([np.pad(row, (width - len(row), 0)) for row in rows]))
    caches = [BatchKVCache(padding) for _ in model.layers]
    logits = [model(batch[:, : width - more], caches)[:, -1]]
    for position in range(width - more, width):
        logits.append(model(batch[:, position : position + 1], caches)[:, -1])
    together = mx.stack(logits, axis=1)
    found = {f"padded/{number}/logits": together[number] for number in range(len(rows))}
    return compare_logits(dtype, model, found)


def _padded_rows() -> tuple[list[np.ndarray], int]:
    """The rows of a batch, and how many of each one's tokens follow its prompt."""
    chosen = settings()["padded"]
    return [reference()[f"padded/{n}/ids"] for n in range(chosen["rows"])], chosen["more"]


def check_end_of_text(_: str) -> Finding:
    """An answer ends at the tokenizer's end token, and not at 2, which the Hub's config names."""
    base = Base.open("mini")
    tokenizer = base.tokenizer
    script = [2, 40, tokenizer.eos_token_id, 41]

    class Scripted:
        """In place of a network: says the script, without a cache."""

        layers: tuple[()] = ()
        told = itertools.chain(script, itertools.repeat(0))

        def make_cache(self) -> list[Any]:
            return []

        def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
            # All but the last token of a prompt go in together, and nothing is said then.
            token = next(self.told) if inputs.shape[1] == 1 else 0
            return (mx.arange(base.network.vocab_size) == token)[None, None].astype(mx.float32)

    scripted: Any = Scripted()
    pieces = stream_generate(scripted, tokenizer, [41, 40, 41], max_tokens=len(script))
    text, expected = "".join(piece.text for piece in pieces), tokenizer.decode(script[:2])
    return Finding(float(text != expected), 0.0, repr(text))


# Training and adapters.


def check_adapter_read(dtype: str) -> Finding:
    """Logits with an adapter that PEFT wrote, against PEFT's."""
    model = build_network(_ODD, dtype)
    Adapter.open(FOLDER / "adapter").apply(model)
    logits = model(mx.array(reference()["adapter/ids"])[None])[0]
    return compare_logits(dtype, model, {"adapter/logits": logits})


def check_adapter_written(dtype: str) -> Finding:
    """An adapter that is written and read again: names, numbers and logits stay as they were.

    The error counts numbers that differ from PEFT's file.
    """
    model, again = (build_network(_ODD, dtype) for _ in range(2))
    opened = Adapter.open(FOLDER / "adapter")
    opened.apply(model)
    with TemporaryDirectory(prefix="imate-mlx-doctor-") as folder:
        save_adapter(Path(folder), adapter_weights(model), opened.config)
        written = {n: np.array(a) for n, a in load_tensors(Path(folder) / WEIGHTS_FILE).items()}
        Adapter.open(Path(folder)).apply(again)
    peft = {n: np.array(a) for n, a in load_tensors(FOLDER / "adapter" / WEIGHTS_FILE).items()}
    if written.keys() != peft.keys():
        raise KeyError(*sorted(written.keys() ^ peft.keys()))
    ids = mx.array(reference()["adapter/ids"])[None]
    differing = sum(int((written[name] != array).sum()) for name, array in peft.items())
    differing += int(np.sum(in_float32(model(ids)) != in_float32(again(ids))))
    return Finding(differing, 0.0, "numbers that differ")


def check_training(dtype: str) -> Finding:
    """Forty updates of a LoRA, dropout 0, against PEFT's and torch's losses.

    With clipping, warmup and weight decay, and rows of unequal length in several microbatches. The
    steps are compiled, as in training; but in float32, where it is not the device's own dtype, they
    are not: CUDA takes seconds to compile a kernel.

    Relative to the loss: 1e-4 in float32, the contract. Otherwise a token's loss errs by two
    numbers of a logit's deviation, the right token's and the mean of all under the softmax. The
    mean over a step's tokens errs less, which leaves room for the errors of the updates.
    """
    chosen = settings()["training"]
    model = build_network(_ODD, dtype)
    lora.add_lora(model, chosen["targets"], chosen["rank"], chosen["alpha"])
    drawn = draw_lora(chosen["seed"], {n: a.shape for n, a in adapter_weights(model).items()})
    start = {name: array * ("lora_A" in name) for name, array in drawn.items()}
    model.load_weights([(n, mx.array(a)) for n, a in start.items()], strict=False)
    executor = choose_executor()
    optimizer = adamw(chosen["weight_decay"])
    is_second = dtype == "float32" and backend.machine().dtype != "float32"
    with executor.opened(), _uncompiled() if is_second else nullcontext():
        step = Step(as_trained(model, dtype).train(), optimizer, chosen["max_grad_norm"], executor)
        rate_of = {key: chosen[key] for key in ("peak", "schedule", "warmup_ratio")}
        losses = []
        for number in range(chosen["steps"]):
            groups = executor.split(_rows_of(number), _TOKEN_BUDGET)
            step.accumulate([collate(group) for group in groups], [0, number])
            numbers = step.update(learning_rate_at(number, chosen["steps"], **rate_of))
            losses.append(numbers["loss"].item())
    expected = reference()["training/losses"]
    errors = np.abs(np.array(losses) / expected - 1)
    worst = int(errors.argmax())
    allowed = _CONTRACT
    if unit_roundoff(dtype) != _UNIT_ROUNDOFF["float32"]:
        logits = reference()[f"{_ODD}/33/logits"]
        allowed = math.sqrt(2) * deviation(dtype, model, logits) / float(expected.min())
    return Finding(float(errors[worst]), allowed, f"update {worst + 1}")


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Let MLX compile nothing within the block."""
    mx.disable_compile()
    try:
        yield
    finally:
        if "MLX_DISABLE_COMPILE" not in os.environ:
            mx.enable_compile()


def _rows_of(step: int) -> list[Example]:
    """The rows of a training step, which take turns."""
    tokens = [reference()[f"training/{number}"] for number in range(8)]
    starts = reference()["training/starts"]  # of what is learned, one a row
    rows = [
        Example(Record("row"), row, np.arange(len(row)) >= start)
        for row, start in zip(tokens, starts, strict=True)
    ]
    return rows[:4] if step % 2 == 0 else rows[4:]


_QUESTIONS = {
    "What is a mean?": "The sum by the count.",
    "What is a loss?": "A distance.",
    "What is a token?": "Part of a word.",
    "What is a label?": "What a row says.",
    "What is an epoch?": "All rows once.",
    "What is a rank?": "A width.",
    "What is a step?": "An update.",
    "What is a row?": "An example.",
}


def check_resume(dtype: str) -> Finding:
    """A run on mini that is stopped and resumed ends in the bytes of one that is not.

    The error counts bytes of the adapter that differ.
    """
    with TemporaryDirectory(prefix="imate-mlx-doctor-") as folder:
        rows = [{"question": q, "answer": a} for q, a in _QUESTIONS.items()]
        data = Path(folder) / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        run = RunConfig().replace(
            model={"base": "mini", "dtype": dtype},
            data={"path": str(data), "max_length": 32},
            train={"epochs": 1, "grad_accumulation": 2, "learning_rate": 5e-3},
        )
        whole = _adapter_bytes(run, Path(folder) / "whole", 4)
        _adapter_bytes(run, Path(folder) / "parts", 2)
        resumed = _adapter_bytes(run, Path(folder) / "parts", 2, resumed_at=2)
        error, detail = _differing(whole, resumed), "bytes that differ"
        if error and _differing(whole, _adapter_bytes(run, Path(folder) / "again", 4)):
            detail = "two whole runs differ too: this device does not repeat itself"
    return Finding(error, 0.0, detail)


def _adapter_bytes(run: RunConfig, out: Path, steps: int, resumed_at: int = 0) -> bytes:
    """The bytes of a run's adapter after so many steps, from the start or from where it stopped."""
    asked = itertools.count(1)
    for event in train(run, out, resume=resumed_at > 0, stop=lambda: next(asked) >= steps):
        if isinstance(event, Started) and event.step != resumed_at:
            raise ValueError(f"the run went on after step {event.step}, expected {resumed_at}")
    return (out / WEIGHTS_FILE).read_bytes()


def _differing(a: bytes, b: bytes) -> int:
    return sum(x != y for x, y in zip(a, b, strict=True))


# By name, in the order of the report.
CHECKS: dict[str, Callable[[str], Finding]] = {
    "matrix products": check_products,
    "GELU": check_gelu,
    "GELU's slope": check_gelu_slope,
    "ALiBi": check_alibi,
    "attention mask": check_mask,
    "logits, 4 heads": check_logits,
    "logits, 3 heads": check_odd_logits,
    "greedy text": check_greedy,
    "right padding": check_right_padding,
    "left padding": check_left_padding,
    "adapter of PEFT": check_adapter_read,
    "adapter written": check_adapter_written,
    "forty updates": check_training,
    "resumed run": check_resume,
    "AdamW": check_optimizer,
    "dropout's share": check_dropout_share,
    "dropout's scale": check_dropout_scale,
    "end of text": check_end_of_text,
}
# These compute in float32, or not at all, whatever the dtype: done once.
ONCE = {"AdamW", "dropout's share", "dropout's scale", "end of text"}
# In the first dtype alone: it compiles what a step takes, and shows nothing else in another.
FIRST = {"resumed run"}
