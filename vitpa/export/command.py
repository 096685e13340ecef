"""`vitpa export RUN`: a folder to hand on, checked before it is there."""

from __future__ import annotations

import argparse
import logging
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

from vitpa.arguments import path_argument
from vitpa.documents import to_yaml
from vitpa.errors import run_command
from vitpa.export.card import RUN_YAML, model_card
from vitpa.export.files import CONFIG, FILES, WEIGHTS, check, config_document, write_network
from vitpa.export.seeds import seeds_of
from vitpa.records import RunError, made_with, write_atomic
from vitpa.terminal import printable_output
from vitpa.trained import TrainedRun, found_target

CARD = "README.md"
EXPORTED = {WEIGHTS, CONFIG, CARD, RUN_YAML, *FILES.values()}
MARKS = (RUN_YAML, CONFIG, WEIGHTS)  # by which a folder is known as an export
LOGGER = logging.getLogger(__name__)
DESCRIPTION = f"""A finished run as a folder to hand on: {WEIGHTS} with timm's parameter names, {CONFIG} (in the form of timm's
models on the Hugging Face Hub, enough to build the network again), {RUN_YAML} (the whole configuration) and {CARD}, a model
card with data, accuracy (its interval over the seeds of the run's sweep), command, versions and hashes.

For positional attention, and for the ResNet, the module that builds the network comes along; nothing else of vitpa is needed.
A run that keeps an average of its weights (train.ema_decay) is exported as it is judged: the average.
The files are loaded again before they are there; unless they give the logits of the run's own model nothing is exported.
"""


def command_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="vitpa export",
        description=DESCRIPTION,
        epilog="exit codes: 0 ok, 1 an error that is yours to fix, 2 usage\n\n"
        "example: vitpa export outputs/sweeps/demo/by-name/digits-positional-s0 --out digits_positional",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_name", metavar="RUN", type=path_argument, help="a folder, or a signature")
    parser.add_argument(
        "--out", metavar="DIR", type=path_argument, help="a new folder, or an export to replace (default: export in the run's)"
    )
    parser.add_argument(
        "--root", type=path_argument, default=Path("outputs"), help="folder of runs/ and sweeps/ (default: outputs)"
    )
    parser.add_argument("--licence", metavar="NAME", default="MIT", help="of the weights, for the card (default: MIT)")
    return parser


@printable_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command: 0, or 1 with one line for an error of the user's."""
    options = command_parser().parse_args(arguments)

    def run() -> int:
        target = found_target(options.run_name, options.root)
        if not isinstance(target, TrainedRun):
            some = target.runs[0].path if target.runs else options.root / "runs" / "<signature>"
            raise RunError(f"{options.run_name}: is a sweep; name one of its runs, such as {some}")
        folder, difference = export(target, options.out or target.path / "export", options.licence)
        print(f"{target.name}: exported to {folder}; loaded from there its logits differ by {difference:.1g} at most")
        return 0

    return run_command("vitpa export", run)


def export(run: TrainedRun, out: Path, licence: str = "MIT") -> tuple[Path, float]:
    """Write the export of a finished run into the folder `out`, which is new or holds an export before.

    Returns:
        the folder, and the largest difference of the logits after loading.

    Raises:
        RunError: the run is not finished, `out` holds anything but an export, or the files do not give the run's logits.
    """
    if run.result is None:
        raise RunError(f"{run.path}: is not finished; train it to its end, then export it")
    _check_replaceable(out)
    model = run.model(ema=run.config.train.ema_decay > 0)
    draft = out.parent / f".draft-{secrets.token_hex(4)}"
    draft.mkdir(parents=True)
    try:
        write_network(run.config, model, run.num_classes, draft)
        difference = check(model, run.config.model.img_size, draft)
        write_atomic(draft / RUN_YAML, to_yaml(run.config.model_dump(mode="json", exclude={"runtime"})))
        document = config_document(run.config, run.num_classes)
        card = model_card(
            run,
            run.result,
            model,
            document=document,
            seeds=seeds_of(run),
            made_with=made_with(run.directory.env_json),
            licence=licence,
        )
        write_atomic(draft / CARD, card)
        _check_replaceable(out)  # it took a while
        out.mkdir(parents=True, exist_ok=True)
        new = [path.name for path in draft.iterdir()]
        for name in new:
            (draft / name).replace(out / name)
        for name in EXPORTED.difference(new):
            (out / name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return out, difference


def _check_replaceable(out: Path) -> None:
    """Whether an export may be written to `out`: there is nothing, an empty folder, or a whole export and nothing else.

    Raises:
        RunError: there is something of the user's.
    """
    hint = "name a new folder with --out"
    if out.exists() and not out.is_dir():
        raise RunError(f"{out}: is not a folder; {hint}")
    found = sorted(path.name for path in out.glob("*") if path.name != "__pycache__")  # Python's, of who loaded an export
    if others := [name for name in found if name not in EXPORTED or not (out / name).is_file()]:
        raise RunError(f"{out}: holds {others[0]}, which is not of an export; {hint}")
    if found and (missing := [name for name in MARKS if name not in found]):
        raise RunError(f"{out}: holds {found[0]}, but no {missing[0]}, so that it is not an export to be replaced; {hint}")
