"""`benchmarks/kernels.py`: what it times computes the same."""

import kernels
import mlx.core as mx
import numpy as np


def test_ways_compute_the_same_and_each_is_timed(monkeypatch, capsys):
    of_kind: dict[str, list[np.ndarray]] = {}
    shape = (2, 9, 2)
    mx.random.seed(0)
    parts = [*kernels.attentions(*shape), *kernels.norms(*shape), *kernels.heads(*shape, 96)]
    for name, function, x in parts:
        if "norm" in name or "attention" in name:
            found = kernels.with_gradient(function)(x)
            arrays = [found[0][0], found[1][0]]
        else:
            arrays = list(function(x))
        flat = np.concatenate([np.array(a.astype(mx.float32)).ravel() for a in arrays])
        of_kind.setdefault(name.partition(",")[0], []).append(flat)
    assert {kind: len(ways) for kind, ways in of_kind.items()} == {
        "attention": 3, "layer norm": 2, "RMS norm": 2, "head and loss": 3
    }  # fmt: skip
    for first, *others in of_kind.values():
        for other in others:
            np.testing.assert_allclose(other, first, atol=1e-4 * np.abs(first).max())

    monkeypatch.setattr(kernels, "TIMES", 1)
    kernels.main(["--rows", "2", "--length", "9", "--heads", "2", "--vocab", "96"])
    printed = capsys.readouterr().out
    assert all(name in printed for name, *_ in parts)
