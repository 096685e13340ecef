"""Patch association: definition 2.2, its share and its gap, of matrices whose answer is known."""

from __future__ import annotations

import pytest
import torch

from vitpa.theory.association import Association, association

PAIRS = torch.tensor([0, 0, 1, 1, 2, 2])


def test_sets_that_are_alike_are_found() -> None:
    together = (PAIRS[:, None] == PAIRS[None, :]).double()
    assert association(together, PAIRS) == Association(complete=True, share=1.0, gap=1.0)
    assert association(-5 + 0.1 * together, PAIRS).gap == pytest.approx(0.1)


def test_one_patch_that_is_more_like_a_stranger_breaks_it() -> None:
    similarity = (PAIRS[:, None] == PAIRS[None, :]).double()
    similarity[0, 5] = 2.0
    found = association(similarity, PAIRS)
    assert not found.complete
    assert found.share == pytest.approx(5 / 6)


def test_a_patch_is_like_itself_whatever_the_diagonal_says() -> None:
    similarity = (PAIRS[:, None] == PAIRS[None, :]).double().fill_diagonal_(-9.0)
    assert association(similarity, PAIRS).complete


def test_equal_entries_are_not_found() -> None:
    assert association(torch.ones(6, 6), PAIRS) == Association(complete=False, share=0.0, gap=0.0)


def test_chance_is_one_in_the_number_of_choices() -> None:
    random = torch.Generator().manual_seed(0)
    shares = [association(torch.rand(6, 6, generator=random), PAIRS).share for _ in range(2_000)]
    assert sum(shares) / len(shares) == pytest.approx(1 / 5, abs=0.02)  # one of five others is the right one


def test_sets_of_unequal_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"of one size, not of \[1, 2\]"):
        association(torch.ones(3, 3), torch.tensor([0, 0, 1]))
