"""Stands in for `python -m vitpa.train` where a test needs dozens of runs: standard library only, keeps the contract.

Takes `train.epochs` steps of 50 ms, keeps a checkpoint after each, stops if asked to, resumes, and writes result.json last.
`<root>/trace` gets a line per training process with the time it was alive; a file `<root>/fail/<signature>` makes it fail.
"""

import hashlib
import json
import os
import re
import sys
import time
from pathlib import Path


def main() -> int:
    run = Path(sys.argv[1]).parent
    root = run.parent.parent
    text = (run / "config.yaml").read_text()
    config = {
        key: match[1] for key in ("dataset", "attention", "seed", "epochs") if (match := re.search(rf"\b{key}: (\w+)", text))
    }
    attempt = Path(os.environ["VITPA_ATTEMPT"])
    trace = root / "trace" / f"{run.name}-{attempt.name}-{os.getpid()}"
    trace.parent.mkdir(exist_ok=True)
    began = time.monotonic()
    trace.write_text(json.dumps([began, None]))
    if (root / "fail" / run.name).exists():
        raise RuntimeError("the test wants this run to fail")
    checkpoint = run / "stand-in-checkpoint.json"
    step, digest = json.loads(checkpoint.read_text()) if checkpoint.exists() else (0, "")
    print("resumes at" if step else "starts at", step, flush=True)
    steps = int(config["epochs"])
    (run / "env.json").write_text(json.dumps({"steps_total": steps}))
    while step < steps:
        time.sleep(0.05)
        step, digest = step + 1, hashlib.sha256(f"{digest} {config} {step}".encode()).hexdigest()
        replace(checkpoint, [step, digest])
        with (run / "metrics.jsonl").open("a") as metrics:
            metrics.write(json.dumps({"step": step, "epoch": step, "val/top1": 0.5, "perf/images_per_s": 100.0}) + "\n")
        if step < steps and (run / "stop").exists():
            replace(trace, [began, time.monotonic()])
            return 0
    result = {
        "signature": run.name,
        "dataset": config["dataset"],
        "attention": config["attention"],
        "seed": int(config["seed"]),
        "epochs": steps,
        "steps": steps,
        "val_top1": 0.5,
        "val_top5": 0.9,
        "val_loss": 1.0,
        "train_time_s": 0.05 * steps,
        "gpu_hours": 0.0,
        "images_per_s": 100.0,
        "attempts": int(attempt.name),
        "weights_sha256": digest,
        "code_version": "stand-in",
        "beton_sha256": {"train": "0", "val": "1"},
        "finished_utc": "2026-01-01T00:00:00Z",
    }
    replace(trace, [began, time.monotonic()])
    replace(run / "result.json", result)
    return 0


def replace(path: Path, document: object) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(document))
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
