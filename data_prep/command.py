"""`vitpa prep`: its arguments, its exit codes, and what happens at Ctrl-C."""

from __future__ import annotations

import argparse
from pathlib import Path

from vitpa.arguments import number, path_argument, whole_number
from vitpa.datasets import DATASETS
from vitpa.errors import at_signals, run_command

DESCRIPTION = f"""Convert a data set to FFCV's .beton format: OUT/DATASET/{{train,val}}.beton, each with a manifest (.json).

DATASET is {", ".join(DATASETS)}, or any other name for your own ImageFolder at --source
(train/ and val/, each with one folder per class). cifar10, cifar100 and svhn are downloaded if there is no --source.
Photos are turned upright by their EXIF orientation and become RGB (transparent parts white); the default for them is
short side 256 px, JPEG quality 90. Small images are stored as raw pixels: digits, cifar10, cifar100 and svhn,
and a folder in which none has a side above 32 px. Images are never enlarged.
Left out are hidden and system files and folders, and what is no image by its name; the report and the manifest count
them. Links are followed, but not to a folder that is read anyway. An image whose decoder warns of damage is corrupt, and
so is one with a wrong checksum (PNG, TIFF with Deflate) or too few pixels; changed bytes of BMP, PPM, GIF, WebP, AVIF
and uncompressed TIFF can hardly be noticed, as these have no checksum,
nor that a plain (ASCII) PPM or PGM is cut within its last number.
Repeated with the same settings it does nothing."""

EXAMPLES = """examples:
  vitpa prep digits
  vitpa prep cifar10 --verify
  vitpa prep cifar10 --source ~/datasets            a folder with cifar-10-batches-py/
  vitpa prep imagenet --source /datasets/imagenet --out /scratch/beton --workers 32
  vitpa prep pets --source ~/pets --max-side-px 500 --jpeg-share 0.5 --skip-corrupt

exit codes: 0 done (or nothing to do), 1 it cannot be done or --verify found a difference, 2 usage."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `prep` to the commands of `vitpa`."""
    parser = commands.add_parser(
        "prep",
        help="convert a data set to .beton files",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dataset", metavar="DATASET")
    parser.add_argument("--source", type=path_argument, metavar="DIR", help="folder with the raw data")
    parser.add_argument("--out", type=path_argument, default=Path("data"), metavar="DIR", help="default: data")
    parser.add_argument(
        "--workers", type=whole_number(1, 1024), metavar="N", help="processes; default: the CPUs, 1 for small images"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--short-side-px", type=whole_number(1, 1_000_000), metavar="N", help="bring the shorter side down to N pixels"
    )
    size.add_argument(
        "--max-side-px", type=whole_number(1, 1_000_000), metavar="N", help="bring the longer side down to N pixels"
    )
    parser.add_argument("--jpeg-quality", type=whole_number(1, 100), metavar="Q", help="1 to 100; default: 90")
    parser.add_argument(
        "--jpeg-share",
        type=number(0, 1),
        metavar="S",
        help="share of images stored as JPEG, the others are raw pixels: larger, faster to read "
        "(0: FFCV's write_mode raw, 1: jpg, between: proportion)",
    )
    parser.add_argument(
        "--white-level",
        type=whole_number(1, (1 << 31) - 1),
        metavar="N",
        help="the value that is white in images of more than 8 bits; default: the largest that has as many bits, and an "
        "image that stays below a quarter of that is refused",
    )
    parser.add_argument("--skip-corrupt", action="store_true", help="leave corrupt images out and list them in the manifest")
    parser.add_argument("--force", action="store_true", help="convert again what is there")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare what is there, or was made, with the source: all labels, the content hash, all small images "
        "exactly, 1,000 photos to within 3 of 255 grey levels of the same JPEG quality",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Do `vitpa prep` and return its exit code: 0 done, 1 one clear line on stderr says what is wrong."""
    with at_signals(_interrupt):
        interrupted = "interrupted; what was not finished has been removed"
        return run_command("vitpa prep", lambda: _prepare(options), interrupted=interrupted)


def _prepare(options: argparse.Namespace) -> int:
    from data_prep.errors import PrepError  # noqa: PLC0415  # `vitpa --help` needs none of it
    from data_prep.prep import Options, prepare  # noqa: PLC0415
    from data_prep.progress import Report  # noqa: PLC0415
    from vitpa.terminal import OutputFailedError  # noqa: PLC0415

    arguments = {name: value for name, value in vars(options).items() if name in Options.__dataclass_fields__}
    report = Report()
    done = prepare(Options(**arguments), report)
    if report.failure is None or isinstance(report.failure, BrokenPipeError):  # `| head` has read enough
        return 0 if done else 1
    if isinstance(report.failure, SystemExit) and not isinstance(report.failure, OutputFailedError):
        raise report.failure
    raise PrepError(f"all is done, but the report could not be printed: {report.failure.strerror}")


def _interrupt(number: int, _: object) -> None:
    raise KeyboardInterrupt(number)
