"""The shapes and types in signatures (jaxtyping) are true: checked while the eager paths run, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import beartype
from jaxtyping import TypeCheckError, install_import_hook
beartype.int_is_float = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))  # the hook takes a name
MODULES = ["vitpa.models", "vitpa.step", "vitpa.data.augment", "vitpa.data.loader", "vitpa.data.rng", "vitpa.data.resident",
           "vitpa.data.sampler"]
with install_import_hook(MODULES, "beartype.int_is_float"):
    import torch
    from vitpa.config_file import parse_config
    from vitpa.data.augment.pipeline import Augmentation, epoch_keys
    from vitpa.data.loader import ResidentFeed
    from vitpa.data.resident import ResidentImages
    from vitpa.data.sampler import train_batches
    from vitpa.distributed import Group
    from vitpa.models import build_model
    from vitpa.models.stacked import plain_mix
    from vitpa.optim import adamw, learning_rates
    from vitpa.step.step import ReplicaSteps

CPU, N, R = torch.device("cpu"), 16, 2
PLAIN = {"augment": {"policy": "none"}}
OTHERS = ["optim.lr=2e-4", "optim.betas=[0.8,0.9]", "optim.grad_clip_norm=null", "optim.label_smoothing=0.3",
          "model.drop_path_rate=0.3", "augment.erase_prob=0.9", "augment.cutout_px=2", "augment.cutmix_alpha=0.5",
          "augment.randaugment_magnitude=3"]
AUGMENTS = [
    {"crop": "padded", "policy": "autoaugment_cifar10", "erase_prob": 0.5, "erase_mode": "const", "cutout_px": 4},
    {"policy": "randaugment", "mixup_alpha": 0.8, "cutmix_alpha": 1.0},
    {"policy": "randaugment_timm", "erase_prob": 0.5, "erase_mode": "pixel", "permute_block_px": 4,
     "color_jitter": [0.3, 0.3, 0.3, 0.1]},
]


def refused(function, *arguments):
    try:
        function(*arguments)
    except TypeCheckError:
        return
    raise AssertionError(f"{function} takes what it should not")


def train(attention, augment, global_pool, others=()):
    model = {"attention": attention, "global_pool": global_pool}
    model |= {"img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}
    document = {"dataset": "cifar10", "augment": augment, "model": {**model, "drop_path_rate": 0.1},
                "train": {"global_batch_size": 4}, "runtime": {"device": "cpu", "step": "eager"}}
    config, *_ = configs = [parse_config(document, "here", each) for each in (["seed=0"], ["seed=1", *others])]
    group = Group(0, 1, 0, 1, CPU)
    images = {split: ResidentImages(torch.randint(256, (N, 3, 16, 16)).to(torch.uint8), torch.arange(N) % 10, device=CPU)
              for split in ("train", "val")}
    models = [build_model(**dict(config.model), num_classes=10, seed=seed) for seed in range(R)]
    logits = models[0](torch.zeros(2, 3, 16, 16))
    assert logits.shape == (2, 10)
    augmentation = Augmentation.of(configs, img_size=16, device=CPU)
    steps = ReplicaSteps(
        configs, group, models=models,
        optimizers=[adamw(model, lr=each.optim.lr, weight_decay=each.optim.weight_decay, betas=each.optim.betas,
                          eps=each.optim.eps, fused=False) for each, model in zip(configs, models)],
        feed=ResidentFeed(images, group, seeds=range(R), batch_size=4, accum_steps=1),
        learning_rates=learning_rates(configs, 8),
    )
    steps.prepare(0)
    steps.begin_epoch(0, 0)
    for _ in range(2):
        steps.load()
        steps.step()
    assert steps.evaluate()[:, 3].tolist() == [N, N]
    return models[0], augmentation


for attention, augment, global_pool in zip(("content", "positional", "content"), AUGMENTS, ("token", "avg", "token")):
    train(attention, augment, global_pool, OTHERS)
    model, augmentation = train(attention, augment, global_pool)
    if attention == "positional":
        model.attention_maps()
        refused(model, torch.zeros(2, 1, 16, 16))  # no three channels
keys, images = epoch_keys([0], 0), torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
refused(augmentation, images.float(), torch.arange(4), keys)  # no uint8
refused(augmentation, images, torch.arange(3), keys)  # an image without its number
refused(plain_mix, torch.zeros(2, 2, 5, 4), torch.zeros(2, 3, 5, 2, 4))  # no square matrices
list(train_batches(seed=0, epoch=0, num_samples=N, global_batch_size=8, accum_steps=2, rank=0, world_size=2, start_step=0))
"""


@pytest.mark.slow
def test_eager_paths_keep_to_the_shapes_in_their_signatures() -> None:
    got = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert got.returncode == 0, got.stderr
