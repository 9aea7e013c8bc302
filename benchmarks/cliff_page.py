"""The page of the cliff and its plots, from the rows that `cliff.read` returns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import measure
from lab_page import panels

from retort.evaluate import Estimate
from retort.quantities.extrapolation import lambda_star, with_budget

Rows = Sequence[Mapping[str, Any]]

#: Up to this many seeds an interval is called weak.
WEAK = 3
#: Batches whose parse rates are averaged for the plot over steps.
WINDOW = 5
INTRO = """# The cliff of reward extrapolation

<!-- Written by benchmarks/cliff.py; edit that. -->

"The Extrapolation Cliff" (arXiv 2605.08737) predicts, for outputs whose structure is almost deterministic, a lambda
above which the completions of a student that extrapolates beyond its teacher can no longer be parsed. Here `listopd` is
trained on the built-in task `ranking` (JSON lists of four to six items) at values of lambda on both sides of the
prediction. The student starts at the teacher's own weights and the base is the task's small student, so at lambda = 1
there is nothing to learn, and structure that breaks at another lambda was intact before.

```sh
python benchmarks/cliff.py --out runs/cliff          # runs what is missing; --report only writes this page
```

"""
LEGEND = """
In brackets 95 % intervals over seeds (Student's t){weak}. *Parse rate*: of 256 held-out prompts x 4 completions at
temperature 1, by the last weights; *last third*: of all training rollouts in the last third of the run, because a
student that fluctuates from step to step makes its last weights arbitrary; *greedy*: of one held-out completion each
without sampling. *NDCG@1* is that of completions that parse. Differences are taken within a seed, in points: against
the student before training, and against {below}, the highest lambda of the grid below both predictions. *Target* is not
a run: as many completions sampled, token by token, from the softmax of lambda log p_T + (1 - lambda) log p_B, the
distribution that the objective drives the student to."""


def prediction(rows: Rows, steps: int) -> dict[str, float]:
    """Where the parse rate is to fall, from p and b as measured at the first step, one row per seed.

    `typical` is lambda* of the mean p, `safe` of the largest rollout mean of p (as the method logs it); `budget` and
    `safe_budget` are the two, moved to this number of steps.
    """
    by_seed = {row["seed"]: row for row in rows}.values()
    mass, base = (statistics.mean(row[name] for row in by_seed) for name in ("teacher_mass", "base_mass"))
    (cap,) = {row["cap"] for row in by_seed}
    found = {"teacher_mass": mass, "base_mass": base, "cap": cap, "typical": lambda_star(mass, base, cap)}
    if all(row["safe"] is not None for row in by_seed):
        found["safe"] = statistics.mean(row["safe"] for row in by_seed)
        found["safe_budget"] = with_budget(found["safe"], steps)
    return {**found, "budget": with_budget(found["typical"], steps)}


def summary(rows: Rows, targets: Rows, questions: Mapping[str, str]) -> dict[str, Any]:
    """The predictions, and a cell per condition and lambda: means over seeds, and differences within them."""
    conditions = {name: [row for row in rows if row["condition"] == name] for name in questions}
    conditions = {name: found for name, found in conditions.items() if found}
    predicted = {name: prediction(found, found[0]["steps"]) for name, found in conditions.items()}
    cells = [
        _cell(name, weight, found, predicted[name]) for name, found in conditions.items() for weight in _weights(found)
    ]
    return {
        "questions": dict(questions),
        "predictions": predicted,
        "cells": cells,
        "above_minus_below": {name: above_minus_below(rows, predicted[name]) for name, rows in conditions.items()},
        "targets": list(targets),
    }


def _weights(rows: Rows) -> list[float]:
    return sorted({row["weight"] for row in rows})


def _cell(condition: str, weight: float, rows: Rows, predicted: Mapping[str, float]) -> dict[str, Any]:
    own = {row["seed"]: row for row in rows if row["weight"] == weight}
    below = last_below(_weights(rows), predicted)
    return {
        "condition": condition,
        "weight": weight,
        "seeds": len(own),
        **{name: _estimate([row[name] for row in own.values()]) for name in ("parse", "greedy", "ndcg", "length")},
        "one_missing": _estimate([row["one_missing"] for row in own.values()]),
        "early": _estimate([third(row, 0) for row in own.values()]),
        "late": _estimate([third(row, 2) for row in own.values()]),
        "tail": _estimate([_late_tail(row) for row in own.values()]),
        "beyond": statistics.mean(_beyond(row) for row in own.values()),
        "worst": min(min(row["curve"]) for row in own.values()),
        "below": below,
        **{
            f"{name}_{reference}": found
            for name, value in MEASURES.items()
            for reference, found in (
                ("against_start", _estimate([value(row) - row["before"] for row in own.values()])),
                ("against_below", _difference(rows, own, below, value)),
            )
        },
    }


def third(row: Mapping[str, Any], part: int) -> float:
    """The parse rate of the training rollouts in a third of the run, 0 to 2."""
    size = max(1, len(row["curve"]) // 3)
    return statistics.mean(row["curve"][part * size : (part + 1) * size] or row["curve"])


def _late_tail(row: Mapping[str, Any]) -> float:
    """The student's mean mass on all but the teacher's likeliest token, at contract positions, in the last third."""
    known = [tail for tail in row["tail"][-max(1, len(row["tail"]) // 3) :] if tail is not None]
    return statistics.mean(known)


def _beyond(row: Mapping[str, Any]) -> float:
    """The share of batches in which that mass is below (1 - p) / c, where the theory says that ratios are capped."""
    return statistics.mean(tail is not None and tail < row["boundary"] for tail in row["tail"])


#: What is held against the prediction. The last weights of a student that wobbles are a draw; a third of a run is not.
MEASURES: Mapping[str, Callable[[Mapping[str, Any]], float]] = {
    "parse": lambda row: row["parse"],
    "late": lambda row: third(row, 2),
}


def _estimate(values: Sequence[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    interval = Estimate.over_runs(known)
    if interval is None:
        return {"value": known[0], "n": 1} if known else None
    return {"value": interval.value, "low": interval.low, "high": interval.high, "n": len(known)}


def _difference(
    rows: Rows,
    own: Mapping[int, Mapping[str, Any]],
    weight: float | None,
    value: Callable[[Mapping[str, Any]], float],
) -> dict[str, float] | None:
    """A measure minus that at another lambda, within each seed; None for itself."""
    other = {row["seed"]: row for row in rows if row["weight"] == weight}
    if other == own:
        return None
    return _estimate([value(own[seed]) - value(other[seed]) for seed in sorted(set(own) & set(other))])


def above_minus_below(rows: Rows, predicted: Mapping[str, float]) -> dict[str, dict[str, float] | None]:
    """Each measure above both predictions minus that between 1 and both, means over the lambdas of a seed."""
    low, high = sorted((predicted["typical"], predicted["budget"]))
    found: dict[str, list[float]] = {name: [] for name in MEASURES}
    for seed in sorted({row["seed"] for row in rows}):
        own = [row for row in rows if row["seed"] == seed]
        above, below = [r for r in own if r["weight"] > high], [r for r in own if 1 < r["weight"] < low]
        if above and below:
            for name, value in MEASURES.items():
                found[name].append(statistics.mean(map(value, above)) - statistics.mean(map(value, below)))
    return {name: _estimate(differences) for name, differences in found.items()}


def last_below(weights: Sequence[float], predicted: Mapping[str, float]) -> float | None:
    """The highest lambda of a grid, from 1 on, that lies below both predictions."""
    return max((w for w in weights if 1.0 <= w < min(predicted["typical"], predicted["budget"])), default=None)


def verdict(cells: Rows, predicted: Mapping[str, float]) -> list[str]:
    """What the cells of one condition say of the prediction, in sentences."""
    beyond = [cell for cell in cells if cell["weight"] > 1]
    above = [cell for cell in cells if cell["weight"] > predicted["typical"]]
    found: list[str] = []
    for name, words in (
        ("parse", "Held-out completions of the last weights"),
        ("late", "Rollouts of the last third"),
    ):
        falls = [cell["weight"] for cell in beyond if _below_zero(cell[f"{name}_against_start"])]
        broken = [cell["weight"] for cell in above if _below_zero(cell[f"{name}_against_below"])]
        judged = [cell["weight"] for cell in above if "high" in (cell[f"{name}_against_below"] or {})]
        spared = [weight for weight in judged if weight not in broken]
        sentence = f"{words}: fewer parse than at the start, by more than the seeds' spread, at {_some(falls)}"
        if above and above[0]["below"] is not None:
            sentence += (
                f"; of those above the prediction ({predicted['typical']:.2f}), fewer than at lambda = "
                f"{above[0]['below']:g} at {_some(broken)}"
            ) + (f", not at {_some(spared)}" if spared else "")
        found.append(f"{sentence}.")
    alone = [cell["weight"] for cell in beyond if cell["seeds"] < 2]
    if alone:
        found.append(f"With one seed there is no spread, so nothing is said here of {_some(alone)}.")
    best = max(cell["parse"]["value"] for cell in cells)
    half = [cell["weight"] for cell in beyond if cell["parse"]["value"] < best / 2]
    where = f"reached at lambda = {half[0]:g}" if half else f"not reached up to lambda = {cells[-1]['weight']:g}"
    return [*found, f"Half of the peak, where the paper puts the middle of a cliff, is {where}."]


def _some(weights: Sequence[float]) -> str:
    return f"lambda = {', '.join(f'{weight:g}' for weight in weights)}" if weights else "none"


def _below_zero(cell: Mapping[str, float] | None) -> bool:
    return cell is not None and "high" in cell and cell["high"] < 0


# --- words ---


def page(found: Mapping[str, Any], rows: Rows, missing: Mapping[str, int] | None = None) -> str:
    """Markdown: the prediction, the tables with what they say, the plots, and how many runs are not finished."""
    targets = {one["weight"]: one for one in found["targets"]}
    cells = {name: [c for c in found["cells"] if c["condition"] == name] for name in found["predictions"]}
    fewest = min(cell["seeds"] for cell in cells["base"])
    parts = [
        INTRO + measure.in_words(measure.machine("cpu", 1)).replace(", load", "; load") + ".",
        _predicted(found["predictions"], rows),
        f"## {found['questions']['base'].capitalize()}",
        measure.markdown(HEADER, [_line(cell, targets) for cell in cells["base"]]),
        LEGEND.format(weak=f"; n = {fewest} is weak" if fewest <= WEAK else "", below=f"{cells['base'][0]['below']:g}"),
        _said(found, "base", cells["base"]),
        "![parse rate against lambda, with the two predictions](images/cliff-parse.svg)",
        "## Over the steps",
        f"Parse rates of the training rollouts (128 a batch, temperature 1; in the plot means of {WINDOW} batches). "
        "*First* and *last* are thirds of the run, *worst* is the worst single batch of any seed. *Tail* is what the "
        "student gives at contract positions to all but the teacher's likeliest token, in the last third; the cliff "
        "should begin where it sinks below the boundary (1 - p) / c, here "
        f"{statistics.mean(row['boundary'] for row in rows if row['condition'] == 'base'):.1e}; *beyond* are the "
        "batches in which it did.",
        measure.markdown(
            ["lambda", "first third, %", "last third, %", "worst batch, %", "tail", "beyond, %"],
            [
                [
                    f"{c['weight']:g}",
                    _share(c["early"]),
                    _share(c["late"]),
                    f"{100 * c['worst']:.0f}",
                    f"{c['tail']['value']:.1e}",
                    f"{100 * c['beyond']:.0f}",
                ]
                for c in cells["base"]
            ],
        ),
        "![parse rate against the step, one panel per lambda](images/cliff-steps.svg)",
    ]
    for name in (name for name in cells if name not in ("base", "direct")):
        parts += [
            f"## {found['questions'][name].capitalize()}",
            measure.markdown(HEADER, [_line(cell, targets) for cell in cells[name]]),
            _said(found, name, cells[name]),
        ]
    if missing:
        words = ", ".join(f"`{name}` {count}" for name, count in missing.items())
        parts.append(f"Runs that are not finished, by condition: {words}.")
    parts.append(
        "[What this says about the paper](lab-notes.md#the-cliff-of-reward-extrapolation) is on a page of its own."
    )
    return "\n\n".join(parts) + "\n"


HEADER = (
    "lambda",
    "seeds",
    "parse rate, %",
    "against the start",
    "against the last below",
    "last third, %",
    "against the last below",
    "greedy, %",
    "NDCG@1",
    "one item missing, %",
    "tokens",
    "target, %",
)


def _line(cell: Mapping[str, Any], targets: Mapping[float, Mapping[str, Any]]) -> list[str]:
    target = targets.get(cell["weight"])
    return [
        f"{cell['weight']:g}",
        str(cell["seeds"]),
        _share(cell["parse"]),
        _points(cell["parse_against_start"]),
        _points(cell["parse_against_below"]),
        _share(cell["late"]),
        _points(cell["late_against_below"]),
        _share(cell["greedy"]),
        "–" if cell["ndcg"] is None else f"{cell['ndcg']['value']:.3f}",
        _share(cell["one_missing"]),
        _number(cell["length"]),
        "–" if target is None else f"{100 * target['parse']:.1f}",
    ]


def _predicted(predictions: Mapping[str, Mapping[str, float]], rows: Rows) -> str:
    base = predictions["base"]
    seeds = len({row["seed"] for row in rows if row["condition"] == "base"})
    text = (
        f"**The prediction.** At the contract positions of the teacher's own completions (first step, seeds: {seeds}"
        f") the teacher's likeliest token has p = {base['teacher_mass']:.5f}, and the base gives it "
        f"b = {base['base_mass']:.4f} (the implied one, p exp(-mean log-ratio)). With the cap c = {base['cap']:g}, "
        f"lambda* is **{base['typical']:.2f}** for the mean p and {base['safe']:.2f} for the largest rollout mean; "
        f"moved to the number of steps, as the paper's own cliff moves, **{base['budget']:.2f}** and "
        f"{base['safe_budget']:.2f}."
    )
    if "direct" in predictions:
        other = predictions["direct"]
        text += (
            f" With b measured directly, the paper's other reading, b = {other['base_mass']:.4f} and lambda* is "
            f"{other['typical']:.2f}."
        )
    return text


def _said(found: Mapping[str, Any], name: str, cells: Rows) -> str:
    """The sentences about a condition, as a list."""
    pooled = found["above_minus_below"][name]
    sentences = verdict(cells, found["predictions"][name])
    if pooled["parse"] is not None:
        sentences.insert(
            0,
            "All lambdas above both predictions minus all between 1 and both, within a seed: "
            f"{_points(pooled['parse'])} points of the held-out completions, {_points(pooled['late'])} of the rollouts "
            "of the last third.",
        )
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _share(cell: Mapping[str, float] | None) -> str:
    """A share in percent; an interval ends at 0 and 100."""
    if cell is None:
        return "–"
    if "low" not in cell:
        return f"{100 * cell['value']:.1f}"
    return f"{100 * cell['value']:.1f} [{max(0.0, 100 * cell['low']):.1f}, {min(100.0, 100 * cell['high']):.1f}]"


def _points(cell: Mapping[str, float] | None) -> str:
    if cell is None:
        return "–"
    ends = f" [{100 * cell['low']:+.1f}, {100 * cell['high']:+.1f}]" if "low" in cell else ""
    return f"{100 * cell['value']:+.1f}{ends}".replace("-", "−")


def _number(cell: Mapping[str, float] | None) -> str:
    if cell is None:
        return "–"
    return f"{cell['value']:.1f} ± {cell['high'] - cell['value']:.1f}" if "low" in cell else f"{cell['value']:.1f}"


# --- plots ---


def plots(found: Mapping[str, Any], rows: Rows, folder: Path) -> None:
    """Parse rate against lambda, and against the step."""
    base = [row for row in rows if row["condition"] == "base"]
    lines = {
        f"lambda = {weight:g}": [windows(row["curve"]) for row in base if row["weight"] == weight]
        for weight in _weights(base)
    }
    panels(lines, folder / "cliff-steps.svg", "step", "training rollouts that parse, %")
    _against_weight(found, base, folder / "cliff-parse.svg")


def windows(curve: Sequence[float]) -> list[tuple[float, float]]:
    """Means of neighbouring batches, in percent, each at its window's last step."""
    parts = [curve[start : start + WINDOW] for start in range(0, len(curve), WINDOW)]
    return [(min((place + 1) * WINDOW, len(curve)), 100 * statistics.mean(part)) for place, part in enumerate(parts)]


def _against_weight(found: Mapping[str, Any], rows: Rows, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "retort", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    cells = [cell for cell in found["cells"] if cell["condition"] == "base"]
    predicted = found["predictions"]["base"]
    aims = sorted((one["weight"], 100 * one["parse"]) for one in found["targets"])
    figure, panes = pyplot.subplots(1, 2, sharey=True, figsize=(9, 4))
    titles = ("held-out answers, last weights", "training rollouts, last third of the run")
    for axes, title, (name, value) in zip(panes, titles, MEASURES.items(), strict=True):
        for place, words, style in (("typical", "predicted", "-"), ("budget", "moved to the number of steps", "--")):
            label = f"{words}: {predicted[place]:.2f}"
            axes.axvline(predicted[place], color="#b4441a", linewidth=1, linestyle=style, label=label)
        if aims:
            axes.plot(*zip(*aims, strict=True), color="#8a8a8a", linestyle=":", label="the target itself, no training")
        at = [row["weight"] for row in rows]
        axes.scatter(at, [100 * value(row) for row in rows], s=14, color="#6ba4d6", label="a seed")
        means = [100 * cell[name]["value"] for cell in cells]
        across = [cell["weight"] for cell in cells]
        axes.plot(
            across,
            means,
            color="#0b5cad",
            marker="o",
            markersize=4,
            label="mean; bars: 95 % interval, from three seeds on",
        )
        # Two seeds have an interval, of 12.7 standard errors: it would fill the plot and say as much.
        for cell in (cell for cell in cells if cell[name]["n"] > 2):
            ends = [min(100.0, max(0.0, 100 * cell[name][end])) for end in ("low", "high")]
            axes.plot([cell["weight"]] * 2, ends, color="#0b5cad", linewidth=2.5, alpha=0.35)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("lambda")
        axes.spines[["top", "right"]].set_visible(False)
    panes[0].set_ylabel("parse, %")
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.legend(*panes[0].get_legend_handles_labels(), loc="lower center", ncol=3, frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": time.strftime("%Y-%m-%d")}, facecolor="white")
    pyplot.close(figure)
