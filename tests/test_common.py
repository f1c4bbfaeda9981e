"""The designs of the tests."""

from __future__ import annotations

from itertools import combinations, product
from math import prod

import pytest
from common import covering


@pytest.mark.parametrize(
    "sizes", [(2, 2, 2), (4, 8, 7), (10, 8, 6), (10, 8, 10, 2), (10, 4, 9), (3, 1, 5, 5, 5), (4, 2)]
)
def test_every_pair_of_levels_of_any_two_factors_occurs(sizes):
    """In hardly more rows than the two largest factors have pairs, never twice the same, and each time the same."""
    factors = [[f"{k}{level}" for level in range(size)] for k, size in enumerate(sizes)]
    rows = covering(*factors)
    for i, j in combinations(range(len(sizes)), 2):
        assert {(row[i], row[j]) for row in rows} == set(product(factors[i], factors[j]))
    assert all(level in factor for row in rows for level, factor in zip(row, factors, strict=True))
    assert len(set(rows)) == len(rows) <= min(prod(sizes), 1.2 * prod(sorted(sizes)[-2:]))
    assert rows == covering(*factors)
