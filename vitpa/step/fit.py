"""How much memory of a GPU runs of one shape take that train together as replicas.

Arithmetic on the configuration; nothing is measured, and no torch is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vitpa.config import RunConfig

GIB = 2**30
COPY_BYTES_PER_PARAMETER = 2  # for products in bfloat16
BYTES_PER_PARAMETER = 4 + 8 + 4 + COPY_BYTES_PER_PARAMETER  # weights, AdamW's two moments, gradients, the copy
EMA_BYTES_PER_PARAMETER = 4 + 2  # with train.ema_decay the average of the weights, and its copy
KEPT_PER_TOKEN = 9  # vectors of D that a block keeps for its backward pass: inputs of both norms, norms, q, k, v, mixed, ...
KEPT_PER_HIDDEN = 2  # vectors of the MLP's hidden width: before and after its non-linearity
CLASSES = 1000  # of the head, at most; of a small data set it is nothing beside the rest
FIXED_GIB = 1.5  # CUDA's context, cuBLAS's and the compiler's workspace
MARGIN = 1.25  # for what is not counted: batches on their way, the val split, fragmentation


def memory_gib(config: RunConfig, replicas: int, num_train_images: int) -> float:
    """Memory of a GPU, in GiB, on which so many replicas of this configuration train; an estimate on the safe side.

    On an H200 the cifar10 recipe, 1, 5 and 10 replicas, had 0.95, 3.3 and 6.3 GiB in use at the most, without CUDA's own;
    the estimates are 2.8, 5.6 and 9.2 (vitpa/bench/results/small_h200.json).
    """
    model = config.model
    image_bytes = 3 * model.img_size**2
    kept = KEPT_PER_TOKEN + KEPT_PER_HIDDEN * model.mlp_ratio
    bytes_per_value = 2 if config.train.precision == "bfloat16" else 4
    batch_size = config.train.global_batch_size // config.runtime.accum_steps
    activations = model.depth * model.num_tokens * model.embed_dim * kept * bytes_per_value * batch_size
    bytes_per_parameter = BYTES_PER_PARAMETER + (EMA_BYTES_PER_PARAMETER if config.train.ema_decay else 0)
    per_replica = num_parameters(config) * bytes_per_parameter + activations
    return MARGIN * ((replicas * per_replica + num_train_images * image_bytes) / GIB + FIXED_GIB)


def state_bytes(config: RunConfig) -> int:
    """Bytes that the weights, gradients and AdamW's moments of one replica take at least, without the head."""
    copies = config.train.precision == "bfloat16"
    return num_parameters(config, classes=0) * (BYTES_PER_PARAMETER - (0 if copies else COPY_BYTES_PER_PARAMETER))


def num_parameters(config: RunConfig, classes: int = CLASSES) -> int:
    """Parameters of the network, about; its attention has four square matrices per block, its MLP two."""
    model, D = config.model, config.model.embed_dim
    blocks = model.depth * (4 + 2 * model.mlp_ratio) * D * D
    return round(blocks) + D * (3 * model.patch_size**2 + model.num_tokens + classes)
