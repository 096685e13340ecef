"""Which SLURM jobs are ours: by SLURM's own words, whoever rewrites them, whatever the shell's variables say."""

from __future__ import annotations

import gzip
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.execute.attempt import Signals
from jobs.execute.slurm import Place, SlurmIntent, _Job
from jobs.scheduler.client import Scheduler, query_environment, scheduler_environment
from jobs.scheduler.cluster import ask
from jobs.scheduler.own_jobs import ACCOUNT_COLUMNS, COLUMN, QUEUE_COLUMNS, RECORD, SlurmJob, in_accounting, in_queue
from tests.support.cluster import BoundCluster
from tests.support.jobs_sweeps import HOLD, Field, finished_trainings, slurm_profile
from tests.support.waiting import run_to_end, wait_for
from vitpa.cli import main as vitpa
from vitpa.records import ProcessId, read_json, write_json

TOKEN = "0a1b2c3d"
SCRIPT = f"/shared/outputs/sweeps/small/submissions/20260101T000000Z-{TOKEN}/submitit/.submission_file_x.sh"
NOBODY = 65534


def queued(identity: str = "12_3", *, user: int = 5, name: str = "x", script: str = "(null)", comment: str = "(null)") -> str:
    return RECORD + COLUMN.join([identity, str(user), "PENDING", "Priority", "", name, script, comment]) + "\n"


@pytest.mark.parametrize(
    "words",
    [
        {"comment": f"vitpa:{TOKEN}"},
        {"comment": f"account=ml; vitpa:{TOKEN} [checked by site policy]"},
        {"name": f"small-{TOKEN}"},
        {"name": f"grp_small-{TOKEN}.x", "comment": "vitpa:0a1b"},  # cut by a plugin
        {"script": SCRIPT},
        {"name": "a|b\nc", "comment": "x\ny", "script": SCRIPT},
    ],
)
def test_one_proof_suffices(words: dict[str, object]) -> None:
    jobs = in_queue(queued("1", name="another") + queued(**words), 5)  # type: ignore[arg-type]
    assert jobs[TOKEN, 3].id == "12_3"
    assert len(jobs) == 1


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"name": "small", "comment": "vitpa:"},
        {"comment": f"{TOKEN}"},
        {"name": f"{TOKEN}0", "comment": f"vitpa:{TOKEN}0"},
        {"script": f"/shared/{TOKEN}.sh"},
        {"comment": f"vitpa:{TOKEN}", "user": 6},
    ],
)
def test_without_proof_it_is_a_stranger_s(words: dict[str, object]) -> None:
    assert not in_queue(queued(**words), 5)  # type: ignore[arg-type]


def test_what_waits_together_in_accounting() -> None:
    """Tasks that have not been started have one record; of several records of a task the last counts."""
    rows = [
        ("12_[1-2,5-9:2%3]", "5", "PENDING", "None assigned", f"small-{TOKEN}", "sbatch x"),
        ("12_1", "5", "REQUEUED", "n1", "a\nb|c", f"sbatch {SCRIPT}"),
        ("12_1", "5", "CANCELLED by 5", "n2", "renamed", f"sbatch {SCRIPT}"),
        ("12_2", "6", "RUNNING", "n3", f"small-{TOKEN}", "sbatch x"),
        ("12", "5", "RUNNING", "n3", "a job of that number in an older cluster", "sbatch --wrap x"),
    ]
    text = "".join(COLUMN.join(row) + "\n" for row in rows)
    jobs = {index: job for (_, index), job in in_accounting(text, 5).items()}
    assert {index: (job.id, job.state) for index, job in jobs.items()} == {
        1: ("12_1", "CANCELLED"),
        **{index: (f"12_{index}", "PENDING") for index in (2, 5, 7, 9)},
    }
    assert len(ACCOUNT_COLUMNS) == len(rows[0]) - 1
    assert QUEUE_COLUMNS.count(COLUMN) == queued().count(COLUMN)


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING", "SPECIAL_EXIT", "REVOKED", "A_STATE_OF_2030"])
def test_what_is_not_known_to_have_ended_is_live(state: str) -> None:
    """REVOKED, too: another cluster of the federation has started the job."""
    assert SlurmJob("12_3", state).live


def test_environments() -> None:
    of_cluster = {"SLURM_CONF": "/c", "SLURM_CONF_SERVER": "c1:6817"}
    shell = {**of_cluster, "PATH": "/bin", "HF_HOME": "/scratch", "SQUEUE_USERS": "x", "TZ": "Asia/Tokyo"}
    asked = query_environment({**shell, "SLURM_CLUSTERS": "other", "LC_ALL": "de_DE.UTF-8", "BASH_ENV": "/x"})
    assert asked == {**of_cluster, "PATH": "/bin", "LC_ALL": "C", "SLURM_BITSTR_LEN": "0"}
    assert scheduler_environment({**shell, "SBATCH_PARTITION": "x", "SALLOC_QOS": "x", "SLURM_UMASK": "0"}) == shell


# --- on a real SLURM


class Neighbour:
    """A job in the queue that is none of ours: of another user where that can be, otherwise of this one."""

    def __init__(self, cluster: BoundCluster) -> None:
        self._cluster = cluster
        self.as_other: list[str] = []
        self._modes: dict[Path, int] = {}  # as they were: other tests look at them
        if os.geteuid() == 0:
            folders = (cluster.root, cluster.layout.slurm_conf.parent, cluster.root / "run")
            for path, mode in (*((folder, 0o711) for folder in folders), (cluster.layout.slurm_conf, 0o644)):
                self._modes[path] = path.stat().st_mode & 0o777
                path.chmod(mode)
            self.as_other = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        self.id = self._run("sbatch", "--parsable", "--hold", "--chdir=/tmp", "--job-name=small", "--wrap=sleep 9").strip()

    def _run(self, *words: str) -> str:
        line = [*self.as_other, *words]
        return subprocess.run(line, env=self._cluster.environment, capture_output=True, text=True, check=True).stdout

    def facts(self) -> str:
        """What SLURM says of it, without what changes by itself."""
        return re.sub(r"LastSchedEval=\S+", "", self._run("scontrol", "show", "job", self.id))

    def leave(self) -> None:
        self._run("scancel", self.id)
        for path, mode in self._modes.items():
            path.chmod(mode)


@pytest.fixture
def field(tmp_path: Path, cluster: BoundCluster) -> Iterator[Field]:
    made = Field(tmp_path, cluster)
    yield made
    made.clear()


@pytest.fixture
def neighbour(cluster: BoundCluster) -> Iterator[Neighbour]:
    made = Neighbour(cluster)
    before = made.facts()
    assert "JobState=PENDING" in before
    yield made
    assert made.facts() == before, "it was touched"
    made.leave()


def queue_of(field: Field) -> str:
    return field.slurm("squeue", "--noheader", "--array", "--format=%i %T %j %k")


@pytest.mark.slurm
@pytest.mark.slow
def test_rewritten_comment_and_name(field: Field) -> None:
    assert field.vitpa("submit").returncode == 0
    first, second = (state.job_id for state in field.states())
    field.slurm("scontrol", "update", f"JobId={first}", "Comment=x")
    field.slurm("scontrol", "update", f"JobId={second}", "Comment=site: ok", "JobName=y")
    assert [(state.state, state.job_id) for state in field.states()] == [("pending", first), ("pending", second)]
    assert "nothing to submit" in field.vitpa("submit").stdout
    field.assert_one_job_each()
    assert "2 cancelled while they waited" in field.vitpa("cancel").stdout
    wait_for(lambda: field.live() == 0, poll_s=0.2)
    assert first.partition("_")[0] not in queue_of(field)


@pytest.mark.slurm
@pytest.mark.slow
def test_a_wrapper_of_sbatch_that_says_other_numbers(field: Field, neighbour: Neighbour) -> None:
    """Its lines surround those of sbatch; the receipt has the job that SLURM calls ours, and it finds its pickle."""
    noise = f"echo 'Your last job {neighbour.id} is using 3 % of its memory'"
    field.replace_program("sbatch", noise, f"{noise} >&2", f'{field.real("sbatch")} "$@"; code=$?', noise, "exit $code")
    assert field.vitpa("submit", "attention=content").returncode == 0
    (receipt,) = (read_json(path) for path in field.files("receipt.json"))
    (state,) = [state for state in field.states() if state.run.attention == "content"]
    assert receipt is not None
    assert [job["id"] for job in receipt["jobs"]] == [state.job_id]
    assert state.job_id != neighbour.id
    field.release()
    wait_for(lambda: field.states()[0].state == "done", poll_s=0.3)
    assert finished_trainings(field.root) == [field.sweep.runs[0].signature]


@pytest.mark.slurm
@pytest.mark.slow
def test_a_wrapper_of_sbatch_that_pipes_the_script(field: Field) -> None:
    """SLURM does not know the script's path then, and sbatch's line is lost: comment and name are left."""
    field.replace_program("sbatch", f'{field.real("sbatch")} --parsable < "${{@: -1}}" | sed "s/$/;lab/"')
    assert field.vitpa("submit").returncode == 0
    field.usual_slurm()
    field.slurm("scontrol", "update", f"JobId={field.states()[0].job_id}", "Comment=x")
    field.assert_one_job_each()
    assert "nothing to submit" in field.vitpa("submit").stdout
    field.release()
    field.assert_each_done_once()


@pytest.mark.slurm
@pytest.mark.slow
@pytest.mark.parametrize("started", [False, True])
def test_job_ids_that_began_anew(field: Field, neighbour: Neighbour, started: bool) -> None:
    """All our records name a job that is somebody else's now, as after a new installation of the cluster."""
    assert field.vitpa("submit", "attention=content").returncode == 0
    run = field.sweep.runs[0]
    field.clear()
    (attempt,) = run.directory(field.root).attempts()
    for path in [attempt.claim_json, *field.files("intent.json")]:
        write_json(path, {**(read_json(path) or {}), "token": "00000000"})
    (receipt,) = field.files("receipt.json")
    write_json(receipt, {"executor": "slurm", "jobs": [{"id": neighbour.id, "array": False, "tasks": 1}]})
    if started:
        execution = {"id": neighbour.id, "restart": 0}
        write_json(attempt.start_json, {"process": ProcessId.mine().model_dump(), "job": execution, "step": 0})
    state = field.states()[0]
    assert state.state == ("lost" if started else "uncertain")
    assert state.job is None
    assert Scheduler(field.environment).job(neighbour.id, "00000000") is None
    intent = SlurmIntent.of(field.files("intent.json")[0].parent)
    here = Place(neighbour.id, 0, 0, "node", 0, 1)  # a job script that was started by hand in an allocation of another use
    job = _Job(field.root, field.files("intent.json")[0].parent, intent, here, Signals())
    job.scheduler = Scheduler(field.environment)
    assert job._requeue() == f"SLURM does not know job {neighbour.id} as one of this submission"
    job._leave_out("node")
    field.vitpa("cancel")
    field.vitpa("cancel", "--now")
    assert field.vitpa("logs").returncode == 0
    again = field.vitpa("retry" if not started else "submit", "attention=content")
    assert "submitted 1 of 2 runs" in again.stdout, again.stdout + again.stderr
    assert len(field.jobs()[run.signature]) == 1


@pytest.mark.slurm
@pytest.mark.slow
def test_what_only_sacct_shows_is_not_started_again(field: Field) -> None:
    assert field.vitpa("submit").returncode == 0
    ids = [state.job_id for state in field.states()]
    scheduler = Scheduler(field.environment)
    wait_for(lambda: [job.state for job in scheduler.accounted(ids).values()] == ["PENDING"] * 2, poll_s=0.5)
    field.replace_program("squeue", "exit 0")
    shown = field.vitpa("status")
    assert "2 pending" in shown.stdout
    assert "squeue does not show its job" in shown.stdout
    assert "nothing to submit" in field.vitpa("submit").stdout
    field.usual_slurm()
    field.assert_one_job_each()


@pytest.mark.slurm
@pytest.mark.slow
def test_the_probe_of_doctor_is_not_mixed_up(
    field: Field, neighbour: Neighbour, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    field.replace_program("sbatch", f"echo 'Your last job {neighbour.id} was fine'", f'{field.real("sbatch")} "$@"')
    for key in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(key, field.environment[key])
    profile = slurm_profile(field.root, "held", **HOLD)
    assert vitpa(["doctor", "--profile", str(profile), "--root", str(field.root), "--wait-s", "2"]) in (0, 1)
    assert "it did not start in 2 s (JobHeldUser)" in capsys.readouterr().out
    assert "vitpa-doctor" not in queue_of(field)


# --- the variables of SLURM's programs

VARIABLES = {  # of the manual pages of 22.05 and 24.11; each with a value that changes what its program does
    "SQUEUE": "ACCOUNT ALL ARRAY ARRAY_UNIQUE FEDERATION FORMAT FORMAT2 LICENSES LOCAL NAMES PARTITION PRIORITY QOS SIBLING "
    "SORT STATES USERS",
    "SCANCEL": "ACCOUNT BATCH CRON CTLD FULL HURRY INTERACTIVE NAME PARTITION QOS STATE USER VERBOSE WCKEY",
    "SACCT": "FEDERATION FORMAT LOCAL",
    "SINFO": "ALL FEDERATION FORMAT LOCAL PARTITION SORT",
    "SCONTROL": "ALL FEDERATION FUTURE LOCAL SIBLING",
    "SLURM": "BITSTR_LEN CLUSTERS CONF_OUT DEBUG_FLAGS TIME_FORMAT TOPO_LEN JSON YAML PROTOCOL_VERSION",
}
VALUES = {"SLURM_BITSTR_LEN": "3", "SCANCEL_STATE": "RUNNING", "SQUEUE_STATES": "RUNNING", "SQUEUE_SORT": "-i"}
SHELL = {"LC_ALL": "tr_TR.UTF-8", "LANG": "de_DE.UTF-8", "TZ": "Pacific/Auckland", "COLUMNS": "10", "BASH_ENV": "/nonexistent"}


def variables() -> dict[str, str]:
    names = [f"{program}_{name}" for program, words in VARIABLES.items() for name in words.split()]
    return {**{name: VALUES.get(name, "low") for name in names}, **SHELL}


def test_no_variable_of_the_manual_pages_is_forgotten() -> None:
    """The list above has what the manual pages that are installed here name."""
    folder = Path("/usr/share/man/man1")
    pages = [path for name in ("squeue", "scancel", "sacct", "sinfo", "scontrol") for path in folder.glob(f"{name}.1.gz")]
    if not pages:
        pytest.skip("no manual pages of SLURM here")
    for page in pages:
        text = gzip.decompress(page.read_bytes()).decode().replace("\\", "")
        named = re.findall(r"^fB((?:SQUEUE|SCANCEL|SACCT|SINFO|SCONTROL)_[A-Z0-9_]+)fR$", text, re.MULTILINE)
        assert set(named) <= variables().keys()


@pytest.mark.slurm
@pytest.mark.skipif(os.geteuid() != 0, reason="who runs SLURM sees hidden partitions anyway, and only root can ask as another")
def test_jobs_in_a_hidden_partition(field: Field, neighbour: Neighbour) -> None:
    """As an ordinary user sees them."""
    assert field.vitpa("submit").returncode == 0
    for name in ("squeue", "sinfo", "scontrol"):
        field.replace_program(name, f'exec {" ".join(neighbour.as_other)} {field.real(name)} "$@"')
    hide = (str(field.real("scontrol")), "update", "PartitionName=main")
    field.slurm(*hide, "Hidden=YES")
    try:
        assert field.slurm("squeue", "--noheader") == "", "not to be seen without --all"
        field.assert_one_job_each()
        ((job,), _) = field.jobs().values()
        assert field.scheduler.time_left_s(job.id) is not None
        cluster = ask(field.scheduler)
        assert cluster.own_jobs == 2
        assert {"main", "low"} == cluster.partitions.keys() == cluster.nodes.keys()
    finally:
        field.slurm(*hide, "Hidden=NO")


@pytest.mark.slurm
def test_a_job_that_has_got_the_id_of_ours_is_not_cancelled(field: Field) -> None:
    """As when the cluster was installed again since it was looked at."""
    script, names = ["--hold", "--array=0-1", "--wrap=true"], (f"small-{TOKEN}", "small")
    ours, other = (field.slurm("sbatch", "--parsable", *script, f"--job-name={name}").strip() for name in names)

    def live(identity: str) -> int:
        return field.slurm("squeue", "--noheader", "--array", "--format=%i", f"--jobs={ours},{other}").split().count(identity)

    try:
        scheduler = Scheduler(field.environment)
        scheduler.cancel([SlurmJob(f"{number}_1", "PENDING") for number in (ours, other)])
        wait_for(lambda: not live(f"{ours}_1"), poll_s=0.2)
        assert [live(f"{ours}_0"), live(f"{other}_0"), live(f"{other}_1")] == [1, 1, 1]
    finally:
        field.slurm("scancel", ours, other)


@pytest.mark.slurm
@pytest.mark.slow
def test_variables_of_the_shell(field: Field) -> None:
    """None of them changes what is seen or done; one at a time, since one may hide another's effect."""
    shell = variables()
    profile = slurm_profile(field.root, "held", replicas=1, **HOLD)
    assert field.vitpa("submit", profile=profile).returncode == 0
    array = ["--hold", f"--array=0-{len(shell) - 1}", f"--job-name=x-{TOKEN}", "--wrap=true"]
    held = field.slurm("sbatch", "--parsable", *array).strip()
    try:
        ids = [state.job_id for state in field.states()]
        wait_for(lambda: len(Scheduler(field.environment).accounted(ids)) == len(ids), poll_s=0.5)

        def seen(environment: dict[str, str]) -> tuple[set[tuple[str, int]], set[str], object]:
            scheduler = Scheduler(environment)
            cluster = ask(scheduler)
            cluster.configuration, cluster.jobs, cluster.own_jobs = {}, None, 0  # they change by themselves
            live = {key for key, job in scheduler.snapshot().jobs.items() if job.live}
            return live, {job.id for job in scheduler.accounted(ids).values()}, cluster

        live, accounted, cluster = seen(dict(field.environment))
        for index, (name, value) in enumerate(shell.items()):
            changed = {**field.environment, name: value}
            assert seen(changed) == (live, accounted, cluster), name
            scheduler = Scheduler(changed)
            scheduler.cancel([scheduler.snapshot().jobs[TOKEN, index]])
            live.remove((TOKEN, index))
        assert seen(dict(field.environment)) == (live, accounted, cluster)
    finally:
        field.slurm("scancel", held)
    field.environment = {**field.environment, **shell}
    assert "2 pending" in field.vitpa("status").stdout
    assert "nothing to submit" in field.vitpa("submit").stdout
    assert "2 cancelled while they waited" in field.vitpa("cancel").stdout
    field.environment = field.cluster.environment
    wait_for(lambda: field.live() == 0, poll_s=0.2)


SBATCH = """
ACCOUNT ACCTG_FREQ ARRAY_INX BATCH CLUSTERS CONSTRAINT CONTAINER CORE_SPEC CPUS_PER_GPU DEBUG DELAY_BOOT DISTRIBUTION
ERROR EXCLUSIVE EXPORT GET_USER_ENV GPUS GPUS_PER_NODE GPUS_PER_TASK GPU_BIND GPU_FREQ GRES GRES_FLAGS HINT IGNORE_PBS
INPUT JOB_NAME MEM_BIND MEM_PER_CPU MEM_PER_GPU MEM_PER_NODE NETWORK NO_KILL NO_REQUEUE OPEN_MODE OUTPUT OVERCOMMIT
PARTITION POWER PROFILE QOS REQUEUE REQ_SWITCH RESERVATION SIGNAL SPREAD_JOB THREADS_PER_CORE THREAD_SPEC TIMELIMIT
USE_MIN_NODES WAIT WAIT4SWITCH WAIT_ALL_NODES WCKEY TRES_PER_TASK TRES_BIND SEGMENT_SIZE
"""


@pytest.mark.slurm
@pytest.mark.slow
def test_variables_of_sbatch_do_not_change_a_job(field: Field) -> None:
    """All at once: a job is the same as without them, and still gets the other variables of the shell."""

    def job_of(attention: str) -> str:
        profile = slurm_profile(field.root, "held", setup=[f"env > {field.root}/$SLURM_JOB_ID.env"], **HOLD)
        assert field.vitpa("submit", f"attention={attention}", profile=profile).returncode == 0
        (job,) = [state.job for state in field.states() if state.job is not None and state.run.attention == attention]
        show = ["scontrol", "--oneliner", "show", "job", job.id]
        own = r"\b(JobId|JobName|SubmitTime|EligibleTime|LastSchedEval|Command|Comment|StdErr|StdOut|AllocNode:Sid)=\S*"
        return re.sub(own, "", run_to_end(show, env=field.cluster.environment).stdout)

    plain = job_of("content")
    shell = {f"SBATCH_{name}": "low" for name in SBATCH.split()}
    others = ("EXIT_ERROR", "UMASK", "STEP_KILLED_MSG_NODE_ID", "HINT", "CPU_BIND", "CLUSTERS")
    shell |= {f"SLURM_{name}": "7" for name in others}
    field.environment = {**field.environment, **shell, "SITE_LICENCE": "here"}
    assert job_of("positional") == plain
    identity = field.states()[1].job_id
    field.environment = field.cluster.environment
    field.release()
    field.assert_each_done_once()
    inside = (field.root / f"{identity}.env").read_text().splitlines()
    assert "SITE_LICENCE=here" in inside
    assert not shell.keys() & {line.partition("=")[0] for line in inside}
