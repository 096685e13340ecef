"""The command line of `vitpa devcluster chaos`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from vitpa.arguments import IntermixedParser, number, path_argument, whole_number
from vitpa.errors import at_signals, run_command

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[IntermixedParser]

OK, PARTIAL = 0, 4
TEXT = "a sweep on a SLURM of its own under random faults; prints a certificate of how it came through"
DESCRIPTION = """Start a SLURM on this machine, train the runs of SWEEP on it, each on a node of its own, and break things at
random moments: processes, nodes, the controller, the disk. Afterwards train the same runs undisturbed and print a certificate:
faults by kind, the share of time that trained (ETTR) beside Daly's bound, lost seconds, and runs lost, doubled or different
in bits. Only processes that it has started are ended. It takes a bit more than twice HOURS.
Exit codes: 0 no run was lost, doubled or different, 4 one was."""


def add_parser(verbs: Subparsers) -> None:
    """Add `chaos` to `vitpa devcluster`."""
    parser = verbs.add_parser(
        "chaos",
        help=TEXT,
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: vitpa devcluster chaos demo --seed 1 --mttf 10 --hours 1 --json certificate.json",
    )
    parser.add_argument("sweep", metavar="SWEEP", help="as of `vitpa sweep submit`: trained on CPUs, so a small one")
    parser.add_argument("terms", metavar="KEY=VALUE", nargs="*", help="as of `vitpa sweep submit`, such as seed=0,1")
    parser.add_argument(
        "--seed", type=whole_number(0), default=0, help="of the faults: equal seeds, equal faults (default: 0)"
    )
    parser.add_argument(
        "--mttf",
        type=number(0, above=True),
        default=10.0,
        metavar="MINUTES",
        help="between faults of a run, mean (default: 10)",
    )
    parser.add_argument("--hours", type=number(0, 240, above=True), default=1.0, metavar="H", help="under faults (default: 1)")
    parser.add_argument(
        "--checkpoint-every", type=number(0, 1e6, above=True), default=60.0, metavar="S", help="seconds (default: 60)"
    )
    parser.add_argument(
        "--epochs", type=whole_number(1, 10**6), help="of every run (default: as many as take H hours, which is timed first)"
    )
    parser.add_argument("--data-dir", type=path_argument, help="folder of the data sets (default: the recipe's)")
    parser.add_argument("--json", type=path_argument, metavar="FILE", help="write the certificate there, too")
    parser.add_argument("--keep", type=path_argument, metavar="DIR", help="copy the disturbed sweep's runs and logs there")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    def stop(signal_number: int, _frame: object) -> None:
        raise KeyboardInterrupt(signal_number)

    with at_signals(stop):
        return run_command("vitpa devcluster chaos", lambda: _chaos(options))


def _chaos(options: argparse.Namespace) -> int:
    from slurm.chaos.certificate import as_text, is_clean  # noqa: PLC0415 - what the other verbs do not need
    from slurm.chaos.experiment import Plan, run_experiment  # noqa: PLC0415 - as above

    plan = Plan(
        words=(options.sweep, *options.terms),
        seed=options.seed,
        mttf_s=60 * options.mttf,
        duration_s=3600 * options.hours,
        checkpoint_every_s=options.checkpoint_every,
        epochs=options.epochs,
        data_dir=options.data_dir,
        keep=options.keep,
    )
    certificate = run_experiment(plan, lambda line: print(line, file=sys.stderr, flush=True))
    if options.json is not None:
        options.json.write_text(json.dumps(certificate, indent=2) + "\n", encoding="utf-8")
    print(as_text(certificate))
    return OK if is_clean(certificate) else PARTIAL
