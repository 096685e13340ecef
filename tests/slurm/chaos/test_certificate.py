"""The certificate's numbers, each beside one that was worked out by hand."""

import math
from pathlib import Path

import pytest

from slurm.chaos.certificate import Ending, Observed, as_text, checkpoint_cost_s, is_clean, numbers, percentile
from slurm.chaos.daly import daly_interval_s, efficiency, young_interval_s
from slurm.chaos.watch import Life, Sample, Start, Strike, cause, kept_s, outages, trained_s

FIRST, AGAIN, THIRD = "sweeps/chaos/submissions/1", "sweeps/chaos/submissions/2", "sweeps/chaos/submissions/3"


def life(label: str, samples: list[tuple[float, int, float]], starts: list[tuple[float, str]], done_s: float | None) -> Life:
    executions = [Start(at_s, number, submission) for number, (at_s, submission) in enumerate(starts, 1)]
    return Life(label, Path(), [Sample(*sample) for sample in samples], executions, done_s)


def a_run() -> Life:
    """Ten steps a second of training. Killed at 105 s, back at its checkpoint of 90 s at 120 s, requeued at 200 s.

    It does the steps of 90 to 105 s again from 120 to 135 s: 30 s are lost. The second time SIGTERM lets it write a
    checkpoint: it is at the same step again after 20 s.
    """
    rows = [(float(t), 10 * t, float(t)) for t in range(0, 106)]
    rows += [(float(t), 10 * (t - 30), float(t - 30)) for t in range(121, 201)]
    rows += [(float(t), 10 * (t - 50), float(t - 50)) for t in range(221, 301)]
    return life("a", rows, [(-5.0, FIRST), (115.0, FIRST), (215.0, AGAIN)], 300.0)


def test_lost_seconds_are_those_until_the_run_is_where_it_was() -> None:
    killed, requeued = outages(a_run())
    assert (killed.began_s, killed.lost_s, killed.submissions) == (105.0, 30.0, set())
    assert (requeued.began_s, requeued.lost_s, requeued.submissions) == (200.0, 20.0, {AGAIN})


def test_a_run_that_is_interrupted_on_its_way_back_has_one_outage() -> None:
    rows = [(0.0, 0, 0.0), (50.0, 500, 50.0), (70.0, 410, 41.0), (75.0, 460, 46.0), (100.0, 410, 41.0), (110.0, 510, 51.0)]
    (outage,) = outages(life("a", rows, [(-5.0, FIRST), (60.0, FIRST), (90.0, FIRST)], None))
    assert [start.number for start in outage.attempts] == [2, 3]
    assert outage.lost_s == pytest.approx((110 - 50) - (51 - 50))


def test_a_run_that_never_comes_back() -> None:
    (outage,) = outages(life("a", [(50.0, 500, 50.0)], [(-5.0, FIRST), (60.0, FIRST)], None))
    assert outage.lost_s is None


def test_an_attempt_without_a_row_loses_everything_since_its_start() -> None:
    (outage,) = outages(life("a", [(40.0, 10, 1.0)], [(-5.0, FIRST), (30.0, FIRST)], None))
    assert (outage.began_s, outage.lost_s) == (-5.0, 45.0 - 1.0)


def test_the_cause_is_the_last_fault_that_touched_the_run() -> None:
    killed, _ = outages(a_run())
    strikes = [Strike(90.0, "requeue", ("a",), ""), Strike(106.0, "trainer killed", ("a",), "")]
    others = [Strike(106.5, "node down", ("b",), ""), Strike(118.0, "time limit", ("a",), "")]
    assert cause(killed, "a", [*strikes, *others]) == strikes[1]
    assert cause(killed, "a", others) is None


def test_seconds_that_are_lost_later_were_never_had() -> None:
    run = a_run()
    assert (trained_s(run, 105.0), kept_s(run, 105.0), kept_s(run, 300.0)) == (105.0, 91.0, 250.0)
    assert trained_s(run, -1.0) == 0.0


def observed() -> Observed:
    """From 0 s to 300 s under faults; the run b is undisturbed and done after 200 s."""
    rows = [(float(t), t, float(t)) for t in range(0, 201)]
    strikes = [
        Strike(-40.0, "restart", ("a",), ""),
        Strike(105.5, "trainer killed", ("a",), ""),
        Strike(150.0, "controller restart", ("a", "b"), ""),
        Strike(200.5, "requeue", ("a",), ""),
    ]
    lives = [a_run(), life("b", rows, [(-5.0, FIRST)], 200.0)]
    endings = [Ending("a", True), Ending("b", True)]
    return Observed(0.0, 300.0, lives, strikes, endings, {AGAIN: "submit"}, 15.0, 0.5)


def test_numbers_of_two_runs() -> None:
    found = numbers(observed())
    assert found["lost_s"] == {"count": 2, "p50": 20.0, "p95": 30.0, "max": 30.0}
    assert {kind: (its["struck"], its["interruptions"]) for kind, its in found["faults_by_kind"].items()} == {
        "trainer killed": (1, 1),
        "controller restart": (1, 0),
        "requeue": (1, 1),
    }
    assert found["recoveries"] == {"itself": 1, "submit": 1, "retry": 0, "nobody": 0}
    ettr = found["ettr"]
    assert ettr["measured"] == pytest.approx((250 + 200) / (300 + 200) * 15 / 15.5, abs=1e-4), "without checkpoints"
    assert ettr["mean_time_to_interruption_s"] == 250.0
    assert ettr["daly_bound"] == pytest.approx(15 / (250 * math.expm1(15.5 / 250)), abs=1e-4)
    assert ettr["of_daly_bound"] == pytest.approx(ettr["measured"] / ettr["daly_bound"], abs=1e-3)


def test_a_restart_that_was_measured_beforehand_counts_for_nothing_else() -> None:
    run = a_run()
    seen = observed()
    before = [Sample(-90.0, 0, 0.0), Sample(-60.0, 0, 0.0)]
    run.samples[:0] = before
    run.starts[:] = [Start(-100.0, 1, FIRST), *(Start(s.at_s, s.number + 1, s.submission) for s in run.starts)]
    seen = Observed(
        **{**vars(seen), "lives": [run, seen.lives[1]], "strikes": [Strike(-59.0, "restart", ("a",), ""), *seen.strikes[1:]]}
    )
    found = numbers(seen)
    assert found["ettr"]["restarts_measured_s"] == [60.0]
    assert found["ettr"]["restart_s"] == 60.0
    assert found["lost_s"]["count"] == 2
    assert "restart" not in found["faults_by_kind"]


def test_nothing_later_counts_as_a_measured_restart() -> None:
    """Not even what nothing explains."""
    seen = observed()
    run = life("a", [(float(t), t, float(t)) for t in range(-90, 301)], [(-100.0, FIRST), (120.0, FIRST)], None)
    found = numbers(Observed(**{**vars(seen), "lives": [run], "strikes": [Strike(-30.0, "restart", ("a",), "")]}))
    assert found["ettr"]["restarts_measured_s"] == []
    assert found["ettr"]["interruptions"] == 1
    assert {kind: its["interruptions"] for kind, its in found["faults_by_kind"].items()} == {"unexplained": 1}


def test_interruptions_on_the_way_back_count_each_for_its_own_fault() -> None:
    rows = [(0.0, 0, 0.0), (50.0, 500, 50.0), (70.0, 410, 41.0), (75.0, 460, 46.0), (100.0, 410, 41.0), (110.0, 510, 51.0)]
    run = life("a", rows, [(-5.0, FIRST), (60.0, FIRST), (90.0, FIRST)], None)
    strikes = [Strike(52.0, "requeue", ("a",), ""), Strike(80.0, "node down", ("a",), "")]
    found = numbers(Observed(0.0, 200.0, [run], strikes, [Ending("a", True)], {}, 60.0, 0.0))
    assert {kind: its["interruptions"] for kind, its in found["faults_by_kind"].items()} == {"requeue": 1, "node down": 1}
    assert found["ettr"]["mean_time_to_interruption_s"] == 100.0
    assert found["lost_s"]["count"] == 1, "it was away once"


def test_a_run_that_was_done_before_has_no_part_in_it() -> None:
    rows = [(float(t), t, float(t)) for t in range(-50, 0)]
    early = life("a", rows, [(-55.0, FIRST)], -1.0)
    run = life("b", [(float(t), t, float(t)) for t in range(0, 101)], [(-5.0, FIRST)], None)
    found = numbers(Observed(0.0, 100.0, [early, run], [], [Ending("a", True), Ending("b", True)], {}, 60.0, 0.0))
    assert (found["ettr"]["measured"], found["ettr"]["run_hours"]) == (1.0, round(100 / 3600, 4))


def test_runs_that_did_not_come_through_are_named() -> None:
    seen = observed()
    endings = [Ending("a", False), Ending("b", True, "2 attempts finished it", "weights_sha256")]
    certificate = {**numbers(Observed(**{**vars(seen), "endings": endings})), "left_out": {"disk full": "no room"}}
    certificate |= {"sweep": "demo", "hours": 1.0, "seed": 3, "mttf_min": 10.0}
    assert not is_clean(certificate)
    text = as_text(certificate)
    assert "1 lost, 1 doubled, 1 different of 2 runs" in text
    assert "lost: a" in text
    assert "different: b: weights_sha256" in text
    assert "left out: disk full: no room" in text
    assert "recoveries: 1 without a hand, 1 by submit again, 0 by retry" in text
    assert is_clean({**certificate, **numbers(seen)})


def test_no_fault_at_all() -> None:
    run = life("b", [(float(t), t, float(t)) for t in range(0, 101)], [(-5.0, FIRST)], None)
    found = numbers(Observed(0.0, 100.0, [run], [], [Ending("b", True)], {}, 60.0, 0.0))
    assert found["ettr"]["measured"] == found["ettr"]["daly_bound"] == 1.0
    assert found["ettr"]["mean_time_to_interruption_s"] is None
    assert found["lost_s"] == {"count": 0, "p50": None, "p95": None, "max": None}


def test_percentiles_are_by_nearest_rank() -> None:
    values = [float(n) for n in range(20, 0, -1)]
    assert [percentile(values, share) for share in (0.5, 0.95, 1.0)] == [10.0, 19.0, 20.0]
    assert percentile([], 0.5) is None


def test_daly() -> None:
    """M = 600 s, R = 20 s, a checkpoint of 0.1 s every 60 s: 60 / (600 e^(1/30) (e^0.10016667 - 1)) = 60 / 65.3560."""
    assert efficiency(60, checkpoint_s=0.1, restart_s=20, mttf_s=600) == pytest.approx(60 / 65.3560, rel=1e-4)
    assert efficiency(60, checkpoint_s=1, restart_s=20, mttf_s=math.inf) == pytest.approx(60 / 61)
    assert young_interval_s(checkpoint_s=3, mttf_s=600) == 60.0
    root = math.sqrt(0.0025)
    assert daly_interval_s(checkpoint_s=3, mttf_s=600) == pytest.approx(60 * (1 + root / 3 + 0.0025 / 9) - 3)
    assert daly_interval_s(checkpoint_s=3000, mttf_s=600) == 600


def test_no_interval_is_much_better_than_dalys() -> None:
    cost = {"checkpoint_s": 2.0, "mttf_s": 600.0}
    best = efficiency(daly_interval_s(**cost), restart_s=20, **cost)
    assert best >= max(efficiency(s, restart_s=20, **cost) for s in range(1, 600)) - 1e-5


def test_the_cost_of_a_checkpoint_is_that_of_an_interval() -> None:
    assert checkpoint_cost_s(
        [{"checkpoints_s": 0.3, "train_time_s": 180.0}, {"checkpoints_s": 0.1, "train_time_s": 30.0}], 60
    ) == (pytest.approx((0.1 + 0.1) / 2))
    assert checkpoint_cost_s([], 60) == 0.0
