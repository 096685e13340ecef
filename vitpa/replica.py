"""One of the runs that are trained together, as the training sees it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vitpa.checkpoint import Progress, weights_sha256
from vitpa.clock import Clock
from vitpa.config import RunConfig
from vitpa.documents import YAML_BYTES, read_bytes
from vitpa.logs import Logs
from vitpa.records import utc_now, with_checksum, write_json
from vitpa.rundir import AttemptDir, Pause, Result, RunDir
from vitpa.seconds import Seconds, lost_beyond


@dataclass
class Replica:
    """One of the runs that are trained together; most often the only one."""

    config: RunConfig
    run: RunDir
    model: Any  # timm's VisionTransformer or ResNet: the weights
    name: str = ""  # what tells it from the others, such as `seed 0`
    progress: Progress = field(
        default_factory=lambda: Progress(energy_j=0.0)
    )  # as of the newest checkpoint, but for the newest evaluation
    rows: str | None = ""  # of metrics.jsonl up to there; None: as the file has them
    logs: Logs | None = None  # in the main process
    left: str = ""  # why it is not trained any more, while the others are
    failed: bool = False  # whether that is a failure
    counted_s: float = 0.0  # time.monotonic() up to which progress.train_time_s counts
    attempt: AttemptDir | None = None  # whose seconds are recorded, in the main process
    resumed_train_time_s: float = 0.0  # progress.train_time_s when the attempt began
    graphs: tuple[int, int] = (0, 0)  # compiled in this attempt, and taken from an earlier start
    lost: tuple[int, float] = (0, 0.0)  # steps, and seconds, of earlier attempts that are done again

    @property
    def train_time_s(self) -> float:
        """Wall-clock time of training over all attempts: steps, evaluations and checkpoints that led to this state."""
        return self.progress.train_time_s + time.monotonic() - self.counted_s

    def count(self, now_s: float, gpus: float, energy_j: float | None) -> None:
        """Add the time up to `now_s` (time.monotonic()), of so many GPUs, and their energy to what the run has taken."""
        new_s, self.counted_s = now_s - self.counted_s, now_s
        self.progress.train_time_s += new_s
        self.progress.gpu_time_s += new_s * gpus
        before_j = self.progress.energy_j
        self.progress.energy_j = None if before_j is None or energy_j is None else before_j + energy_j

    @property
    def evaluated_at(self) -> int | None:
        """The step of the last row of metrics.jsonl, if it is an evaluation's; None also where nothing is logged."""
        return None if self.logs is None else self.logs.evaluated_at

    def begin_seconds(self, clock: Clock) -> None:
        """Begin the record of where this attempt's time goes; metrics.jsonl still has the rows that will be made again."""
        self.resumed_train_time_s = self.progress.train_time_s
        self.lost = lost_beyond(self.run.metrics_jsonl, self.progress.step, self.progress.train_time_s)
        self.attempt = next(reversed(self.run.attempts()), None)
        self.record_seconds(clock)

    def record_seconds(self, clock: Clock) -> None:
        """Write seconds.json, if the attempt has a folder."""
        self.seconds_writer(clock)()

    def seconds(self, clock: Clock) -> Seconds:
        """Where this attempt's time has gone up to now."""
        return Seconds(
            **clock.seconds(),
            first_step_s=clock.first_step_s,
            graphs_compiled=self.graphs[0],
            graphs_reused=self.graphs[1],
            train_time_s=self.progress.train_time_s,
            resumed_train_time_s=self.resumed_train_time_s,
            lost_steps=self.lost[0],
            lost_s=self.lost[1],
        )

    def seconds_writer(self, clock: Clock) -> Callable[[], None]:
        """What writes seconds.json as it is now, to be called later."""
        seconds = self.seconds(clock)
        attempt = self.attempt
        return lambda: None if attempt is None else seconds.write(attempt.seconds_json)

    def result(self, beton_sha256: dict[str, str]) -> Result:
        """What its result.json says, once it is trained to its end on these data."""
        config, progress = self.config, self.progress
        return Result(
            signature=config.signature,
            dataset=config.dataset,
            attention=config.model.attention,
            seed=config.seed,
            epochs=config.train.epochs,
            steps=progress.step,
            val_top1=progress.val["val/top1"],
            val_top5=progress.val["val/top5"],
            val_loss=progress.val["val/loss"],
            ema_val_top1=progress.val.get("ema_val/top1"),
            ema_val_top5=progress.val.get("ema_val/top5"),
            ema_val_loss=progress.val.get("ema_val/loss"),
            train_time_s=progress.train_time_s,
            gpu_hours=progress.gpu_time_s / 3600,
            images_per_s=progress.step * config.train.global_batch_size / progress.train_time_s,
            attempts=max(1, len(self.run.attempts())),
            weights_sha256=weights_sha256(self.model.state_dict()),
            code_version=", ".join(progress.code_versions),
            beton_sha256=beton_sha256,
            finished_utc=utc_now(),
            holdout=config.train.holdout,
            energy_j=progress.energy_j,
            config_sha256=hashlib.sha256(read_bytes(self.run.config_yaml, YAML_BYTES)).hexdigest(),
        )

    def record_result(self, beton_sha256: dict[str, str]) -> str:
        """Write result.json, the last act of a training to its end; a line about it.

        It is believed only beside the rows it speaks of, so those are on the disk before.
        """
        if self.logs is not None:
            self.logs.sync()
        result = self.result(beton_sha256)
        without = {"energy_j"} if result.energy_j is None else None
        write_json(self.run.result_json, with_checksum(result.model_dump(exclude=without)))
        accuracy = f"{self.config.top1_name} {100 * result.top1:.2f} % after {result.epochs} epochs"
        return f"finished: {accuracy}; {self.run.result_json}"

    def record_pause(self, epoch_steps: int) -> str:
        """Write paused.json, the last act of a training that stops after `runtime.stop_after_epoch`; a line about it."""
        if self.logs is not None:
            self.logs.sync()
        progress = self.progress
        pause = Pause(
            signature=self.config.signature,
            epoch=progress.step // epoch_steps,
            step=progress.step,
            train_time_s=progress.train_time_s,
            gpu_hours=progress.gpu_time_s / 3600,
            utc=utc_now(),
        )
        write_json(self.run.paused_json, with_checksum(pause.model_dump()))
        if self.evaluated_at == progress.step:
            accuracy = f"{self.config.top1_name} {100 * progress.val[self.config.top1_metric]:.2f} %"
        else:
            accuracy = f"at step {progress.step}, where it is not evaluated"
        return f"paused after epoch {pause.epoch} of {self.config.train.epochs}: {accuracy}; without the pause it goes on"
