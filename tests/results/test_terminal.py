"""What a run looks like on the terminal."""

import pytest

from interviewmate_mlx.results.terminal import curve


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([2.0, 1.0], "█▁"),
        ([8, 7, 6, 5, 4, 3, 2, 1], "█▇▆▅▄▃▂▁"),
        ([1.0, 1.0, 1.0], "▁▁▁"),
        ([4.0, 2.0, 1.0, 1.0], "█▁"),  # in groups of two: 3 and 1
    ],
)
def test_curve(values, expected):
    assert curve(values, width=max(2, len(expected))) == expected


def test_curve_of_many_steps_is_as_wide_as_there_is_room():
    falling = [1 / step for step in range(1, 1000)]
    drawn = curve(falling)
    assert len(drawn) == 32
    assert list(drawn) == sorted(drawn, reverse=True)
