"""The measures of spatial structure: known answers, slow loops over patches, and what chance does to them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from vitpa.analysis import measures
from vitpa.analysis.measures import Measured

SIDE = 4
PLACES = measures.grid_places(SIDE)
ORDERS = measures.orders(SIDE * SIDE)


def random_matrices(count: int, n: int = SIDE * SIDE) -> Tensor:
    return torch.rand(count, n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)


def of(found: Measured) -> float:
    return found.value.item()


def test_places_and_distances() -> None:
    assert PLACES[:6].tolist() == [[0, 0], [0, 1], [0, 2], [0, 3], [1, 0], [1, 1]]
    distances = measures.distances(PLACES)
    for i, j in itertools.product(range(16), range(16)):
        assert distances[i, j].item() == pytest.approx(math.hypot(i // 4 - j // 4, i % 4 - j % 4))


@pytest.mark.parametrize("count", [1, 4, 8])
def test_encodings_of_places_have_recall_1(count: int) -> None:
    """A hand-made encoding of the 4 x 4 grid whose similarity falls with the distance."""
    centres = torch.cartesian_prod(torch.arange(-3.0, 7), torch.arange(-3.0, 7))
    encodings = torch.exp(-(PLACES[:, None] - centres[None]).square().sum(-1))
    similarity = measures.cosine_similarity(encodings)[None]
    assert of(measures.neighbour_recall(similarity, PLACES, count, ORDERS)) == 1
    assert of(measures.distance_correlation(similarity, PLACES, ORDERS)) < -0.8


def test_random_encodings_have_the_recall_and_correlation_of_chance() -> None:
    outside = 0
    for seed in range(40):
        vectors = torch.randn(16, 64, generator=torch.Generator().manual_seed(seed))
        similarity = measures.cosine_similarity(vectors)[None]
        for found in (
            measures.neighbour_recall(similarity, PLACES, 4, ORDERS),
            measures.distance_correlation(similarity, PLACES, ORDERS),
        ):
            low, high = found.interval()[:, 0].tolist()
            assert low < found.chance.item() < high
            outside += not low <= of(found) <= high
    assert outside <= 10  # 4 of 80 are expected, 95 % intervals as they are


def test_recall_counts_what_a_loop_counts() -> None:
    matrices = random_matrices(3)
    distances = measures.distances(PLACES)
    found = measures.neighbour_recall(matrices, PLACES, 4, ORDERS)
    for matrix, value in zip(matrices, found.value, strict=True):
        hits = 0
        for i in range(16):
            others = [j for j in range(16) if j != i]
            best = sorted(others, key=lambda j: -matrix[i, j].item())[:4]
            farthest = sorted(distances[i, j].item() for j in others)[3]
            hits += sum(distances[i, j].item() <= farthest + 1e-9 for j in best)
        assert value.item() == pytest.approx(hits / 64)


def test_equal_entries_have_the_recall_of_a_draw_among_them() -> None:
    found = measures.neighbour_recall(torch.ones(1, 16, 16, dtype=torch.float64), PLACES, 4, ORDERS)
    assert of(found) == pytest.approx(found.chance.item())
    assert found.chance.item() == pytest.approx(measures.near(PLACES, 4).sum().item() / (16 * 15))
    assert found.permuted.min().item() == pytest.approx(found.permuted.max().item())


@pytest.mark.parametrize("name", ["recall", "correlation", "distance"])
def test_chance_is_the_mean_over_all_orders(name: str) -> None:
    places = measures.grid_places(2)
    every = torch.tensor(list(itertools.permutations(range(4))))
    matrices = random_matrices(2, 4)
    found = {
        "recall": lambda: measures.neighbour_recall(matrices, places, 2, every),
        "correlation": lambda: measures.distance_correlation(matrices, places, every),
        "distance": lambda: measures.attention_distance(matrices, places, every),
    }[name]()
    torch.testing.assert_close(found.permuted.mean(1), found.chance)
    torch.testing.assert_close(found.permuted[:, 0], found.value)  # the first order is none


def test_distance_of_uniform_and_of_identity_attention() -> None:
    uniform = torch.full((1, 16, 16), 1 / 16, dtype=torch.float64)
    # closed form: the mean over two patches drawn independently from the grid
    pairs = itertools.product(range(4), repeat=4)
    expected = sum(math.hypot(a - c, b - d) for a, b, c, d in pairs) / 256
    found = measures.attention_distance(uniform, PLACES, ORDERS)
    assert of(found) == pytest.approx(expected)
    assert found.chance.item() == pytest.approx(expected)
    identity = measures.attention_distance(torch.eye(16, dtype=torch.float64)[None], PLACES, ORDERS)
    assert of(identity) == 0
    assert identity.chance.item() == 0


def test_entropy_of_uniform_and_of_identity_attention() -> None:
    assert measures.entropy(torch.full((16, 16), 1 / 16, dtype=torch.float64)).item() == pytest.approx(math.log(16))
    assert measures.entropy(torch.eye(16, dtype=torch.float64)).item() == 0


def test_correlation_is_pearsons_over_pairs_of_patches() -> None:
    matrices, distances = random_matrices(2), measures.distances(PLACES)
    off = ~torch.eye(16, dtype=torch.bool)
    found = measures.distance_correlation(matrices, PLACES, ORDERS)
    for matrix, value in zip(matrices, found.value, strict=True):
        assert value.item() == pytest.approx(torch.corrcoef(torch.stack([matrix[off], distances[off]]))[0, 1].item())
    constant = measures.distance_correlation(torch.full((1, 16, 16), 0.1, dtype=torch.float64), PLACES, ORDERS)
    assert of(constant) == 0


def test_a_permutation_and_its_inverse_give_equal_numbers() -> None:
    matrices = random_matrices(2)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    inverse = order.argsort()
    shown = matrices[:, order[:, None], order[None]]
    undone = shown[:, inverse[:, None], inverse[None]]
    assert torch.equal(undone, matrices)
    by_places = measures.neighbour_recall(shown, PLACES[order], 4, ORDERS)
    torch.testing.assert_close(by_places.value, measures.neighbour_recall(matrices, PLACES, 4, ORDERS).value)


def test_attention_among_patches_leaves_the_class_token_out() -> None:
    scores = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    attention, got = scores.softmax(-1), measures.among_patches(scores)
    for i, j in itertools.product(range(4), range(4)):
        expected = attention[..., i + 1, j + 1] / attention[..., i + 1, 1:].sum(-1)
        torch.testing.assert_close(got[..., i, j], expected.double())


def test_attention_among_patches_is_known_where_the_class_token_takes_it_all() -> None:
    """A head of a content model trained on CIFAR-100 did so: exp(-200) is 0 in float32."""
    scores = torch.tensor([[200.0, 0.0, math.log(3)]]).expand(3, 3)
    assert scores.softmax(-1)[0].tolist() == [1, 0, 0]
    got = measures.among_patches(scores)
    torch.testing.assert_close(got, torch.tensor([[0.25, 0.75]], dtype=torch.float64).expand(2, 2), atol=1e-7, rtol=0)


def test_products_are_scaled_by_the_largest() -> None:
    vectors = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    assert measures.scaled_products(vectors).tolist() == [[0.25, 0, 0], [0, 1, -1], [0, -1, 1]]
    assert measures.scaled_products(torch.zeros(2, 3)).tolist() == [[0, 0], [0, 0]]
