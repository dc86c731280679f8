"""`benchmarks/kernels.py`: what it times computes the same."""

import kernels
import mlx.core as mx
import numpy as np

from interviewmate_mlx import backend


def test_ways_compute_the_same_and_each_is_timed(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "CHUNKS", (4, 7, 18))  # of 18 tokens
    monkeypatch.setattr(kernels, "TIMES", 1)
    of_kind: dict[str, list[np.ndarray]] = {}
    shape = (2, 9, 2)
    parts = [*kernels.attentions(*shape), *kernels.norms(*shape), *kernels.heads(*shape, 96)]
    for name, function, x in parts:
        of_head = name.startswith("head")
        found = function(x) if of_head else kernels.with_gradient(function)(x)
        flat = np.concatenate([np.array(a.astype(mx.float32)).ravel() for a in found])
        assert np.abs(np.array(found[1].astype(mx.float32))).mean() > (1e-3 if of_head else 0.1)
        of_kind.setdefault(name.partition(",")[0], []).append(flat)
    assert {kind: len(ways) for kind, ways in of_kind.items()} == {
        "attention": 3, "layer norm": 2, "RMS norm": 2, "head and loss": 3
    }  # fmt: skip
    # Some roundings of numbers as large as the largest.
    eps = float(mx.finfo(backend.resolve_dtype("auto")).eps)
    for first, *others in of_kind.values():
        for other in others:
            np.testing.assert_allclose(other, first, atol=8 * eps * np.abs(first).max())

    kernels.main(["--rows", "2", "--length", "9", "--heads", "2", "--vocab", "96"])
    printed = capsys.readouterr().out
    assert all(name in printed for name, *_ in parts)
