"""Profiles: what ships loads, and what is wrong in one is said with its key and a hint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from jobs.errors import SweepError
from jobs.profile import SHIPPED, LocalProfile, SlurmProfile, load_profile, minutes
from jobs.scheduler.client import ranges, scheduler_environment
from jobs.scheduler.options import parse_time_s
from jobs.submit.submit import shares
from vitpa.arguments import ConfigError

SLURM = "executor: slurm\n"
HOUR = f"{SLURM}time: '1:00:00'\n"


def load(tmp_path: Path, text: str) -> object:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return load_profile(str(path))


@pytest.mark.parametrize(
    ("profile", "key"),
    [
        (profile, name)
        for profile in (LocalProfile, SlurmProfile)
        for name, field in profile.model_fields.items()
        if int in (field.annotation, *get_args(field.annotation))
    ],
)
def test_every_whole_number_has_an_upper_bound(profile: type[LocalProfile | SlurmProfile], key: str, tmp_path: Path) -> None:
    huge = f"1{'0' * 20}"
    with pytest.raises(ConfigError, match=rf"{key}={huge}: (Input should be less than or equal to|expected .* from 1 to) \d"):
        load(tmp_path, f"{HOUR if profile is SlurmProfile else ''}{key}: {huge}")


def test_the_default_profile_says_the_defaults() -> None:
    assert load_profile("local") == LocalProfile()


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_profiles_load(path: Path) -> None:
    assert load_profile(path.stem).executor == ("local" if "local" in path.stem else "slurm")


def test_the_cluster_profile_names_every_key() -> None:
    keys = yaml.safe_load((SHIPPED / "cluster.yaml").read_text()).keys()
    assert keys == SlurmProfile.model_fields.keys() - {"cpus_per_task"}  # the other way to say cpus_per_gpu


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slot: 2", "unknown key slot; did you mean slots?"),
        ("notify: {webhook: https://hooks.example.org/x}", "notify.webhook: expected the name of the environment variable"),
        (
            f"{HOUR}per_dataset: {{svhn: {{notify: null}}}}",
            "per_dataset.svhn.notify: is for all runs of a submission",
        ),
        ("slots: 0", "slots=0: expected a whole number from 1 to 1,024, or auto"),
        ("replicas: many", "replicas=many: expected a whole number from 1 to 1,024, or auto"),
        (f"{SLURM}time: '1:00:00'\nreplicas: 2.5", "replicas=2.5: expected a whole number from 1 to 1,024, or auto"),
        ("{gpus_per_run: 2, runs_per_gpu: 2}", "one of them must be 1"),
        (f"{SLURM}partitoin: gpu\ntime: '1:00:00'", "unknown key partitoin; did you mean partition?"),
        (f"{SLURM}time: tomorrow", "time='tomorrow': expected SLURM's notation"),
        (f"{SLURM}time: '0:30'", "time=0:30: SLURM counts in whole minutes; at least '1:00'"),
        (f"{SLURM}time: '3:00'", "signal_delay_s=120 is more than half of time=3:00"),
        (f"{HOUR}mem: 64 GB", "mem=64 GB: expected a whole number and a unit, such as 64G"),
        (f"{HOUR}mem: 64", "mem=64: expected a whole number and a unit, such as 64G"),
        (f"{HOUR}setup: module load cuda", 'expected a list of lines, such as setup: ["module load cuda"]'),
        (f"{HOUR}gres: gpu:2\ngpus_per_node: 0", "gres=gpu:2 with gpus_per_node=0"),
        (f"{HOUR}cpus_per_gpu: 4\ncpus_per_task: 4", "cpus_per_gpu: not together with cpus_per_task"),
        (f"{HOUR}additional_parameters: {{array: 0-3}}", "additional_parameters.array: is set by vitpa"),
        (f"{HOUR}per_dataset: {{svhn: {{tmie: '2:00'}}}}", "per_dataset.svhn: unknown key tmie; did you mean time?"),
        (f"{HOUR}per_dataset: {{svhn: {{time: '2:00'}}}}", "per_dataset.svhn: signal_delay_s=120 is more than half"),
        (
            f"{HOUR}per_dataset: {{svhn: {{array_parallelism: 2}}}}",
            "per_dataset.svhn.array_parallelism: is for all runs of a submission together",
        ),
        ("runtime: {root: /scratch}", "runtime.root=/scratch: --root gives the folder of a sweep's runs"),
        (f"{HOUR}runtime: {{root: /scratch}}", "runtime.root=/scratch: --root gives the folder of a sweep's runs"),
        (f"{HOUR}per_dataset: {{svhn: {{runtime: {{root: /x}}}}}}", "per_dataset.svhn: runtime.root=/x: --root gives the"),
        ("runtime: {runs_per_gpu: 2}", "runtime.runs_per_gpu=2: say it as the profile's own runs_per_gpu"),
        (f'{HOUR}setup: ["#SBATCH --mem=4G"]', "setup: '#SBATCH --mem=4G': sbatch would not see it there"),
        (f'{HOUR}setup: [" #SBATCH --mem=4G"]', "setup: ' #SBATCH --mem=4G': sbatch would not see it there"),
        (f'{HOUR}setup: ["module load x", "\\t#SBATCH --mem=4G"]', "#SBATCH --mem=4G': sbatch would not see it there"),
        (f'{HOUR}setup: ["true\\n  #sbatch --mem=4G"]', "#sbatch --mem=4G': sbatch would not see it there"),
    ],
)
def test_invalid_profile(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(tmp_path, text)


def test_unknown_executor(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match="executor='pbs': expected local or slurm"):
        load(tmp_path, "executor: pbs")


def test_values_for_a_data_set(tmp_path: Path) -> None:
    text = f"{HOUR}per_dataset: {{imagenet: {{gpus_per_node: 4, time: 2-00:00:00}}}}"
    profile = load(tmp_path, text)
    assert isinstance(profile, SlurmProfile)
    large, small = profile.for_dataset("imagenet"), profile.for_dataset("digits")
    assert (large.gpus_per_node, large.time_s, large.processes) == (4, 2 * 86400, 4)
    assert (small.gpus_per_node, small.time_s, small.per_dataset) == (1, 3600, {})


@pytest.mark.parametrize(("written", "seconds"), [("24:00:00", 86400), ("1:30:00", 5400), ("90", 5400), ("2-00", 172800)])
def test_a_time_needs_no_quotes(tmp_path: Path, written: str, seconds: int) -> None:
    """YAML 1.1 reads 1:30:00 as the number 5400."""
    profile = load(tmp_path, f"{SLURM}time: {written}\ncpus_per_task: 010\ngpus_per_node: 0")
    assert isinstance(profile, SlurmProfile)
    assert (profile.time, profile.time_s, profile.cpus_per_task) == (written, seconds, 10)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 1800), ("2:30", 150), ("1:02:03", 3723), ("2-0", 172800), ("1-2:03", 93780), ("1-2:03:04", 93784)],
)
def test_time_as_slurm_writes_it(text: str, seconds: int) -> None:
    assert parse_time_s(text) == seconds


def test_minutes_are_rounded_up() -> None:
    assert [minutes(seconds) for seconds in (60, 61, 120)] == [1, 2, 2]


@pytest.mark.parametrize(
    ("limit", "sizes", "expected"),
    [
        (None, [5, 5], [None, None]),
        (4, [8], [4]),
        (3, [5, 3], [2, 1]),
        (10, [1000, 500], [7, 3]),
        (1, [5, 5], [1, 1]),
        (5, [1, 100], [1, 4]),
    ],
)
def test_arrays_share_the_limit(limit: int | None, sizes: list[int], expected: list[int | None]) -> None:
    assert shares(limit, sizes) == expected


def test_indices_as_slurm_writes_them() -> None:
    assert ranges([5, 0, 2, 1]) == "0-2,5"


def test_a_job_s_environment_is_not_handed_on() -> None:
    leaks = (
        "SLURM_JOB_ID",
        "SLURM_CPU_BIND",
        "SBATCH_PARTITION",
        "SRUN_DEBUG",
        "PMI_RANK",
        "RANK",
        "WORLD_SIZE",
        "VITPA_ATTEMPT",
    )
    cluster = {"SLURM_CONF": "/etc/slurm.conf", "SLURM_CONF_SERVER": "c1:6817", "SLURM_JWT": "x"}
    kept = {**cluster, "PATH": "/bin", "HF_HOME": "/scratch"}
    assert scheduler_environment({**dict.fromkeys(leaks, "1"), **kept}) == kept
