"""The command line of `vitpa sweep`: verbs and options, nothing else, so that importing it costs nothing."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from vitpa.arguments import IntermixedParser, name_or_path, number, whole_number
from vitpa.installation import CODE

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

FILTER_HELP = (
    "only the runs with dataset=NAME, attention=NAME, seed=N, state=NAME, or a value on an axis (several values: seed=0,1)"
)
VERBS = {
    "plan": (
        "show the runs, what is missing, what it would cost and what stands in the way",
        "vitpa sweep plan demo\n         vitpa sweep plan paper_imagenet --speeds imagenet.json --gpu-hour-price 2.50",
    ),
    "submit": (
        "start what is missing; again: resume",
        "vitpa sweep submit demo --wait\n         vitpa sweep submit cifar10 optim.lr=5e-4,1e-3 seed=0,1,2",
    ),
    "status": ("show where each run is", "vitpa sweep status demo --watch"),
    "watch": (
        "one screen with keys: find runs, their curves and logs, cancel, retry; without a terminal as status --watch",
        "vitpa sweep watch demo",
    ),
    "logs": ("show what the runs printed", "vitpa sweep logs demo --failed"),
    "cancel": ("stop runs; what is in training writes a checkpoint first", "vitpa sweep cancel demo seed=2"),
    "retry": ("start failed, cancelled or broken runs again", "vitpa sweep retry demo state=failed"),
    "collect": ("mean and standard deviation over the seeds, as table and files", "vitpa sweep collect demo"),
    "report": (
        "write one HTML file, and Markdown, to send around: failures, verdict, table, curves, structure, costs, origin",
        "vitpa sweep report demo",
    ),
    "frame": (
        "all results, or all curves, as one table for other programs: CSV or Parquet",
        "vitpa sweep frame demo --out demo.csv\n         vitpa sweep frame demo --curves --out curves.parquet",
    ),
    "tensorboard": (
        "each cell's mean over the seeds, with its band, and final accuracies along the axes, in TensorBoard on this machine",
        "vitpa sweep tensorboard demo --port 6007",
    ),
}
EPILOG = """exit codes: 0 ok, 1 an error that is yours to fix, 2 usage, 3 SLURM does not answer, 4 partial (some runs failed
or are missing), 130 interrupted by Ctrl-C; a sweep that was never submitted under --root is an error, save for plan and
submit, and for retry if `vitpa train` has left runs of it

example: """


def add_parser(subparsers: Subparsers) -> None:
    """Add `sweep` and its verbs to the `vitpa` command."""
    sweep = subparsers.add_parser(
        "sweep",
        help="run a grid of data sets x attentions x seeds, and collect the table",
        epilog="example: vitpa sweep submit demo --wait",
    )
    verbs = sweep.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=IntermixedParser)
    for verb, (text, example) in VERBS.items():
        parser = verbs.add_parser(
            verb,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=EPILOG + example,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_arguments(parser, verb)
        parser.set_defaults(run=_run)


def _add_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    starts = verb in ("submit", "retry")
    shipped = ", ".join(sorted(path.stem for path in (CODE / "jobs" / "sweeps").glob("*.yaml")))
    parser.add_argument(
        "sweep", metavar="SWEEP", type=name_or_path, help=f"a shipped sweep ({shipped}), a YAML file, or a recipe"
    )
    settings = "; runtime.KEY=VALUE sets what does not change the numbers" if starts else ""
    if verb in ("plan", "submit"):
        settings += (
            "; another key of the configuration (optim.lr=5e-4,1e-3) makes a sweep with that axis, and with these seeds"
        )
    parser.add_argument("terms", metavar="KEY=VALUE", nargs="*", help=FILTER_HELP + settings)
    parser.add_argument("--root", type=name_or_path, default="outputs", help="folder of runs/ and sweeps/ (default: outputs)")
    if starts or verb == "plan":
        parser.add_argument(
            "--profile",
            type=name_or_path,
            help="where to run: a shipped profile or a YAML file (default: as at the last submission, at first local)",
        )
        parser.add_argument(
            "--data-dir",
            type=name_or_path,
            help="folder of the data sets (default: as at the last submission, at first the recipe's)",
        )
    if starts:
        parser.add_argument("--wait", action="store_true", help="show the live table until nothing is in progress")
        parser.add_argument(
            "--code",
            choices=("live", "snapshot"),
            default="live",
            help="snapshot: the jobs run a copy of the code as it is now, whatever you edit meanwhile (default: live)",
        )
    if starts or verb == "cancel":
        parser.add_argument("--dry-run", action="store_true", help="say what would be done and do nothing")
    if verb in ("plan", "collect"):
        parser.add_argument("--json", action="store_true", help="print JSON")
    _add_own_arguments(parser, verb)


def _add_own_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """The options that only this verb has."""
    if verb == "plan":
        parser.add_argument(
            "--speeds",
            type=name_or_path,
            metavar="FILE",
            help="time and GPU-hours from the JSON of `vitpa bench imagenet` or `small`, where no run of a kind has finished",
        )
        parser.add_argument(
            "--gpu-hour-price", type=number(0, 1e9, above=True), metavar="PRICE", help="what a GPU-hour costs, in any currency"
        )
    if verb in ("plan", "submit"):
        parser.add_argument("--name", help="of the sweep that KEY=VALUE makes of SWEEP (default: cifar10-lr for optim.lr=...)")
    if verb == "submit":
        parser.add_argument(
            "--give-up", action="store_true", help="of a search: go on without trials whose runs failed or were cancelled"
        )
        parser.add_argument("--update", action="store_true", help="accept that configurations recorded before have changed")
        parser.add_argument("--force", action="store_true", help="also what `plan` says that SLURM would never start")
    if verb == "retry":
        parser.add_argument(
            "--force",
            action="store_true",
            help="also what fails alike each time, was last seen elsewhere, or would never start",
        )
    if verb == "cancel":
        parser.add_argument("--gone", action="store_true", help="only what was started for the sweep and is no longer in it")
        parser.add_argument("--now", action="store_true", help="kill instead of letting a checkpoint be written")
    if verb == "status":
        output = parser.add_mutually_exclusive_group()
        output.add_argument("--json", action="store_true", help="print JSON")
        output.add_argument("--watch", action="store_true", help="keep showing until nothing is in progress (Ctrl-C to leave)")
    if verb == "logs":
        parser.add_argument("--follow", action="store_true", help="print what is being written until nothing is in progress")
        parser.add_argument("--failed", action="store_true", help="the last traceback of each kind of failure")
        parser.add_argument("--lines", type=whole_number(1, 1_000_000), default=15, help="lines of each log (default: 15)")
    if verb == "tensorboard":
        parser.add_argument(
            "--port", type=whole_number(0, 65_535), default=6006, help="on 127.0.0.1; 0: any that is free (default: 6006)"
        )
        parser.add_argument("--no-serve", action="store_true", help="write or update what it would show, and return")
        parser.add_argument("--runs", action="store_true", help="show the single runs, too, with their images")
    if verb == "frame":
        parser.add_argument("--curves", action="store_true", help="the rows of all metrics.jsonl instead of the results")
        where = parser.add_mutually_exclusive_group()
        where.add_argument("--wandb", type=name_or_path, metavar="DIR", help="offline runs of Weights & Biases instead")
        where.add_argument("--mlflow", type=name_or_path, metavar="DIR", help="runs in a file store of MLflow instead")
        where.add_argument(
            "--out", type=name_or_path, metavar="FILE", help="Parquet if it ends in .parquet, else CSV (default: CSV, printed)"
        )
    if verb == "report":
        parser.add_argument(
            "--maps-mib",
            type=number(0, 1024),
            default=8,
            metavar="MIB",
            help="of similarity and attention maps in the file, at most; without them it is under 1 MB for 30 runs; 0: none "
            "(default: 8)",
        )
        parser.add_argument(
            "--out", type=name_or_path, metavar="FOLDER", help="where to write (default: report/ in the sweep's folder)"
        )
    if verb in ("collect", "report"):
        parser.add_argument(
            "--compare",
            metavar="AXIS[=VALUE]",
            help="an axis, or attention: differences between every two of its values, or from this one, paired by seed",
        )
        parser.add_argument(
            "--pivot", nargs=2, metavar=("ROWS", "COLUMNS"), help="tables of means along two of: attention, the sweep's axes"
        )
        parser.add_argument(
            "--allow-mixed", action="store_true", help="average over different code or data, and mark the table"
        )


def _run(options: argparse.Namespace) -> int:
    from jobs.verbs import run_verb  # noqa: PLC0415 - what the verbs need is imported when one is used

    return run_verb(options)
