"""What a run is: its typed configuration, and the signature that names it.

`runtime` is the one section that must not change the numbers; it stays out of the signature.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from vitpa import image_sizes
from vitpa.arguments import FLOAT, expand_path, parse_float, parse_integer
from vitpa.rundir import Result, RunDir

MAX_PX, MAX_CPUS, MAX_STEPS = 8192, 1024, 10**9  # what is beyond is a slip, which must not hang or fill the memory
EXPERIMENT_VERSION = 1  # raise it when the same configuration starts to mean another experiment


def _number(value: object) -> object:
    """A string that is a number in YAML is meant as one: '1e-3' in quotes."""
    if isinstance(value, str) and FLOAT.fullmatch(value):
        number = parse_float(value)
        if number is None:
            raise PydanticCustomError("float64", "Input should be a finite number that float64 can hold")
        return number
    whole = parse_integer(value) if isinstance(value, str) else None
    return value if whole is None else float(whole)


Float = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]


def name_validator(letters: str, characters: str) -> AfterValidator:
    """What refuses a name of other characters than these letters, as of a class in a pattern, digits, _ and -."""

    def check(name: str) -> str:
        if not re.fullmatch(rf"[{characters}0-9][{characters}0-9_\-]*", name):
            raise PydanticCustomError("name", f"take {letters}, digits, _ and -, and begin with a letter or digit")
        return name

    return AfterValidator(check)


class Section(BaseModel):
    """One part of a configuration: immutable, no unknown keys, no silent conversion between types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelConfig(Section):
    """The network, in timm's names; of `kind` resnet18 nothing but img_size counts. Changes the numbers."""

    kind: Literal["vit", "resnet18"] = Field(
        "vit", description="resnet18: timm's with a 3x3 stem, a baseline that relies on neighbouring pixels"
    )
    attention: Literal["content", "positional"] = Field("content", description="what the attention matrix depends on")
    img_size: int = Field(32, ge=1, le=MAX_PX, description="height and width of the input, pixels")
    patch_size: int = Field(4, ge=1, le=MAX_PX, description="height and width of a patch, pixels")
    embed_dim: int = Field(384, ge=1, le=65_536, description="width D of the token vectors")
    depth: int = Field(7, ge=1, le=1024, description="number of blocks")
    num_heads: int = Field(12, ge=1, le=4096, description="attention heads per block")
    mlp_ratio: Float = Field(1.0, gt=0, le=100, description="hidden width of the MLP as a multiple of embed_dim")
    drop_path_rate: Float = Field(0.0, ge=0, lt=1, description="stochastic depth at the last block; 0 at the first")
    pos_embed_std: Float = Field(0.02, ge=1e-9, le=1e3, description="standard deviation of the initial positional encoding")
    global_pool: Literal["token", "avg"] = Field(
        "token", description="what the head sees: the class token, or (avg) the mean of all patches, without a class token"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind != "vit":
            if self.attention != "content":
                raise ValueError(
                    f"model.attention={self.attention} is for model.kind=vit; model.kind={self.kind} has no attention"
                )
            return self
        if self.embed_dim % self.num_heads:
            raise ValueError(f"model.embed_dim={self.embed_dim} is not a multiple of model.num_heads={self.num_heads}")
        if self.img_size % self.patch_size:
            raise ValueError(f"model.img_size={self.img_size} is not a multiple of model.patch_size={self.patch_size}")
        if int(self.embed_dim * self.mlp_ratio) < 1:
            raise ValueError(
                f"model.mlp_ratio={self.mlp_ratio} of model.embed_dim={self.embed_dim} is less than 1 hidden unit"
            )
        return self

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens of an image before those of its patches: the class token, or none."""
        return int(self.global_pool == "token")

    @property
    def num_tokens(self) -> int:
        """Tokens N of an image, the class token included."""
        return (self.img_size // self.patch_size) ** 2 + self.num_prefix_tokens


class AugmentConfig(Section):
    """What happens to training images, drawn per sample from (seed, epoch, sample). Changes the numbers."""

    crop: Literal["none", "padded", "random_resized"] = Field("padded", description="how a training crop is taken")
    crop_padding_px: int = Field(4, ge=0, le=1024, description="padded: zero pixels added on each side before the crop")
    crop_scale: tuple[Float, Float] = Field((0.08, 1.0), description="random_resized: range of the crop's share of area")
    crop_ratio: tuple[Float, Float] = Field((0.75, 4 / 3), description="random_resized: range of its width / height")
    hflip: bool = Field(True, description="mirror half of the images left to right")
    policy: Literal[
        "none", "autoaugment_cifar10", "autoaugment_svhn", "autoaugment_imagenet", "randaugment", "randaugment_timm"
    ] = Field("none", description="random operations after crop and flip, as in torchvision, or RandAugment as in timm")
    randaugment_num_ops: int = Field(2, ge=1, le=100, description="randaugment(_timm): operations per image")
    randaugment_magnitude: int = Field(
        9, ge=0, le=30, description="randaugment: their strength, a bin of 0 to 30; _timm: its mean, 0 to 10"
    )
    randaugment_magnitude_std: Float = Field(0.5, ge=0, le=100, description="randaugment_timm: its standard deviation")
    color_jitter: tuple[Annotated[Float, Field(ge=0, le=1e3)], ...] = Field(
        (),
        description="brightness, contrast, saturation and, if wanted, hue, as of torchvision's ColorJitter, after the policy; "
        "[] for none",
        examples=["[0.4,0.4,0.4]"],
    )
    erase_prob: Float = Field(0.0, ge=0, le=1, description="share of the images of which a random rectangle is erased")
    erase_mode: Literal["const", "pixel"] = Field("const", description="erased: the mean colour, or noise in each pixel")
    erase_scale: tuple[Float, Float] = Field((0.02, 0.33), description="erased: range of the rectangle's share of area")
    erase_ratio: tuple[Float, Float] = Field((0.3, 3.3), description="erased: range of its height / width")
    cutout_px: int = Field(0, ge=0, le=MAX_PX, description="side of a square erased around a random pixel, pixels; 0 for none")
    mixup_alpha: Float = Field(0.0, ge=0, le=1e3, description="mixup of pairs, with weights of Beta(alpha, alpha); 0 for none")
    cutmix_alpha: Float = Field(0.0, ge=0, le=1e3, description="cutmix of pairs, shares of Beta(alpha, alpha); 0 for none")
    mixup_switch_prob: Float = Field(0.5, ge=0, le=1, description="share of the pairs for cutmix where mixup is on, too")
    permute_block_px: int = Field(
        0,
        ge=0,
        le=MAX_PX,
        description="side of blocks that stand in one random order in every image, train and val; 0: as is",
    )
    eval_crop_pct: Float = Field(1.0, ge=0.1, le=1, description="img_size / short side before the centre crop at evaluation")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("crop_scale", "crop_ratio", "erase_scale", "erase_ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"augment.{name}=[{low}, {high}] is not a range of positive numbers")
            if name.endswith("_scale") and high > 1:
                raise ValueError(f"augment.{name}=[{low}, {high}] goes beyond the whole image (1.0)")
        if self.color_jitter and len(self.color_jitter) not in (3, 4):
            raise ValueError(
                f"augment.color_jitter={list(self.color_jitter)}: expected [brightness, contrast, saturation], "
                "[brightness, contrast, saturation, hue], or [] for none"
            )
        if any(hue > 0.5 for hue in self.color_jitter[3:]):
            raise ValueError(f"augment.color_jitter={list(self.color_jitter)}: the hue, the last, must be at most 0.5")
        if self.policy == "randaugment_timm" and self.randaugment_magnitude > 10:
            raise ValueError(
                f"augment.randaugment_magnitude={self.randaugment_magnitude}: augment.policy=randaugment_timm takes 0 to 10"
            )
        return self

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs: by mixup, cutmix or both."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0


class OptimConfig(Section):
    """AdamW, its schedule and the loss. Changes the numbers."""

    lr: Float = Field(1e-3, ge=1e-12, le=1e38, description="peak learning rate, reached at the end of the warm-up")
    min_lr: Float = Field(1e-5, ge=0, le=1e38, description="learning rate at the last step (cosine)")
    warmup_epochs: Float = Field(5.0, ge=0, le=1e6, description="epochs of linear warm-up from 0")
    weight_decay: Float = Field(0.05, ge=0, le=1e3, description="AdamW's decoupled decay, on weight matrices only")
    betas: tuple[Float, Float] = Field((0.9, 0.999), description="AdamW's running-average coefficients")
    eps: Float = Field(1e-8, ge=1e-30, le=1.0, description="AdamW's epsilon")
    label_smoothing: Float = Field(0.1, ge=0, lt=1, description="share of the target spread over all classes")
    grad_clip_norm: Float | None = Field(1.0, ge=1e-12, le=1e12, description="bound on the gradient's 2-norm; null for none")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"optim.min_lr={self.min_lr} is above optim.lr={self.lr}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas={list(self.betas)}: each must be in [0, 1)")
        return self


class TrainConfig(Section):
    """How long and in what batches. Changes the numbers."""

    epochs: int = Field(300, ge=1, le=100_000, description="passes over the training set")
    global_batch_size: int = Field(
        128, ge=1, le=1_048_576, description="images per optimiser step over all processes and accumulation steps"
    )
    ema_decay: Float = Field(
        0.0, ge=0, lt=1, description="of a moving average of the weights, evaluated beside them, which then counts; 0: none"
    )
    precision: Literal["float32", "bfloat16"] = Field("bfloat16", description="autocast type of the forward pass")
    order: Literal["random", "quasi_random"] = Field(
        "random",
        description="of an epoch's images; quasi_random: read in shards, for a .beton larger than the node's memory",
    )
    image_sizes: tuple[tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1, le=MAX_PX)]], ...] = Field(
        (),
        description="[[epoch, px], ...]: from which epoch on (0: the first) training images have which size; []: one size",
        examples=["[[0,96],[200,224]]"],
    )
    holdout: Float = Field(
        0.0,
        ge=0,
        le=0.5,
        description="share of each class of train, an image at least, that replaces val, to choose a recipe by; 0: val itself",
    )


TorchOperation = Literal["attention", "mix", "add_norm", "bias_gelu", "policy", "erase"]  # those for which there are kernels


class RuntimeConfig(Section):
    """Where and how it runs. Must not change the numbers (beyond rounding); not part of the signature."""

    root: str = Field("outputs", description="folder of runs/ and sweeps/")
    data_dir: str = Field("data", description="folder with <dataset>/train.beton and val.beton")
    stage_dir: str | None = Field(
        None, description="folder on the node's own disk, such as $TMPDIR, to which they are copied first; null: not at all"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA where there is a GPU")
    accum_steps: int = Field(1, ge=1, le=65_536, description="gradient accumulation steps per optimiser step")
    step: Literal["auto", "graph", "compile", "eager"] = Field(
        "auto", description="how a step runs: as one CUDA graph, compiled, or as it is; auto: the fastest that can be had"
    )
    torch_operations: tuple[TorchOperation, ...] = Field(
        (),
        description="operations that a GPU does as torch's own instead of our kernels, to compare them or to do without one: "
        f"{', '.join(get_args(TorchOperation))}",
        examples=[f"[{get_args(TorchOperation)[0]}]"],
    )
    compile_cache: str | None = Field(
        "auto", description="folder with what was compiled for later starts; auto: compiled/ in root; null: none is kept"
    )
    cpu_threads: int | None = Field(
        None, ge=1, le=MAX_CPUS, description="torch's threads per process; null: the CPUs allowed / processes"
    )
    workers: int | None = Field(
        None, ge=1, le=MAX_CPUS, description="decoding threads per process; null: the CPUs allowed / processes"
    )
    runs_per_gpu: int = Field(1, ge=1, le=1000, description="runs that share each GPU; gpu_hours counts this run's share")
    loader: Literal["auto", "resident", "stream"] = Field("auto", description="auto: on the device if all images are one size")
    decoder: Literal["auto", "cpu", "gpu"] = Field(
        "auto",
        description="what decodes streamed images; the pixels of JPEGs differ by about a grey level; auto: gpu if it can",
    )
    eval_every_epochs: int = Field(
        1, ge=1, le=100_000, description="epochs between evaluations; the last epoch is always evaluated"
    )
    log_every_steps: int = Field(50, ge=1, le=MAX_STEPS, description="optimiser steps between rows of metrics.jsonl")
    checkpoint_every_s: Float = Field(60.0, ge=0, le=1e9, description="seconds between checkpoints")
    checkpoint_every_steps: int | None = Field(
        None, ge=1, le=MAX_STEPS, description="optimiser steps between checkpoints, besides"
    )
    keep_epochs: tuple[Annotated[int, Field(ge=1, le=100_000)], ...] = Field(
        (),
        description="epochs after which the weights are kept for `vitpa analyze`, such as [1, 10, 100]",
        examples=["[1,10,100]"],
    )
    stop_after_epoch: int | None = Field(
        None,
        ge=1,
        le=100_000,
        description="epoch after which the run pauses, and can be gone on with; null: none before its end",
    )
    poll_every_steps: int = Field(
        10,
        ge=1,
        le=MAX_STEPS,
        description="steps between looks at the clock and at the file `stop`",
    )
    tensorboard: bool = Field(True, description="write TensorBoard logs beside metrics.jsonl")
    takeover: bool = Field(False, description="resume a run last seen alive on another host")

    @property
    def root_path(self) -> Path:
        """`root` with `~` and variables expanded."""
        return expand_path(self.root, "runtime.root")

    @property
    def compile_cache_path(self) -> Path | None:
        """`compile_cache` with `~` and variables expanded."""
        if self.compile_cache == "auto":
            return self.root_path / "compiled"
        return None if self.compile_cache is None else expand_path(self.compile_cache, "runtime.compile_cache")

    def compiles(self, device_type: str) -> bool:
        """Whether a step is compiled on such a device: cpu or cuda."""
        return self.step != "eager" and (self.step != "auto" or device_type == "cuda")

    @property
    def data_path(self) -> Path:
        """`data_dir` with `~` and variables expanded."""
        return expand_path(self.data_dir, "runtime.data_dir")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.stage_dir is not None and not self.stage_dir.startswith(("/", "~", "$")):
            raise ValueError(
                f"runtime.stage_dir={self.stage_dir}: expected an absolute path, or one that begins with ~ or a variable "
                "such as $TMPDIR; null for none"
            )
        return self


class RunConfig(Section):
    """One run, its seed included."""

    dataset: Annotated[str, name_validator("lower-case letters", "a-z")] = Field(
        description="name under which `vitpa prep` made the .beton"
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, description="of initialisation, order and augmentation")
    model: ModelConfig = ModelConfig()
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    experiment_version: int = Field(
        EXPERIMENT_VERSION, ge=1, le=EXPERIMENT_VERSION, description="raised when a configuration changes its meaning"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.optim.warmup_epochs > self.train.epochs:
            raise ValueError(f"optim.warmup_epochs={self.optim.warmup_epochs} is longer than train.epochs={self.train.epochs}")
        if late := [epoch for epoch in self.runtime.keep_epochs if epoch > self.train.epochs]:
            raise ValueError(f"runtime.keep_epochs has {late[0]}, which is beyond train.epochs={self.train.epochs}")
        if self.last_epoch > self.train.epochs:
            raise ValueError(f"runtime.stop_after_epoch={self.last_epoch} is beyond train.epochs={self.train.epochs}")
        if self.train.order == "quasi_random" and self.runtime.loader == "resident":
            raise ValueError(
                "train.order=quasi_random is for images that are streamed; leave out runtime.loader=resident, or set "
                "train.order=random"
            )
        if self.augment.cutout_px > self.model.img_size:
            raise ValueError(f"augment.cutout_px={self.augment.cutout_px} is more than model.img_size={self.model.img_size}")
        if self.augment.permute_block_px and self.model.img_size % self.augment.permute_block_px:
            block_px = self.augment.permute_block_px
            raise ValueError(f"augment.permute_block_px={block_px} does not divide model.img_size={self.model.img_size}")
        for name, used in {"crop": self.augment.crop == "random_resized", "erase": self.augment.erase_prob > 0}.items():
            low, high = getattr(self.augment, f"{name}_scale")
            if used and high * self.model.img_size**2 < 1:
                raise ValueError(
                    f"augment.{name}_scale=[{low}, {high}] is less than a pixel of model.img_size={self.model.img_size}"
                )
        if reason := self._image_sizes_unsupported_reason():
            raise ValueError(reason)
        if self.train.global_batch_size % self.runtime.accum_steps:
            raise ValueError(
                f"train.global_batch_size={self.train.global_batch_size} is not a multiple of "
                f"runtime.accum_steps={self.runtime.accum_steps}"
            )
        if self.augment.mixes and self.train.global_batch_size // self.runtime.accum_steps % 2:
            raise ValueError(
                "augment.mixup_alpha and augment.cutmix_alpha mix images in pairs: make train.global_batch_size / "
                f"runtime.accum_steps={self.train.global_batch_size // self.runtime.accum_steps} even, or both 0"
            )
        return self

    @model_validator(mode="after")
    def _check_batch_norm(self) -> Self:
        kind = self.model.kind
        if kind == "vit":
            return self
        if self.train.global_batch_size == 1:
            raise ValueError(f"train.global_batch_size=1: the batch norm of model.kind={kind} takes 2 images at least")
        if self.runtime.accum_steps > 1:
            raise ValueError(
                f"runtime.accum_steps={self.runtime.accum_steps}: the batch norm of model.kind={kind} takes the "
                "statistics of a whole batch; it must be 1"
            )
        if self.train.ema_decay:
            raise ValueError(
                f"train.ema_decay={self.train.ema_decay}: the batch norm of model.kind={kind} has no statistics of averaged "
                "weights; it must be 0"
            )
        return self

    def experiment(self) -> dict[str, Any]:
        """Everything that may change the numbers: the whole resolved document without `runtime`."""
        document = self.model_dump(mode="json", exclude={"runtime"})
        # these keys are younger than many runs, which were all so
        if self.train.order == "random":
            del document["train"]["order"]
        if not self.train.ema_decay:
            del document["train"]["ema_decay"]
        if not self.train.image_sizes:
            del document["train"]["image_sizes"]
        if not self.train.holdout:
            del document["train"]["holdout"]
        if not self.augment.color_jitter:
            del document["augment"]["color_jitter"]
        if not self.augment.permute_block_px:
            del document["augment"]["permute_block_px"]
        if self.model.global_pool == "token":
            del document["model"]["global_pool"]
        if self.model.kind == "vit":
            del document["model"]["kind"]
        else:  # the other keys are those of a ViT
            document["model"] = {key: document["model"][key] for key in ("kind", "attention", "img_size")}
        return document

    def network(self) -> dict[str, Any]:
        """What a benchmark's figures hold for: the section `model` without the attention, and the precision."""
        return {**self.model.model_dump(mode="json", exclude={"attention"}), "precision": self.train.precision}

    def _image_sizes_unsupported_reason(self) -> str | None:
        model, augment = self.model, self.augment
        return image_sizes.unsupported_reason(
            self.train.image_sizes,
            epochs=self.train.epochs,
            kind=model.kind,
            img_size=model.img_size,
            patch_size=model.patch_size,
            crop=augment.crop,
            permute_block_px=augment.permute_block_px,
            cutout_px=augment.cutout_px,
        )

    def processes_unsupported_reason(self, processes: int) -> str | None:
        """Why so many processes cannot train it together; None if they can."""
        if self.model.kind == "vit" or processes <= 1:
            return None
        whole = "its batch norm takes the statistics of a whole batch"
        return f"model.kind={self.model.kind}: {whole}, and {processes} processes have a part of it each"

    def train_img_size(self, epoch: int) -> int:
        """Height and width of the training images of an epoch (from 0 on), pixels; an evaluation's have model.img_size."""
        sizes = self.train.image_sizes
        return image_sizes.size_in(sizes, epoch) if sizes else self.model.img_size

    @property
    def last_epoch(self) -> int:
        """Epochs trained when this execution is over: all, unless it pauses before."""
        return self.runtime.stop_after_epoch or self.train.epochs

    @property
    def evaluated_on(self) -> str:
        """The images of its evaluations, for people: val, or such as held-out 10 % of train."""
        if not self.train.holdout:
            return "val"
        minimum = ", at least 1 image of each class" if self.train.holdout < 0.01 else ""  # which is often more than the share
        return f"held-out {100 * self.train.holdout:g} % of train{minimum}"

    @property
    def top1_name(self) -> str:
        """What a line about the run calls its accuracy."""
        return f"{'held-out' if self.train.holdout else 'val'} top-1{' (EMA)' if self.train.ema_decay else ''}"

    @property
    def top1_metric(self) -> str:
        """The metric in the rows of metrics.jsonl that counts."""
        return "ema_val/top1" if self.train.ema_decay else "val/top1"

    @property
    def network_name(self) -> str:
        """The network, for people: the attention of a ViT, or another kind, such as resnet18."""
        return self.model.attention if self.model.kind == "vit" else self.model.kind

    @property
    def signature(self) -> str:
        """The run's identity: 16 hex digits of SHA-256 over the canonical JSON of `experiment()`."""
        canonical = json.dumps(self.experiment(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @property
    def run_dir(self) -> RunDir:
        """Where the run lives: `<runtime.root>/runs/<signature>`."""
        return RunDir(self.runtime.root_path, self.signature)

    def contradiction_of(self, result: Result) -> str:
        """What a result says otherwise than this configuration; empty if nothing."""
        says = {"dataset": self.dataset, "attention": self.model.attention, "seed": self.seed}
        says |= {"epochs": self.train.epochs, "holdout": self.train.holdout}
        for key, value in says.items():
            if getattr(result, key) not in (value, None):
                return f"says {key} {getattr(result, key)}, its configuration {value}"
        return ""
