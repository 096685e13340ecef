"""What was compiled for a step, for later starts of the same: on other nodes, after a requeue, of other seeds.

A training compiles into a folder of its own on the node's disk. From `runtime.compile_cache` it first gets what an earlier
training of the same kind has compiled (compile_archive.py), and when it has compiled more it puts all of it there. What the
same kind is says `kind_of_step`: the same code, versions, hardware and shape of the step. Within it Inductor and Triton find
by hashes of their own what they can use; what they do not find they compile.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config as functorch

from vitpa.code_version import code_version
from vitpa.config import RunConfig
from vitpa.data.private_folder import NotOursError, PrivateFolder
from vitpa.distributed import Group
from vitpa.environment import version_of
from vitpa.records import Holder, ProcessId, RunError, read_record, write_json
from vitpa.step import compiler_cache
from vitpa.step.compile_archive import ArchiveError, files_in, read_archive, write_archive
from vitpa.together import step_shape

LOGGER = logging.getLogger(__name__)
VARIABLES = {compiler_cache.VARIABLE: "inductor", "TRITON_CACHE_DIR": "triton"}  # with the folders that they name here
# keys of `runtime` that may change what is compiled
SHAPING = ("accum_steps", "step", "device", "loader", "decoder", "torch_operations")
OWNER, KIND = "process.json", "kind.json"


@dataclass
class CompileCache:
    """Of one training: its folder on this node, and the archive for later ones."""

    archive: Path
    folder: Path
    group: Group
    kept: set[Path] = field(default_factory=set)  # what the archive has of the folder

    def load(self, kind: dict[str, Any]) -> None:
        """Take over what an earlier training of this kind has compiled, if there is anything."""
        try:
            found = read_archive(self.archive, self.folder)
            write_json(self.folder / KIND, kind)  # for people who look into an archive
        except (ArchiveError, OSError) as error:
            self._say(f"what was compiled before is not used: {_line(error)}; it is compiled again")
            shutil.rmtree(self.folder, ignore_errors=True)  # half of it may be there
            self.folder.mkdir(exist_ok=True)
            return
        if found:
            self.kept = set(files_in(self.folder))

    def save(self) -> None:
        """Keep what was compiled, if there is anything new; to be called by all processes when they have compiled."""
        self.group.all_gather(None)
        if not self.group.is_main or (files := set(files_in(self.folder))) <= self.kept:
            return
        try:
            write_archive(self.archive, self.folder)
            self.kept = files
        except (ArchiveError, OSError) as error:
            self._say(f"what was compiled is not kept for later starts: {_line(error)}")

    def _say(self, text: str) -> None:
        if self.group.is_main:
            LOGGER.info(text)


@contextmanager
def compile_cache(configs: Sequence[RunConfig], group: Group) -> Iterator[CompileCache | None]:
    """Have Inductor and Triton compile into a folder of this training's own, with what earlier ones have compiled.

    None, and nothing is done, where nothing is compiled, `runtime.compile_cache` is null, or the user has named a folder for
    Inductor.
    """
    config = configs[0]
    archives = config.runtime.compile_cache_path
    if archives is None or compiler_cache.is_named() or not config.runtime.compiles(group.device.type):
        yield None
        return
    with ExitStack() as stack:
        folder = None
        if group.local_rank == 0:
            try:
                folder = stack.enter_context(_own_folder())
            except (NotOursError, OSError) as error:
                LOGGER.info(f"what was compiled is neither taken over nor kept: {_line(error)}")
        # the processes of a node share a folder
        folder = group.all_gather(folder)[group.rank - group.local_rank]
        if folder is None:
            yield None
            return
        kind = kind_of_step(configs, group)
        cache = CompileCache(archives / f"{_name(kind)}.zip", folder, group)
        if group.local_rank == 0:
            cache.load(kind)
        group.all_gather(None)
        stack.enter_context(_compiling_into(folder))
        yield cache


def hash_compilers() -> None:
    """Have threads hash the files of torch and Triton, which are in the keys of all that is compiled.

    Half a gigabyte is read for that. Inductor would do it when it looks for the first graph, and wait for it.
    """
    from torch._inductor import codecache  # noqa: PLC0415 - loads the compiler

    for name in ("torch_key", "triton_key"):
        prefetch = getattr(getattr(codecache, name, None), "prefetch", None)
        if prefetch is not None:  # torch 2.14 has it, earlier ones may not
            prefetch()


def graph_counts() -> tuple[int, int]:
    """How many graphs this process has compiled so far, and how many it has found compiled, by Inductor's own counters."""
    from torch._dynamo.utils import counters  # noqa: PLC0415 - loads the compiler

    of = counters["inductor"]
    return of["fxgraph_cache_miss"] + of["fxgraph_cache_bypass"], of["fxgraph_cache_hit"]


def kind_of_step(configs: Sequence[RunConfig], group: Group) -> dict[str, Any]:
    """All that what is compiled depends on, and that Inductor and Triton may not look at themselves.

    They do not see the code of our operations, nor what our kernels are called with.
    """
    config, cuda = configs[0], group.device.type == "cuda"
    shape = json.loads(step_shape(config))
    shape["runtime"] = {key: shape["runtime"][key] for key in SHAPING}
    return {
        "code_version": code_version(),
        "python": platform.python_version(),
        "libc": platform.libc_ver(),  # an older one does not load what was linked with a newer one
        "versions": {name: version_of(name) for name in ("torch", "triton", "timm")},
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name(group.device) if cuda else None,
        "cpu": _cpu(),
        "processes": [group.world_size, group.local_world_size],
        "replicas": len(configs),
        "step": shape,
    }


def _name(kind: dict[str, Any]) -> str:
    """Of the archive: for people, and a hash."""
    step = kind["step"]
    words = (step["dataset"], step["model"]["attention"], f"r{kind['replicas']}")
    return "-".join([*words, hashlib.sha256(json.dumps(kind, sort_keys=True).encode()).hexdigest()[:16]])


def _cpu() -> str:
    """The processor and what it can do: host code is compiled for it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    facts = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    return hashlib.sha256("\n".join(sorted(set(facts))).encode()).hexdigest()[:16]


@contextmanager
def _own_folder() -> Iterator[Path]:
    """A new folder on this node's disk, which goes at the end; those of processes that were killed go, too."""
    with PrivateFolder.open(Path(tempfile.gettempdir()) / f"vitpa-compiled-{os.geteuid()}") as private:
        parent = private.path
        for name in private.names():
            with suppress(RunError):
                owner = read_record(Holder, parent / name / OWNER)
                if owner is not None and owner.process.alive() is False:
                    shutil.rmtree(parent / name, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(dir=parent))
    try:
        write_json(folder / OWNER, {"process": ProcessId.mine().model_dump()})
        (folder / "compiled").mkdir()
        yield folder / "compiled"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _compiling_into(folder: Path) -> Iterator[None]:
    """Have the compilers use that folder.

    Inductor then also keeps graphs with a torch.autograd.Function. By itself it would not, since it does not know whether the
    function is the same; here it is, as the code is.
    """
    allow = {"autograd_cache_allow_custom_autograd_functions": True}
    with ExitStack() as stack:
        if all(hasattr(functorch, name) for name in allow):  # since torch 2.7
            stack.enter_context(functorch.patch(allow))
        before = {name: os.environ.get(name) for name in VARIABLES}
        os.environ |= {name: str(folder / its) for name, its in VARIABLES.items()}
        _forget_paths()
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
            _forget_paths()


def _forget_paths() -> None:
    """Have Inductor, if it is loaded, forget the paths of files in another folder."""
    utils = sys.modules.get("torch._inductor.utils")
    for name in ("clear_caches", "clear_inductor_caches"):  # the second until torch 2.8
        if utils is not None and hasattr(utils, name):
            getattr(utils, name)()
            return


def _line(error: Exception) -> str:
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
