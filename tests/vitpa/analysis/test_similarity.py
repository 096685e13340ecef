"""The positional-similarity map against loops over pairs of patches."""

from __future__ import annotations

import math

import pytest
import torch

from vitpa.analysis.similarity import positional_similarity, similarity_grid


def test_similarity_is_the_cosine_of_every_pair_of_patches() -> None:
    pos_embed = torch.randn(1, 1 + 9, 5, generator=torch.Generator().manual_seed(0))
    got = positional_similarity(pos_embed)
    vectors = [[float(x) for x in vector] for vector in pos_embed[0, 1:]]  # without the class token
    assert got.shape == (9, 9)
    for i, a in enumerate(vectors):
        for j, b in enumerate(vectors):
            dot = sum(x * y for x, y in zip(a, b, strict=True))
            norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
            assert float(got[i, j]) == pytest.approx(dot / norms, abs=1e-6)


def test_the_class_token_does_not_count() -> None:
    pos_embed = torch.randn(1, 1 + 4, 3, generator=torch.Generator().manual_seed(0))
    other = pos_embed.clone()
    other[0, 0] = 100.0
    assert torch.equal(positional_similarity(other), positional_similarity(pos_embed))
    other[0, 4] = 100.0
    assert not torch.equal(positional_similarity(other), positional_similarity(pos_embed))


def test_known_similarities() -> None:
    patches = torch.tensor([[1.0, 0.0], [5.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    got = positional_similarity(torch.cat([torch.ones(1, 2), patches])[None])
    expected = [[1, 1, 0, -1], [1, 1, 0, -1], [0, 0, 1, 0], [-1, -1, 0, 1]]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float32))


def test_encodings_of_zero_and_in_bfloat16_give_numbers() -> None:
    assert positional_similarity(torch.zeros(1, 5, 3)).tolist() == [[0.0] * 4] * 4
    half = torch.randn(1, 5, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert positional_similarity(half).dtype == torch.float32
    torch.testing.assert_close(positional_similarity(half).diagonal(), torch.ones(4))


@pytest.mark.parametrize("zoom", [1, 4])
@pytest.mark.parametrize("g", [1, 2, 3])
def test_the_grid_shows_at_its_place_the_map_of_each_patch(g: int, zoom: int) -> None:
    similarity = torch.rand(g * g, g * g, generator=torch.Generator().manual_seed(0)) * 2 - 1
    image = similarity_grid(similarity, zoom)
    side = g * (g + 1) - 1  # g maps of g patches with g - 1 lines between them
    assert image.shape == (1, side * zoom, side * zoom)
    for y in range(side * zoom):
        for x in range(side * zoom):
            (i, row), (j, column) = divmod(y // zoom, g + 1), divmod(x // zoom, g + 1)
            on_a_line = g in (row, column)
            expected = 1.0 if on_a_line else (float(similarity[i * g + j, row * g + column]) + 1) / 2
            assert float(image[0, y, x]) == pytest.approx(expected, abs=1e-6)


def test_the_grid_stays_within_an_images_range() -> None:
    image = similarity_grid(torch.tensor([[1.0 + 1e-6, -1.0 - 1e-6], [0.0, 1.0]]).repeat(2, 2))
    assert float(image.min()) >= 0 and float(image.max()) <= 1
