"""Episodes in the report: turns, the turn that is farthest from the teacher, and plots over turns."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retort.report import build_report
from retort.report.by_turn import is_by_turn
from retort.report.episodes import MOST_CHARACTERS, episode_of

MakeRun = Callable[..., Path]
OUTCOMES = [
    {"messages": [["user", "so"]], "reward": 0.0, "measures": {"tool_errors": 1.0}},
    {"messages": [["user", "done"]], "reward": 1.0, "measures": {"success": 1.0}},
]


def test_turns_have_their_tokens_mean_gap_and_outcome() -> None:
    row = {"turns": [0, 0, 1, 1, 1], "outcomes": OUTCOMES}
    found = episode_of(row, 5, {"reverse_kl": [0.5, 1.5, 0.25, None, 0.75]})
    assert found["turns"] == [
        {"from": 0, "to": 2, "gap": 1.0, "said": [["user", "so"]], "reward": 0.0, "errors": 1.0},
        {"from": 2, "to": 5, "gap": 0.5, "said": [["user", "done"]], "reward": 1.0, "success": True},
    ]
    assert found["worst"] == 0


def test_without_exact_divergences_the_gap_is_that_of_the_tokens_drawn() -> None:
    values = {"student_logp": [-1.0, -1.0, -0.5], "teacher_logp": [-1.5, -0.5, -3.5]}
    found = episode_of({"turns": [0, 0, 1]}, 3, values)
    assert [turn["gap"] for turn in found["turns"]] == [0.0, 3.0]
    assert found["worst"] == 1


@pytest.mark.parametrize(
    "values",
    [{}, {"reverse_kl": [0.0, 0.0]}, {"reverse_kl": [-0.5, -0.25]}, {"reverse_kl": [0.5]}],
    ids=["nothing known", "no gap", "below 0", "torn"],
)
def test_no_turn_is_marked_that_is_not_farther(values: dict[str, Any]) -> None:
    found = episode_of({"turns": [0, 1]}, 2, values)
    assert len(found["turns"]) == 2
    assert "worst" not in found


@pytest.mark.parametrize(
    "turns", [None, [], [0], [0, 0, 1], [1, 1], [0, 2], [1, 0], ["0", "1"], [0, None], {"0": 1}], ids=str
)
def test_turns_that_do_not_fit_are_no_episode(turns: object) -> None:
    assert episode_of({"turns": turns}, 2, {"reverse_kl": [0.5, 1.0]}) == {}


def test_an_episode_that_was_over_after_one_turn_is_one() -> None:
    found = episode_of({"outcomes": OUTCOMES[1:]}, 2, {"reverse_kl": [0.5, 1.0]})
    assert [(turn["from"], turn["to"]) for turn in found["turns"]] == [(0, 2)]
    assert "worst" not in found, "there is no other to be farther than"


def test_a_long_reply_is_cut_and_says_so() -> None:
    outcomes = [{"messages": [["tool", "x" * (MOST_CHARACTERS + 1500)]]}]
    (turn,) = episode_of({"outcomes": outcomes}, 1, {})["turns"]
    assert turn["said"][0][1].endswith("x … 1,500 more characters")


# --- plots ---


def written(run: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row | change(row)) + "\n" for row in rows))
    return run


def data_of(page: str, title: str) -> dict[str, Any]:
    import html

    (found,) = (part for part in page.split("<svg ") if f'data-title="{title}"' in part)
    return json.loads(html.unescape(found.split('data-plot="')[1].split('"')[0]))


def test_curves_by_turn_are_drawn_for_the_first_and_the_last_steps(tmp_path: Path, make_run: MakeRun) -> None:
    """Means of a tenth of the steps: of 20 steps two; a turn that nobody came to has no point."""

    def turns(row: dict[str, Any]) -> dict[str, Any]:
        step = row["step"]
        first = {"reverse_kl/turn-1": 1.0 * step, "reverse_kl/turn-2": 2.0 * step, "odd/turn-1": 1.0, "odd/turn-2": 2.0}
        return first | ({"reverse_kl/turn-3": 0.5} if step > 10 else {})

    page = build_report([written(make_run(tmp_path / "run", steps=20), turns)]).read_text()
    found = data_of(page, "Reverse KL by turn")
    assert found["at"] == ["1", "2", "3"]
    assert {one["name"]: one["y"] for one in found["series"]} == {
        "first steps": [1.5, 3.0, None],
        "last steps": [19.5, 39.0, 0.5],
    }
    assert 'data-title="odd by turn"' in page
    assert "turn-1" not in page, "a turn has no plot by itself"


def test_success_is_drawn_by_horizon(tmp_path: Path, make_run: MakeRun) -> None:
    def grown(row: dict[str, Any]) -> dict[str, Any]:
        return {"horizon": 2 + row["step"] // 3, "success": 0.5 if row["step"] == 3 else 0.25}

    page = build_report([written(make_run(tmp_path / "run", steps=5), grown)]).read_text()
    found = data_of(page, "Success by horizon")
    assert (found["at"], found["series"][0]["y"]) == (["2", "3"], [0.25, pytest.approx(1 / 3, rel=1e-5)])


def test_a_page_without_turns_has_none_of_it(tmp_path: Path, make_run: MakeRun) -> None:
    page = build_report([make_run(tmp_path / "run", steps=20)]).read_text().split("<script>")[0]
    assert not any(words in page for words in ("by turn", "by horizon", "Horizon"))


def test_held_out_divergences_are_drawn_by_turn(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path / "run", steps=4)
    results = json.loads((run / "eval.json").read_text())
    bins = {"from": [1, 2], "tokens": [50, 40], "reverse_kl": [0.25, 0.75]}
    results["profile"]["student after"]["by_turn"] = bins
    (run / "eval.json").write_text(json.dumps(results))
    found = data_of(build_report([run]).read_text(), "Reverse KL by turn")
    assert (found["at"], found["series"][0]["y"]) == (["1", "2"], [0.25, 0.75])


@pytest.mark.parametrize("key", ["/turn-1", "x/turn-", "x/turn-a", "x/turn-0", "x/turn-1.5", "turn-1", "x/from-1"])
def test_other_metrics_stay_curves(key: str) -> None:
    assert not is_by_turn(key)
