"""WHERE runs are executed: a profile's YAML file, for this machine (`local`) or for a cluster (`slurm`)."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, JsonValue, ValidationInfo, field_validator, model_validator

from jobs.errors import SweepError
from jobs.notify.config import Notify
from jobs.scheduler.gres import SHARES, Gres, gpu_count, gpus_by_type, parse_gres
from jobs.scheduler.options import check_srun_args, parse_time_s, sbatch_option
from vitpa.arguments import ConfigError
from vitpa.config import MAX_CPUS, Float, Section
from vitpa.config_file import load_model, parse_model, read_yaml
from vitpa.installation import CODE

SHIPPED = CODE / "slurm"
MAX_AT_A_TIME = 1024  # runs of a machine, seeds of a step


def _count(value: object, field: ValidationInfo) -> object:
    if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_AT_A_TIME):
        raise ValueError(f"{field.field_name}={value}: expected a whole number from 1 to {MAX_AT_A_TIME:,}, or auto")
    return value


Count = Annotated[int | Literal["auto"], BeforeValidator(_count)]


def _runtime(values: object) -> object:
    if isinstance(values, dict) and "root" in values:
        raise ValueError(f"runtime.root={values['root']}: --root gives the folder of a sweep's runs, not the profile")
    return values


Runtime = Annotated[dict[str, Any], BeforeValidator(_runtime)]


class LocalProfile(Section):
    """This machine: `slurm/local.yaml` explains each key."""

    executor: Literal["local"] = Field("local", description="what starts the jobs")
    slots: Count = Field("auto", description="runs, or groups, at a time; auto: as the GPUs or CPUs allow")
    gpus_per_run: int = Field(1, ge=1, le=1024, description="GPUs of one run")
    runs_per_gpu: int = Field(
        1,
        ge=1,
        le=1000,
        description="processes that share one GPU, each with a run, or a group of replicas, of any cell of the grid",
    )
    replicas: Count = Field(
        "auto",
        description="runs of one shape trained together in one step; auto: as many as fit the GPU's memory (up to "
        "16), but so that no slot is idle; 1 without a GPU",
    )
    cpus_per_slot: int = Field(1, ge=1, le=MAX_CPUS, description="without a GPU: CPUs of one run")
    notify: Notify | None = Field(None, description="messages about the runs, to a webhook or by e-mail; null: none")
    runtime: Runtime = Field({}, description="values of the `runtime` section of every run")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.gpus_per_run > 1 and self.runs_per_gpu > 1:
            raise ValueError(f"gpus_per_run={self.gpus_per_run} and runs_per_gpu={self.runs_per_gpu}: one of them must be 1")
        if "runs_per_gpu" in self.runtime:
            raise ValueError(f"runtime.runs_per_gpu={self.runtime['runs_per_gpu']}: say it as the profile's own runs_per_gpu")
        return self


# keys of a profile that are sbatch's own options: they may be said among additional_parameters, too
SBATCH_KEYS = (
    *("partition", "account", "qos", "constraint", "reservation", "exclude", "nodelist", "nice", "mail_type", "mail_user"),
    *("gpus_per_node", "gres", "cpus_per_gpu", "cpus_per_task", "mem"),
)


class SlurmProfile(Section):
    """A cluster, in SLURM's own names: `slurm/cluster.yaml` explains each key.

    A run, or a group of replicas, is one task of a job array.
    """

    executor: Literal["slurm"] = Field(description="what starts the jobs")

    partition: str | None = Field(None, description="sbatch --partition")
    account: str | None = Field(None, description="sbatch --account")
    qos: str | None = Field(None, description="sbatch --qos")
    constraint: str | None = Field(None, description="sbatch --constraint")
    reservation: str | None = Field(None, description="sbatch --reservation")
    exclude: str | None = Field(None, description="sbatch --exclude: nodes never to use")
    nodelist: str | None = Field(None, description="sbatch --nodelist")
    nodes: int = Field(1, ge=1, le=100_000, description="sbatch --nodes: nodes of one run")
    gpus_per_node: int = Field(
        1,
        ge=0,
        le=1024,
        description="sbatch --gpus-per-node; one training process per GPU; 0: CPUs only; default: as many as gres says, or 1",
    )
    gres: str | None = Field(
        None, description="sbatch --gres: GPUs in it are asked for instead of gpus_per_node, anything else on top of that"
    )
    cpus_per_gpu: int | None = Field(None, ge=1, le=MAX_CPUS, description="CPUs per GPU")
    cpus_per_task: int | None = Field(None, ge=1, le=65_536, description="CPUs per node, instead of cpus_per_gpu")
    mem: str | None = Field(None, description="sbatch --mem: memory per node, such as 64G")
    time: str = Field(description="sbatch --time: limit of one attempt, such as '24:00:00' or '2-00:00:00'")
    nice: int | None = Field(None, ge=-2_147_483_645, le=2_147_483_645, description="sbatch --nice")
    mail_type: str | None = Field(None, description="sbatch --mail-type, such as FAIL,ARRAY_TASKS")
    mail_user: str | None = Field(None, description="sbatch --mail-user")
    setup: list[str] = Field([], description="shell lines before the job, such as `module load cuda`")
    additional_parameters: dict[str, JsonValue] = Field({}, description="further sbatch options, by their long names")
    srun_args: list[str] = Field([], description="further arguments of srun")
    array_parallelism: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="jobs of a submission at a time, at least one per array; null: as many as SLURM gives",
    )
    replicas: Count = Field(
        "auto",
        description="runs of one shape trained together in one step, by one job; auto: as many as fit the GPU's "
        "memory (up to 16), since GPU-hours count; 1 without a GPU",
    )
    gpu_memory_gib: Float | None = Field(
        None, gt=0, description="memory of a GPU, for replicas: auto; null: 16, as any GPU of a data centre has"
    )
    signal_delay_s: int = Field(
        120, ge=1, le=65_535, description="seconds before the time limit at which a run writes its checkpoint"
    )

    processes_per_node: int | None = Field(None, ge=1, le=1024, description="training processes per node; null: one per GPU")
    max_attempts: int = Field(
        100, ge=1, le=1_000_000, description="executions of a run per submission, restarts by SLURM included"
    )
    max_idle_attempts: int = Field(
        3, ge=1, le=1_000_000, description="executions in a row without a new checkpoint before a run is given up"
    )
    preflight: bool = Field(True, description="check GPUs, data and disk of a node before training on it")
    min_free_gib: Float = Field(1.0, ge=0, description="free space that the pre-flight wants below runtime.root")
    exclude_failed_nodes: bool = Field(True, description="leave out nodes that have failed the pre-flight")
    notify: Notify | None = Field(None, description="messages about the runs, to a webhook or by e-mail; null: none")
    runtime: Runtime = Field({}, description="values of the `runtime` section of every run")
    per_dataset: dict[str, dict[str, Any]] = Field({}, description="other values of the keys above for a data set")

    @model_validator(mode="before")
    @classmethod
    def _in_one_place(cls, document: Any) -> Any:
        """Move each of additional_parameters that has a key of its own to that key; gres says how many GPUs."""
        if not isinstance(document, dict):
            return document
        document = dict(document)
        more = document.get("additional_parameters")
        if isinstance(more, dict):
            document["additional_parameters"] = _own_keys_moved(document, more)
        if document.get("gpus_per_node") is None and isinstance(document.get("gres"), str):
            asked = _resources(document["gres"])
            document.pop("gpus_per_node", None)
            if gpus_by_type(asked):
                document["gpus_per_node"] = gpu_count(asked)
        return document

    @field_validator("time", mode="before")
    @classmethod
    def _minutes(cls, value: object) -> object:
        """`time: 30` is SLURM's '30', in minutes."""
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("mem", mode="before")
    @classmethod
    def _with_unit(cls, value: object) -> object:
        if value is not None and not (isinstance(value, str) and re.fullmatch(r"\d+[KMGT]|0", value)):
            raise ValueError(f"mem={value}: expected a whole number and a unit, such as 64G")
        return value

    @field_validator("setup", "srun_args", mode="before")
    @classmethod
    def _list(cls, value: object) -> object:
        if isinstance(value, str):
            raise ValueError(f'{value!r}: expected a list of lines, such as setup: ["{value}"]')
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_resources()
        if self.time_s < 60:
            raise ValueError(f"time={self.time}: SLURM counts in whole minutes; at least '1:00'")
        if 2 * self.signal_delay_s > self.time_s:
            raise ValueError(
                f"signal_delay_s={self.signal_delay_s} is more than half of time={self.time}: a run would be told to stop as "
                "soon as it has started"
            )
        if self.cpus_per_gpu is not None and (self.cpus_per_task is not None or not self.gpus_per_node):
            raise ValueError("cpus_per_gpu: not together with cpus_per_task, and not with gpus_per_node=0")
        _check_texts(self.model_dump(exclude={"setup", "per_dataset", "runtime"}))
        for line in "\n".join(self.setup).splitlines():
            if line.strip().upper().startswith("#SBATCH"):
                raise ValueError(f"setup: {line!r}: sbatch would not see it there; write it among additional_parameters")
        check_srun_args(self.srun_args, gpus_by_type(self.resources), self.nodes)
        return self

    def _check_resources(self) -> None:
        asked, more = _resources(self.gres or ""), self.additional_parameters
        if gpus_by_type(asked) and gpu_count(asked) != self.gpus_per_node:
            raise ValueError(
                f"gres={self.gres} with gpus_per_node={self.gpus_per_node}: by gres a node gives {gpu_count(asked)} GPUs; say "
                "the same in both, or leave out gpus_per_node"
            )
        memory = {**({"mem": self.mem} if self.mem else {}), **more}
        said = [f"{key}={memory[key]}" for key in ("mem", "mem_per_cpu", "mem_per_gpu") if key in memory]
        if len(said) > 1:
            raise ValueError(f"{' with '.join(said)}: SLURM takes one of them only")

    @property
    def resources(self) -> tuple[Gres, ...]:
        """Everything of SLURM's generic resources that a run gets on each node."""
        asked = _resources(self.gres or "")
        counted = self.gpus_per_node and not self.gpus_in_gres
        return (Gres("gpu", "", self.gpus_per_node), *asked) if counted else asked

    @property
    def gpus_in_gres(self) -> bool:
        """Whether GPUs, or shares of one, are asked for with gres and not with gpus_per_node."""
        return any(each.name in ("gpu", *SHARES) for each in _resources(self.gres or ""))

    @property
    def time_s(self) -> int:
        """The time limit in seconds."""
        return parse_time_s(self.time)

    @property
    def processes(self) -> int:
        """Training processes on each node."""
        return self.processes_per_node or max(1, self.gpus_per_node)

    @property
    def cpus_per_node(self) -> int | None:
        """CPUs that a run asks for on each node; None: SLURM's default."""
        return self.cpus_per_task or (self.cpus_per_gpu or 0) * max(1, self.gpus_per_node) or None

    def for_dataset(self, dataset: str, where: str = "the profile") -> SlurmProfile:
        """The profile with the keys of `per_dataset` for that data set in it, and without `per_dataset`.

        Raises:
            ConfigError: a key that does not exist, or values that do not fit together.
        """
        document, special = self.model_dump(mode="json", exclude={"per_dataset"}), self.per_dataset.get(dataset, {})
        for key in special.keys() & {"array_parallelism", "notify"}:
            raise ConfigError(f"{where}.{key}: is for all runs of a submission together")
        if special.get("gres") and gpus_by_type(self.resources):  # which says how many GPUs it gives
            document["gpus_per_node"] = None if "gpu" in str(special["gres"]) else self.gpus_per_node
        return parse_model(SlurmProfile, {**document, **special}, where)


Profile = LocalProfile | SlurmProfile


def _resources(text: str) -> tuple[Gres, ...]:
    try:
        return parse_gres(text)
    except ValueError as error:
        raise ValueError(f"gres={text}: {error}") from None


def _own_keys_moved(document: dict[str, Any], more: dict[Any, Any]) -> dict[str, Any]:
    """The additional parameters by their usual names, without those that have a key of their own or say what vitpa says.

    Raises:
        ValueError: vitpa sets an option, or the profile says two things of it.
    """
    kept: dict[str, Any] = {}
    same = {"ntasks_per_node": "1", "tasks_per_node": "1", "ntasks": str(document.get("nodes") or 1)}
    for name, value in more.items():
        plain = str(name).replace("-", "_")
        if value is None or value is False or (plain in same and str(value) == same[plain]):  # nothing to ask for
            continue
        key = sbatch_option(str(name))
        if not isinstance(value, bool | int | float | str):
            raise ValueError(f"additional_parameters.{key}={value}: expected a text, a number or true")
        if key in SBATCH_KEYS:
            if document.get(key) not in (None, value):
                raise ValueError(f"{key}={document[key]}, but additional_parameters say {key}={value}: say it once")
            document[key] = value
        elif kept.setdefault(key, value) != value:
            raise ValueError(f"additional_parameters: {key} comes up twice, as {kept[key]} and {value}")
    return kept


def _check_texts(document: dict[str, Any]) -> None:
    """Refuse what would end a line of the job script."""
    for key, value in document.items():
        texts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        for text in texts:
            if isinstance(text, str) and not text.isprintable():
                raise ValueError(f"{key}: {text!r} holds a line break or another control character")


def minutes(seconds: float) -> int:
    """Whole minutes, rounded up as SLURM does."""
    return math.ceil(seconds / 60)


def load_profile(spec: str) -> Profile:
    """The profile that `spec` names: a path, or a shipped profile such as `local`.

    Raises:
        SweepError: there is none.
        ConfigError: its file is not valid.
    """
    shipped = {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}
    path = Path(spec) if Path(spec).is_file() else shipped.get(spec)
    if path is None:
        raise SweepError(f"profile {spec!r}: no such file, and none of the shipped ones ({', '.join(shipped)})")
    executor = read_yaml(path).get("executor", "local")
    if executor == "local":
        return load_model(LocalProfile, path)
    if executor != "slurm":
        raise SweepError(f"{path}: executor={executor!r}: expected local or slurm")
    profile = load_model(SlurmProfile, path)
    for dataset in profile.per_dataset:  # refuses what is unknown or does not fit together
        profile.for_dataset(dataset, f"{path}: per_dataset.{dataset}")
    return profile
