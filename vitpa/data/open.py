"""Opening a run's data: the files of both splits, where their images stay, what decodes them, the source of the batches."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vitpa.arguments import ConfigError
from vitpa.config import RunConfig
from vitpa.data.augment.pipeline import Augmentation, epoch_keys
from vitpa.data.beton import Beton, open_splits
from vitpa.data.decode.gpu import GpuDecoder, gpu_unsupported_reason
from vitpa.data.decode.segment_file import SegmentFile
from vitpa.data.holdout import without_val
from vitpa.data.loader import Feed, ResidentFeed, StreamedFeed
from vitpa.data.manifest import BetonError
from vitpa.data.residency import replicas_unsupported_reason, streaming_setting
from vitpa.data.resident import ResidentImages, decoded
from vitpa.data.staging import open_copy, staged
from vitpa.data.stream import StreamedImages
from vitpa.datasets import SPLITS
from vitpa.distributed import Group

LOGGER = logging.getLogger(__name__)
RESIDENT_SHARE = 0.5  # of the free memory of a GPU that the images may take
PREVIEW_IMAGES = 64
SEGMENTS = "jpeg_segments"  # the folder in runtime.root


@dataclass(frozen=True)
class Data:
    """The open data of the runs that are trained together."""

    feed: Feed  # the source of their batches
    num_samples: dict[str, int]  # images of each split
    beton_sha256: dict[str, str]  # checksum of each split
    num_classes: int  # K, the same for both

    def previews(self, configs: Sequence[RunConfig]) -> Tensor:
        """The first images of train, as the first epoch of the runs sees them: (R, B, 3, H, W) uint8."""
        seeds, img_size = [each.seed for each in configs], configs[0].train_img_size(0)
        samples = torch.arange(min(PREVIEW_IMAGES, self.num_samples["train"]))
        count, device = len(samples), self.feed.group.device
        if isinstance(self.feed, ResidentFeed):
            images = self.feed.images["train"].images[samples.to(device)]
        else:
            with closing(self.feed.images["train"].train_batches([samples], 0, img_size)) as batches:
                images = next(batches).images.clone()
        samples, keys = samples.to(device).repeat(len(seeds)), epoch_keys(seeds, 0).to(device).repeat_interleave(count, dim=0)
        augmentation = Augmentation.of(configs, img_size=img_size, device=device)
        images = augmentation.uint8(images.repeat(len(seeds), 1, 1, 1), samples, keys)
        return augmentation.permuted(images).view(len(seeds), count, *images.shape[1:])


def open_data(configs: Sequence[RunConfig], group: Group) -> Data:
    """Open the data of runs that may train together (vitpa/together.py).

    Raises:
        ConfigError: the configuration does not fit the data, the processes or the device.
        BetonError: the data cannot be used.
    """
    config = configs[0]
    batch_size = local_batch_size(config, group)
    betons = open_betons(config, group)
    num_samples = {split: len(beton) for split, beton in betons.items()}
    if num_samples["train"] < config.train.global_batch_size:
        raise ConfigError(
            f"train.global_batch_size={config.train.global_batch_size} is more than the {num_samples['train']} training images"
        )
    resident = images_are_resident(config, betons, group)
    reason = replicas_unsupported_reason(config) or (None if resident else "their images do not stay on the device")
    if reason is not None and len(configs) > 1:
        raise ConfigError(f"{len(configs)} runs cannot be trained together: {reason}; train them one by one")
    if resident:
        size, accum_steps = config.model.img_size, config.runtime.accum_steps
        images = {split: ResidentImages(*decoded(beton, size), device=group.device) for split, beton in betons.items()}
        seeds = [each.seed for each in configs]
        feed: Feed = ResidentFeed(images, group, seeds=seeds, batch_size=batch_size, accum_steps=accum_steps)
    else:
        feed = open_streamed(config, betons, group, batch_size=batch_size)
    return Data(
        feed=feed,
        num_samples=num_samples,
        beton_sha256={split: beton.manifest.beton_sha256 for split, beton in betons.items()},
        num_classes=len(betons["train"].manifest.class_names),
    )


def local_batch_size(config: RunConfig, group: Group) -> int:
    """Images of a micro-batch of this process: B.

    Raises:
        ConfigError: the batch cannot be divided among the processes and accumulation steps.
    """
    if reason := config.processes_unsupported_reason(group.world_size):
        raise ConfigError(f"{reason}; train it in one process, without torchrun")
    batch_size, accum_steps = config.train.global_batch_size, config.runtime.accum_steps
    if batch_size % (group.world_size * accum_steps):
        raise ConfigError(
            f"train.global_batch_size={batch_size} is not a multiple of {group.world_size} processes x "
            f"runtime.accum_steps={accum_steps}"
        )
    local = batch_size // (group.world_size * accum_steps)
    if config.augment.mixes and local % 2:
        raise ConfigError(
            f"augment.mixup_alpha, augment.cutmix_alpha: images are mixed in pairs, and a process has {local} at a time; "
            "change train.global_batch_size, runtime.accum_steps or the number of processes"
        )
    return local


def open_betons(config: RunConfig, group: Group) -> dict[str, Beton]:
    """The files of both splits, or with `train.holdout` two parts of train.

    With `runtime.stage_dir` they are copies on this node, which are made if need be.

    Raises:
        ConfigError: the data cannot be copied to the node.
        BetonError: a file is missing or damaged, or the splits have other classes.
    """
    dataset, data_dir = config.dataset, config.runtime.data_path
    if config.runtime.stage_dir is None:
        betons = open_splits(data_dir, dataset)
    else:
        copy = staged(data_dir, dataset, config.runtime.stage_dir, group)
        betons = {split: open_copy(copy, dataset, split) for split in SPLITS}
    train, val = betons["train"], betons["val"]
    if val.manifest.class_names != train.manifest.class_names:
        raise BetonError(f"{val.path}: has other classes than {train.path}; prepare both from one source")
    return without_val(train, config.train.holdout) if config.train.holdout else betons


def images_are_resident(config: RunConfig, betons: dict[str, Beton], group: Group) -> bool:
    """Whether the images stay on the device: where they may and fit there, or as the user says.

    If not they are streamed, which makes no difference to the numbers.

    Raises:
        ConfigError: the user says so, and they may not.
    """
    setting = streaming_setting(config, [beton.image_size_px for beton in betons.values()])
    if config.runtime.loader == "resident":
        if setting is not None:
            raise ConfigError(f"runtime.loader=resident takes whole images: no {setting}")
        return True
    if setting is not None:
        return False
    needed = sum(3 * int((beton.heights * beton.widths).sum()) for beton in betons.values())
    free = torch.cuda.mem_get_info(group.device)[0] if group.device.type == "cuda" else available_memory()
    fits = needed <= RESIDENT_SHARE * free
    if not fits and group.is_main:
        LOGGER.info(
            f"the images take {needed / 2**30:.2f} GiB, more than {100 * RESIDENT_SHARE:.0f} % of the {free / 2**30:.2f} GiB "
            f"that are free on {group.device}: they are streamed from {betons['train'].path.parent}"
        )
    return fits


def choose_decoder(config: RunConfig, beton: Beton, group: Group) -> Literal["cpu", "gpu"]:
    """What decodes images that are streamed: as the user says, else the GPU if it decodes one of `beton`.

    Raises:
        ConfigError: the GPU is asked for and cannot do it.
    """
    wanted = config.runtime.decoder
    if wanted == "cpu" or (wanted == "auto" and group.device.type == "cpu"):
        return "cpu"
    reason = gpu_unsupported_reason(beton, img_size=config.model.img_size, device=group.device)
    if reason is None:
        return "gpu"
    if wanted == "gpu":
        raise ConfigError(f"runtime.decoder=gpu: {reason}; set runtime.decoder=cpu")
    if group.is_main:
        LOGGER.info(f"images are decoded on the CPU, since the GPU cannot do it: {reason}")
    return "cpu"


def open_streamed(config: RunConfig, betons: dict[str, Beton], group: Group, *, batch_size: int) -> StreamedFeed:
    """The source of the batches of images that are decoded when they are needed."""
    decoder = choose_decoder(config, betons["train"], group)
    feed = streamed_feed(config, betons, group, batch_size=batch_size, decoder=decoder)
    for each in feed.images.values():
        if isinstance(each.decoder, GpuDecoder) and each.beton.is_jpeg.any():
            prepare_decoder(each.decoder, config.runtime.root_path / SEGMENTS, group)
    return feed


def prepare_decoder(decoder: GpuDecoder, folder: Path, group: Group) -> None:
    """Have a decoder know where the segments of its JPEGs begin: from a file in `folder`, or by reading all of them.

    Where there is no such file, the main process writes it.

    Raises:
        BetonError: a JPEG is damaged.
    """
    file = SegmentFile(folder, decoder.beton)
    found = None
    try:
        found = file.read()
    except OSError as error:
        if group.is_main:
            LOGGER.info(f"{file.path} cannot be read ({error.strerror}): it is made again")
    if found is not None and decoder.use_segments(found):
        return
    if group.is_main:
        LOGGER.info(f"{decoder.beton.path}: its JPEGs are read once, for the GPU to decode in parallel; later starts need not")
    decoder.prepare()
    if group.is_main:
        try:
            file.write(decoder.segments())
        except OSError as error:
            LOGGER.info(f"{file.path} cannot be written ({error.strerror}): the next start reads all JPEGs again")


def streamed_feed(
    config: RunConfig, betons: Mapping[str, Beton], group: Group, *, batch_size: int, decoder: Literal["cpu", "gpu"]
) -> StreamedFeed:
    """The source of the batches of images that `decoder` decodes; JPEGs are examined when their turn comes."""
    images = {
        split: StreamedImages(
            beton,
            config.augment,
            img_size=config.model.img_size,
            seed=config.seed,
            device=group.device,
            workers=config.runtime.workers or group.cpus,
            decoder=decoder,
        )
        for split, beton in betons.items()
    }
    return StreamedFeed(
        images,
        group,
        seed=config.seed,
        batch_size=batch_size,
        accum_steps=config.runtime.accum_steps,
        order=config.train.order,
    )


def random_reads_note(config: RunConfig, feed: Feed) -> str | None:
    """What to do about a file that is read in random order and that no page cache can hold; None if that is not so."""
    if isinstance(feed, ResidentFeed) or config.train.order != "random":
        return None
    beton, memory = feed.images["train"].beton, total_memory()
    size = beton.manifest.file_size_bytes
    if size <= memory:
        return None
    return (
        f"{beton.path} has {size / 2**30:.1f} GiB, more than this node's memory ({memory / 2**30:.1f} GiB), and every "
        "image is read by itself; if that is slow, train.order=quasi_random reads whole shards (it makes another run)"
    )


def available_memory() -> int:
    """Bytes of this machine's memory that can be had without swapping (proc(5), meminfo)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def memory_limit() -> int:
    """Bytes of memory that this process may have: this machine's, or less if its control group has a limit (cgroups(7))."""
    limits = [total_memory()]
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            folder = Path("/sys/fs/cgroup", controllers, path.lstrip("/"))
            for each in (folder, *folder.parents):
                with suppress(OSError, ValueError):  # no limit there, or the word max
                    limits.append(int((each / ("memory.limit_in_bytes" if controllers else "memory.max")).read_text()))
    return min(limits)


def total_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
