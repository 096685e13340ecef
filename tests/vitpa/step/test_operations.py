"""Which operations a network runs on a GPU: the sizes that kernels take, and the trial that they must pass."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from triton.runtime.errors import OutOfResources

from vitpa.config import ModelConfig, TorchOperation
from vitpa.config_file import load_config, shipped_configs
from vitpa.kernels.attention import attention
from vitpa.kernels.gelu import bias_gelu
from vitpa.kernels.mixing import mix
from vitpa.kernels.norm import add_norm
from vitpa.kernels.tiled_attention import tiled_attention
from vitpa.kernels.tiled_mixing import tiled_mix
from vitpa.models import build_model
from vitpa.models.stacked import PLAIN, StackedViT
from vitpa.step.operations import candidates, choose_operations, kernels_unsupported_reason, trial, trial_inputs

H100_SHARED_MEMORY = 233472
CPU = torch.device("cpu")


def model_of(**changes: Any) -> ModelConfig:
    """The paper's small ViT, changed."""
    return ModelConfig.model_validate({**dict(load_config(shipped_configs()["cifar10"]).model), **changes})


@pytest.mark.parametrize(
    ("changes", "content", "positional", "norm"),
    [
        ({}, attention, mix, add_norm),
        ({"img_size": 224, "patch_size": 16}, tiled_attention, tiled_mix, add_norm),
        ({"img_size": 256, "patch_size": 8}, None, tiled_mix, add_norm),
        ({"num_heads": 8}, None, None, add_norm),
        ({"embed_dim": 4096, "num_heads": 64}, attention, mix, None),
    ],
)
def test_the_first_candidate_is_the_fastest_that_takes_the_sizes(
    changes: dict[str, Any], content: Any, positional: Any, norm: Any
) -> None:
    for kind, name, expected in (("content", "attention", content), ("positional", "mix", positional)):
        found = candidates(model_of(attention=kind, **changes), H100_SHARED_MEMORY)
        first = {name: [each.kernel for each in some if each.unsupported_reason is None][:1] for name, some in found.items()}
        wanted = {name: expected, "add_norm": norm, "bias_gelu": bias_gelu}
        assert first == {name: [] if kernel is None else [kernel] for name, kernel in wanted.items()}


def test_why_no_kernel_runs_is_said() -> None:
    assert kernels_unsupported_reason((9, 0), torch.bfloat16) is None
    assert "train.precision=float32" in str(kernels_unsupported_reason((9, 0), torch.float32))
    assert "compute capability 7.5, and they need 8.0" in str(kernels_unsupported_reason((7, 5), torch.bfloat16))
    assert choose_operations(model_of(), device=CPU, dtype=torch.float32, num_images=8) == (PLAIN, [])


@pytest.mark.parametrize("name", PLAIN._fields)
def test_an_operation_passes_its_own_trial_and_a_wrong_one_does_not(name: str) -> None:
    model = model_of(drop_path_rate=0.1, embed_dim=32, num_heads=2)
    inputs = trial_inputs(name, model, 3, device=CPU, dtype=torch.bfloat16)
    operation = getattr(PLAIN, name)

    def wrong_values(*arguments: Any) -> Any:
        out = operation(*arguments)
        return out * 1.03 if isinstance(out, Tensor) else (out[0], out[1] * 1.03)

    def wrong_gradient(first: Tensor, *rest: Any) -> Any:
        return operation(first * 1.5 - first.detach() * 0.5, *rest)

    def not_a_number(*arguments: Any) -> Any:
        out = wrong_values(*arguments)
        return out * torch.nan if isinstance(out, Tensor) else (out[0], out[1] * torch.nan)

    assert trial(operation, operation, inputs) is None
    assert "wrong_values computes something else on this GPU: relative error 0.0" in str(
        trial(wrong_values, operation, inputs)
    )
    assert "wrong_gradient computes something else" in str(trial(wrong_gradient, operation, inputs))
    assert "not_a_number computes something else on this GPU: relative error nan" in str(
        trial(not_a_number, operation, inputs)
    )


def test_a_kernel_that_does_not_run_is_named_with_the_cause() -> None:
    inputs = trial_inputs("bias_gelu", model_of(), 2, device=CPU, dtype=torch.bfloat16)

    def too_large(*_: Tensor) -> Tensor:
        raise OutOfResources(254208, 232448, "shared memory")

    def no_memory(*_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("none left")

    reason = str(trial(too_large, PLAIN.bias_gelu, inputs))
    assert reason.startswith(
        "too_large does not run on this GPU (OutOfResources: out of resource: shared memory, Required: 254208"
    )
    with pytest.raises(torch.OutOfMemoryError):
        trial(no_memory, PLAIN.bias_gelu, inputs)


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
SHAPES: list[dict[str, Any]] = [  # legal ones besides those of the shipped recipes; the operations without a kernel
    {},
    {"img_size": 224, "patch_size": 16, "embed_dim": 192, "num_heads": 3, "mlp_ratio": 4.0, "drop_path_rate": 0.1},
    {"img_size": 28, "embed_dim": 64, "num_heads": 2},
    {"img_size": 32, "patch_size": 2, "embed_dim": 96, "num_heads": 3},  # 257 tokens
    {"img_size": 240, "patch_size": 16, "embed_dim": 64, "num_heads": 4},  # 226 tokens
    {"img_size": 30, "patch_size": 2, "embed_dim": 64, "num_heads": 1},  # 226 tokens, head_dim 64
    {"patch_size": 8, "embed_dim": 96, "num_heads": 2},  # head_dim 48
    {"img_size": 33, "patch_size": 11, "embed_dim": 50, "num_heads": 5, "mlp_ratio": 0.1},  # head_dim 10
    {"patch_size": 32, "embed_dim": 64, "num_heads": 2},  # 2 tokens
    {"global_pool": "avg"},  # 64 tokens
    {"global_pool": "avg", "patch_size": 16, "embed_dim": 64, "num_heads": 2, "drop_path_rate": 0.1},  # 4 tokens
    {"patch_size": 16, "embed_dim": 128, "num_heads": 1},  # head_dim 128
    {"embed_dim": 30, "num_heads": 1},
    {"embed_dim": 8, "num_heads": 1},
    {"embed_dim": 4096, "num_heads": 64, "depth": 1},
    {"img_size": 256, "patch_size": 8, "embed_dim": 64, "num_heads": 1},  # 1,025 tokens
]


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["content", "positional"])
@pytest.mark.parametrize("changes", [*SHAPES, *shipped_configs()], ids=str)
def test_every_shape_runs_or_falls_back_with_a_note(changes: dict[str, Any] | str, kind: str, dtype: torch.dtype) -> None:
    if isinstance(changes, str):
        changes = dict(load_config(shipped_configs()[changes]).model)
    model, device, images_per_batch = model_of(**{"depth": 2, **changes, "attention": kind}), torch.device("cuda"), 4
    operations, notes = choose_operations(model, device=device, dtype=dtype, num_images=images_per_batch)
    without = [name for name in ("attention" if kind == "content" else "mix", "add_norm", "bias_gelu")
               if getattr(operations, name) is getattr(PLAIN, name)]  # fmt: skip
    if dtype == torch.float32:
        assert (len(without), len(notes)) == (3, 1)
    else:
        assert [note.split()[0] for note in notes] == without
        assert not any("on this GPU" in note for note in notes)  # what does not fit is known without trying

    network = build_model(**dict(model), num_classes=10, seed=1).to(device)
    exact = {name: value.detach().float()[None].requires_grad_() for name, value in network.named_parameters()}
    weights = {name: value.detach().clone().requires_grad_() for name, value in exact.items()}
    copies = {} if dtype == torch.float32 else {name: value.detach().to(dtype) for name, value in weights.items()}
    images = torch.randn(1, images_per_batch, 3, model.img_size, model.img_size, device=device)
    labels = torch.arange(images_per_batch, device=device)
    found = []
    for chosen, values, rounded in ((PLAIN, exact, {}), (operations, weights, copies)):
        vit = StackedViT(model.attention, model.patch_size, model.depth, model.num_heads, chosen, model.global_pool)
        loss = F.cross_entropy(vit(values, rounded, images)[0].float(), labels)
        found.append(torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, list(values.values()))]))
    expected, got = found
    assert float((got - expected).norm() / expected.norm()) < (1e-4 if dtype == torch.float32 else 0.05)


def test_the_operations_to_do_without_are_those_that_have_kernels() -> None:
    assert get_args(TorchOperation) == (*PLAIN._fields, "policy", "erase")


@pytest.mark.gpu
@on_gpu
def test_operations_are_torchs_own_on_request() -> None:
    model, device = model_of(), torch.device("cuda")
    names = [name for name in PLAIN._fields if name != "mix"]
    for without in ([], ["attention"], names):
        chosen, notes = choose_operations(
            model, device=device, dtype=torch.bfloat16, num_images=8, torch_operations=without
        )  # fmt: skip
        assert [name for name in names if getattr(chosen, name) is getattr(PLAIN, name)] == without
        assert notes == []
