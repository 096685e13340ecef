"""A history: a sweep on a simulated cluster, what users and faults do to it, and what must hold whatever they do.

The events are methods of `World`; which of them happen is for tests/simulation to say. What must hold:

- no run is lost: when the faults are over, `submit` and `retry` bring every run to its result, and a result stays
- none is executed twice at once, nor submitted while it is in training, nor executed again when it is done or cancelled
- a result was made by its own configuration, step by step
- a receipt names the jobs that SLURM has of its submission; each finds its pickle, and the copy of the code
- a job asks to be started again only if it has got further
- jobs of others are not touched, and no command or job ends with a traceback
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from submitit.core.utils import DelayedSubmission, JobPaths

from jobs.command import add_parser
from jobs.scheduler.client import Scheduler
from jobs.scheduler.own_jobs import COMMENT
from jobs.state import RunState, StateReader
from jobs.submit import launch
from jobs.sweep import Sweep
from jobs.verbs import run_verb
from tests.support.jobs_sweeps import make_sweep, slurm_profile
from tests.support.simulation import trainer
from tests.support.simulation.disk import Disk, Faults, real_files
from tests.support.simulation.processes import Child, Host, Park, Process, this_process
from tests.support.simulation.seams import HISTORY, SNAPSHOT
from tests.support.simulation.slurm import Slurm, Task
from vitpa.arguments import expand_path
from vitpa.config import RunConfig
from vitpa.rundir import RunDir

EVENT_S = 30.0  # until the next event, at most, mostly less
REST_S = 7200.0  # in which everything has come to rest
ROUNDS = 8  # of submit and retry, at the end
STEPS = 4
TAKEN_OVER = "another execution of this run has taken over"  # says a job whose training is ended for that
SAID_IN_A_LOG = ("FailedJobError", "SchedulerError")  # by a helper, of what SLURM says; its launcher says it in a line


class BrokenInvariantError(AssertionError):
    """Something that must hold does not."""


class World:
    """A history from its beginning to its end."""

    def __init__(
        self,
        seed: int,
        disk: Disk,
        *,
        seeds: int = 1,
        rates: int = 1,
        replicas: int = 1,
        step_s: float = 3.0,
        calm: bool = False,
    ) -> None:
        self.park = Park(seed)
        self.disk = disk
        self.root = Path(disk.root)
        random = self.park.random
        faults = Faults()
        if not calm:
            faults.pause = random.choice((0.0, 0.01, 0.05, 0.2))
            faults.look_pause = random.choice((0.0, 0.0, 0.01, 0.03))
            faults.late = random.choice((0.0, 0.0, 0.1, 0.5))
            faults.late_s = random.choice((2.0, 30.0))
        disk.begin(faults)
        self.rates, self.replicas = rates, replicas
        self.sweep = _files(self.root, seeds, rates, replicas)
        self.signatures = {run.signature for run in self.sweep.runs}  # of all that the sweep has ever had
        self.hosts = [Host("login1"), Host("login2")]
        self.nodes = [Host("n1"), Host("n2"), Host("n3")]
        self.slurm = Slurm(self.park, self.nodes, self._run_job, os.getuid())
        HISTORY.slurm, HISTORY.start_program = self.slurm, self._start_program
        self.step_s = step_s
        self.commands: list[Process] = []  # launchers and their helpers that are at work
        self.training: dict[str, Process] = {}  # by signature
        self.further: set[Process] = set()  # jobs whose training has taken a step
        self.done: dict[str, str] = {}  # signatures, with the hash of the weights that their results must have
        self.failing: dict[str, str] = {}  # signatures that fail, with the reason
        self.tampered = False
        self.forced = False  # a user has insisted, and may have runs started again that are in training
        self.starters = 0  # commands so far that start runs
        self.resting_since_s: float | None = None  # since a command has cancelled all, and nothing has been started
        self.broken: list[str] = []  # what must hold and does not
        self.words: list[str] = []
        self.story: list[str] = []
        self.park.ended = self._has_ended
        self.slurm.requeued = self._asks_to_be_requeued
        self.watch = trainer.Watch(self._training_begins, self._training_steps, self._training_is_done, self._training_ends)

    # --- what happens

    def tell(self, text: str) -> None:
        self.story.append(f"{self.park.now_s:8.1f} s  {text}".replace(str(self.root), "ROOT"))

    def command(self, verb: str, *words: str, host: int = 0) -> Process:
        """`vitpa sweep VERB` is called on a login node."""
        text = f"vitpa sweep {verb} {' '.join(words)}".strip()
        options = _options(verb, str(self.root), words)
        own = {"HOME": "/root", "PATH": "/usr/bin"}
        lines: list[str] = []
        name = f"{text} on {self.hosts[host].name}"
        process = Process(self.park, self.hosts[host], name, lambda: run_verb(options), environment=own, on_words=lines.append)
        process.on_end.append(lambda: self.tell(f"{name} ends with {process.exit_code}: {_last_line(lines)}"))
        self.forced = self.forced or (verb == "retry" and "--force" in words)
        if verb in ("submit", "retry"):
            self.resting_since_s = None
            self.starters += 1
        elif verb == "cancel":
            before = self.starters
            alone = not any(name in each.name for each in self.commands for name in ("submit", "retry"))
            alone = alone and not self.disk.hides(self.park.now_s, host=self.hosts[host].name)
            process.on_end.append(
                lambda: self._after_cancel(process, words, "".join(lines), alone=alone and before == self.starters)
            )
        self.commands.append(process)
        self.park.start(process)
        self.tell(name)
        return process

    def _after_cancel(self, process: Process, words: Sequence[str], said: str, *, alone: bool) -> None:
        """`alone`: nothing could be hidden from it: no command was starting runs, and the disk showed all that was there."""
        if process.exit_code == 0 and not words and alone and not self.slurm.sbatches and "slurm" not in said:
            self.resting_since_s = self.park.now_s

    def kill_command(self, which: int) -> None:
        """`kill -9` of a launcher, or of its helper."""
        alive = [each for each in self.commands if each.alive]
        if alive:
            process = alive[which % len(alive)]
            self.tell(f"kill -9 of {process.name}")
            self.park.kill(process)
            self.park._unwind()

    def kill_in_job(self, which: int) -> None:
        """`kill -9` of a process in a job: that of the job, or the training."""
        alive = [each for each in self.park.processes.values() if each.host in self.nodes]
        if alive:
            process = alive[which % len(alive)]
            self.tell(f"kill -9 of {process.name}")
            self.park.kill(process)
            self.park._unwind()

    def node_down(self, which: int) -> None:
        """A node goes down, with all that its processes have written and not synced."""
        node = self.nodes[which % len(self.nodes)]
        self.tell(f"{node.name} goes down")
        self.slurm.node_goes_down(node)
        self.park._unwind()
        self.disk.lose_data(self.park.now_s, self._some, node.name)

    def login_node_down(self, which: int) -> None:
        host = self.hosts[which % len(self.hosts)]
        self.tell(f"{host.name} goes down")
        self._host_down(host)
        self.disk.lose_data(self.park.now_s, self._some, host.name)

    def _host_down(self, host: Host) -> None:
        for process in [each for each in self.park.processes.values() if each.host is host]:
            self.park.kill(process)
        self.slurm.host_goes_down(host)
        host.boots += 1
        self.park._unwind()

    def power_loss(self) -> None:
        """All hosts and the disk go down: what was not synced may be gone."""
        self.tell("power loss")
        for host in self.hosts:
            self._host_down(host)
        for node in self.nodes:
            self.slurm.node_goes_down(node)
        self.park._unwind()
        self.disk.lose_data(self.park.now_s, self._some)
        self.disk.lose_entries(self.park.now_s, self._some)

    def _some(self, most: int) -> int:
        return self.park.random.choice((0, most, self.park.random.randint(0, most)))

    def controller_down(self, for_s: float) -> None:
        self.tell(f"the controller does not answer for {for_s:.0f} s")
        self.slurm.down_until_s = self.park.now_s + for_s

    def sbatch_fails(self, how: str) -> None:
        self.tell(f"the next sbatch fails: {how}")
        self.slurm.sbatch_fails.append(how)

    def scancel(self, which: int) -> None:
        """The user ends a job of ours by hand."""
        if self.slurm.ours:
            task = self.slurm.ours[which % len(self.slurm.ours)]
            self.tell(f"scancel {task.id}")
            self.slurm.cancel(task)

    def preempt(self, which: int) -> None:
        running = [task for task in self.slurm.ours if task.step is not None]
        if running:
            task = running[which % len(running)]
            self.tell(f"preemption of {task.id}")
            self.slurm.requeue(task, "preemption")

    def odd_state(self, which: int) -> None:
        """The queue calls a running job something that is not known here."""
        running = [task for task in self.slurm.ours if task.step is not None]
        if running:
            task = running[which % len(running)]
            task.odd_state = ("SIGNALING", "STAGE_OUT", "RESIZING")[which % 3]
            self.tell(f"{task.id} is called {task.odd_state}")

    def forget(self) -> None:
        """The queue forgets what has ended."""
        for task in list(self.slurm.tasks):
            self.slurm.forget(task)

    def ids_begin_anew(self, keep_accounts: bool) -> None:
        self.tell(f"the controller is installed again; accounting is {'kept' if keep_accounts else 'lost'}")
        self.slurm.begins_anew(keep_accounts)
        self.park._unwind()

    def touch_stop(self, which: int) -> None:
        run = self.sweep.runs[which % len(self.sweep.runs)].directory(self.root)
        if run.path.is_dir():
            self.tell(f"touch stop of {run.signature}")
            run.stop.touch()

    def fails(self, which: int, reason: str) -> None:
        """From now on a run fails at its next step, for a while."""
        run = self.sweep.runs[which % len(self.sweep.runs)]
        self.tell(f"{run.label} fails from now on: {reason}")
        self.failing[run.signature] = reason

    def works_again(self) -> None:
        self.failing.clear()

    def change_sweep(self, seeds: int) -> None:
        """The sweep's file gets another number of seeds."""
        self.tell(f"the sweep has {seeds} seeds now")
        self.sweep = _files(self.root, seeds, self.rates, self.replicas)
        self.signatures |= {run.signature for run in self.sweep.runs}

    def copy_result(self, which: int) -> None:
        """Somebody copies the result of a run, with what it is compared with, into the directory of another one."""
        done = [run for run in self.sweep.runs if run.signature in self.done]
        others = [run for run in self.sweep.runs if run.signature not in self.done]
        others = [run for run in others if run.directory(self.root).path.is_dir() and run.signature not in self.training]
        if done and others:
            source = done[which % len(done)].directory(self.root)
            target = others[which % len(others)].directory(self.root)
            self.tell(f"the result of {source.signature} is copied to {target.signature}")
            self.tampered = True
            for name in ("env.json", "metrics.jsonl", "result.json"):
                with suppress(FileNotFoundError):
                    (target.path / name).write_bytes((source.path / name).read_bytes())

    def edit_config(self, which: int) -> None:
        """Somebody edits the configuration of a claimed attempt by hand: it is another experiment."""
        for run in self.sweep.runs[which % len(self.sweep.runs) :][:1]:
            for attempt in run.directory(self.root).attempts()[-1:]:
                if attempt.config_yaml.is_file():
                    self.tell(f"{attempt.config_yaml} is edited")
                    text = attempt.config_yaml.read_text()
                    attempt.config_yaml.write_text(text.replace("weight_decay: ", "weight_decay: 0.0123 # "))

    def wait(self, seconds: float) -> None:
        self.park.run(until_s=self.park.now_s + seconds)
        self.check()

    # --- processes

    def _start_program(self, process: Process, command: Sequence[str], keys: dict[str, Any]) -> Child:
        """What `subprocess.Popen` starts: the helper of a submission, or the training of a job."""
        words = list(command)
        environment = dict(keys.get("env") or process.environment)
        log = getattr(keys.get("stderr"), "name", None)
        if "jobs.submit.launch" in words:
            arguments = words[words.index("jobs.submit.launch") + 1 :]
            name, parent = f"the helper of {process.name}", None
            target: Callable[[], object] = lambda: launch.main(arguments)  # noqa: E731 - the other one is a closure, too
        else:
            assert "vitpa.train" in words, words
            paths = [str(expand_path(word, "")) for word in words[words.index("vitpa.train") + 1 :] if word != "--with"]
            name, parent = f"the training of {process.name}", process
            target = lambda: self._train(paths)  # noqa: E731

        def write(text: str) -> None:
            with suppress(OSError), real_files(), Path(log or os.devnull).open("a", encoding="utf-8") as file:
                file.write(text)

        child = Process(self.park, process.host, name, target, environment=environment, parent=parent, on_words=write)
        if parent is None:
            self.commands.append(child)
        else:
            child.handlers = dict.fromkeys((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2), "ignored")
        self.park.start(child, self.park.random.uniform(0, 0.5))
        return Child(child, words)

    def _train(self, paths: list[str]) -> int:
        process = this_process()
        assert process is not None
        return trainer.train(process, paths, self.watch, lambda config: self.failing.get(config.signature, ""), self.step_s)

    def _run_job(self, folder: str, identity: str) -> object:
        """What submitit does in a job: wait for the pickle that is named by the job, and call what is in it."""
        process = this_process()
        assert process is not None
        process.on_words = self._job_says
        path = JobPaths(folder, job_id=identity).submitted_pickle
        for _ in range(60):
            if path.exists():
                break
            process.wait_until(self.park.now_s + 1.0)
        self._check_snapshot(process)
        try:
            delayed = DelayedSubmission.load(path)
        except Exception as error:
            if self._is_in_receipt(Path(folder).parent / "receipt.json", identity):  # until then the next `submit` sees to it
                self.broken.append(f"{process.name} is in a receipt, but cannot load its pickle ({error!r})")
            return 1
        return delayed.function(*delayed.args)

    def _check_snapshot(self, process: Process) -> None:
        """A job finds the whole copy of the code that it was submitted with."""
        code = Path(process.environment["PYTHONPATH"])
        with real_files():
            for path, content in SNAPSHOT.items():
                if not (code / path).is_file() or (code / path).read_bytes() != content:
                    self.broken.append(f"{process.name} does not find {path} of its code in {code}")

    def _is_in_receipt(self, receipt: Path, identity: str) -> bool:
        with real_files():
            jobs = json.loads(receipt.read_text())["jobs"] if receipt.exists() else []
        return identity.partition("_")[0] in [job["id"] for job in jobs]

    def _job_says(self, words: str) -> None:
        self.words.append(words)
        if TAKEN_OVER in words and not self.forced and not self._a_run_was_withdrawn():
            self.broken.append(f"a run was submitted again while it was in training: {words}")

    def _a_run_was_withdrawn(self) -> bool:
        """Whether `cancel` took a run that seemed to wait, and its training may have begun in this moment."""
        with real_files():
            lasts = [RunDir(self.root, signature).attempts()[-1:] for signature in sorted(self.signatures)]
            return any(
                each.start_json.exists() and "withdrawn" in each.start_json.read_text() for last in lasts for each in last
            )

    def _has_ended(self, process: Process) -> None:
        for signature in [each for each, its in self.training.items() if its is process]:
            del self.training[signature]
        if process in self.commands:
            self.commands.remove(process)
        expected = process.name.startswith("the training") or any(name in process.error for name in SAID_IN_A_LOG)
        if process.error and not expected:
            self.broken.append(f"{process.name} ends with a traceback:\n{process.error}")

    # --- what must hold

    def _training_begins(self, process: Process, config: RunConfig, step: int) -> None:
        signature = config.signature
        if signature not in self.signatures:
            self.broken.append(f"{process.name} trains {signature}, which no sweep has")
        self.tell(f"{process.name} begins {signature} at step {step} of {config.train.epochs}")
        if signature in self.training:
            self.broken.append(f"{signature} is executed twice at once, by {process.name}, too")
        faults = self.disk.faults
        grace_s = 2 + faults.late_s + 60 * (faults.pause + faults.look_pause)  # for one that began a moment before
        if self.resting_since_s is not None and self.park.now_s > self.resting_since_s + grace_s:
            self.broken.append(f"{signature} is executed although all was cancelled at {self.resting_since_s:.1f} s")
        if signature in self.done and not self.disk.hides(self.park.now_s - EVENT_S, folder=f"{self.root}/runs/{signature}"):
            self.broken.append(f"{signature} is done, and executed again by {process.name}")
        self.training[signature] = process
        if not self.forced:
            self._check_attempt(process, signature)

    def _check_attempt(self, process: Process, signature: str) -> None:
        """A run is executed by whom the start of its last attempt names, as long as that has no end."""
        with real_files():
            attempt = RunDir(self.root, signature).attempts()[-1]
            start = json.loads(attempt.start_json.read_text()) if attempt.start_json.exists() else {}
            if process.parent is None or start.get("process", {}).get("pid") != process.parent.pid or "withdrawn" in start:
                self.broken.append(f"{signature} is executed by {process.name}, which has not started {attempt.path}")
            if attempt.exit_json.exists():
                self.broken.append(f"{signature} is executed by {process.name}, although {attempt.path} has ended")

    def _training_steps(self, process: Process, config: RunConfig, step: int) -> None:
        if self.training.get(config.signature) is not process:
            self.broken.append(f"{process.name} takes a step of {config.signature}, which is not its own")
        if process.parent is not None:
            self.further.add(process.parent)
        grace_s = 2 * self.step_s + self.disk.faults.late_s + 20  # in which what is asked to stop has to
        if self.resting_since_s is not None and self.park.now_s > self.resting_since_s + grace_s:
            self.broken.append(f"{config.signature} is executed although all was cancelled at {self.resting_since_s:.1f} s")

    def _training_is_done(self, process: Process, config: RunConfig) -> None:
        self.tell(f"{config.signature} is done")
        self.done[config.signature] = trainer.expected_sha256(config)

    def _training_ends(self, process: Process, config: RunConfig) -> None:
        if self.training.get(config.signature) is process:
            del self.training[config.signature]

    def _asks_to_be_requeued(self, task: Task) -> None:
        hidden = self.disk.hides(self.park.now_s - EVENT_S)  # a checkpoint may be older than the start, and new to the job
        if task.step not in self.further and not hidden:
            self.broken.append(f"job {task.id} asks to be started again without having got further")

    def _check_receipts(self) -> None:
        """A receipt names no job that is not of its submission, and all that are in the queue."""
        for path in sorted(self.root.glob("sweeps/*/submissions/*/receipt.json")):
            comment = COMMENT + path.parent.name.rpartition("-")[2]
            named = {int(job["id"]) for job in json.loads(path.read_text())["jobs"]}
            live = {task.array for task in self.slurm.ours if task.comment == comment}
            if not named <= self.slurm.accepted.get(comment, set()):
                self.broken.append(f"{path.parent.name}: its receipt names jobs {named}, which are not its own")
            if not live <= named:
                self.broken.append(f"{path.parent.name}: SLURM has its jobs {live}, its receipt names {named}")

    def check(self) -> None:
        """Raise BrokenInvariantError if something does not hold."""
        self.broken += self.slurm.touched
        self._check_receipts()
        for signature, process in [] if self.forced else self.training.items():
            self._check_attempt(process, signature)
        for signature, weights in self.done.items():
            path = self.root / "runs" / signature / "result.json"
            found = json.loads(path.read_text()) if path.is_file() else {}
            if found.get("weights_sha256") != weights:
                self.broken.append(f"the result of {signature} {'is another one' if found else 'is lost'}")
        if self.broken:
            raise BrokenInvariantError("\n".join([self.broken[0], "", *self.story, "", *self.words[-20:]]))

    def states(self) -> list[RunState]:
        """The states of all runs, as a command on a login node derives them."""
        found: list[RunState] = []

        def look() -> None:
            found.extend(StateReader(self.root, Scheduler()).states(self.sweep.runs))

        looking = self.park.start(Process(self.park, self.hosts[0], "a look", look, environment={"PATH": ""}))
        self.park.run(until=lambda: not looking.alive)
        self.check()
        return found

    def rest(self) -> None:
        """Wait until no command is at work, and no job is in the queue."""
        if not self.park.run(self.park.now_s + REST_S, lambda: not self.commands and not self.slurm.ours):
            at_work = [*(each.name for each in self.commands), *(f"job {task.id} {task.state}" for task in self.slurm.ours)]
            self.broken.append(f"does not come to rest: {', '.join(at_work)}")
        self.check()

    def finish(self) -> None:
        """The faults are over; whatever has happened, every run comes to its own result."""
        self.tell("no more faults")
        self.disk.faults = Faults()
        self.disk.late.clear()
        self.disk.late_in_list.clear()
        self.slurm.down_until_s, self.slurm.sbatch_fails = 0.0, []
        self.works_again()
        self.rest()
        for number in range(ROUNDS):
            self.park.run(until_s=self.park.now_s + 400.0)  # the queue has forgotten what has ended
            states = self.states()
            self.tell(", ".join(f"{state.run.signature} {state.state} ({state.reason})" for state in states))
            if not self.tampered and any(state.state == "broken" for state in states):
                self.broken.append(f"broken, although nobody has edited anything: {self.story[-1]}")
                self.check()
            if all(state.state == "done" for state in states):
                break
            if number % 2:
                self.command("retry", "--force")
            else:
                self.command("submit", "--update")
            self.rest()
        else:
            self.broken.append(f"runs are lost: {self.story[-1]}")
            self.check()
        for state in states:
            assert state.result is not None
            if state.result.weights_sha256 != trainer.expected_sha256(state.run.config):
                self.broken.append(f"{state.run.signature} has the result of something else")
        self.check()

    def close(self) -> None:
        self.park.close()


def _last_line(lines: list[str]) -> str:
    return next((line for line in reversed("".join(lines).splitlines()) if line.strip()), "").strip()[:300]


@functools.cache
def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    return parser


@functools.cache
def _parsed(verb: str, root: str, words: tuple[str, ...]) -> argparse.Namespace:
    place = ["--profile", f"{root}/slurm.yaml", "--code", "snapshot"] if verb in ("submit", "retry") else []
    return _parser().parse_args(["sweep", verb, f"{root}/small.yaml", "--root", root, *place, *words])


def _options(verb: str, root: str, words: tuple[str, ...]) -> argparse.Namespace:
    return copy.copy(_parsed(verb, root, words))


_SWEEPS: dict[tuple[str, int, int, int], tuple[dict[str, bytes], Sweep]] = {}
RATES = (1e-3, 2e-3, 3e-3)


def _files(root: Path, seeds: int, rates: int, replicas: int) -> Sweep:
    """Put the files of a sweep and a profile below the root."""
    key = (str(root), seeds, rates, replicas)
    if key not in _SWEEPS:
        sweep = make_sweep(root, seeds=seeds, steps=STEPS, axes={"optim.lr": list(RATES[:rates])} if rates > 1 else None)
        slurm_profile(
            root, time="1:00", signal_delay_s=20, replicas=replicas, runtime={"device": "cpu", "data_dir": f"{root}/data"}
        )
        _SWEEPS[key] = ({name: (root / name).read_bytes() for name in ("recipe.yaml", "small.yaml", "slurm.yaml")}, sweep)
    files, sweep = _SWEEPS[key]
    for name, content in files.items():
        (root / name).write_bytes(content)
    for split in ("train", "val"):
        path = root / "data" / "digits" / f"{split}.beton"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return sweep
