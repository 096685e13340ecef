"""A SLURM that is simulated: what sbatch, squeue, sacct, scontrol and scancel say and do, and when jobs start and end.

Only what SLURM's programs print and how its jobs live is made up here; jobs/scheduler reads it as it reads the real one.
Times are shorter than a cluster's, in the same order.
"""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jobs.scheduler.own_jobs import ACCOUNT_COLUMNS, COLUMN, ENDED, RECORD
from tests.support.simulation.processes import IGNORED, Host, Park, Process, this_process

KILL_WAIT_S = 3.0
REQUEUE_DELAY_S = 5.0
MIN_JOB_AGE_S = 300.0
MAX_TRIES = 30
SLOTS = 3  # tasks of a node
INSTALLATION_S = 10.0  # of the controller; until then it does not answer
DOWN = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"


@dataclass(eq=False)
class Task:
    """A task of an array, or a job without one."""

    array: int
    index: int | None
    script: str
    name: str
    comment: str
    limit_s: float
    user: int = 0
    code: str = ""  # PYTHONPATH, as its script exports it
    state: str = "PENDING"
    reason: str = "Priority"
    restart: int = 0
    begin_s: float = 0.0  # not before
    node: Host | None = None
    step: Process | None = None
    ended_s: float | None = None
    after_end: str = ""  # in which state it will be when its step is over; empty: by its exit code
    without: set[str] = field(default_factory=set)  # nodes
    accounts: list[tuple[float, str, str]] = field(default_factory=list)  # since when, state, nodes
    foreign: bool = False
    execution: int = 0  # counts its starts and ends
    tries: int = 0  # of its script to start its process again
    odd_state: str = ""  # what the queue calls it while it is in training

    @property
    def id(self) -> str:
        return str(self.array) if self.index is None else f"{self.array}_{self.index}"

    @property
    def shown_state(self) -> str:
        """As the queue has it."""
        if self.step is not None:
            return "COMPLETING" if self.after_end else self.odd_state or self.state
        return self.state


@dataclass(eq=False)
class Sbatch:
    """One sbatch at work. It goes on when the process that started it is killed."""

    host: Host
    script: str
    process: Process
    sent: bool = False
    over: bool = False
    refusal: str = ""
    job: int = 0


class Slurm:
    """The controller, its queue, its accounting and its nodes."""

    def __init__(self, park: Park, nodes: Sequence[Host], run_job: Callable[[str, str], object], user: int) -> None:
        """`run_job(folder, job)` is what a job's script does."""
        self.park, self.nodes, self.run_job, self.user = park, nodes, run_job, user
        self.tasks: list[Task] = []
        self.forgotten: list[Task] = []  # by the queue; accounting knows them
        self.sbatches: list[Sbatch] = []
        self.next_id = 1000 + park.random.randrange(50)
        self.first_id = self.next_id
        self.down_until_s = 0.0
        self.sbatch_fails: list[str] = []  # what happens to the next ones: refused, after
        self.slow_s = 0.3  # an answer takes up to this
        self.lag_s = 4.0  # of accounting
        self.touched: list[str] = []  # what was done to jobs that are not ours
        self.accepted: dict[str, set[int]] = {}  # arrays, by their comments
        self.requeued: Callable[[Task], None] = lambda task: None  # is told when a job asks for that
        self.busy: dict[str, int] = {node.name: 0 for node in nodes}
        self.broken: set[str] = set()

    # --- the programs

    def run_program(self, command: Sequence[str], **_: object) -> subprocess.CompletedProcess[str]:
        """What `vitpa.child_process.run_program` gives for SLURM's programs."""
        process = this_process()
        assert process is not None
        process.wait_until(self.park.now_s + self.park.random.uniform(0, self.slow_s))
        program, *words = command
        if self.park.now_s < self.down_until_s:
            return subprocess.CompletedProcess(command, 1, "", DOWN)
        if "--all" not in words and (program in ("squeue", "sinfo") or words[:2] == ["show", "partition"]):
            return subprocess.CompletedProcess(command, 0, "", "")  # the partition is hidden
        try:
            said = getattr(self, f"_{program}")(words)
        except ValueError as error:
            return subprocess.CompletedProcess(command, 1, "", str(error))
        return subprocess.CompletedProcess(command, 0, said, "")

    def _sinfo(self, words: list[str]) -> str:
        if "--Node" in words:
            return "".join(f"{node.name}\n" for node in self.nodes)
        return "main|4|(null)|64|64000|idle\n"

    def _sdiag(self, words: list[str]) -> str:
        return f"Jobs pending:   {len(self.tasks)}\n"

    def _sbatch(self, words: list[str]) -> str:
        assert words[0] == "--test-only"
        return "sbatch: Job 1 to start at 2030-01-01T00:00:00 using 1 processors on nodes n1 in partition main"

    def _scontrol(self, words: list[str]) -> str:
        if words[:2] == ["show", "config"]:
            return "ClusterName             = lab\nMaxArraySize            = 1001\nAccountingStorageEnforce = none\n"
        if words[:2] == ["show", "partition"]:
            return "PartitionName=main Default=YES MaxTime=UNLIMITED State=UP\n"
        if words[0] == "requeue":
            task = self._task(words[1])
            self.requeued(task)
            self.requeue(task, by="requeue")
            return ""
        if words[0] == "update":
            fields = dict(word.split("=", 1) for word in words[1:])
            task = self._task(fields["JobId"])
            self._touch(task, "update")
            task.without = set(fields["ExcNodeList"].split(","))
            return ""
        raise AssertionError(words)

    def _task(self, identity: str) -> Task:
        for task in self.tasks:
            if task.id == identity:
                return task
        raise ValueError("Invalid job id specified")

    def _touch(self, task: Task, what: str) -> None:
        if task.foreign:
            self.touched.append(f"{what} of job {task.id}, which is not ours")

    def _squeue(self, words: list[str]) -> str:
        which = next((word.removeprefix("--jobs=") for word in words if word.startswith("--jobs=")), None)
        tasks = self.tasks
        if which is not None:
            tasks = [task for task in tasks if task.id == which or str(task.array) == which]
            if not tasks:
                raise ValueError("slurm_load_jobs error: Invalid job id specified")
        form = next(word.removeprefix("--format=") for word in words if word.startswith("--format="))
        if form == "%L":
            (task,) = tasks
            return f"{int(task.limit_s) // 60}:{int(task.limit_s) % 60:02d}\n"
        if form == "%i":
            return "".join(f"{task.id}\n" for task in tasks if task.state not in ENDED)
        lines = []
        for task in tasks:
            node = task.node.name if task.node else ""
            columns = [task.id, str(task.user), task.shown_state, task.reason, node, task.name, task.script, task.comment]
            lines.append(RECORD + COLUMN.join(columns) + "\n")
        return "".join(lines)

    def _sacct(self, words: list[str]) -> str:
        numbers = next(word.removeprefix("--jobs=") for word in words if word.startswith("--jobs=")).split(",")
        lines = []
        for task in [*self.forgotten, *self.tasks]:
            if str(task.array) in numbers:
                for since_s, state, node in task.accounts:
                    if since_s + self.lag_s * (task.array % 3) / 2 <= self.park.now_s:
                        columns = [task.id, str(task.user), state, node, task.name, f"sbatch {task.script}"]
                        lines.append(COLUMN.join(columns[: len(ACCOUNT_COLUMNS) + 1]) + "\n")
        return "".join(lines)

    def _scancel(self, words: list[str]) -> str:
        for word in words:
            number, _, indices = word.partition("_")
            wanted = None
            if indices:
                wanted = set()
                for part in indices.strip("[]").split(","):
                    first, _, last = part.partition("-")
                    wanted |= set(range(int(first), int(last or first) + 1))
            for task in self.tasks:
                if task.array == int(number) and (wanted is None or task.index in wanted) and task.state not in ENDED:
                    self._touch(task, "scancel")
                    self.cancel(task)
        return ""

    # --- sbatch, which outlives the process that has called it

    def submit(self, script: str) -> str:
        """What sbatch prints, in the process that calls it.

        Raises:
            ValueError: what it says where it fails.
        """
        process = this_process()
        assert process is not None
        sbatch = Sbatch(process.host, script, process)
        self.sbatches.append(sbatch)
        self.park.after(self.park.random.uniform(0, 1.5), lambda: self._receive(sbatch))
        while not sbatch.over:
            process.wait_until(None)
        if sbatch.refusal:
            raise ValueError(sbatch.refusal)
        return f"Submitted batch job {sbatch.job}"

    def _receive(self, sbatch: Sbatch) -> None:
        """The controller gets what sbatch has sent."""
        if sbatch.over:  # its host has gone down
            return
        how = self.sbatch_fails.pop(0) if self.sbatch_fails else ""
        if self.park.now_s < self.down_until_s:
            sbatch.refusal = f"sbatch: error: Batch job submission failed: {DOWN}"
        elif how == "refused":
            sbatch.refusal = "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy"
        else:
            sbatch.job = self._add(Path(sbatch.script).read_text())
            sbatch.sent = True
            if how == "after":
                sbatch.refusal = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
        self.park.after(self.park.random.uniform(0, 1.0), lambda: self._return(sbatch))

    def _return(self, sbatch: Sbatch) -> None:
        sbatch.over = True
        if sbatch in self.sbatches:
            self.sbatches.remove(sbatch)
        if sbatch.process.alive:
            sbatch.process.wake()

    def sbatch_at_work(self, host: Host, folder: str) -> bool:
        return any(each.host is host and each.script.startswith(folder) for each in self.sbatches)

    def _add(self, text: str) -> int:
        options = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", text, re.MULTILINE))
        options = {key: shlex.split(value)[0] for key, value in options.items()}
        indices = [None] if "array" not in options else _indices(options["array"])
        while any(task.array == self.next_id for task in self.tasks):
            self.next_id += 1
        number = self.next_id
        self.next_id += 1
        script = re.search(r"submitit\.core\._submit (\S+)", text)
        assert script is not None
        folder = shlex.split(script[1])[0]
        exported = re.search(r"^export PYTHONPATH=(.*)$", text, re.MULTILINE)
        assert exported is not None
        for index in indices:
            task = Task(
                number,
                index,
                f"{folder}/.submission_file_{number}.sh",
                options["job-name"],
                options["comment"],
                60.0 * int(options["time"]),
                self.user,
                shlex.split(exported[1])[0],
            )
            task.accounts.append((self.park.now_s, "PENDING", ""))
            self.tasks.append(task)
            self.accepted.setdefault(task.comment, set()).add(number)
            self._plan_start(task, self.park.random.choice((0.5, 2.0, 10.0, 60.0)))
        return number

    # --- the life of jobs

    def _plan_start(self, task: Task, delay_s: float) -> None:
        execution = task.execution
        self.park.after(delay_s, lambda: self._start(task, execution))

    def _start(self, task: Task, execution: int) -> None:
        if task.state != "PENDING" or task.execution != execution or task not in self.tasks:
            return
        if self.park.now_s < max(self.down_until_s, task.begin_s):
            self._plan_start(task, 2.0)
            return
        free = [
            node
            for node in self.nodes
            if self.busy[node.name] < SLOTS and node.name not in task.without and node.name not in self.broken
        ]
        if not free:
            self._plan_start(task, 2.0)
            return
        node = self.park.random.choice(free)
        self.busy[node.name] += 1
        task.node, task.state, task.reason = node, "RUNNING", "None"
        task.accounts.append((self.park.now_s, "RUNNING", node.name))
        task.execution, task.after_end, task.odd_state, task.tries = task.execution + 1, "", "", 0
        self._start_step(task, node)
        execution = task.execution
        early_s = self.park.random.uniform(0, 20.0)
        self.park.after(task.limit_s - 60 - early_s, lambda: self._warn(task, execution))
        self.park.after(task.limit_s, lambda: self._end_step(task, execution, "TIMEOUT"))

    def _start_step(self, task: Task, node: Host) -> None:
        """Start the process of a job; its script does that again where it is killed (jobs/scheduler/sbatch.py)."""
        folder = task.script.rpartition("/")[0]
        environment = {
            "HOME": "/root",
            "PATH": "/usr/bin",
            "PYTHONPATH": task.code,
            "SLURM_JOB_ID": str(task.array + 100_000 + (task.index or 0)) if task.index is not None else str(task.array),
            "SLURM_RESTART_COUNT": str(task.restart),
            "SLURMD_NODENAME": node.name,
            "SLURM_JOB_NODELIST": node.name,
        }
        if task.index is not None:
            environment |= {"SLURM_ARRAY_JOB_ID": str(task.array), "SLURM_ARRAY_TASK_ID": str(task.index)}
        identity = task.id
        step = Process(self.park, node, f"job {identity}", lambda: self.run_job(folder, identity), environment=environment)
        step.handlers = {signal.SIGUSR1: IGNORED, signal.SIGUSR2: IGNORED}
        step.on_end.append(lambda: self._step_is_over(task, step))
        task.step = step
        self.park.start(step)

    def _warn(self, task: Task, execution: int) -> None:
        if task.execution == execution and task.step is not None and task.step.alive:
            task.step.get_signal(signal.SIGUSR2)

    def _end_step(self, task: Task, execution: int, state: str) -> None:
        """End the step of a task as SLURM does: SIGTERM, then SIGKILL; its state then."""
        if task.execution != execution or task.step is None or not task.step.alive:
            return
        step = task.step
        task.after_end = task.after_end or state
        step.get_signal(signal.SIGTERM)
        self.park.after(KILL_WAIT_S, lambda: step.get_signal(signal.SIGKILL))

    def _step_is_over(self, task: Task, step: Process) -> None:
        if task.step is not step:
            return
        assert task.node is not None
        if not task.after_end and step.exit_code == -signal.SIGKILL and task.tries < MAX_TRIES:
            task.tries += 1
            self._start_step(task, task.node)
            return
        self.busy[task.node.name] -= 1
        state = task.after_end or ("COMPLETED" if step.exit_code == 0 else "FAILED")
        node, task.step = task.node.name, None
        if state == "REQUEUE":
            task.accounts[-1] = (self.park.now_s, "REQUEUED", node)
            self._again(task)
            return
        if state == "NODE_FAIL":
            task.accounts[-1] = (self.park.now_s, "NODE_FAIL", node)
            self._again(task)
            return
        self._finish(task, state)

    def _finish(self, task: Task, state: str) -> None:
        task.state, task.ended_s = state, self.park.now_s
        task.accounts.append((self.park.now_s, state, task.node.name if task.node else ""))
        self.park.after(MIN_JOB_AGE_S, lambda: self.forget(task))

    def _again(self, task: Task) -> None:
        task.state, task.reason, task.node = "PENDING", "BeginTime", None
        task.restart += 1
        task.execution += 1
        task.begin_s = self.park.now_s + REQUEUE_DELAY_S
        task.accounts.append((self.park.now_s, "PENDING", ""))
        self._plan_start(task, REQUEUE_DELAY_S)

    def requeue(self, task: Task, by: str) -> None:
        """`scontrol requeue`, or preemption: the step is ended, and the task waits again."""
        self._touch(task, by)
        if task.step is None:
            if task.state in ENDED:
                raise ValueError("Job has already finished")
            return
        self._end_step(task, task.execution, "REQUEUE")

    def cancel(self, task: Task) -> None:
        if task.step is not None:
            task.after_end = "CANCELLED"
            self._end_step(task, task.execution, "CANCELLED")
        elif task.state not in ENDED:
            self._finish(task, "CANCELLED by 0")
            task.state = "CANCELLED"

    def forget(self, task: Task) -> None:
        """The queue forgets a job that has ended a while ago."""
        if task in self.tasks and task.state in ENDED:
            self.tasks.remove(task)
            self.forgotten.append(task)

    def node_goes_down(self, node: Host) -> None:
        """All processes of a node are gone; its jobs wait again."""
        for task in self.tasks:
            if task.node is node and task.step is not None:
                task.after_end = "NODE_FAIL"
        for process in [each for each in self.park.processes.values() if each.host is node]:
            self.park.kill(process)
        node.boots += 1

    def host_goes_down(self, host: Host) -> None:
        """An sbatch there that has not reached the controller will not."""
        for sbatch in [each for each in self.sbatches if each.host is host]:
            if not sbatch.sent:
                sbatch.over = True
                self.sbatches.remove(sbatch)

    def begins_anew(self, keep_accounts: bool) -> None:
        """The controller has lost its state: the queue is empty, ids begin anew, and others get those that were ours."""
        for task in self.tasks:
            step, task.step = task.step, None
            if step is not None:  # accounting goes on to call it running
                self.park.kill(step)
        old = [*self.forgotten, *self.tasks]
        self.down_until_s = max(self.down_until_s, self.park.now_s + INSTALLATION_S)
        self.tasks, self.forgotten = [], old if keep_accounts else []
        for number in sorted({task.array for task in old}):
            if self.park.random.random() < 0.5:  # else the next job of ours gets it
                continue
            for index in (0, 1, 2):
                task = Task(number, index, "/home/other/job.sh", "other", "", 1e9, self.user, foreign=True)
                task.state = self.park.random.choice(("RUNNING", "PENDING"))
                task.accounts.append((self.park.now_s, task.state, "n1"))
                self.tasks.append(task)
        self.next_id = self.first_id
        self.busy = {node.name: 0 for node in self.nodes}

    @property
    def ours(self) -> list[Task]:
        """Our jobs that have not ended."""
        return [task for task in self.tasks if not task.foreign and task.state not in ENDED]


def _indices(text: str) -> list[int | None]:
    found: list[int | None] = []
    for part in text.partition("%")[0].split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found
