"""torchrun for a benchmark: `python -m vitpa.bench.torchrun ARGUMENT ...`. A signal ends all of it without a traceback."""

from __future__ import annotations

import logging
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.run import main


def run() -> int:
    """Run torchrun with the arguments of the command line; 128 and the signal's number if one has ended it."""
    logging.disable(logging.WARNING)  # which process is ended by which signal
    try:
        main()
    except SignalException as stopped:
        return 128 + stopped.sigval.value
    finally:
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # they may come again
            signal.signal(name, signal.SIG_IGN)
    return 0


if __name__ == "__main__":
    sys.exit(run())
