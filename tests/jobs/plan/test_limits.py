"""What a cluster's limits say to a sweep: each limit by arithmetic on SLURM's own words, and all of it on a real SLURM."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.execute import bad_nodes
from jobs.plan.limits import Need
from jobs.profile import SlurmProfile
from jobs.scheduler.client import Scheduler, SchedulerError
from jobs.scheduler.cluster import Nodes, mem_mib
from jobs.scheduler.gres import parse_gres
from tests.support.cluster import FaultyCluster, require_slurm, short_folder
from tests.support.jobs_sweeps import make_sweep, write_result
from tests.support.waiting import wait_for
from vitpa.cli import main

PARTITION = "PartitionName={} Default={} State=UP MaxTime=1-00:00:00 MaxNodes=2 MinNodes=1 QoS=N/A MaxCPUsPerNode=UNLIMITED"


class Words(Scheduler):
    """A scheduler that answers with given words; the subprocess border of the tests."""

    def __init__(self, **answers: str) -> None:
        super().__init__({})
        self.asked: list[tuple[str, ...]] = []
        self.answers = {
            "scontrol show config": "MaxArraySize = 4\nMaxJobCount = 10000\nAccountingStorageEnforce = none\n",
            "scontrol show partition": PARTITION.format("main", "YES") + "\n" + PARTITION.format("fat", "NO") + "\n",
            "sinfo --noheader --all --Node": "n1\nn7\nn7\n",
            "sinfo": (
                "main|10|gpu:h100:4(S:0-1)|64|512000|idle\nmain|2|gpu:h100:4|64|512000|down*\nfat|1|(null)|8|1000|mixed\n"
            ),
            "squeue": "",
            "sdiag": "Jobs pending:   5\nJobs running:   2\n",
            "sbatch": "sbatch: Job 1 to start at 2026-01-01T00:00:00 using 8 processors on nodes n1 in partition main",
            **{key.replace("_", " "): text for key, text in answers.items()},
        }

    def ask(self, program: str, *arguments: str, with_stderr: bool = False) -> str:
        """The first answer whose key the command starts with."""
        self.asked.append((program, *arguments))
        line = " ".join((program, *arguments))
        found = next((text for key, text in self.answers.items() if line.startswith(key)), None)
        if found is None or found.startswith("error: "):
            raise SchedulerError(f"{program}: {(found or 'error: not here').removeprefix('error: ')}")
        return found


class Shell:
    """Types `vitpa sweep plan --json` with a profile for the sweep `small`."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.capsys, self.monkeypatch = root, capsys, monkeypatch
        monkeypatch.setattr("submitit.SlurmExecutor.affinity", classmethod(lambda cls: 2))

    def line(self, *more: str, verb: str = "plan", **profile: Any) -> list[str]:
        path = self.root / "profile.yaml"
        path.write_text(yaml.safe_dump({"executor": "slurm", "time": "1:00:00", "replicas": 1, **profile}))
        where = ["--root", str(self.root), "--data-dir", str(self.root / "data"), "--profile", str(path)]
        return ["sweep", verb, str(self.root / "small.yaml"), *where, *more]

    def text(self, words: Scheduler, *more: str, **profile: Any) -> tuple[int, str]:
        return self.of("plan", words, *more, **profile)

    def of(self, verb: str, words: Scheduler, *more: str, **profile: Any) -> tuple[int, str]:
        self.monkeypatch.setattr("jobs.context.Scheduler", lambda: words)
        code = main(self.line(*more, verb=verb, **profile))
        captured = self.capsys.readouterr()
        return code, captured.out + captured.err

    def __call__(self, words: Scheduler, **profile: Any) -> tuple[int, dict[str, Any]]:
        code, text = self.text(words, "--json", **profile)
        return code, json.loads(text)


@pytest.fixture
def plan(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    make_sweep(tmp_path, seeds=3)  # 6 runs
    return Shell(tmp_path, capsys, monkeypatch)


def said(document: dict[str, Any], about: str, level: str = "") -> str:
    return "\n".join(f["text"] for f in document["findings"] if f["about"] == about and level in ("", f["level"]))


def test_what_fits_is_said_and_nothing_is_written(plan: Shell) -> None:
    before = sorted(path for path in plan.root.rglob("*"))
    code, found = plan(Words(), cpus_per_gpu=8, mem="64G")
    assert (code, found["problem"]) == (0, "")
    assert said(found, "MaxArraySize") == "6 runs in 2 job arrays (MaxArraySize 4); 0 jobs of yours are in the queue"
    assert "10 of 12 nodes of partition main are in service and have 1 GPU, 8 CPUs, 64G of memory" in said(found, "nodes")
    assert [group["at_a_time"] for group in found["groups"]] == [40]
    assert "SLURM accepts it; a first run could start at 2026-01-01T00:00:00" in said(found, "sbatch")
    assert (found["gpu_hours"], found["wall_s"], found["unmeasured"]) == (None, None, ["digits content", "digits positional"])
    assert sorted(path for path in plan.root.rglob("*")) == sorted([*before, plan.root / "profile.yaml"])


def test_wall_time_and_gpu_hours_from_what_was_measured(plan: Shell) -> None:
    runs = make_sweep(plan.root, seeds=3).runs  # 1437 images x 4 epochs: 5748 s at 1 image/s
    for run in runs[:2]:
        write_result(plan.root, run, attention=run.attention, images_per_s=1.0)
    code, found = plan(Words(), gpus_per_node=2, array_parallelism=2)
    assert code == 0
    assert found["estimated_train_s"] == 4 * 5748
    assert found["gpu_hours"] == pytest.approx(4 * 5748 * 2 / 3600)
    assert found["wall_s"] == 2 * 5748
    assert found["groups"][0]["attempts"] == 2  # 3600 s - 120 s are not enough
    assert "takes 2 attempts of time=1:00:00" in said(found, "time")
    code, found = plan(Words(), gpus_per_node=2, time="0:20:00", max_attempts=3)
    assert code == 1
    assert "would take 6 attempts of time=0:20:00, and is given up after max_attempts=3" in found["problem"]


def test_figures_measured_on_other_hardware_say_so(plan: Shell) -> None:
    content, positional = make_sweep(plan.root, seeds=3).runs[:2]
    for run in (content, positional):  # 1 GPU for 10 s
        write_result(plan.root, run, attention=run.attention, images_per_s=1.0, train_time_s=10.0, gpu_hours=10 / 3600)
    path = content.directory(plan.root).env_json
    path.write_text(json.dumps({**json.loads(path.read_text()), "device": "cpu", "gpu": None}))
    text = plan.text(Words(), gpus_per_node=4)[1]
    assert "warning: digits content was measured on CPUs, these runs have GPUs: expect less time" in text
    assert "warning: digits positional was measured with 1 GPUs for a run, these have 4" in text
    assert not said(plan(Words(), gpus_per_node=0)[1], "measured")


@pytest.mark.parametrize(
    ("profile", "problem"),
    [
        (
            {"gpus_per_node": 8},
            "0 nodes of partition main have 8 GPUs, 1 CPU, 1 are needed; there are: 10 x 4 h100 GPUs, 64 CPUs",
        ),
        ({"gres": "gpu:a100:1"}, "0 nodes of partition main have 1 a100 GPU"),
        ({"cpus_per_gpu": 65}, "0 nodes of partition main have 1 GPU, 65 CPUs"),
        ({"mem": "1T"}, "0 nodes of partition main have 1 GPU, 1 CPU, 1T of memory"),
        ({"partition": "fat"}, "0 nodes of partition fat have 1 GPU"),
        ({"time": "2-00:00:00"}, "time=2-00:00:00 is more than partition main allows (MaxTime=1-00:00:00)"),
        ({"nodes": 3}, "3 nodes: partition main allows 2 (MaxNodes)"),
    ],
)
def test_what_would_never_start_is_a_problem(plan: Shell, profile: dict[str, Any], problem: str) -> None:
    code, found = plan(Words(), **profile)
    assert code == 1
    assert problem in found["problem"]


def test_what_sbatch_says_is_repeated(plan: Shell) -> None:
    refusal = "error: sbatch: error: invalid partition specified: nope allocation failure: Invalid partition name specified"
    code, text = plan.text(Words(sbatch=refusal), partition="nope")
    assert code == 1
    problem = (
        "cannot be submitted yet: SLURM would refuse it: invalid partition specified: nope Invalid partition name specified"
    )
    assert problem in text
    assert "there is no partition nope; partitions: " in text


@pytest.mark.parametrize(
    ("answers", "silent"),
    [
        ({"scontrol_show_config": "error: not found; is this a login node"}, "scontrol: not found"),
        ({"sbatch": "error: Unable to contact slurm controller (connect failure)"}, "Unable to contact slurm controller"),
    ],
)
def test_silence_of_slurm_is_exit_code_3(plan: Shell, answers: dict[str, str], silent: str) -> None:
    code, text = plan.text(Words(**answers))
    assert code == 3
    assert silent in text


def test_arrays_of_one_group_share_the_runs_at_a_time(plan: Shell) -> None:
    configuration = "MaxArraySize = 1001\nMaxJobCount = 10000\nSchedulerParameters = bf_interval=1,max_array_tasks=4\n"
    words = Words(scontrol_show_config=configuration)
    _, found = plan(words, array_parallelism=3)
    (group,) = found["groups"]
    assert (group["runs"], group["arrays"], group["at_a_time"]) == (6, 2, 3)
    assert "6 runs in 2 job arrays (MaxArraySize 1001, max_array_tasks=4)" in said(found, "MaxArraySize")
    assert sum(asked[0] == "sbatch" for asked in words.asked) == 1


def test_replicas_are_jobs(plan: Shell) -> None:
    """6 runs, 3 seeds of 2 cells, one at a time on a GPU measured: 5748 s each."""
    for run in make_sweep(plan.root, seeds=4).runs[6:]:
        write_result(plan.root, run, attention=run.attention, seed=3, images_per_s=1.0, train_time_s=30.0, gpu_hours=10 / 3600)
    words = Words()
    code, found = plan(words, replicas=3, array_parallelism=1)
    assert (code, found["jobs"], found["slots"]) == (0, 2, 1)
    assert said(found, "MaxArraySize").startswith("6 runs (2 jobs) in 1 job array (MaxArraySize 4); ")
    (group,) = found["groups"]
    assert (group["runs"], group["jobs"], group["arrays"], group["at_a_time"]) == (6, 2, 1, 1)
    assert group["gpus_per_run"] == pytest.approx(1 / 3)
    assert found["wall_s"] == pytest.approx(2 * 5748)  # measured as one of three, too
    assert found["gpu_hours"] == pytest.approx(2 * 5748 / 3600)
    assert not said(found, "measured")
    text = plan.text(words, replicas=2)[1]
    assert "submit would start 6 runs in 4 jobs" in text
    assert "warning: digits content was measured with 0.33 GPUs for a run, these have 0.67" in text


def test_what_cannot_be_found_out_is_said(plan: Shell) -> None:
    enforced = "MaxArraySize = 4\nAccountingStorageEnforce = associations,limits\n"
    words = Words(scontrol_show_config=enforced, sdiag="error: Access denied", sacctmgr="error: slurmdbd: Connection refused")
    code, found = plan(words, constraint="h100")
    assert code == 0
    assert said(found, "MaxJobCount", "unknown") == "jobs of all users: not known (sdiag: Access denied)"
    assert "limits per user, account and QOS: not known (sacctmgr: slurmdbd" in said(found, "limits", "unknown")
    assert "jobs at a time: not known, since constraint" in said(found, "nodes", "unknown")


@pytest.mark.parametrize(
    ("delay", "level"), [(10, "warning: signal_delay_s=10: a step, a checkpoint"), (1500, "the last 42 % of each attempt")]
)
def test_a_signal_too_late_or_too_early(plan: Shell, delay: int, level: str) -> None:
    assert level in plan.text(Words(), signal_delay_s=delay)[1]


def test_a_full_queue(plan: Shell) -> None:
    code, found = plan(Words(scontrol_show_config="MaxArraySize = 4\nMaxJobCount = 12\n"))
    assert code == 1
    assert "6 runs and 7 jobs in the queue are more than MaxJobCount=12" in found["problem"]


def test_failed_nodes_that_are_left_out(plan: Shell) -> None:
    (plan.root / "nodes").mkdir()
    (plan.root / "nodes/n7.json").write_text(json.dumps({"node": "n7", "reason": "no GPU"}))
    assert "leaving out n7: no GPU" in plan.text(Words())[1]


def test_failed_nodes_of_another_cluster_are_none_of_this(plan: Shell) -> None:
    """Nor are those that have left the cluster since: sbatch would refuse the whole job."""
    for cluster, node in (("lab", "n1"), ("farm", "n7"), ("lab", "gone"), ("", "gone")):
        bad_nodes.record(plan.root, cluster, node, "no GPU")
    words = Words(scontrol_show_config="ClusterName = lab\nMaxArraySize = 4\nAccountingStorageEnforce = none\n")
    code, text = plan.text(words)
    assert code == 0
    assert re.findall(r"leaving out (\S+): .*use it again: rm (\S+)\)", text) == [("n1", f"{plan.root}/nodes/lab/n1.json")]


def test_a_nodelist_with_a_failed_node_is_refused(plan: Shell) -> None:
    """sbatch would say `Invalid node name specified`."""
    bad_nodes.record(plan.root, "", "n7", "failed its pre-flight: no GPU")
    words = Words(scontrol_show_hostnames="n6\nn7\n")
    code, found = plan(words, nodelist="n[6-7]")
    utc = json.loads((plan.root / "nodes/n7.json").read_text())["utc"]
    assert (code, found["problem"]) == (
        1,
        f"the profile's nodelist=n[6-7]: n7 failed its pre-flight: no GPU ({utc}); "
        f"name other nodes, or, to use it again: rm {plan.root}/nodes/n7.json",
    )
    assert ("scontrol", "show", "hostnames", "n[6-7]") in words.asked
    assert plan(words, nodelist="n[6-7]", exclude_failed_nodes=False)[0] == 0
    assert plan(Words(scontrol_show_hostnames="n6\n"), nodelist="n6")[0] == 0


def test_groups_of_unequal_resources_are_looked_at_each(plan: Shell) -> None:
    (plan.root / "other.yaml").write_text(
        yaml.safe_dump({**yaml.safe_load((plan.root / "recipe.yaml").read_text()), "dataset": "pets"})
    )
    grid = yaml.safe_load((plan.root / "small.yaml").read_text())
    (plan.root / "small.yaml").write_text(yaml.safe_dump({**grid, "recipes": ["recipe.yaml", "other.yaml"]}))
    (plan.root / "data/pets").mkdir()
    for split in ("train", "val"):
        (plan.root / "data/pets" / f"{split}.beton").touch()
    words = Words()
    code, found = plan(words, per_dataset={"pets": {"gpus_per_node": 8}})
    assert code == 1
    assert found["problem"].startswith("pets: 0 nodes of partition main have 8 GPUs")
    assert [(group["datasets"], group["gpus_per_run"]) for group in found["groups"]] == [("digits", 1), ("pets", 8)]
    assert sum(asked[0] == "sbatch" for asked in words.asked) == 2


def test_values_for_a_data_set_that_there_is_not(plan: Shell) -> None:
    """Those of other sweeps count, and a user's own that lie in the data folder."""
    (plan.root / "data/pets").mkdir()
    (plan.root / "data/pets/train.beton").touch()
    for there in ("svhn", "pets"):
        assert plan(Words(), per_dataset={there: {"time": "2:00:00"}})[0] == 0
    code, found = plan(Words(), per_dataset={"digts": {"time": "2:00:00"}})
    known = "cifar10, cifar100, digits, imagenet, pets, svhn"
    assert (code, found["problem"]) == (1, f"the profile's per_dataset.digts: no such data set; there is {known}")


def test_a_thousand_runs_take_a_handful_of_questions(plan: Shell) -> None:
    make_sweep(plan.root, seeds=500)
    words = Words(scontrol_show_config="MaxArraySize = 100\nMaxJobCount = 10000\n")
    code, found = plan(words)
    assert code == 0
    assert "1000 runs in 10 job arrays" in said(found, "MaxArraySize")
    assert len(words.asked) < 10


def test_shares_of_a_node() -> None:
    nodes = Nodes(1, parse_gres("gpu:a100:4(S:0,1),gpu:h100:2,lscratch:100"), 48, 512_000, "idle")
    base = {"executor": "slurm", "time": "60"}
    assert Need.of(SlurmProfile.model_validate({**base, "gpus_per_node": 2})).fits(nodes) == 3
    assert Need.of(SlurmProfile.model_validate({**base, "gpus_per_node": 2, "gres": "gpu:h100:2"})).fits(nodes) == 1
    assert Need.of(SlurmProfile.model_validate({**base, "cpus_per_gpu": 24})).fits(nodes) == 2
    assert Need.of(SlurmProfile.model_validate({**base, "mem": "400G"})).fits(nodes) == 1
    assert Need.of(SlurmProfile.model_validate({**base, "gpus_per_node": 0})).fits(nodes) == 48
    assert Need.of(SlurmProfile.model_validate({**base, "gres": "lscratch:40"})).fits(nodes) == 2
    assert Need.of(SlurmProfile.model_validate({**base, "gres": "gpu:h100:1,lscratch:10"})).fits(nodes) == 2
    assert Need.of(SlurmProfile.model_validate({**base, "additional_parameters": {"exclusive": True}})).fits(nodes) == 1
    assert Need.of(SlurmProfile.model_validate({**base, "additional_parameters": {"mem_per_gpu": "200G"}})).fits(nodes) == 2
    assert (mem_mib("64G"), mem_mib("1.5T"), mem_mib("100"), mem_mib("2048K"), mem_mib("")) == (65536, 1572864, 100, 2, 0)


UNAVAILABLE = "error: allocation failure: Requested node configuration is not available"
ALL_DRAINED = "main|12|gpu:h100:4(S:0-1)|64|512000|drained\nfat|1|(null)|8|1000|mixed\n"
HALF_DRAINED = "main|6|gpu:h100:4|64|512000|drained\nmain|6|gpu:h100:4|64|512000|idle\n"


def partition(**values: str) -> str:
    """`scontrol show partition` with other values for main."""
    fields = dict(pair.split("=", 1) for pair in PARTITION.format("main", "YES").split())
    return " ".join(f"{key}={value}" for key, value in {**fields, **values}.items())


@pytest.mark.parametrize(
    ("answers", "values", "refused"),
    [
        ({}, {}, ""),
        ({}, {"time": "2-00:00:00"}, "time=2-00:00:00 is more than partition main allows (MaxTime=1-00:00:00)"),
        ({}, {"nodes": 3}, "3 nodes: partition main allows 2 (MaxNodes)"),
        ({"sbatch": UNAVAILABLE}, {"gpus_per_node": 8}, "0 nodes of partition main have 8 GPUs, 1 CPU, 1 are needed"),
        ({"sbatch": UNAVAILABLE}, {}, "SLURM would refuse it: Requested node configuration is not available"),
        ({"sbatch": "error: Invalid feature specification"}, {"constraint": "b200"}, "SLURM would refuse it: Invalid feature"),
        (
            {"sbatch": "error: Invalid partition name specified"},
            {"partition": "no"},
            "would refuse it: Invalid partition",
        ),
        ({}, {"account": "chem", "partition": "fat"}, "account chem: partition fat is for phys,math only"),
        ({}, {"gres": "lscratch:20"}, "0 nodes of partition main have 1 GPU, lscratch:20, 1 CPU, 1 are needed"),
    ],
)
def test_plan_and_submit_refuse_in_the_same_words(
    plan: Shell, answers: dict[str, str], values: dict[str, Any], refused: str
) -> None:
    fat = partition(PartitionName="fat", Default="NO", AllowAccounts="phys,math")
    words = Words(**{"scontrol_show_partition": f"{partition()}\n{fat}\n", **answers})
    code, found = plan(words, **values)
    assert (code, refused in found["problem"]) == (1 if refused else 0, True)
    code, said_there = plan.of("submit", words, "--dry-run", **values)
    assert (code, f"vitpa sweep: {found['problem']}" in said_there) == (1 if refused else 0, bool(refused))
    if refused:
        code, said_there = plan.of("submit", words, "--dry-run", "--force", **values)
        assert (code, f"warning: {found['problem']}" in said_there) == (0, True)


@pytest.mark.parametrize(
    ("answers", "values", "expected"),
    [
        (
            {"sinfo": ALL_DRAINED},
            {},
            "none of the 12 nodes of partition main with 1 GPU, 1 CPU is in service now",
        ),
        (
            {"sinfo": HALF_DRAINED},
            {"nodelist": "n3"},
            "SLURM takes it, but it would wait: Requested node",
        ),
        ({"scontrol show partition": partition(State="DOWN")}, {}, "partition main is DOWN: nothing starts there now"),
        ({"sbatch": "error: Requested nodes are busy"}, {}, "SLURM takes it, but it would wait: Requested nodes are busy"),
        ({"sbatch": "error: Invalid time specified"}, {"reservation": "r"}, "takes it, but it would wait: Invalid time"),
    ],
)
def test_what_only_waits_is_a_warning(plan: Shell, answers: dict[str, str], values: dict[str, Any], expected: str) -> None:
    words = Words(**{"sbatch": UNAVAILABLE, **answers})
    code, found = plan(words, **values)
    assert (code, found["problem"]) == (0, "")
    assert expected in "\n".join(each["text"] for each in found["findings"] if each["level"] == "warning")
    code, said_there = plan.of("submit", words, "--dry-run", **values)
    assert code == 0
    assert f"warning: {expected}" in said_there or expected in said_there


# --- a real SLURM that enforces limits


@pytest.fixture(scope="module")
def strict() -> Iterator[FaultyCluster]:
    """2 nodes; MaxTime=2 h; QOS `small`: 5 jobs in the queue, 3 at a time, 2 GPUs in all, 1 h."""
    require_slurm()
    with FaultyCluster(short_folder(), nodes=2, gpus=2) as cluster:
        conf = cluster.layout.slurm_conf
        enforce = "AccountingStorageEnforce=limits,qos\nAccountingStorageTRES=gres/gpu\n"
        conf.write_text(conf.read_text().replace("YES MaxTime=INFINITE", "YES MaxTime=2:00:00") + enforce)
        cluster.restart_controller()
        limits = "MaxTRESPerUser=gres/gpu=2 MaxJobsPerUser=3 MaxSubmitJobsPerUser=5 MaxWall=1:00:00"
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        for line in (f"add qos small {limits}", f"modify user {user} set qos+=small", "modify account root set GrpTRES=cpu=8"):
            subprocess.run(["sacctmgr", "-i", *line.split()], env=cluster.environment, check=True, capture_output=True)
        yield cluster


@pytest.mark.slurm
def test_limits_of_a_real_cluster(strict: FaultyCluster, plan: Shell) -> None:
    scheduler = Scheduler(strict.environment)

    def accepted() -> bool:  # the nodes come back some time after the restart
        return "SLURM accepts it" in said(plan(scheduler, gpus_per_node=1, time="30")[1], "sbatch")

    wait_for(accepted, poll_s=0.5)
    code, found = plan(scheduler, gpus_per_node=1, time="30", cpus_per_gpu=2)
    assert (code, found["problem"]) == (0, "")
    assert "account root allows cpu=8 (GrpTRES): at most 4 jobs at a time" in said(found, "GrpTRES")
    assert found["groups"][0]["at_a_time"] == 4
    code, found = plan(scheduler, gpus_per_node=1, time="90", qos="small")
    assert code == 1
    assert "time=90: QOS small allows 01:00:00 (MaxWall)" in found["problem"]
    assert "QOS small allows 5 jobs in the queue (MaxSubmitPU), these are 6" in found["problem"]
    assert "QOS small allows 3 jobs at a time (MaxJobsPU)" in said(found, "MaxJobsPU")
    assert found["groups"][0]["at_a_time"] == 2
    code, found = plan(scheduler, gpus_per_node=1, time="3:00:00")
    assert code == 1
    assert "time=3:00:00 is more than partition main allows (MaxTime=02:00:00)" in found["problem"]


@pytest.mark.slurm
def test_plan_on_the_development_cluster(cluster: FaultyCluster, plan: Shell) -> None:
    scheduler = Scheduler(cluster.environment)
    code, found = plan(scheduler, gpus_per_node=1, partition="main")
    assert (code, found["problem"]) == (0, "")
    assert found["groups"][0]["at_a_time"] == 8
    code, text = plan.text(scheduler, partition="nope", gpus_per_node=1)
    assert code == 1
    assert "SLURM would refuse it: invalid partition specified: nope" in text
    code, text = plan.text(scheduler, gpus_per_node=3)
    assert code == 1
    assert "0 nodes of partition main have 3 GPUs, 1 CPU, 1 are needed; there are: 4 x 2 GPUs, 8 CPUs, 62G" in text
