"""The curves of a run, or of several runs overlaid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from retort.report.plots import Kind, Series, plot
from retort.report.read import RunFiles

COLORS = 6
DASHES = 5


@dataclass(frozen=True)
class Curves:
    """One plot of a run: its title, the unit of y, and the metrics in it with their labels."""

    title: str
    unit: str
    keys: Mapping[str, str]
    kind: Kind = "number"
    smooth: bool = True


PLOTS = (
    Curves("Reverse KL", "nats per token", {"reverse_kl": "reverse KL"}),
    Curves("Forward KL, gate open", "nats per token", {"forward_kl_gated": "forward KL, gated"}),
    Curves("Forward KL", "nats per token", {"forward_kl": "forward KL"}),
    Curves("Entropy", "nats per token", {"student_entropy": "student", "teacher_entropy": "teacher"}),
    Curves("Gate open", "share of tokens", {"gate_open_fraction": "gate open"}, "share"),
    Curves("Teacher's top-k mass", "mean, gate open", {"teacher_topk_mass": "top-k mass"}, "share"),
    Curves("Clipped", "share of tokens", {"clip_fraction": "clipped"}, "share"),
    Curves("Reward", "mean over rollouts", {"reward": "reward"}),
    Curves("Length", "tokens per rollout", {"length": "length"}),
    Curves("Truncated", "share of rollouts", {"truncated_fraction": "truncated"}, "share"),
    Curves("Gradient norm", "before clipping", {"grad_norm": "gradient norm"}),
    Curves("Learning rate", "", {"lr": "learning rate"}, smooth=False),
    Curves("Throughput", "student tokens per second", {"tokens_per_second": "tokens per second"}),
)


def series_of(
    run: RunFiles,
    run_index: int,
    place: int,
    label: str,
    points: Sequence[tuple[float, float]],
    *,
    several: bool,
    alone: bool,
) -> Series:
    """One run on the page: a colour for each curve. Several: a colour for each run and a dash for each curve."""
    if several:
        name, run_name = (run.name, "") if alone else (label, run.name)
        return Series(name, points, run_index % COLORS, place % DASHES, run_name)
    return Series("" if alone else label, points, place % COLORS)


def curves_section(runs: Sequence[RunFiles]) -> str:
    """The section with all curves; empty if there is none."""
    known = [_loss(runs), *PLOTS[:8], _accuracy(runs), *PLOTS[8:], _times(runs)]
    shown = {key for curves in known for key in curves.keys} | {"tokens"}
    every = {key for run in runs for key in run.curves if not key.startswith("time/")}
    others = sorted(every - shown)
    main = "".join(_figure(runs, curves) for curves in known)
    rest = "".join(_figure(runs, Curves(key, "", {key: key}, _kind(key))) for key in others)
    if not main and not rest:
        return ""
    several = len(others) > 1
    more = (
        f'<details><summary>{len(others)} more curve{"s" * several}</summary><div class="plots">{rest}</div></details>'
        if rest
        else ""
    )
    return (
        '<section aria-labelledby="curves"><h2 id="curves">Curves</h2>'
        '<p class="muted">The numbers above a plot are its last ones; point at a plot to read every plot at that step. '
        f'Long curves are drawn thin, with a running mean on top.</p><div class="plots">{main}</div>{more}</section>'
    )


def _keys(runs: Sequence[RunFiles], prefix: str) -> list[str]:
    return list(dict.fromkeys(key for run in runs for key in run.curves if key.startswith(prefix)))


def _kind(key: str) -> Kind:
    return "share" if key.endswith("_fraction") or "@" in key else "number"


def _loss(runs: Sequence[RunFiles]) -> Curves:
    terms = _keys(runs, "loss/")
    return Curves("Loss", "nats per token", {"loss": "all terms"} | {key: key.removeprefix("loss/") for key in terms})


def _accuracy(runs: Sequence[RunFiles]) -> Curves:
    keys = {key: key.removeprefix("eval/") for key in _keys(runs, "eval/") if "@" in key}
    return Curves("Accuracy during the run", "held-out problems", keys, "share")


def _times(runs: Sequence[RunFiles]) -> Curves:
    if len(runs) > 1:
        return Curves("Time", "seconds per step", {"time/step": "whole step"})
    keys = {key: key.removeprefix("time/") for key in _keys(runs, "time/") if key != "time/step"}
    return Curves("Time", "seconds per step", keys)


def _figure(runs: Sequence[RunFiles], curves: Curves) -> str:
    present = [key for key in curves.keys if any(run.curves.get(key) for run in runs)]
    if curves.title == "Loss" and len(present) == 2:
        present = ["loss"] if "loss" in present else present  # a single term is the whole
    series = [
        series_of(run, index, place, curves.keys[key], run.curves[key], several=len(runs) > 1, alone=len(present) == 1)
        for place, key in enumerate(present)
        for index, run in enumerate(runs)
        if run.curves.get(key)
    ]
    if not series:
        return ""
    steps = [step for run in runs for points in run.curves.values() for step in (points[0][0], points[-1][0])]
    return plot(
        curves.title,
        curves.unit,
        series,
        kind=curves.kind,
        x_range=(min(steps), max(steps)),
        smooth=curves.smooth,
    )
