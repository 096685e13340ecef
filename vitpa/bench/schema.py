"""One schema for all benchmarks: a `Case` is what is measured, a `Line` what it gave; the file of `--json` is a list of lines.

Nothing here needs torch: `vitpa sweep plan --speeds FILE` reads the lines on a login node (jobs/plan/speeds.py).
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from vitpa.arguments import ConfigError
from vitpa.config import RunConfig

Attention = Literal["content", "positional"]
Decoder = Literal["cpu", "gpu"]
ATTENTIONS: tuple[Attention, ...] = ("content", "positional")

RECIPES = {"small": "cifar10", "imagenet": "imagenet"}  # whose network each benchmark measures, unless overridden


class Case(BaseModel):
    """What is measured: whole training steps, or the loader alone."""

    model_config = ConfigDict(frozen=True, strict=True)

    model: Literal["vitpa", "timm", "vmap"] | None = "vitpa"  # whose steps; vmap: torch.func's; None: the loader alone
    attention: Attention | None  # None: no module
    step: Literal["auto", "graph", "compile", "eager"] | None  # runtime.step; None: no module
    augmentation: bool = True  # of the recipe, after the crop
    images: Literal["synthetic", "JPEG", "raw"] = "synthetic"  # random ones that lie on the device, or a .beton's
    decoder: Decoder | None = None  # of the images of a .beton
    loader: Literal["vitpa", "ffcv", "torchvision", "nvimagecodec"] = "vitpa"  # whose
    without: str | None = None  # the one of our mechanisms that is switched off
    gpus: int = Field(ge=1)  # or processes on the CPU
    batch_size: int = Field(ge=1)  # of one seed, over all GPUs
    replicas: int = Field(ge=1)  # runs in a step, which differ in their seeds
    differing: tuple[str, ...] = ()  # and in these keys

    @classmethod
    def of(cls, config: RunConfig, *, gpus: int = 1, replicas: int = 1, **values: Any) -> Self:
        """Training by `config`; `values`: the other fields.

        Raises:
            ConfigError: its network is no ViT.
        """
        if config.model.kind != "vit":
            raise ConfigError(f"model.kind={config.model.kind}: benchmarks measure ViTs; leave it out")
        has_model = values.get("model", "vitpa") is not None
        return cls(
            attention=config.model.attention if has_model else None,
            step=config.runtime.step if has_model else None,
            batch_size=config.train.global_batch_size,
            gpus=gpus,
            replicas=replicas,
            **values,
        )

    @property
    def name(self) -> str:
        """What is measured of a training, such as `training, JPEG, gpu`; `model` is one without augmentation."""
        if self.model is not None and not self.augmentation:
            words = ["model"]
        else:
            words = ["loader" if self.model is None else "training", self.images, *([self.decoder] if self.decoder else [])]
            if self.loader != "vitpa":
                words.append(self.loader)
        if self.differing:
            words.append(f"by {' x '.join(self.differing)}")
        if self.without:
            words.append(f"without {self.without}")
        return ", ".join(words if self.model in {None, "vitpa"} else [str(self.model), *words])

    def __str__(self) -> str:
        words = [self.name, self.attention, self.step, f"R={self.replicas}" if self.replicas > 1 else None]
        return " ".join(word for word in words if word)


class Kernel(BaseModel):
    """One of the kernels of a step, on the CPU one of torch's operations: all its calls together."""

    model_config = ConfigDict(frozen=True, strict=True)

    name: str
    share: float  # of the time of all kernels
    us_per_step: float
    calls_per_step: float


class Line(BaseModel):
    """A case and its figures. Ratios are None where the other line is not there, or would be this one."""

    model_config = ConfigDict(frozen=True, strict=True)

    case: Case
    images_per_s: float = Field(gt=0, allow_inf_nan=False)  # of all GPUs and seeds together, the median of the windows
    spread: float  # (largest - smallest window) / median
    peak_memory_gib: float | None  # of the first GPU; None: not on a GPU
    start_s: float  # until the first steps are done: building, compiling, capturing
    mfu: float | None  # model FLOPs utilisation: arithmetic / what bfloat16 matrix products alone reach; None: no module
    notes: tuple[str, ...] = ()
    kernels: tuple[Kernel, ...] = ()  # those that take most of a step, if asked for
    times_timm: float | None = None  # rate / that of timm's module
    times_one_gpu: float | None = None  # rate / that of the same on one GPU
    times_one_run: float | None = None  # rate / that of one run in a step
    of_synthetic: float | None = None  # rate / that of the same on images that lie on the device
    of_whole: float | None = None  # rate / that of the same with all mechanisms on
    cpu_cores: float | None = None  # seconds of the processor per second, of the main process
    memory_gib: float | None = None  # resident, of the main process, afterwards
