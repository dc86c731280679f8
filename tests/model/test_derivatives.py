"""Derivatives that are written by hand, against autodiff of the naive form and against float64.

Those of a CPU's kernels are in `test_cpu_kernels.py`, dropout's in `test_dropout.py`.
"""

import re
from math import sqrt

import mlx.core as mx
import numpy as np
import pytest
import torch

from interviewmate_mlx.model.falcon import exact_gelu
from interviewmate_mlx.model.lora import add_product

# Half of what one unit in the last place is of a number.
UNIT_ROUNDOFF = {mx.float32: 2.0**-24, mx.bfloat16: 2.0**-8, mx.float16: 2.0**-11}
DTYPES = pytest.mark.parametrize("dtype", UNIT_ROUNDOFF, ids=str)
COMPILED = pytest.mark.parametrize("compiled", [False, True], ids=["as_it_is", "compiled"])


def wide(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def derivatives(function, primals, cotangent, compiled: bool) -> list[mx.array]:
    def of(*arrays):
        return mx.vjp(function, list(arrays), [cotangent])[1]

    return (mx.compile(of) if compiled else of)(*primals)


def naive_gelu(x: mx.array) -> mx.array:
    x = x.astype(mx.float32)
    return 0.5 * x * (1 + mx.erf(x / sqrt(2)))


@DTYPES
@COMPILED
def test_gelu_and_its_derivative(dtype, compiled):
    x = mx.linspace(-9, 9, 4001).astype(dtype)
    cotangent = mx.array(np.random.default_rng(0).normal(size=4001), mx.float32).astype(dtype)
    exact = torch.tensor(wide(x), requires_grad=True)
    value = torch.nn.functional.gelu(exact)
    value.backward(torch.tensor(wide(cotangent)))
    unit = UNIT_ROUNDOFF[dtype]
    # In float32 some ten roundings of numbers up to 9, and one of the result in its own dtype.
    allowed = 4e-6 + unit * np.abs(value.detach().numpy())
    assert (np.abs(wide(exact_gelu(x)) - value.detach().numpy()) <= allowed).all()
    (found,) = derivatives(exact_gelu, [x], cotangent, compiled)
    assert found.dtype == dtype
    allowed = 1e-5 + unit * np.abs(exact.grad.numpy())
    assert (np.abs(wide(found) - exact.grad.numpy()) <= allowed).all()
    (naive,) = derivatives(naive_gelu, [x], cotangent.astype(mx.float32), compiled)
    assert (np.abs(wide(found) - wide(naive)) <= 1e-5 + unit * np.abs(wide(naive))).all()


def naive_sum(y: mx.array, inner: mx.array, weight: mx.array) -> mx.array:
    return y + inner @ weight.T


@DTYPES
@COMPILED
@pytest.mark.parametrize("narrow", [False, True], ids=["lora_in_float32", "lora_in_its_dtype"])
def test_product_that_is_added_and_its_derivatives(dtype, compiled, narrow):
    rows, out, rank = (3, 50), 96, 8
    rng = np.random.default_rng(1)

    def normal(*shape: int) -> mx.array:
        return mx.array(rng.normal(size=shape), mx.float32)

    y, cotangent = normal(*rows, out).astype(dtype), normal(*rows, out).astype(dtype)
    own = dtype if narrow else mx.float32
    inner, weight = normal(*rows, rank).astype(own), normal(out, rank).astype(own)
    primals = [y, inner, weight]
    exact = [torch.tensor(wide(a), requires_grad=True) for a in primals]
    value = exact[0] + exact[1] @ exact[2].T
    value.backward(torch.tensor(wide(cotangent)))
    # Inner and weight are rounded to y's dtype; their eight products; and the sum.
    unit, sizes = UNIT_ROUNDOFF[dtype], wide(inner.abs()) @ wide(weight.abs()).T + np.abs(wide(y))
    assert (np.abs(wide(add_product(*primals)) - value.detach().numpy()) <= 5 * unit * sizes).all()
    found = derivatives(add_product, primals, cotangent, compiled)
    assert [array.dtype for array in found] == [dtype, own, own]
    naive = derivatives(
        naive_sum, [a.astype(mx.float32) for a in primals], cotangent.astype(mx.float32), compiled
    )
    # Sums of up to 150 products: each may be rounded as its parts are, and the sum as its own.
    many = 2 * 150 * UNIT_ROUNDOFF[mx.float32] + UNIT_ROUNDOFF[own]
    g = np.abs(wide(cotangent))
    terms = [
        g,
        g @ np.abs(wide(weight)),
        g.reshape(-1, out).T @ np.abs(wide(inner)).reshape(-1, rank),
    ]
    for array, truth, other, size in zip(found, exact, naive, terms, strict=True):
        assert (np.abs(wide(array) - truth.grad.numpy()) <= many * size).all()
        assert (np.abs(wide(array) - wide(other)) <= many * size).all()


def test_gelu_is_one_kernel_where_nothing_else_is_compiled(tmp_path):
    """As in generation."""
    mx.export_to_dot(str(tmp_path / "graph.dot"), exact_gelu(mx.zeros(8, mx.bfloat16)))
    labels = re.findall(r'label ?="(\w+)"', (tmp_path / "graph.dot").read_text())
    (kernel,) = (label for label in labels if label.startswith("Compiled"))
    assert "Erf" in kernel
    assert not {"AsType", "Multiply", "Erf", "Add"} & set(labels)
