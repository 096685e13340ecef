"""The ResNet: timm's with another stem, as a module and as a network of one replica."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn

from tests.support.networks import SMALL
from vitpa.models import build_model
from vitpa.models.resnet import OneNetwork, resnet18

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def built(seed: int) -> nn.Module:
    model: nn.Module = build_model(kind="resnet18", attention="content", seed=seed, **SMALL)
    return model


def test_it_is_timms_resnet18_but_for_the_stem() -> None:
    ours, theirs = resnet18(10), timm.create_model("resnet18", num_classes=10)
    assert (ours.conv1.kernel_size, ours.conv1.stride, ours.conv1.padding) == ((3, 3), (1, 1), (1, 1))
    theirs.conv1, theirs.maxpool = ours.conv1, nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    for size in (8, 32, 33):
        images = torch.randn(2, 3, size, size)
        assert torch.equal(ours.eval()(images), theirs.eval()(images))
    assert ours.forward_features(torch.zeros(2, 3, 32, 32)).shape == (2, 512, 4, 4)


def test_the_stem_is_initialised_as_timm_initialises_convolutions() -> None:
    fan_out = 64 * 3 * 3
    assert abs(resnet18(10).conv1.weight.std().item() / (2 / fan_out) ** 0.5 - 1) < 0.1


def test_it_is_initialised_from_the_seed_alone() -> None:
    torch.manual_seed(5)
    one = built(seed=1).state_dict()
    torch.manual_seed(6)
    two, other = built(seed=1).state_dict(), built(seed=2).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["conv1.weight"], other["conv1.weight"])
    assert one["fc.weight"].shape == (SMALL["num_classes"], 512)


def stacked(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach()[None].clone().requires_grad_() for name, parameter in model.named_parameters()}


def test_as_a_network_of_one_replica_it_has_the_modules_logits_gradients_and_statistics() -> None:
    module, model = built(seed=1), built(seed=1)
    weights, images = stacked(model), torch.randn(8, 3, 8, 8)
    logits = OneNetwork(model, training=True, products=torch.float32)(weights, {}, images[None])
    expected = module.train()(images)
    assert torch.equal(logits, expected[None])
    gradients = torch.autograd.grad(logits.square().sum(), list(weights.values()))
    expected.square().sum().backward()
    for (name, parameter), gradient in zip(module.named_parameters(), gradients, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(gradient[0], parameter.grad, msg=name)
    theirs = dict(module.named_buffers())
    assert {name.rpartition(".")[2] for name in theirs} == set(BUFFERS)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, theirs[name]), name
    assert model.get_buffer("bn1.num_batches_tracked") == 1

    evaluated = OneNetwork(model, training=False, products=torch.float32)(weights, {}, images[None])
    assert torch.equal(evaluated, module.eval()(images)[None])
    assert not torch.equal(evaluated, logits)
    assert model.get_buffer("bn1.num_batches_tracked") == 1  # as it was
    for parameter in model.parameters():  # the weights come with each call
        parameter.data.zero_()
    assert torch.equal(OneNetwork(model, training=False, products=torch.float32)(weights, {}, images[None]), evaluated)


def test_in_bfloat16_its_products_are_rounded_and_its_gradients_float32() -> None:
    model = built(seed=1)
    weights, images = stacked(model), torch.randn(1, 8, 3, 8, 8)
    exact, rounded = (OneNetwork(model, True, products)(weights, {}, images) for products in (torch.float32, torch.bfloat16))
    assert rounded.dtype == torch.bfloat16
    error = (rounded.float() - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.05
    assert all(each.dtype == torch.float32 for each in torch.autograd.grad(rounded.float().sum(), list(weights.values())))
