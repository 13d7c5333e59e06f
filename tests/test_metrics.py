"""metrics.py: its pictures, its KID and its differences, against formulas."""

import numpy as np
import pytest

from experiments.machine import metrics


def test_kid_against_loops():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 5)), rng.normal(size=(6, 5)) + 0.3

    def kernel(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / 5 + 1) ** 3

    def mean(one, other):
        same = one is other
        pairs = [
            (i, j) for i in range(len(one)) for j in range(len(other)) if not (same and i == j)
        ]
        return sum(kernel(one[i], other[j]) for i, j in pairs) / len(pairs)

    want = mean(x, x) + mean(y, y) - 2 * mean(x, y)
    assert metrics.kernel_distance(x, y) == pytest.approx(want, rel=1e-12)


def test_both_sets_are_pictures_that_differ():
    a, b = (metrics.draw(4, 16, seed) for seed in (0, 1))
    assert a.shape == b.shape == (4, 16, 16, 3) and a.dtype == np.uint8
    assert np.array_equal(a, metrics.draw(4, 16, 0)) and not np.array_equal(a, b)
    assert 20 < a.std() < 100


def test_a_difference_is_relative():
    assert metrics.difference(1.01, 1.0) == "0.01"
    assert metrics.difference(2.0, 2.0) == "0"
    assert metrics.difference(None, 2.0) == ""
