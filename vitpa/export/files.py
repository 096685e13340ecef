"""The exported network: model.safetensors with timm's parameter names, and config.json, from which it is built again.

config.json has the keys of timm's models on the Hugging Face Hub (`architecture`, `num_classes`, `model_args`,
`pretrained_cfg`). A content ViT is then timm's `create_model`; for the others `file` names a module exported beside it, which
needs torch, timm and jaxtyping, not vitpa.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vitpa.config import RunConfig
from vitpa.data.augment.permute import block_order
from vitpa.datasets import facts_of
from vitpa.documents import parse_json
from vitpa.installation import CODE
from vitpa.records import RunError, write_json

WEIGHTS, CONFIG = "model.safetensors", "config.json"
TIMM_VIT = "vit_small_patch16_224"  # any of timm's plain ViTs: `model_args` says all that differs between them
MODULES = {"positional": "PositionalVisionTransformer", "resnet18": "resnet18"}  # by network_name: what builds it
FILES = {"positional": "positional.py", "resnet18": "resnet.py"}  # of vitpa/models
TOLERANCE = 1e-6  # between the logits of the run's model and those of the exported one
CHECK_IMAGES = 8


def config_document(config: RunConfig, num_classes: int) -> dict[str, Any]:
    """What config.json says: the network, and how images are brought into the form that it takes."""
    model, facts = config.model, facts_of(config.dataset)
    args: dict[str, Any] = {}
    if model.kind == "vit":
        names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "global_pool")
        args = {name: getattr(model, name) for name in names} | {"class_token": bool(model.num_prefix_tokens)}
    document = {
        "architecture": {"content": TIMM_VIT}.get(config.network_name, config.network_name),
        "num_classes": num_classes,
        "model_args": args,
        "pretrained_cfg": {
            "input_size": [3, model.img_size, model.img_size],
            "mean": list(facts.mean),
            "std": list(facts.std),
            "crop_pct": config.augment.eval_crop_pct,
            "interpolation": "bilinear",
            "num_classes": num_classes,
        },
    }
    if config.network_name in FILES:
        document |= {"file": FILES[config.network_name], "builder": MODULES[config.network_name]}
    if block_px := config.augment.permute_block_px:
        order = block_order(model.img_size // block_px).tolist()
        document |= {"permute_block_px": block_px, "permute_block_order": order}
    return document


def write_network(config: RunConfig, model: nn.Module, num_classes: int, folder: Path) -> None:
    """Write the weights, the configuration, and the module that builds the network where timm has none."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / CONFIG, config_document(config, num_classes))
    if file := FILES.get(config.network_name):
        shutil.copyfile(CODE / "vitpa" / "models" / file, folder / file)


def rebuilt(folder: Path) -> nn.Module:
    """The network of an export, from its files alone, on the CPU, ready to evaluate."""
    document: dict[str, Any] = parse_json((folder / CONFIG).read_text(encoding="utf-8"))
    arguments = {**document["model_args"], "num_classes": document["num_classes"]}
    if "file" not in document:
        plain: nn.Module = timm.create_model(document["architecture"], **arguments, checkpoint_path=str(folder / WEIGHTS))
        return plain.eval()
    built: nn.Module = getattr(_module(folder / document["file"]), document["builder"])(**arguments)
    built.load_state_dict(load_file(folder / WEIGHTS))
    return built.eval()


def _module(path: Path) -> ModuleType:
    """The module in a file, whatever else is called so."""
    name = f"vitpa_exported_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


def check_images(img_size: int) -> Float[Tensor, "B 3 H W"]:
    """The images of the check: normal noise, the same each time."""
    return torch.randn(CHECK_IMAGES, 3, img_size, img_size, generator=torch.Generator().manual_seed(0))


def check(model: nn.Module, img_size: int, folder: Path) -> float:
    """The largest difference between the logits of `model` and those of the export in `folder`, on `check_images`.

    Raises:
        RunError: it is more than TOLERANCE, or the export cannot be loaded.
    """
    images = check_images(img_size)
    try:
        exported = rebuilt(folder)
        with torch.inference_mode():
            difference = float((exported(images) - model.eval()(images)).abs().max())
    except (RuntimeError, TypeError, ValueError, SafetensorError) as error:  # load_state_dict, create_model, the network
        reason = " ".join(str(error).split())
        raise RunError(
            f"not exported: the files do not load as the run's network ({reason}); try the versions of torch and timm "
            "that the run was trained with, as its env.json has them"
        ) from error
    if not difference <= TOLERANCE:
        raise RunError(
            f"not exported: reloaded, the weights give other logits than the run's model (by up to {difference:.3g}; allowed: "
            f"{TOLERANCE:g}); try the versions of torch and timm that the run was trained with, as its env.json has them"
        )
    return difference
