"""The command line of `vitpa doctor`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from vitpa.arguments import name_or_path, number
from vitpa.errors import run_command
from vitpa.terminal import printable

if TYPE_CHECKING:
    from collections.abc import Generator

    from jobs.doctor.cluster import Check

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

OK, ERROR, UNREACHABLE = 0, 1, 3
DESCRIPTION = """Check the place where runs are to be trained, a line for each check, with how to fix what is wrong. Of a
cluster (a SLURM profile), one probe job is submitted: it looks from inside, is requeued once, and is cancelled at the end.
Nothing is left behind."""
EPILOG = """exit codes: 0 no problem, 1 problems, 2 usage, 3 SLURM does not answer, 130 interrupted by Ctrl-C

example: vitpa doctor --profile my_cluster.yaml --root /scratch/me/outputs --data-dir /scratch/me/data"""


def add_parser(subparsers: Subparsers) -> None:
    """Add `doctor` to the `vitpa` command."""
    parser = subparsers.add_parser(
        "doctor",
        help="check this machine or a cluster, and say how to fix what is wrong",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--profile",
        type=name_or_path,
        default="local",
        help="what to check: a shipped profile or a YAML file (default: this machine)",
    )
    parser.add_argument("--root", type=name_or_path, default="outputs", help="folder of runs/ and sweeps/ (default: outputs)")
    parser.add_argument("--data-dir", type=name_or_path, help="folder of the data sets (default: data)")
    parser.add_argument(
        "--wait-s",
        type=number(0, 604_800),
        default=120,
        help="how long to wait for the probe job to start, and for its report (default: 120)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    return run_command("vitpa doctor", lambda: _check(options))


def _check(options: argparse.Namespace) -> int:
    from jobs.doctor.examine import UnreachableError  # noqa: PLC0415 - what it needs is imported when it is used

    checks: list[Check] = []
    code = OK

    def add(check: Check) -> None:
        checks.append(check)
        if not options.json:
            print(printable(check.line()), flush=True)

    try:
        with closing(_examine(options)) as examination:  # Ctrl-C, too, takes the probe job away
            for check in examination:
                add(check)
    except UnreachableError as error:
        add(error.check)
        code = UNREACHABLE
    code = code or (ERROR if any(check.level == "problem" for check in checks) else OK)
    if options.json:
        print(json.dumps({"ok": code == OK, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        problems, warnings = (sum(check.level == level for check in checks) for level in ("problem", "warning"))
        print(f"problems: {problems}, warnings: {warnings}")
    return code


def _examine(options: argparse.Namespace) -> Generator[Check, None, None]:
    from jobs.doctor.examine import examine_cluster, examine_machine  # noqa: PLC0415
    from jobs.profile import LocalProfile, load_profile  # noqa: PLC0415
    from jobs.scheduler.client import Scheduler  # noqa: PLC0415
    from jobs.submit.submission import check_root  # noqa: PLC0415

    profile, root = load_profile(options.profile), Path(os.path.realpath(options.root))
    if isinstance(profile, LocalProfile):
        return examine_machine(profile, root, options.data_dir)

    check_root(root, profile.executor)

    def say(line: str) -> None:
        print(printable(line), file=sys.stderr, flush=True)

    return examine_cluster(profile, root, options.data_dir, scheduler=Scheduler(), wait_s=options.wait_s, say=say)
