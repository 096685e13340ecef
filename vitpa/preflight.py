"""What a node must pass before a training starts on it: GPUs, CPUs, data and disk. Torch-free without GPUs.

    python -m vitpa.preflight CONFIG [a.b=c ...] --gpus N [--cpus N] [--min-free-gib X]

Whatever can hang (a GPU, a network file system) is looked at by child processes, which are given up at the deadline. Each
check says what it blames: `node` (another node may do), `data` (no node will), `disk` (short of room now, on all nodes), `run`
(what was asked for).
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from vitpa.arguments import ConfigError, literal_path, number, path_argument, whole_number
from vitpa.config import RunConfig
from vitpa.config_file import keys_help, load_config
from vitpa.data.beton import Beton
from vitpa.data.manifest import BetonError, beton_path
from vitpa.datasets import SPLITS
from vitpa.documents import DocumentError, parse_json
from vitpa.room import GIB, is_full, shortage
from vitpa.terminal import printable, printable_output

Blame = Literal["node", "data", "disk", "run"]

MEMORY_WAIT_S = 15.0  # what ended just now may take as long to let go of a GPU's memory
USERS_OWN = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR)  # the same on every node
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)  # likewise, when writing
PRODUCT_SIDE = 1024
PASSED_ON = ("gpus", "min-free-gib", "max-used-gib", "deadline-s")  # options, to child processes


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `blames` is whose fault it is, or would be."""

    name: str
    ok: bool
    detail: str
    blames: Blame


def check_cpus(wanted: int) -> Check:
    """Whether this process may use as many CPUs as the job asked for; srun does not hand them on by itself."""
    found = len(os.sched_getaffinity(0))
    hint = "" if found >= wanted else f" of {wanted} asked for; start it with srun --cpus-per-task={wanted}"
    return Check("cpus", found >= wanted, f"{found} CPUs{hint}", "node")


def check_files(config: RunConfig, options: argparse.Namespace) -> Iterator[Check]:
    """The disk that takes the results, and both splits of the data."""
    yield check_disk(config.runtime.root_path, options.min_free_gib)
    for split in SPLITS:
        yield check_data(beton_path(config.runtime.data_path, config.dataset, split), config.dataset, split)


def check_disk(root: Path, min_free_gib: float) -> Check:
    """Whether there is room below `root` and it can be written to.

    Too little room blames neither the node nor the run: results are written to a disk that all nodes share.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        short = shortage(root, min_free_gib)
        free_gib = shutil.disk_usage(root).free / GIB
    except OSError as error:
        blames: Blame = "disk" if is_full(error) else "run" if error.errno in NOT_WRITABLE else "node"
        return Check("disk", False, f"{root}: cannot be written to ({error.strerror})", blames)
    detail = f"{short}; make room" if short else f"{root}: {free_gib:.1f} GiB free"
    return Check("disk", not short, detail, "disk")


def check_data(path: Path, dataset: str, split: str) -> Check:
    """Whether a .beton is there, whole, and what its manifest says; its images are not read."""
    name = f"data_{split}"
    try:
        with Beton.open(path, dataset, split) as beton:
            return Check(name, True, f"{path}: {len(beton)} images", "data")
    except BetonError as error:
        return Check(name, False, str(error), "data")
    except OSError as error:
        detail = f"{path}: cannot be read ({error.strerror})"
        return Check(name, False, detail, "data" if error.errno in USERS_OWN else "node")


def check_gpus(config: RunConfig, options: argparse.Namespace) -> Iterator[Check]:
    """The GPUs that torch sees: how many, whether they are free, and whether they multiply."""
    try:
        import torch  # noqa: PLC0415 - costs seconds, and a node without GPUs needs none of it
    except ImportError as error:
        yield Check("torch", False, f"cannot be imported: {error}", "run")
        return
    visible, wanted = torch.cuda.device_count(), options.gpus
    among = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
    detail = f"{visible} visible GPUs, {wanted} expected (CUDA_VISIBLE_DEVICES: {among})"
    more = "; the job is not bound to its own: ask for whole nodes, or for all GPUs of one"
    yield Check(
        "gpu_count", visible == wanted, detail + (more if visible > wanted else ""), "run" if visible > wanted else "node"
    )
    for index in range(min(visible, wanted)):
        checks = {
            "memory": partial(memory_is_free, index, config, options.max_used_gib),
            "product": partial(multiplies, torch.device("cuda", index)),
        }
        for what, check in checks.items():
            try:
                ok, detail = check()
            except RuntimeError as error:  # CUDA's errors are
                ok, detail = False, str(error).splitlines()[0]
            yield Check(f"gpu{index}_{what}", ok, detail, "node")


def memory_is_free(index: int, config: RunConfig, max_used_gib: float) -> tuple[bool, str]:
    """Whether nobody else uses a GPU, and how much memory is in use. Runs that share GPUs expect others."""
    import torch  # noqa: PLC0415

    deadline_s = time.monotonic() + MEMORY_WAIT_S
    while True:
        free, total = torch.cuda.mem_get_info(index)
        used_gib = (total - free) / GIB
        detail = f"{used_gib:.2f} of {total / GIB:.1f} GiB in use"
        if used_gib <= max_used_gib or config.runtime.runs_per_gpu > 1:
            return True, detail
        if time.monotonic() > deadline_s:
            return False, f"{detail} before the training starts, by processes that are not ours"
        time.sleep(1)


def multiplies(device: Any) -> tuple[bool, str]:
    """Whether a device multiplies matrices as the CPU does.

    Their entries are -1, 0 and 1 and no sum comes near 256, so that every number type and every order of summation is exact.
    """
    import torch  # noqa: PLC0415

    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-1, 2, (PRODUCT_SIDE, PRODUCT_SIDE), generator=draw).double() for _ in range(2))
    expected = a @ b
    for dtype in (torch.float32, torch.bfloat16):
        got = (a.to(device, dtype) @ b.to(device, dtype)).double().cpu()
        if wrong := int((got != expected).sum()):
            return False, f"{wrong} of {expected.numel()} entries of a {dtype} matrix product are wrong"
    return True, "matrix products are exact"


class Probe:
    """Checks that are made by a child process, because they can hang."""

    def __init__(self, kind: str, names: Sequence[str], arguments: Sequence[str], deadline_s: float) -> None:
        self.names = names  # in the order in which they are made
        self.limit_s = deadline_s
        self.ends_s = time.monotonic() + deadline_s
        command = [sys.executable, "-m", "vitpa.preflight", *arguments, "--only", kind]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def checks(self) -> list[Check]:
        """What the child has found by the deadline; what it was at then has failed."""
        try:
            output, errors = self.process.communicate(timeout=max(0.0, self.ends_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            try:
                output, errors = self.process.communicate(timeout=1)
            except subprocess.TimeoutExpired as stuck:  # in the kernel, where no signal reaches it: leave it
                output, errors = stuck.output or b"", b""
            return self._with_missing(output, f"no answer in {self.limit_s:g} s", "node")
        sys.stderr.write(errors.decode(errors="replace"))
        code = self.process.returncode
        if code == 0:
            return self._with_missing(output, "", "node")
        last = (errors.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        if code < 0:  # SIGBUS: a page of a file could not be read
            return self._with_missing(output, f"the check was killed by {signal.Signals(-code).name}", "node")
        return self._with_missing(output, f"the check failed: {last}", "run")

    def _with_missing(self, output: bytes, why: str, blames: Blame) -> list[Check]:
        lines = output[: output.rfind(b"\n") + 1].splitlines()
        found = [check for check in map(_check, lines) if check is not None]
        missing = [name for name in self.names if name not in {check.name for check in found}]
        return found + ([Check(missing[0], False, why, blames)] if why and missing else [])


def _check(line: bytes) -> Check | None:
    """The check that a child has printed; None for what a library prints."""
    try:
        return Check(**parse_json(line))
    except (DocumentError, TypeError):
        return None


def report(config: RunConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Make all checks and say what they found."""
    began_s = time.monotonic()
    ours = [f"--{name}={getattr(options, name.replace('-', '_'))}" for name in PASSED_ON]
    arguments = [literal_path(options.config), *options.overrides, *ours]
    probes = [Probe("files", ["disk", *(f"data_{split}" for split in SPLITS)], arguments, options.deadline_s)]
    if config.runtime.device != "cpu" and options.gpus:
        names = ["gpu_count", *(f"gpu{index}_{what}" for index in range(options.gpus) for what in ("memory", "product"))]
        probes.append(Probe("gpus", names, arguments, options.deadline_s))
    checks = [check_cpus(options.cpus), *(check for probe in probes for check in probe.checks())]
    return {
        "ok": all(check.ok for check in checks),
        "host": socket.gethostname(),
        "checks": [asdict(check) for check in checks],
        "duration_s": round(time.monotonic() - began_s, 3),
    }


@printable_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """The command: prints the report; 0 if the checks could be made, passed or not, 1 for an error of the user's."""
    parser = argparse.ArgumentParser(
        prog="python -m vitpa.preflight",
        description="Check whether this node can train a run; prints a JSON object.",
        epilog=f"example: python -m vitpa.preflight cifar10 --gpus 4 --cpus 32\n\nkeys:\n{keys_help()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=path_argument, help="a YAML file, or the name of a shipped recipe such as cifar10")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="change a value of the configuration")
    parser.add_argument(
        "--gpus",
        type=whole_number(0, 1024),
        required=True,
        help="GPUs that the job has on this node; not looked at on the CPU",
    )
    parser.add_argument(
        "--cpus", type=whole_number(1, 65_536), default=1, help="CPUs that the job has on this node (default: %(default)s)"
    )
    parser.add_argument("--min-free-gib", type=number(0), default=1.0, help="room below runtime.root (default: %(default)s)")
    parser.add_argument(
        "--max-used-gib",
        type=number(0),
        default=1.5,
        help="memory of a GPU in use, of which this check's own CUDA context is about 0.5 (default: %(default)s)",
    )
    parser.add_argument(
        "--deadline-s", type=number(0, 86_400), default=120.0, help="after which a check counts as hung (default: %(default)s)"
    )
    parser.add_argument("--only", choices=("files", "gpus"), help="make these checks in this process, a line each")
    options = parser.parse_intermixed_args(arguments)
    try:
        config = load_config(options.config, options.overrides)
        if config.runtime.device == "cuda" and not options.gpus:
            raise ConfigError("runtime.device=cuda with --gpus 0: ask for GPUs, or set runtime.device=cpu")
    except (ConfigError, OSError) as error:
        print(f"vitpa preflight: {printable(str(error))}", file=sys.stderr)
        return 1
    if options.only is None:
        print(json.dumps(report(config, options)))
        return 0
    signal.alarm(max(1, round(options.deadline_s)) + 5)  # ends, too, if nobody is left to end it
    for check in (check_files if options.only == "files" else check_gpus)(config, options):
        print(json.dumps(asdict(check)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
