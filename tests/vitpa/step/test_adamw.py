"""AdamW over one buffer against torch's AdamW and torch's clipping, one model after the other, in float64."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitpa.models import build_model
from vitpa.optim import adamw, load_moments
from vitpa.step.adamw import ReplicaAdamW

SIZES: dict[str, Any] = {
    "num_classes": 5,
    "img_size": 4,
    "patch_size": 2,
    "embed_dim": 6,  # no parameter fills what it is given in the buffer
    "depth": 1,
    "num_heads": 2,
    "mlp_ratio": 1.5,
    "drop_path_rate": 0.0,
    "pos_embed_std": 0.2,
}
R, STEPS = 3, 50

Gradients = dict[str, Tensor]

assert_close = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-13)


def models(seeds: Sequence[int], dtype: torch.dtype = torch.float64) -> list[nn.Module]:
    return [build_model(attention="content", seed=seed, **SIZES).to(dtype) for seed in seeds]


def optimizer(model: nn.Module) -> torch.optim.AdamW:
    return adamw(model, lr=1e-3, weight_decay=0.3, betas=(0.8, 0.95), eps=1e-6, fused=False)


def together(seeds: Sequence[int], max_norm: float | None) -> tuple[list[nn.Module], ReplicaAdamW]:
    networks = models(seeds)
    return networks, ReplicaAdamW(
        networks, [optimizer(network) for network in networks], torch.float64, [max_norm] * len(seeds)
    )


def rate(step: int) -> float:
    return 0.01 * (1 + math.cos(step / 10))


def random_gradients(model: nn.Module, seed: int, step: int) -> Gradients:
    """The gradients of a replica in a step: in some steps their norm is above 1, in some below."""
    generator = torch.Generator().manual_seed(1000 * seed + step)
    scale = 10.0 ** float(torch.rand(1, generator=generator) * 4 - 3) / 10
    return {
        name: scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        for name, parameter in model.named_parameters()
    }


def update(replicas: ReplicaAdamW, step: int, gradients: Sequence[Gradients], losses: Sequence[float] | None = None) -> Tensor:
    """Step number `step` (0 is the first); the norms."""
    replicas.take_gradients(torch.stack([each[name] for each in gradients]) for name in replicas.spans)
    loss = torch.ones(len(gradients)) if losses is None else torch.tensor(losses)
    rates = torch.tensor([[rate(each)] for each in range(step + 1)], dtype=torch.float64)
    return replicas.update(loss, replicas.factors(rates)[step])


def torch_update(model: nn.Module, own: torch.optim.AdamW, step: int, gradients: Gradients, max_norm: float | None) -> Tensor:
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name].clone()
    for group in own.param_groups:
        group["lr"] = rate(step)
    norm: Tensor = nn.utils.clip_grad_norm_(model.parameters(), math.inf if max_norm is None else max_norm)
    own.step()
    return norm


def check_equal(model: nn.Module, expected: nn.Module) -> None:
    for (name, parameter), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert_close(parameter, other, msg=name)


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_every_replica_is_updated_as_torchs_adamw_does(max_norm: float | None) -> None:
    networks, replicas = together(range(R), max_norm)
    expected = models(range(R))
    optimizers = [optimizer(model) for model in expected]
    clipped = 0
    for step in range(STEPS):
        gradients = [random_gradients(model, seed, step) for seed, model in enumerate(expected)]
        norms = update(replicas, step, gradients)
        for replica, model in enumerate(expected):
            norm = torch_update(model, optimizers[replica], step, gradients[replica], max_norm)
            assert_close(norms[replica], norm)  # before clipping
            clipped += float(norm) > 1
    assert STEPS * R / 10 < clipped < STEPS * R * 9 / 10  # both happened
    for network, model, own in zip(networks, expected, optimizers, strict=True):
        check_equal(network, model)
        mine = replicas.state_dict(networks.index(network), STEPS)
        for number, state in own.state_dict()["state"].items():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                assert_close(mine["state"][number][key], state[key])


@pytest.mark.parametrize("where", ["a gradient", "a loss", "on request"])
def test_a_replica_that_is_not_finite_stays_as_it_is_and_the_others_go_on_as_alone(where: str) -> None:
    networks, replicas = together(range(R), 1.0)
    pair, alone = together([0, 2], 1.0)
    kept: list[Tensor] = []
    for step in range(STEPS):
        gradients = [random_gradients(model, seed, step) for seed, model in enumerate(networks)]
        losses = [1.0] * R
        if step == 20:
            kept = [tensor[1].clone() for tensor in replicas.state_tensors()[:3]]
            if where == "a gradient":
                gradients[1]["blocks.0.norm2.bias"][2] = math.inf
            elif where == "a loss":
                losses[1] = math.nan
            else:
                replicas.frozen[1] = True
        update(replicas, step, gradients, losses)
        update(alone, step, [gradients[0], gradients[2]])
        assert replicas.frozen.tolist() == [False, step >= 20, False]
    for tensor, before in zip(replicas.state_tensors()[:3], kept, strict=True):
        assert torch.equal(tensor[1], before)
        assert before.isfinite().all() and before.count_nonzero() > 0
    assert torch.equal(replicas.values[[0, 2]], alone.values)
    assert torch.equal(networks[2].get_parameter("head.weight"), pair[1].get_parameter("head.weight"))


@pytest.mark.parametrize("first_ours", [False, True])
def test_a_run_goes_on_with_the_other_adamw(first_ours: bool) -> None:
    """As when a run was trained in one way, and then goes on in a group, or leaves it."""
    (expected,) = models([1])
    own = optimizer(expected)
    networks, replicas = together(range(R), 1.0)
    (model,) = models([1])
    half, theirs = STEPS // 2, optimizer(model)
    for step in range(half):
        gradients = [random_gradients(model, seed, step) for seed in range(R)]
        torch_update(expected, own, step, gradients[1], 1.0)
        if first_ours:
            update(replicas, step, gradients)
        else:
            torch_update(model, theirs, step, gradients[1], 1.0)
    if first_ours:
        state = saved_and_loaded({"optimizer": replicas.state_dict(1, half), "model": networks[1].state_dict()})
        model.load_state_dict(state["model"])
        load_moments(theirs, state["optimizer"])
    else:
        others = [tensor[[0, 2]].clone() for tensor in replicas.state_tensors()]
        state = saved_and_loaded({"optimizer": theirs.state_dict(), "model": model.state_dict()})
        networks[1].load_state_dict(state["model"])
        replicas.load_state_dict(1, state["optimizer"])
        assert all(map(torch.equal, others, (tensor[[0, 2]] for tensor in replicas.state_tensors())))
    for step in range(half, STEPS):
        gradients = [random_gradients(model, seed, step) for seed in range(R)]
        torch_update(expected, own, step, gradients[1], 1.0)
        if first_ours:
            torch_update(model, theirs, step, gradients[1], 1.0)
        else:
            update(replicas, step, gradients)
    check_equal(model if first_ours else networks[1], expected)


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def test_a_saved_state_holds_nothing_but_its_own_replica() -> None:
    networks, replicas = together(range(R), 1.0)
    update(replicas, 0, [random_gradients(model, seed, 0) for seed, model in enumerate(networks)])
    state = replicas.state_dict(1, 7)
    before = saved_and_loaded(state)
    tensors = [tensor for each in state["state"].values() for tensor in each.values()]
    assert all(tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size() for tensor in tensors)
    update(replicas, 1, [random_gradients(model, seed, 1) for seed, model in enumerate(networks)])
    for number, each in state["state"].items():  # a later step does not change it
        assert each["step"] == 7
        assert all(torch.equal(tensor, before["state"][number][key]) for key, tensor in each.items())
    assert saved_and_loaded(replicas.state_dict(1, 8))["state"][0]["step"] == 8


def test_only_what_torchs_groups_decay_is_decayed() -> None:
    networks, replicas = together(range(R), 1.0)
    before = [{name: value.detach().clone() for name, value in model.named_parameters()} for model in networks]
    nothing = {name: torch.zeros_like(value) for name, value in networks[0].named_parameters()}
    update(replicas, 0, [nothing] * R)
    factor = 1 - rate(0) * 0.3
    for replica, model in enumerate(networks):
        decayed = {id(parameter) for parameter in replicas.optimizers[replica].param_groups[0]["params"]}
        assert 0 < len(decayed) < len(nothing)
        for name, parameter in model.named_parameters():
            if id(parameter) in decayed:
                assert parameter.ndim >= 2
                assert_close(parameter, before[replica][name] * factor)
            else:
                assert torch.equal(parameter, before[replica][name]), name
    for name in ("pos_embed", "cls_token", "norm.weight", "head.bias"):
        assert torch.equal(networks[0].get_parameter(name), before[0][name]), name


def test_the_models_parameters_are_views_of_the_buffer() -> None:
    expected = models(range(R))
    networks, replicas = together(range(R), 1.0)
    for network, model in zip(networks, expected, strict=True):
        assert all(map(torch.equal, network.state_dict().values(), model.state_dict().values()))  # as they were
    start, end = replicas.values.data_ptr(), replicas.values.data_ptr() + replicas.values.nbytes
    taken: set[int] = set()
    for network in networks:
        for parameter in network.parameters():
            assert start <= parameter.data_ptr() < end
            assert (parameter.data_ptr() - start) % (64 * parameter.element_size()) == 0
            bytes_taken = set(range(parameter.data_ptr(), parameter.data_ptr() + parameter.nbytes))
            assert not bytes_taken & taken
            taken |= bytes_taken
    update(replicas, 0, [random_gradients(model, seed, 0) for seed, model in enumerate(networks)])
    for network, model, replica in zip(networks, expected, range(R), strict=True):
        views = replicas.of_replica(replicas.values, replica)
        assert set(views) == {name for name, _ in network.named_parameters()}
        for name, parameter in network.named_parameters():
            assert torch.equal(parameter, views[name])
            assert not torch.equal(parameter, model.get_parameter(name))


def test_copies_for_products_follow_the_weights() -> None:
    networks = models(range(R), torch.float32)
    replicas = ReplicaAdamW(networks, [optimizer(network) for network in networks], torch.bfloat16, [1.0] * R)
    assert replicas.copies is not None
    assert torch.equal(replicas.copies, replicas.values.bfloat16())
    before = replicas.copies.clone()
    update(replicas, 0, [random_gradients(model, seed, 0) for seed, model in enumerate(networks)])
    assert replicas.values.dtype == torch.float32
    assert not torch.equal(replicas.copies, before)
    assert torch.equal(replicas.copies, replicas.values.bfloat16())
    replicas.values += 1
    replicas.copy_values()
    assert torch.equal(replicas.copies, replicas.values.bfloat16())
