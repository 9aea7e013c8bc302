"""The simulator of a cluster: by hand where it can be, and its page from its file of results."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
NAMES = ("cluster_model", "cluster_sim", "cluster_stages", "cluster_fit", "cluster_gpus", "cluster_sim_page")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(str(FOLDER))
    return SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})


def stages(bench: SimpleNamespace, **more: Any) -> Any:
    """A second for a decode step, two to score, five to learn, and small change."""
    model = bench.cluster_model
    given = {"decode": model.Decode(step=1.0), "teacher": model.Affine(2.0), "learn": model.Affine(5.0)}
    return model.Stages(**{**given, "besides": model.Affine(0.5), "keep": 0.25, "update": 0.5, **more})


def simulated(bench: SimpleNamespace, layout: dict[str, Any], *, length: Any = None, **more: Any) -> Any:
    model = bench.cluster_model
    load = model.Load(4, 2, 10, length or model.always(10))
    return bench.cluster_sim.simulate(model.Layout(**layout), stages(bench, **more), load, steps=12)


def test_one_process_does_one_thing_after_another(bench: SimpleNamespace) -> None:
    found = simulated(bench, {})
    assert found.seconds == pytest.approx(10 + 2 + 5 + 0.5)
    assert found.busy == {"trainer": pytest.approx(1.0)}
    assert found.tokens == 80 and found.staleness == {0: 12 * 80}


def test_without_staleness_roles_take_turns(bench: SimpleNamespace) -> None:
    found = simulated(bench, {"generators": 2, "teachers": 1})
    whole = 10 + 2 + 5 + 0.5 + 0.25 + 0.5
    assert found.seconds == pytest.approx(whole)
    assert found.busy["teacher"] == pytest.approx(2 / whole)
    assert found.busy["generator"] == pytest.approx(10.5 / whole)
    assert found.waiting == pytest.approx(12.5 / whole), "for weights to be taken, for the batch, for its scores"


@pytest.mark.parametrize("staleness", [1, 2, 4])
def test_ahead_the_longer_stage_is_all_that_there_is(bench: SimpleNamespace, staleness: int) -> None:
    found = simulated(bench, {"generators": 2, "teachers": 1, "staleness": staleness})
    assert found.seconds == pytest.approx(10 + 0.5), "writing, and taking weights"
    slow = simulated(
        bench, {"generators": 2, "teachers": 1, "staleness": staleness}, learn=bench.cluster_model.Affine(30)
    )
    assert slow.seconds == pytest.approx(30 + 0.5 + 0.25), "learning, and handing weights out"
    assert slow.waiting == pytest.approx(0)


@pytest.mark.parametrize(("staleness", "batches"), [(1, 2), (2, 3)])
def test_a_batch_passes_all_stages_in_as_many_steps_as_it_may_be_old(
    bench: SimpleNamespace, staleness: int, batches: int
) -> None:
    layout = {"generators": 1, "teachers": 1, "staleness": staleness}
    found = simulated(bench, layout, teacher=bench.cluster_model.Affine(30.0))
    whole = 10.5 + 30 + 5 + 0.5 + 0.25
    assert found.seconds == pytest.approx(max(30, whole / batches), rel=0.02)


@pytest.mark.parametrize("staleness", range(5))
def test_batch_j_is_written_with_the_weights_after_j_minus_s_steps(bench: SimpleNamespace, staleness: int) -> None:
    found = simulated(bench, {"generators": 1, "teachers": 1, "staleness": staleness})
    expected = dict.fromkeys(range(staleness + 1), 80)
    expected[staleness] = (12 - staleness) * 80
    assert found.staleness == expected


def test_a_teacher_that_runs_share_is_waited_for(bench: SimpleNamespace) -> None:
    layout = {"generators": 1, "teachers": 1, "staleness": 2}
    slow = bench.cluster_model.Affine(9.0)
    alone, three = (simulated(bench, {**layout, "runs": runs}, teacher=slow) for runs in (1, 3))
    assert alone.seconds == pytest.approx(10.5)
    assert three.seconds == pytest.approx(27.0, rel=0.02), "three requests of nine seconds for each step of all"
    assert three.busy["teacher"] == pytest.approx(1.0, rel=0.02)


def test_a_group_is_scored_while_others_are_written(bench: SimpleNamespace) -> None:
    ragged = {"generators": 1, "teachers": 1, "parallel": 2}
    by_batch = simulated(bench, {**ragged, "ask": "batch"})
    by_group = simulated(bench, {**ragged, "ask": "group"})
    assert by_batch.seconds == pytest.approx(4 * 10 + 2 + 5 + 1.25), "groups of two completions, one after another"
    assert by_group.seconds == by_batch.seconds, (
        "the last group is scored when the batch is written, in as many seconds"
    )
    dear = bench.cluster_model.Affine(0.0, 1 / 10)
    assert simulated(bench, {**ragged, "ask": "batch"}, teacher=dear).seconds == pytest.approx(40 + 16 + 6.25)
    assert simulated(bench, {**ragged, "ask": "group"}, teacher=dear).seconds == pytest.approx(40 + 4 + 6.25)


def test_the_longest_completion_is_waited_for_and_places_are_taken_again(bench: SimpleNamespace) -> None:
    lengths = iter([30, *[10] * 7] * 100)
    found = simulated(bench, {"generators": 1, "parallel": 4}, length=lambda draw: next(lengths))
    # 30 in one place; in the other three 10 of each of seven, which takes three turns: 30 in all.
    assert found.seconds == pytest.approx(30 + 2 + 5 + 1.25)
    lengths = iter([30, *[10] * 7] * 100)
    few = simulated(bench, {"generators": 1, "parallel": 2}, length=lambda draw: next(lengths))
    assert few.seconds == pytest.approx(50 + 2 + 5 + 1.25), (
        "seven of 10: three while 30 are written, two turns after it"
    )


def test_environments_are_waited_for(bench: SimpleNamespace) -> None:
    model = bench.cluster_model
    load = model.Load(2, 1, 10, model.always(10), turns=3)
    layouts = [model.Layout(generators=1, environments=count) for count in (1, 2)]
    one, two = (
        bench.cluster_sim.simulate(layout, stages(bench, environment=4.0), load, steps=4).seconds for layout in layouts
    )
    assert two == pytest.approx(3 * 10 + 2 * 4 + 2 + 5 + 1.25)
    assert one > two, "two come back together, and one environment serves them one by one"


def test_each_takes_weights_by_itself_where_that_is_said(bench: SimpleNamespace) -> None:
    def lengths() -> Any:
        given = iter([[20, 20, 10, 10], [10, 10, 20, 20]] * 100)
        batch = iter([length for group in given for length in (group[0], group[0], group[2], group[2]) * 2])
        return lambda draw: next(batch)

    layout = {"generators": 2, "teachers": 1, "staleness": 2}
    together = simulated(bench, layout, length=lengths())
    each = simulated(bench, {**layout, "together": False}, length=lengths())
    assert together.seconds == pytest.approx(20.5)
    assert each.seconds == pytest.approx(15.5, rel=0.05), "who was quick goes on"


def test_staleness_needs_someone_who_generates_besides(bench: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="staleness needs processes that generate"):
        bench.cluster_model.Layout(staleness=1)
    with pytest.raises(ValueError, match="too few"):
        bench.cluster_sim.simulate(
            bench.cluster_model.Layout(generators=1, staleness=4),
            stages(bench),
            bench.cluster_model.Load(1, 1, 1, bench.cluster_model.always(1)),
            steps=5,
        )


def test_a_prediction_never_reads_the_times_that_it_predicts(bench: SimpleNamespace) -> None:
    fit = bench.cluster_fit
    rounds = json.loads(bench.cluster_stages.RESULTS.read_text())["rounds"]
    before = fit.compared(rounds)
    for one in (rows for own in rounds for rows in own["runs"].items() if rows[0] in {c.setting.key for c in before}):
        one[1].update(dict.fromkeys(("generate", "teacher", "learn", "besides", "whole"), 1000.0))
    after = fit.compared(rounds)
    assert [one.predicted for one in after] == [one.predicted for one in before]
    assert all(set(one.measured) == {1000.0} for one in after)


def test_stage_times_are_lines_through_what_was_measured(bench: SimpleNamespace) -> None:
    low, high = ({"learn": 1.0, "tokens": 100.0}, {"learn": 2.5, "tokens": 400.0})
    found = bench.cluster_fit.line("learn", low, high)
    assert (found.fixed, found.each) == (pytest.approx(0.5), pytest.approx(0.005))
    assert bench.cluster_fit.line("learn", high, {"learn": 1.0, "tokens": 500.0}).each == 0, "none falls"


def test_decoding_is_bound_by_memory(bench: SimpleNamespace) -> None:
    gpus = bench.cluster_gpus
    own = gpus.decode(gpus.H100, gpus.STUDENT)
    read = gpus.H100.bandwidth * gpus.assumed("memory")
    assert own.step == pytest.approx(gpus.assumed("overhead") + 2 * gpus.STUDENT.weights / read)
    assert gpus.STUDENT.cache == 147_456, "bytes of keys and values of a token"
    for users, prompt, completion, published in gpus.RATES:
        assert gpus.decode_rate(users, prompt, completion) == pytest.approx(published, rel=0.2)


def test_the_page_is_what_the_command_writes(bench: SimpleNamespace) -> None:
    found = json.loads(bench.cluster_stages.RESULTS.read_text())
    written = (FOLDER.parent / "docs" / "cluster-sim.md").read_text()
    assert written == bench.cluster_sim_page.page(found), "write it again: python benchmarks/cluster_sim.py page"
