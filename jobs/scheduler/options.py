"""Options of sbatch and srun that a profile may add, and those that it may not, because vitpa sets them or relies on them.

SLURM 22.05 to 24.11 know these options (man sbatch, man srun). One that is not known here goes to SLURM as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

# `=` after a name: with a value; `?`: with or without one
_COMMON = """
account= acctg-freq= bb= bbf= begin= cluster-constraint= clusters= cluster= comment= constraint= container= container-id=
contiguous core-spec= cores-per-socket= cpu-freq= cpus-per-gpu= cpus-per-task= deadline= delay-boot= dependency=
distribution= error= exclude= exclusive? export= extra= extra-node-info= gid= gpu-bind= gpu-freq= gpus= gpus-per-node=
gpus-per-socket= gpus-per-task= gres= gres-flags= help hint= hold input= job-name= licenses= mail-type= mail-user=
mcs-label= mem= mem-bind= mem-per-cpu= mem-per-gpu= mincpus= network= nice? no-kill? nodefile= nodelist= nodes= ntasks=
ntasks-per-core= ntasks-per-gpu= ntasks-per-node= ntasks-per-socket= open-mode= output= overcommit oversubscribe?
partition= power= prefer= priority= profile= propagate? qos= quiet reboot reservation= resv-ports? segment= share? signal=
sockets-per-node= spread-job stepmgr switches= tasks-per-node= test-only thread-spec= threads-per-core= time= time-min=
tmp= tres-bind= tres-per-task= uid= usage use-min-nodes verbose version wckey= x11?
"""
_SBATCH = """
array= batch= chdir= workdir= export-file= get-user-env? ignore-pbs kill-on-invalid-dep= no-requeue parsable requeue wait
wait-all-nodes= wrap=
"""
_SRUN = """
accel-bind= allocation= bcast? bcast-exclude= chdir= compress? cpu-bind= debugger-test disable-status epilog= exact
external-launcher? het-group= pack-group= immediate? interactive jobid= kill-on-bad-exit? label max-exit-timeout=
max-launch-time= mpi= msg-timeout= multi-prog no-allocate overlap preserve-env prolog= pty? quit-on-interrupt relative=
send-libs? slurmd-debug= task-epilog= task-prolog= threads= treewidth= unbuffered wait= whole
"""
_SHORT = "A=account B=extra-node-info C=constraint D=chdir F=nodefile G=gpus H=hold J=job-name L=licenses M=clusters N=nodes"
_SHORT += " O=overcommit Q=quiet S=core-spec V=version b=begin c=cpus-per-task d=dependency e=error h=help i=input k=no-kill"
_SHORT += " m=distribution n=ntasks o=output p=partition q=qos s=oversubscribe t=time v=verbose w=nodelist x=exclude"


def _table(*names: str) -> dict[str, str]:
    """Whether each option takes a value (`=`), may take one (`?`) or takes none (empty)."""
    return {name.rstrip("=?"): name[len(name.rstrip("=?")) :] for name in " ".join(names).split()}


def _letters(more: str) -> dict[str, str]:
    return dict(pair.split("=") for pair in f"{_SHORT} {more}".split())


SBATCH, SBATCH_LETTERS = _table(_COMMON, _SBATCH), _letters("a=array W=wait")
SRUN = _table(_COMMON, _SRUN)
SRUN_LETTERS = _letters(
    "E=preserve-env I=immediate K=kill-on-bad-exit P=dependency T=threads W=wait X=disable-status Z=no-allocate l=label "
    "r=relative u=unbuffered"
)


def _each(options: str, reason: str) -> dict[str, str]:
    return dict.fromkeys(options.split(), reason)


_SET = "is set by vitpa"
_NO_JOB = "with it, nothing would be trained"
_TASKS = "vitpa starts one task per node, which starts a process per GPU (see processes_per_node)"
_OF_THE_JOB = "the training gets what the job has; say it in additional_parameters or by the profile's own keys"
_REFUSED = {
    **_each("ntasks ntasks-per-node tasks-per-node ntasks-per-core ntasks-per-socket ntasks-per-gpu overcommit", _TASKS),
    **_each("gpus gpus-per-task gpus-per-socket tres-per-task", "say with gpus_per_node, or gres, how many GPUs a node gives"),
    **_each("job-name output error open-mode signal comment chdir workdir", _SET),
    **_each("nodes time", f"{_SET} (the profile has a key for it)"),
    **_each("help usage version test-only", _NO_JOB),
    **_each("clusters cluster", "vitpa asks one cluster; choose it with SLURM_CONF"),
    **_each("uid gid", "vitpa sees and cancels the jobs of one user only, the one who submits"),
}
_REFUSED_OF_SBATCH = {
    **_REFUSED,
    **_each("array requeue no-requeue", _SET),
    **_each("wrap", _NO_JOB),
    **_each("parsable quiet", "vitpa reads what sbatch prints"),
    **_each("wait", "jobs need no launcher that waits; see `vitpa sweep submit --wait`"),
}
_REFUSED_OF_SRUN = {
    **_REFUSED,
    **_each("cpus-per-task cpus-per-gpu gpus-per-node gres", _OF_THE_JOB),
    **_each("nodelist exclude nodefile relative", "the training starts on all nodes of the job"),
    **_each("export", "the training gets the job's environment; set variables in `setup`, or by additional_parameters.export"),
    **_each("kill-on-bad-exit wait", f"{_SET}: node 0 has to write down why a run failed"),
    **_each("multi-prog pty no-allocate jobid het-group pack-group external-launcher", _NO_JOB),
}
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9-]*")


def long_name(name: str, table: Mapping[str, str], letters: Mapping[str, str]) -> str:
    """The long name of an option, also of one given as a letter, with underscores, or cut short.

    Raises:
        ValueError: it cannot be the name of an option.
    """
    plain = name.strip().lstrip("-").replace("_", "-")
    if not _NAME.fullmatch(plain):
        raise ValueError(f"{name!r}: not the name of an option")
    if len(plain) == 1:
        return letters.get(plain, plain)
    longer = [known for known in table if known.startswith(plain)]
    return longer[0] if plain not in table and len(longer) == 1 else plain  # getopt_long takes clear abbreviations


def sbatch_option(name: str) -> str:
    """The name of an option of sbatch as profiles have it: with underscores.

    Raises:
        ValueError: it cannot be one, or it is not for profiles to set; the message says why.
    """
    option = long_name(name, SBATCH, SBATCH_LETTERS)
    key = option.replace("-", "_")
    if option in _REFUSED_OF_SBATCH:
        raise ValueError(f"additional_parameters.{key}: {_REFUSED_OF_SBATCH[option]}")
    return key


def check_srun_args(arguments: Sequence[str], gpus: Mapping[str, int], nodes: int) -> None:
    """Refuse arguments of srun that contradict what vitpa sets or relies on.

    To ask again for the `gpus` that a node gives, by their type, or for the `nodes` of a run, is no contradiction.

    Raises:
        ValueError: one line that names the argument and the reason.
    """
    for name, value in srun_options(arguments):
        if name in _REFUSED_OF_SRUN and not _says_the_same(name, value, gpus, nodes):
            raise ValueError(f"srun_args: --{name}: {_REFUSED_OF_SRUN[name]}")


def _says_the_same(name: str, value: str, gpus: Mapping[str, int], nodes: int) -> bool:
    if name in ("ntasks", "nodes"):
        return value == str(nodes)
    if name in ("ntasks-per-node", "tasks-per-node"):
        return value == "1"
    count = sum(gpus.values())
    wanted = ",".join(":".join(filter(None, ["gpu", kind, str(number)])) for kind, number in gpus.items())
    return (name == "gpus-per-node" and value == str(count)) or (name == "gres" and value in (wanted, f"gpu:{count}"))


def srun_options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The options among arguments of srun by their long names, each with its value; empty without one.

    Raises:
        ValueError: an argument that is no option: srun would start it as the program.
    """
    words = list(arguments)
    while words:
        word = words.pop(0)
        if re.fullmatch(r"--\w\S*\s+\S.*", word) and "=" not in word.split()[0]:
            raise ValueError(f"srun_args: {word!r}: two words in one; write {', '.join(map(repr, word.split(maxsplit=1)))}")
        if word in ("-", "--") or not word.startswith("-"):
            raise ValueError(f"srun_args: {word!r}: not an option; srun would start it instead of the training")
        if word.startswith("--"):
            text, equals, value = word.partition("=")
            name = long_name(text, SRUN, SRUN_LETTERS)
            is_value = bool(words) and not words[0].startswith("-")  # what comes next, for an option that is not known
            takes_next = not equals and (SRUN[name] == "=" if name in SRUN else is_value)
            yield name, _next(word, words) if takes_next else value
            continue
        letters = word[1:]
        while letters:
            name, letters = SRUN_LETTERS.get(letters[0], letters[0]), letters[1:]
            kind = SRUN.get(name, "")
            value = (letters or _next(word, words)) if kind == "=" else letters if kind == "?" else ""
            letters = "" if kind else letters
            yield name, value.strip().removeprefix("=")


def _next(word: str, words: list[str]) -> str:
    if not words:
        raise ValueError(f"srun_args: {word}: needs a value")
    return words.pop(0)


def parse_time_s(text: str) -> int:
    """Seconds of SLURM's time notation (man sbatch, --time): `M`, `M:S`, `H:M:S`, `D-H`, `D-H:M`, `D-H:M:S`.

    Raises:
        ValueError: it is none of these.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise ValueError(f"time={text!r}: expected SLURM's notation, such as '30' (minutes), '24:00:00' or '2-00:00:00'")
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is None and len(numbers) < 3:  # without hours
        numbers.insert(0, 0)
    hours, minutes, seconds = [*numbers, 0, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def seconds_of(text: str) -> int | None:
    """SLURM's time in seconds; None for none."""
    try:
        return parse_time_s(text)
    except ValueError:
        return None
