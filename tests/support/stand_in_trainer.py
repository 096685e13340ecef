"""Stands in for `python -m vitpa.train` where a test needs dozens of runs: standard library only, keeps the contract.

Takes `train.epochs` steps of 50 ms, keeps a checkpoint after each, stops if asked to, resumes, and writes result.json last.
With `--with CONFIG` it does so for those runs, too, together. `<root>/trace` gets a file per run and process with the
time it was alive; a file `<root>/fail/<signature>` makes it fail, `<root>/leave/<signature>` makes that run leave the others,
`<root>/score-by-name` gives every run an accuracy that follows from its signature,
`<root>/hold` keeps all before their last step. An epoch is a step; it pauses after `runtime.stop_after_epoch`.
"""

import hashlib
import itertools
import json
import os
import re
import sys
import time
from pathlib import Path

STOPPED, FAILED = "stopped", "failed"
BETON_SHA256 = {"train": "0" * 64, "val": "1" * 64}


class Run:
    """One of the runs that are trained."""

    def __init__(self, path: Path) -> None:
        self.path, self.root = path, path.parent.parent
        text = (path / "config.yaml").read_text()
        keys = ("dataset", "attention", "seed", "epochs")
        self.config = {key: match[1] for key in keys if (match := re.search(rf"\b{key}: (\w+)", text))}
        self.attempt = max(each for each in (path / "attempts").iterdir() if each.name.isdigit())
        self.trace = self.root / "trace" / f"{path.name}-{self.attempt.name}-{os.getpid()}"
        self.trace.parent.mkdir(exist_ok=True)
        self.began = time.monotonic()
        self.trace.write_text(json.dumps([self.began, None]))
        self.checkpoint = path / "stand-in-checkpoint.json"
        self.step: int
        self.digest: str
        self.step, self.digest = json.loads(self.checkpoint.read_text()) if self.checkpoint.exists() else (0, "")
        self.steps = int(self.config["epochs"])
        pauses = re.search(r"\bstop_after_epoch: (\d+)", (self.attempt / "config.yaml").read_text())
        self.last = int(pauses[1]) if pauses else self.steps
        made_with = {"code_version": "stand-in", "beton_sha256": BETON_SHA256, "steps_total": self.steps}
        (path / "env.json").write_text(json.dumps(made_with))

    def advance(self) -> None:
        self.step += 1
        self.digest = hashlib.sha256(f"{self.digest} {self.config} {self.step}".encode()).hexdigest()
        replace(self.checkpoint, [self.step, self.digest])
        with (self.path / "metrics.jsonl").open("a") as metrics:
            row = {
                "step": self.step,
                "epoch": self.step,
                "val/top1": self.val_top1(),
                "val/top5": 0.9,
                "val/loss": 1.0,
                "perf/images_per_s": 100.0,
            }
            metrics.write(json.dumps(row) + "\n")

    def leaves(self) -> str:
        """How the run leaves those that are trained with it; empty if it does not."""
        if (self.root / "leave" / self.path.name).exists():
            return FAILED
        return STOPPED if self.step < self.steps and (self.path / "stop").exists() else ""

    def leave(self, state: str) -> None:
        self.end()
        replace(self.attempt / "left.json", {"state": state, "reason": f"{state} at step {self.step}", "utc": ""})

    def end(self) -> None:
        replace(self.trace, [self.began, time.monotonic()])

    def val_top1(self) -> float:
        wished = self.root / "top1" / self.path.name
        if (self.root / "score-by-name").exists():
            return int(self.path.name[:4], 16) / 65536
        return float(wished.read_text()) if wished.exists() else 0.5

    def pause(self) -> None:
        self.end()
        taken = {"train_time_s": 0.05 * self.step, "gpu_hours": self.step / 100, "utc": ""}
        replace(self.path / "paused.json", {"signature": self.path.name, "epoch": self.step, "step": self.step, **taken})

    def finish(self) -> None:
        if self.step < self.steps:
            return self.pause()
        result = {
            "signature": self.path.name,
            "dataset": self.config["dataset"],
            "attention": self.config["attention"],
            "seed": int(self.config["seed"]),
            "epochs": self.steps,
            "steps": self.steps,
            "val_top1": self.val_top1(),
            "val_top5": 0.9,
            "val_loss": 1.0,
            "train_time_s": 0.05 * self.steps,
            "gpu_hours": self.steps / 100,
            "images_per_s": 100.0,
            "attempts": int(self.attempt.name),
            "weights_sha256": self.digest,
            "code_version": "stand-in",
            "beton_sha256": BETON_SHA256,
            "finished_utc": "2026-01-01T00:00:00Z",
        }
        self.end()
        return replace(self.path / "result.json", result)


def main() -> int:
    others = [file for option, file in itertools.pairwise(sys.argv) if option == "--with"]
    runs = [Run(Path(file.replace("$$", "$")).parents[2]) for file in (sys.argv[1], *others)]  # as the trainer reads them
    seeds = [run.config["seed"] for run in runs] if others else []
    assert Path(os.environ["VITPA_ATTEMPT"]) == runs[0].attempt
    assert len({run.step for run in runs}) == 1, "no common step"
    if any((run.root / "fail" / run.path.name).exists() for run in runs):
        raise RuntimeError("the test wants this run to fail")
    print("resumes at" if runs[0].step else "starts at", runs[0].step, *(f"seed {seed}" for seed in seeds), flush=True)
    failed = False
    while runs[0].step < runs[0].last:
        time.sleep(0.05)
        for run in runs:
            if run.step + 1 < run.steps or not (run.root / "hold").exists():
                run.advance()
        leaving = {run: how for run in runs if (how := run.leaves())}
        if leaving and len(leaving) < len(runs):  # look again: all may be meant
            time.sleep(0.2)
            leaving = {run: how for run in runs if (how := run.leaves())}
        if len(leaving) == len(runs) and FAILED not in leaving.values():
            for run in runs:
                run.end()
            return int(failed)
        for run, how in leaving.items():
            run.leave(how)
            failed = failed or how == FAILED
        runs = [run for run in runs if run not in leaving]
        if not runs:
            return int(failed)
    for run in runs:
        run.finish()
    return int(failed)


def replace(path: Path, document: object) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(document))
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
