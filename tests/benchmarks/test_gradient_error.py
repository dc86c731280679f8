"""Copies of LoRA's matrices in a base's bfloat16 lose nothing that shows beside the base's own."""

import gradient_error


def test_gradients_err_by_what_the_base_errs(monkeypatch):
    monkeypatch.setattr(gradient_error, "STEPS", 1)
    wide, narrow = gradient_error.errors([0])
    # A rounding is 2**-9 of a number; some twenty of them in a row are 1 to 3 percent.
    assert 0.005 < wide < 0.05
    assert narrow < 1.15 * wide
