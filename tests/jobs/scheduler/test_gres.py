"""Generic resources: SLURM's grammar, what a profile with them asks for, and options that say something else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.errors import SweepError
from jobs.profile import SlurmProfile
from jobs.scheduler.gres import Gres, gpus_by_type, parse_gres
from jobs.scheduler.options import SBATCH, SRUN, check_srun_args, sbatch_option, srun_options
from jobs.scheduler.sbatch import sbatch_parameters
from jobs.submit.submission import check_root
from vitpa.arguments import ConfigError
from vitpa.config_file import parse_model


def profile(**values: Any) -> SlurmProfile:
    return parse_model(SlurmProfile, {"executor": "slurm", "time": "1:00:00", **values}, "mine.yaml")


def asked(made: SlurmProfile) -> tuple[object, object]:
    parameters = sbatch_parameters(made, root=Path("/r"), name="s", token="t", exclude=[])
    return parameters.get("gpus_per_node"), parameters.get("gres")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gpu", "gpu:1"),
        ("gpu:2", "gpu:2"),
        ("gpu:a100:2", "gpu:a100:2"),
        ("gpu:a100", "gpu:a100:1"),
        ("gpu:1g.5gb:2", "gpu:1g.5gb:2"),
        ("gres/gpu:2", "gpu:2"),
        ("gres:gpu:2", "gpu:2"),
        ("gpu=2", "gpu:2"),
        (" gpu:1 , lscratch:20,", "gpu:1,lscratch:20"),
        ("gpu:2(S:0-1)", "gpu:2"),
        ("gpu:a100:2(S:0,1),gpu:h100:1(S:1)", "gpu:a100:2,gpu:h100:1"),
        ("gpu:1,gpu:1", "gpu:2"),
        ("gpu:tesla:no_consume:4", "gpu:tesla:4"),
        ("lscratch:2K,tmp:1m", "lscratch:2048,tmp:1048576"),
        ("gpu:0", "gpu:0"),
        ("none", ""),
        ("(null)", ""),
        ("", ""),
    ],
)
def test_as_slurm_writes_them(text: str, expected: str) -> None:
    assert ",".join(map(str, parse_gres(text))) == expected


@pytest.mark.parametrize("text", ["gpu:", "gpu::2", "gpu:a:b:1", "gpu:-1", "g pu:1", "gpu:1;x", "gpu:1\n#SBATCH", "2", ":gpu"])
def test_what_is_not_a_resource(text: str) -> None:
    with pytest.raises(ValueError, match="expected NAME, NAME:COUNT or NAME:TYPE:COUNT, such as gpu:a100:2"):
        parse_gres(text)


NAMES = st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True).filter(lambda name: name not in ("gres", "none"))
ITEMS = st.builds(Gres, NAMES, st.from_regex(r"([a-z][a-z0-9.]{0,6}[g-z])?", fullmatch=True), st.integers(0, 10**6))


@pytest.mark.fuzz
@given(st.lists(ITEMS, max_size=4, unique_by=lambda each: (each.name, each.type)))
def test_what_is_written_is_read(items: list[Gres]) -> None:
    items = [each for each in items if not re.fullmatch(r"\d+[kmgtp]?", each.type)]
    assert parse_gres(",".join(map(str, items))) == tuple(items)


@pytest.mark.fuzz
@given(st.text(alphabet="gpua10:=/,() Kx", max_size=20))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        found = parse_gres(text)
    except ValueError:
        return
    assert parse_gres(",".join(map(str, found))) == found


@pytest.mark.parametrize(
    ("values", "gpus", "options"),
    [
        ({}, {"": 1}, (1, None)),
        ({"gpus_per_node": 0}, {}, (None, None)),
        ({"gres": "lscratch:20"}, {"": 1}, (1, "lscratch:20")),
        ({"gres": "lscratch:20", "gpus_per_node": 1}, {"": 1}, (1, "lscratch:20")),
        ({"gres": "gpu:1,lscratch:20"}, {"": 1}, (None, "gpu:1,lscratch:20")),
        ({"gres": "gpu:2"}, {"": 2}, (None, "gpu:2")),
        ({"gres": "gres/gpu:a100:2", "gpus_per_node": 2}, {"a100": 2}, (None, "gpu:a100:2")),
        ({"gres": "gpu:0"}, {"": 0}, (None, "gpu:0")),
        ({"gres": "shard:4"}, {}, (None, "shard:4")),
        ({"gres": "none", "gpus_per_node": 2}, {"": 2}, (2, None)),
        ({"additional_parameters": {"gres": "lscratch:20"}}, {"": 1}, (1, "lscratch:20")),
        ({"additional_parameters": {"gpus-per-node": 2}}, {"": 2}, (2, None)),
        ({"additional_parameters": {"gres": "gpu:2"}}, {"": 2}, (None, "gpu:2")),
    ],
)
def test_what_a_run_gets(values: dict[str, Any], gpus: dict[str, int], options: tuple[object, object]) -> None:
    made = profile(**values)
    assert gpus_by_type(made.resources) == gpus
    assert asked(made) == options
    assert made.processes == max(1, sum(gpus.values()) if gpus else made.gpus_per_node)
    assert parse_model(SlurmProfile, made.model_dump(mode="json"), "the intent") == made


def test_resources_of_a_data_set() -> None:
    made = profile(gres="gpu:a100:1", per_dataset={"imagenet": {"gres": "gpu:a100:4"}, "pets": {"gres": "lscratch:5"}})
    assert asked(made.for_dataset("imagenet")) == (None, "gpu:a100:4")
    assert made.for_dataset("imagenet").processes == 4
    assert asked(made.for_dataset("pets")) == (1, "lscratch:5")
    with pytest.raises(ConfigError, match="gres=gpu:a100:1 with gpus_per_node=4: by gres a node gives 1 GPUs"):
        profile(gres="gpu:a100:1", per_dataset={"imagenet": {"gpus_per_node": 4}}).for_dataset("imagenet")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gres": "gpu:2", "gpus_per_node": 1}, "gres=gpu:2 with gpus_per_node=1: by gres a node gives 2 GPUs"),
        ({"gres": "gpu:1", "gpus_per_node": 0}, "gres=gpu:1 with gpus_per_node=0"),
        ({"gres": "gpu:a b"}, "gres=gpu:a b: 'gpu:a b': expected NAME"),
        (
            {"gres": "gpu:1", "additional_parameters": {"gres": "gpu:2"}},
            "gres=gpu:1, but additional_parameters say",
        ),
        ({"mem": "1G", "additional_parameters": {"mem_per_cpu": "2G"}}, "mem=1G with mem_per_cpu=2G: SLURM takes one of them"),
        ({"partition": "a", "additional_parameters": {"p": "b"}}, "partition=a, but additional_parameters say partition=b"),
        ({"partition": "a\n#SBATCH --ntasks=2"}, "holds a line break or another control character"),
        ({"additional_parameters": {"licenses": "a\nb"}}, "holds a line break or another control character"),
        ({"additional_parameters": {"licenses": ["a"]}}, "additional_parameters.licenses=['a']: expected a text, a number or"),
        ({"setup": ["#SBATCH --ntasks=2"]}, "setup: '#SBATCH --ntasks=2': sbatch would not see it there"),
    ],
)
def test_contradictions(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        profile(**values)
    assert "\n" not in str(caught.value)


TASKS = ["ntasks_per_node", "ntasks", "ntasks-per-socket", "ntasks_per_core", "ntasks_per_gpu", "tasks-per-node", "n"]
OF_VITPA = ["array", "a", "comment", "output", "o", "error", "nodes", "N", "time", "t", "signal", "requeue", "no_requeue", "J"]
OF_VITPA += ["job-name", "open_mode", "wrap", "parsable", "wait", "W", "test_only", "overcommit", "O", "chdir", "D", "quiet"]
GPUS = ["gpus", "G", "gpus_per_task", "gpus_per_socket", "tres_per_task"]
OTHERS = ["clusters", "M", "uid", "gid", "help", "version"]
SPELLINGS = ["--ntasks", "ntasks-per-n", "ntasks 2", "ntasks=2", "job-na", "test-o"]


@pytest.mark.parametrize("name", [*TASKS, *OF_VITPA, *GPUS, *OTHERS, *SPELLINGS])
def test_options_of_sbatch_that_are_not_for_profiles(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        profile(additional_parameters={name: 2})
    assert re.search(r"additional_parameters\.[a-z_]+: |not the name of an option", str(caught.value))
    assert "\n" not in str(caught.value)


def test_other_options_of_sbatch_go_through() -> None:
    more = {"licenses": "scratch:1", "export": "NONE", "begin": "now+60", "mem_per_cpu": "2G", "exclusive": True, "new-one": 3}
    more |= {"hold": False, "dependency": None, "ntasks_per_node": 1, "qos": "long", "--wckey": "x"}
    made = profile(additional_parameters=more)
    assert made.qos == "long"
    assert made.additional_parameters == {
        **{"licenses": "scratch:1", "export": "NONE", "begin": "now+60", "mem_per_cpu": "2G", "exclusive": True},
        **{"new_one": 3, "wckey": "x"},
    }
    assert {sbatch_option(name) for name in ("hold", "H", "ho", "--hold")} == {"hold"}


@pytest.mark.parametrize(
    "arguments",
    [
        *(["-n2"], ["-n", "2"], ["-n=2"], ["--ntasks=2"], ["--ntasks", "2"], ["--ntasks-per-n=2"], ["--ntasks 2"], ["-lun2"]),
        *(["--ntasks-per-node", "2"], ["--ntasks-per-core=1"], ["-O"], ["--overcommit"], ["--label", "--ntasks=2"], ["-n"]),
        *(["--mpi", "none", "-n2"], ["--of-2030", "x", "-n2"], ["--gres=gpu:2"], ["--gpus-per-node=2"], ["-G1"], ["-c", "9"]),
        *(["-N2"], ["--output=x"], ["-o", "x"], ["--export=NONE"], ["--kill-on-bad-exit=1"], ["-K"], ["-K1"], ["-W0"]),
        *(["--", "x"], ["echo"], ["-w", "node1"], ["--pty"], ["-h"], ["--jobid=1"], ["--multi-prog"], ["-v", "hello"]),
    ],
)
def test_arguments_of_srun_that_are_not_for_profiles(arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match="srun_args: ") as caught:
        profile(srun_args=arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--mpi=none"],
        ["--mpi", "none"],
        ["--cpu-bind=none", "-v"],
        ["--mem=0"],
        ["--exact", "-lu"],
        ["-n1", "--gres", "gpu:1"],
    ],
)
def test_other_arguments_of_srun_go_through(arguments: list[str]) -> None:
    assert profile(srun_args=arguments).srun_args == arguments
    assert [name for name, _ in srun_options(["-lu", "--mpi", "none", "-T4"])] == ["label", "unbuffered", "mpi", "threads"]


@pytest.mark.fuzz
@given(st.lists(st.text(alphabet="-n2=toask per", min_size=1, max_size=9), max_size=3))
def test_any_arguments_are_read_or_refused(arguments: list[str]) -> None:
    try:
        check_srun_args(arguments, {"": 1}, 1)
    except ValueError as error:
        assert "\n" not in str(error)


def test_the_tables_know_this_slurm_s_options() -> None:
    assert {"ntasks", "gres", "array", "wrap"} <= SBATCH.keys()
    assert {"ntasks", "mpi", "kill-on-bad-exit"} <= SRUN.keys()
    assert (SBATCH["ntasks"], SBATCH["hold"], SBATCH["exclusive"]) == ("=", "", "?")


@pytest.mark.parametrize("name", ["run%j", "%A", "100%", "a%%b", "back\\slash", "new\nline"])
def test_folders_that_slurm_does_not_take_literally(name: str) -> None:
    with pytest.raises(SweepError, match=r"jobs cannot work below a name with .* in it") as caught:
        check_root(Path("/tmp") / name, "slurm")
    assert "\n" not in str(caught.value)


def test_folders_on_this_machine() -> None:
    with pytest.raises(SweepError, match="--root '/tmp/run%j': jobs cannot work below a name with '%j' in it"):
        check_root(Path("/tmp/run%j"), "local")
    check_root(Path("/tmp/100% sure"), "local")
    check_root(Path("/tmp/a b'$HOME\"#,ü"), "slurm")
