"""The command `vitpa train`, also started as `python -m vitpa.train` and `torchrun -m vitpa.train`.

It reads the command line, claims the runs that are not finished, trains them, and turns an error into one line. The training
itself is vitpa/train.py.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import os
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import torch

from vitpa import distributed
from vitpa.arguments import ConfigError, path_argument, whole_numbers
from vitpa.attempt import check_free, check_unedited, claimed_attempt
from vitpa.clock import Clock
from vitpa.config import RunConfig
from vitpa.config_file import Override, keys_help, load_config, record_config
from vitpa.data.beton import open_splits
from vitpa.data.manifest import BetonError
from vitpa.data.open import memory_limit
from vitpa.distributed import Group
from vitpa.errors import run_command
from vitpa.records import RunError, make_folders
from vitpa.rundir import CLAIMED
from vitpa.snapshot import not_kept
from vitpa.step.fit import GIB, state_bytes
from vitpa.terminal import printable_output
from vitpa.together import MAX_REPLICAS, alternatives, check_together, keys_that_may_differ
from vitpa.train import TrainError, train

LOGGER = logging.getLogger(__name__)


@printable_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 if the runs are finished or were stopped on request, 1 with one line for an error of the user's."""
    clock = Clock.of_process()
    options = command_parser().parse_intermixed_args(arguments)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # without the line of code it comes from

    def run() -> int:
        paths = [options.config, *options.others]
        configs = configs_of(paths, options.overrides, options.seeds)
        if CLAIMED in os.environ:  # whoever claimed the attempts has looked, too, but a moment ago
            for path, config in zip(paths, configs, strict=True):
                check_unedited(path, config)
        group = distributed.init_process_group(configs[0].runtime.device)
        try:
            return train_unfinished(configs, group, clock)
        except torch.OutOfMemoryError as error:
            raise TrainError(out_of_memory_line(error, configs)) from error
        finally:
            distributed.destroy_process_group()

    interrupted = "interrupted; the same command continues from the newest checkpoint"
    return run_command("vitpa train", run, interrupted=interrupted)


def command_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="vitpa train",
        description="Train one run, or several together that differ in their seeds or in settings that do not shape the step, "
        "from the newest checkpoints if there are any.",
        epilog="examples: vitpa train cifar10 model.attention=positional seed=3 train.epochs=30\n"
        "          vitpa train cifar10 --seeds 0,1,2,3,4\n"
        "          vitpa train cifar10 optim.lr=5e-4,1e-3 optim.weight_decay=0.05,0.1 --seeds 0,1   (8 runs in one step)\n\n"
        f"settings that may differ between runs in one step:\n  {', '.join(keys_that_may_differ())}\n\nkeys:\n{keys_help()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=path_argument, help="a YAML file, or the name of a shipped recipe such as cifar10")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="a.b=value",
        help="change a value of the configuration; several, with commas between, of a setting that may differ: a run for each",
    )
    parser.add_argument(
        "--seeds", type=seed_list, metavar="S,S,...", help="train these seeds together, each as a run of its own"
    )
    parser.add_argument(
        "--with",
        dest="others",
        action="append",
        default=[],
        type=path_argument,
        metavar="CONFIG",
        help="train the run of this file in the same step, too; may be given several times",
    )
    return parser


def configs_of(paths: Sequence[Path], overrides: Sequence[str], seeds: Sequence[int] | None) -> list[RunConfig]:
    """The runs that a command asks for: of each configuration one for every combination of values and seeds.

    Raises:
        ConfigError: a configuration cannot be used, the runs cannot train together or are too many, or a seed is asked for
            twice.
    """
    for override in overrides:
        if seeds is not None and override.startswith("seed="):
            raise ConfigError(f"{override} and --seeds: say one of the two")
    chosen = [alternatives(override) for override in overrides]
    if seeds is not None:
        chosen.append([Override("seed", seed) for seed in seeds])
    num_runs = len(paths) * math.prod(map(len, chosen))
    if num_runs > MAX_REPLICAS:
        raise ConfigError(
            f"{num_runs:,} runs in one step: at most {MAX_REPLICAS:,}; name fewer seeds, values or files (a sweep takes "
            "several steps by itself)"
        )
    configs = [load_config(path, each) for path in paths for each in itertools.product(*chosen)]
    check_together(configs)
    return configs


def seed_list(text: str) -> list[int]:
    """The seeds in a text such as 0,1,2."""
    seeds = whole_numbers(0)(text)
    if len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"{text}: a seed comes up twice")
    return seeds


def train_unfinished(configs: Sequence[RunConfig], group: Group, clock: Clock | None = None) -> int:
    """Claim the runs that are not finished, and train them; the exit code of this process.

    Raises:
        ConfigError, BetonError, RunError, OSError: in the main process, if one of them cannot be had; 1 in the others.
    """
    with ExitStack() as stack:
        unfinished: list[int] = []
        refused: Exception | None = None
        if group.is_main:  # it alone looks: on NFS a node may see the files of another one seconds later
            try:
                if len(configs) > 1 and group.world_size > 1:
                    raise ConfigError("several runs are trained together by one process, without torchrun")
                check_memory(configs, group.device)
                unfinished = [number for number, config in enumerate(configs) if can_be_trained(config)]
                for number in unfinished:  # once all can be: none is left with an attempt that failed for another
                    stack.enter_context(claimed(configs[number]))
            except (ConfigError, BetonError, RunError, OSError) as error:
                refused = error
        unfinished, stays_out = group.broadcast((unfinished, refused is not None))
        if refused is not None:
            raise refused
        if stays_out:  # all processes end, not only the main one
            return 1
        if unfinished:
            train([configs[number] for number in unfinished], group, clock=clock)
    return 0


def check_memory(configs: Sequence[RunConfig], device: torch.device) -> None:
    """Refuse runs whose weights and optimisers alone are more than the device's memory: on a CPU nothing else would.

    Raises:
        ConfigError: they are.
    """
    if len(configs) < 2:
        return
    on_gpu, each = device.type == "cuda", state_bytes(configs[0])
    memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else memory_limit()
    if len(configs) * each > memory:
        raise ConfigError(
            f"{len(configs):,} runs in one step: their weights, gradients and optimiser states alone take "
            f"{len(configs) * each / GIB:.1f} GiB of the {memory / GIB:.1f} GiB of {'the GPU' if on_gpu else 'memory'}; at "
            f"most {memory // each:,} fit: name fewer seeds, values or files"
        )


def claimed(config: RunConfig) -> AbstractContextManager[None]:
    """Hold a run for this process."""
    return claimed_attempt(config.run_dir, takeover=config.runtime.takeover, last_epoch=config.last_epoch)


def can_be_trained(config: RunConfig) -> bool:
    """Make the run's folder and see whether there is something to train; False if it is finished.

    Raises:
        BetonError: its data cannot be used; the run is as it was.
        RunError: its directory cannot be used, or another process trains it.
        OSError: it cannot be made or written.
    """
    root = config.runtime.root_path
    try:
        make_folders(root)
    except (FileExistsError, FileNotFoundError, NotADirectoryError) as error:
        raise RunError(f"runtime.root={root}: cannot be made a folder ({error.strerror}); name another one") from error
    run = record_config(config)
    if (result := run.result()) is not None:
        LOGGER.info(f"{run.result_json}: the run is finished already")
        if note := not_kept(run, config.runtime.keep_epochs, result.steps // result.epochs, result.steps):
            LOGGER.warning(note)
        return False
    if not config.runtime.stage_dir:  # else the node may have a copy
        for beton in open_splits(config.runtime.data_path, config.dataset).values():
            beton.close()
    check_free(run, takeover=config.runtime.takeover)
    return True


def out_of_memory_line(error: torch.OutOfMemoryError, configs: Sequence[RunConfig]) -> str:
    """What to do about a GPU whose memory is too small, in a line."""
    first, num_runs = str(error).partition(". ")[0], len(configs)
    if num_runs > 1:
        return f"the GPU's memory is too small for {num_runs} runs together; train fewer (in a sweep: replicas) ({first})"
    advice = "raise runtime.accum_steps" if configs[0].model.kind == "vit" else "lower train.global_batch_size"
    return f"the GPU's memory is too small; {advice} ({first})"
