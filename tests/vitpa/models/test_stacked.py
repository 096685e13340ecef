"""Stacked networks against timm's modules, one replica after the other, in float64; then the same with bfloat16 copies."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.support.networks import SMALL, B, D, R, gradients_of, key_bias, networks, random_images, stacked
from vitpa.models.stacked import _Weights, product


@pytest.mark.parametrize(("depth", "num_heads"), [(1, 4), (3, 4), (2, 1), (2, 24)])
@pytest.mark.parametrize("global_pool", ["token", "avg"])
@pytest.mark.parametrize("attention", ["content", "positional"])
def test_logits_and_every_gradient_are_those_of_timms_module(
    attention: str, global_pool: str, depth: int, num_heads: int
) -> None:
    models, network = networks(attention, depth=depth, num_heads=num_heads, global_pool=global_pool)
    weights, images = stacked(models), random_images()
    logits = network(weights, {}, images)
    expected = torch.stack([model(batch) for model, batch in zip(models, images, strict=True)])
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)

    gradients = gradients_of(logits, weights)
    factors = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (expected * factors).sum().backward()
    for name, gradient in gradients.items():
        for replica, model in enumerate(models):
            reference = model.get_parameter(name).grad
            scale = float(reference.abs().max())
            assert scale > 1e-3, f"{name} has no gradient that could be compared"
            torch.testing.assert_close(gradient[replica], reference, rtol=1e-10, atol=1e-10 * scale, msg=name)


@pytest.mark.parametrize("attention", ["content", "positional"])
def test_the_bias_of_the_keys_has_no_gradient_at_all(attention: str) -> None:
    models, network = networks(attention, torch.float32)
    weights = stacked(models)
    gradients = gradients_of(network(weights, {}, random_images(torch.float32)), weights)
    biases = [name for name in gradients if key_bias(name) != slice(0, 0)]
    assert len(biases) == SMALL["depth"]
    for name in biases:
        assert torch.count_nonzero(gradients[name][:, key_bias(name)]) == 0
        assert torch.count_nonzero(gradients[name][:, :D]) > 0  # that of the queries


def test_replicas_do_not_touch_each_other() -> None:
    models, network = networks("content")
    weights, images = stacked(models), random_images()
    logits = network(weights, {}, images)
    gradients = torch.autograd.grad(logits[1].sum(), list(weights.values()))
    assert all(torch.count_nonzero(gradient[[0, 2]]) == 0 for gradient in gradients)


def test_patches_come_row_by_row_and_the_class_token_first() -> None:
    models, network = networks("content")
    weights, images = stacked(models), random_images()
    tokens = network._embed(_Weights(weights, {}), images).view(R, B, 17, D)
    for replica, model in enumerate(models):
        for image in range(B):
            expected = [model.cls_token[0, 0]]
            for y in range(0, 8, 2):
                for x in range(0, 8, 2):
                    patch = images[replica, image, :, y : y + 2, x : x + 2]
                    expected.append((model.patch_embed.proj.weight * patch).sum((1, 2, 3)) + model.patch_embed.proj.bias)
            torch.testing.assert_close(tokens[replica, image], torch.stack(expected) + model.pos_embed[0])


@pytest.mark.parametrize("global_pool", ["token", "avg"])
@pytest.mark.parametrize("attention", ["content", "positional"])
def test_with_bfloat16_copies_it_computes_the_same_to_their_rounding(attention: str, global_pool: str) -> None:
    models, network = networks(attention, torch.float32, global_pool=global_pool)
    weights, images = stacked(models), random_images(torch.float32)
    copies = {name: weight.detach().bfloat16() for name, weight in weights.items()}
    exact, rounded = network(weights, {}, images), network(weights, copies, images)
    assert (exact.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    error = (rounded.float() - exact).abs().max() / exact.abs().max()
    assert 0 < error < 0.03  # bfloat16 has 8 bits: 0.4 % in every rounding
    wanted, got = gradients_of(exact, weights), gradients_of(rounded, weights)
    for name, gradient in got.items():
        assert gradient.dtype == torch.float32  # the gradient of the weights, not of the copies
        assert (gradient - wanted[name]).norm() < 0.08 * wanted[name].norm(), name


def test_what_is_computed_with_is_the_copy() -> None:
    models, network = networks("content", torch.float32)
    weights, images = stacked(models), random_images(torch.float32)
    copies = {name: weight.detach().bfloat16() for name, weight in weights.items()}
    before = network(weights, copies, images)
    copies["blocks.1.mlp.fc1.weight"] = torch.zeros_like(copies["blocks.1.mlp.fc1.weight"])
    assert not torch.equal(network(weights, copies, images), before)


@pytest.mark.parametrize("out", [6, 8])  # less or more than 7
def test_product_is_a_linear_layer_per_replica_with_the_gradient_of_the_weight_itself(out: int) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(R, 5, 7, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(R, out, 7, generator=generator).requires_grad_()
    copy = weight.detach().bfloat16().requires_grad_()
    y = product(x, weight, copy)
    assert (y.dtype, y.shape) == (torch.bfloat16, (R, 5, out))
    for replica in range(R):
        expected = torch.nn.functional.linear(x[replica].float(), copy[replica].float())
        torch.testing.assert_close(y[replica].float(), expected, rtol=0.01, atol=0.01)
    dy = torch.randn(y.shape, generator=generator).bfloat16()
    y.backward(dy)
    assert x.grad is not None and weight.grad is not None
    assert copy.grad is None
    assert (x.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)
    assert weight.grad.stride() == weight.stride()
    torch.testing.assert_close(weight.grad, torch.einsum("rmo,rmi->roi", dy.float(), x.detach().float()), rtol=0.01, atol=0.03)
    torch.testing.assert_close(x.grad.float(), torch.einsum("rmo,roi->rmi", dy, copy).float(), rtol=0.01, atol=0.03)


def test_products_gradient_is_exact() -> None:
    generator = torch.Generator().manual_seed(4)
    x, weight = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 3, 5), (2, 4, 5)))
    assert torch.autograd.gradcheck(lambda x, w: product(x, w, w.detach()), (x.requires_grad_(), weight.requires_grad_()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler hides it
@pytest.mark.parametrize(
    ("attention", "precision"), [("content", torch.float32), ("positional", torch.float32), ("positional", torch.bfloat16)]
)
def test_the_compiler_takes_each_part_as_one_graph(attention: str, precision: torch.dtype) -> None:
    models, network = networks(attention, torch.float32)
    weights, images = stacked(models), random_images(torch.float32)
    copies = {} if precision == torch.float32 else {name: weight.detach().bfloat16() for name, weight in weights.items()}
    torch._dynamo.reset()
    compiled = network.compiled(partial(torch.compile, backend="aot_eager", dynamic=False, fullgraph=True))
    logits, expected = compiled(weights, copies, images), network(weights, copies, images)
    torch.testing.assert_close(logits, expected)
    ours, theirs = gradients_of(logits, weights), gradients_of(expected, weights)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=1e-3 * float(theirs[name].abs().max()), msg=name)
