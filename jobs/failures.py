"""Why an attempt failed, from what its processes printed and what its exit record says.

A failure of several processes is told by the first that failed for a reason of its own: the others only report that they
have lost it, and torchrun, which started them, prints a traceback of its own that says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Cause:
    """A kind of failure."""

    name: str
    pattern: str  # of a line
    advice: str  # one line: how to fix it


CAUSES = (  # the first that matches; what follows from other failures comes last
    Cause(
        "cuda out of memory",
        r"CUDA out of memory|OutOfMemoryError|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED",
        "do a batch in several parts, which does not change the numbers: retry with runtime.accum_steps=2; "
        "or fewer runs_per_gpu or replicas in the profile",
    ),
    Cause(
        "host out of memory",
        r"\b(_Array)?MemoryError\b|std::bad_alloc|[Cc]an(no|')t allocate memory|\[Errno 12\]|OUT_OF_MEMORY|host out of memory",
        "ask for more memory (`mem` in a SLURM profile), or retry with a smaller runtime.workers",
    ),
    Cause(
        "staging",
        r"runtime\.stage_dir=",
        "read from the shared disk: retry with runtime.stage_dir=null; or name a larger folder of the nodes in the profile",
    ),
    Cause(
        "disk full",
        r"No space left on device|\[Errno 28\]|Disk quota exceeded|PytorchStreamWriter failed writing|are wanted; make room",
        "free space or quota where --root is, then submit, or retry what is failed: it goes on from its newest checkpoint",
    ),
    Cause(
        "not finite",
        r"became non-finite",
        "lower optim.lr, lengthen optim.warmup_epochs or set train.precision=float32, in the recipe: it is another run then",
    ),
    Cause(
        "missing data",
        r"`vitpa prep \w|\.beton: no such file|No such file or directory: .*\.beton",
        "make it with `vitpa prep` where every node can read it, or say where it is with --data-dir",
    ),
    Cause(
        "import error",
        r"(ModuleNotFoundError|ImportError): |No module named |cannot open shared object file",
        "install what is missing into the environment that submits, where every node can read it",
    ),
    Cause(
        "node",
        r"CUDA error: (uncorrectable|hardware|.*ECC)|[Uu]ncorrectable (ECC|NVLink)|ECC error|no CUDA-capable device"
        r"|No CUDA GPUs are available|Found no NVIDIA driver|busy or unavailable|fallen off the bus"
        r"|CUDA driver initialization failed|system not yet initialized|pre-flight",
        "the node is at fault, not the run: retry; if it comes back, leave the node out (`exclude`) and tell its keepers",
    ),
    Cause(
        "nccl",
        r"NCCL error|\bnccl[A-Z]\w+Error|Watchdog caught|gloo/transport|DistBackendError|DistNetworkError|DistStoreError"
        r"|RendezvousTimeoutError|RendezvousConnectionError|[Cc]onnection (closed|reset|refused)",
        "processes lost each other: look for an earlier failure in every node's log; if there is none, the network: retry",
    ),
    Cause(
        "killed by a signal",
        r"killed by SIG|Signal \d+ \(SIG\w+\) received|Segmentation fault|Fatal Python error",
        "by the kernel if memory ran out (ask for more, see the node's log), or by a person; then retry",
    ),
)
ENDED_EARLY = Cause(
    "job ended early",
    r"ended (\([\w ]+\) )?before it started the run",
    "fix what it says (`setup` in the profile, the Python that submits, the disk below --root), then retry",
)
OTHER = Cause("other", "", "fix what the last lines of the log say, then retry")
LOST_A_PEER = CAUSES[-2].pattern

_PREFIX = re.compile(r"^\[(?:rank|default)\d+\]: ?")  # of torch and of torchrun --tee
_TRACEBACK = "Traceback (most recent call last)"
_CHAINED = ("During handling of the above exception", "The above exception was the direct cause")
_OUR_ERROR = re.compile(r"^vitpa [\w.]+: ")
_TORCHRUN = re.compile(r"^[EWI]\d{4} .* torch/distributed/|^\*{20,}$")
_TORCHRUN_FAILED = ("torch/distributed/elastic/", "ChildFailedError")


def cause_of(reason: str, log_tail: str) -> Cause:
    """The cause of a failure, by exit.json's `reason` and the last part of the attempt's log, or of all its logs."""
    log = log_tail.splitlines()
    told = _message(essence(log) or log[-30:])
    texts = [told] if told and is_loss_of_peer(reason) else [reason, told]
    return next((cause for cause in (*CAUSES, ENDED_EARLY) for text in texts if re.search(cause.pattern, text)), OTHER)


def is_loss_of_peer(reason: str) -> bool:
    """Whether a process that ended for this reason has just noticed the end of another one."""
    return re.search(LOST_A_PEER, reason) is not None


def without_particulars(text: str) -> str:
    """What is the same in two failures that are alike: no addresses, signatures, numbers, and no file to look at."""
    return re.sub(r"; see \S+$|0x[0-9a-f]+|\b[0-9a-f]{16}\b|\d+", "#", text)


def essence(log: Sequence[str]) -> list[str]:
    """The part of a log that says why: the traceback, or our one line, of the process that failed first by itself.

    Of one process its last error counts. Without any it is what torchrun says of the root cause; else nothing.
    """
    errors = sorted(_last_errors(log))
    own = [error for _, error in errors if not is_loss_of_peer(_message(error))]
    if errors:
        return own[0] if own else errors[0][1]
    root_causes = [index for index, line in enumerate(log) if line.startswith("Root Cause")]
    return list(log[root_causes[-1] :]) if root_causes else []


def _message(error: list[str]) -> str:
    """An error without the frames of its traceback."""
    framed = bool(error) and error[0].startswith(_TRACEBACK)
    return "\n".join(line for line in error if not (framed and line.startswith("  ")))


def _last_errors(log: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """The last error of each process, with the line on which it begins; torchrun's own is passed over."""
    of_process: dict[str, list[tuple[int, str]]] = {}
    for number, line in enumerate(log):
        prefix = _PREFIX.match(line)
        of_process.setdefault(prefix[0] if prefix else "", []).append((number, line[prefix.end() :] if prefix else line))
    for numbered in of_process.values():
        blocks = [block for block in _blocks(numbered) if not any(word in "".join(block[1]) for word in _TORCHRUN_FAILED)]
        if blocks:
            yield blocks[-1]


def _blocks(numbered: Sequence[tuple[int, str]]) -> Iterator[tuple[int, list[str]]]:
    """The errors in what one process has printed, each with the line on which it begins."""
    begin, block = 0, list[str]()
    inside = False
    for number, line in numbered:
        starts = line.startswith(_TRACEBACK) or _OUR_ERROR.match(line) is not None
        chained = inside and any(words in text for text in block[-3:] for words in _CHAINED)
        if (starts and not chained) or _TORCHRUN.match(line):
            if inside:
                yield begin, block
            begin, block, inside = number, [], starts
        if inside:
            block.append(line)
    if inside:
        yield begin, block
