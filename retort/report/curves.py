"""The curves of a run, or of several overlaid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from retort.report.ahead import IDLE, PARTIAL, SEGMENTS, STALENESS, is_of_staleness, staleness_figure
from retort.report.alike import tables
from retort.report.by_turn import by_turn_figures, is_by_turn, other_figures
from retort.report.flow_words import DECIDED, all_flows, is_by_step, words_of
from retort.report.groups import Group, Points, all_runs, over_seeds
from retort.report.method_curves import OF_METHODS
from retort.report.plots import SMOOTH_FROM, Kind, Series, plot, smoothed

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
    Curves("Teacher’s entropy: a lower bound", "nats per token", {"teacher_entropy_bound": "teacher, at least"}),
    Curves("Student’s entropy, gate open", "nats per token", {"student_entropy_gated": "student, gated"}),
    Curves("Gate open", "share of tokens", {"gate_open_fraction": "gate open"}, "share"),
    Curves("Teacher’s top-k mass", "mean, gate open", {"teacher_topk_mass": "top-k mass"}, "share"),
    Curves(
        "Predicted cliff: a prediction, not a safe bound",
        "reward weight",
        {
            "reward_weight": "in effect",
            "lambda_star_safe": "λ*, surest rollout",
            "lambda_star_typical": "λ*, typical",
            "lambda_star_budget": "λ*, at this many steps",
        },
        smooth=False,
    ),
    *(Curves(*own) for own in OF_METHODS),
    Curves("Top-k in common", "share of the student’s k", {"overlap_ratio": "overlap"}, "share"),
    Curves(
        "Mass of the top-k in common",
        "probability",
        {"overlap_mass": "student’s", "overlap_teacher_mass": "teacher’s"},
        "share",
    ),
    Curves("Teacher’s pull among the top-k in common", "nats, 0 is agreement", {"overlap_advantage": "advantage"}),
    Curves("Entropy gap", "nats per token", {"entropy_gap": "entropy gap"}),
    Curves("How far the teachers differ", "nats per token", {"teacher_disagreement": "Jensen-Shannon divergence"}),
    Curves(
        "Teacher’s scores that the cache had",
        "share of sequences",
        {"teacher_cache/hit_rate": "found"},
        "share",
    ),
    Curves(
        "Faults of the cache",
        "sequences of a step, computed anew",
        {"teacher_cache/damaged": "damaged", "teacher_cache/unsaved": "not stored"},
        smooth=False,
    ),
    Curves("Moving teacher’s distance", "of the student’s norm", {"teacher_lag": "distance"}),
    Curves("Rollout engine against trainer", "nats per token", {"noise_floor": "noise floor"}),
    Curves(
        "Does the teacher’s reward tell right from wrong?",
        "AUROC over rollouts, 0.5 is random",
        {"trajectory_auroc": "AUROC"},
    ),
    Curves(
        "Does the teacher rank a prompt’s completions?",
        "mean over prompts with both kinds",
        {"teacher_signal/auc": "AUC, 0.5 is random", "teacher_signal/pairwise_accuracy": "pairs in order"},
    ),
    Curves(
        "Shown to the teacher",
        "share of rollouts",
        {
            "view/teacher/shows/success": "a success",
            "view/teacher/shows/failure": "a failure",
            "view/teacher/shows/feedback": "feedback",
            "view/teacher/no_context": "nothing: left out",
        },
        "share",
    ),
    Curves(
        "Bytes in units",
        "share of the completions’ bytes",
        {
            "view/teacher/one_to_one": "1:1 units",
            "view/teacher/spans": "longer units",
            "view/teacher/unread": "no unit",
        },
        "share",
    ),
    Curves(
        "Stopping where the student stopped",
        "probability, mean over completions",
        {"stop_probability/student": "student", "stop_probability/teacher": "teacher"},
        "share",
    ),
    Curves(
        "Criteria that hold",
        "share of a category’s criteria",
        {"judge/passed/task": "task", "judge/passed/quality": "quality", "judge/passed/reasoning": "reasoning"},
        "share",
    ),
    Curves(
        "Scores by the rubric",
        "share of the points",
        {
            "judge/score": "student",
            "judge/teacher_score": "teacher, mean",
            "judge/teacher_score_min": "teacher, lowest",
            "judge/teacher_score_max": "teacher, highest",
        },
        "share",
    ),
    Curves(
        "Where the rubric fails",
        "share of groups",
        {"judge/teacher_below_student": "teacher below student", "judge/fallback": "no usable verdict"},
        "share",
        smooth=False,
    ),
    Curves(
        "Does the rubric tell right from wrong?",
        "AUC against the verifier, 0.5 is random",
        {"judge/auc": "all completions", "judge/auc_by_prompt": "of one prompt"},
    ),
    Curves("Criteria of a rubric", "per prompt", {"judge/criteria": "criteria"}),
    Curves("Teacher’s answers behind a rubric", "different ones, per prompt", {"judge/references": "answers"}),
    Curves("Weights on the advantage", "mean factor", {"magnitude": "magnitude", "gate": "gate"}),
    Curves("Visual advantage", "nats per token", {"visual_advantage": "teacher’s gain by the image"}),
    Curves(
        "Where the visual advantage lies",
        "share",
        {
            "visual_high_share": "of the advantage, in the high group",
            "visual_high_zero": "of the high group without any",
        },
        "share",
    ),
    Curves(
        "Weights of rollouts",
        "share of a prompt’s loss",
        {"rollout_weight_max": "largest", "rollout_weight_min": "smallest"},
        "share",
    ),
    Curves(
        "Groups",
        "share of groups",
        {"success_group_fraction": "with a success", "mixed_group_fraction": "with success and failure"},
        "share",
    ),
    Curves("Clipped", "share of tokens", {"clip_fraction": "clipped"}, "share"),
    Curves("Reward", "mean over training rollouts", {"reward": "reward"}),
    Curves("Episodes that succeed", "share of episodes", {"success": "succeeded"}, "share"),
    Curves("Turns", "per episode", {"turns": "turns"}),
    Curves("Invalid calls", "per episode", {"tool_errors": "invalid calls"}),
    Curves("Conversations rendered anew", "per episode", {"splits": "rendered anew"}),
    Curves("Horizon", "turns of the student", {"horizon": "horizon"}, smooth=False),
    Curves("Late replies", "share of episodes", {"timed_out": "ended by the deadline"}, "share", smooth=False),
    Curves("Broken episodes", "of a step, not learnt from", {"episode_errors": "ended in an error"}, smooth=False),
    Curves("Replayed episodes", "of a step", {"environment/replayed": "begun anew"}, smooth=False),
    Curves("Comparisons given up", "completions of a step, counted as wrong", {"given_up": "given up"}, smooth=False),
    Curves("Length", "tokens per rollout", {"length": "length"}),
    Curves("Truncated", "share of rollouts", {"truncated_fraction": "truncated"}, "share"),
    Curves("Gradient norm", "before clipping", {"grad_norm": "gradient norm"}),
    Curves(
        "Gradient’s variance at a token",
        "in logits, nats squared",
        {"gradient_variance": "exact", "gradient_variance_plain": "exact, as opd has it"},
    ),
    Curves(
        "Gradient’s variance over all weights",
        "of a step",
        {"batch_gradient_variance": "from prompt to prompt", "adam_variance": "by Adam’s moments, after clipping"},
    ),
    Curves("Learning rate", "", {"lr": "learning rate"}, smooth=False),
    Curves(*STALENESS, smooth=False),
    Curves(*PARTIAL, smooth=False),
    Curves(*SEGMENTS),
    Curves(*IDLE),
    Curves("Throughput", "student tokens per second", {"tokens_per_second": "tokens per second"}),
)

#: Of held-out prompts with an image; see `retort.evaluate.pixelated`.
IMAGES = Curves(
    "Held-out prompts with an image",
    "share of completions",
    {
        "eval/right_original": "right",
        "eval/right_pixelated": "right, image pixelated",
        "eval/changed_pixelated": "changed by pixelating",
    },
    "share",
)

#: Curves that are also averaged by the position in the completion: name, title, unit.
POSITIONS = (
    ("overlap_ratio", "Top-k in common, by position in the completion", "share of the student’s k"),
    ("overlap_mass", "Student’s mass in common, by position in the completion", "probability"),
    ("overlap_advantage", "Teacher’s pull, by position in the completion", "nats, 0 is agreement"),
    ("entropy_gap", "Entropy gap, by position in the completion", "nats per token"),
    ("teacher_disagreement", "How far the teachers differ, by position in the completion", "nats per token"),
    ("overlap_teacher_mass", "Teacher’s mass in common, by position in the completion", "probability"),
)


def run_series(
    group: Group,
    index: int,
    label: str,
    points: Sequence[tuple[float, float]],
    band: Sequence[tuple[float, float]] = (),
    *,
    several: bool,
    alone: bool,
) -> Series:
    """The series of one run: a colour for each curve. Several: a colour for each run and a dash for each curve."""
    if several:
        name, run = (group.name, "") if alone else (label, group.name)
        return Series(name, points, group.color % COLORS, index % DASHES, run, band)
    return Series("" if alone else label, points, index % COLORS, band=band)


def curves_section(groups: Sequence[Group]) -> str:
    """The section with all curves; empty if there is none."""
    runs = all_runs(groups)
    split = next(index for index, curves in enumerate(PLOTS) if curves.title == "Length")
    known = [
        *(_loss(groups), _unit_loss(groups), *PLOTS[:split], accuracy := _accuracy(groups), IMAGES, *PLOTS[split:]),
        _spoken(groups),
        *(_by_position(groups, name, title, unit) for name, title, unit in POSITIONS),
        _times(groups),
    ]
    if all_flows(groups):
        known = _of_flows(groups, known, known.index(accuracy))
    shown = {key for curves in known for key in curves.keys} | {"tokens", DECIDED}
    apart = {key for run in runs for key in run.curves if is_by_turn(key) or is_by_step(key) or is_of_staleness(key)}
    every = {key for run in runs for key in run.curves if not key.startswith(("time/", "eval/"))} - apart
    held_out = _keys(groups, "eval/")
    others = [*sorted(every - shown), *(key for key in held_out if key not in shown)]
    main = "".join((_eval_figures if _is_held_out(curves) else _figure)(groups, curves) for curves in known)
    main += by_turn_figures(groups) + staleness_figure(groups)
    turns = other_figures(groups)
    rest = "".join([(_eval_figures if key in held_out else _figure)(groups, _other(key)) for key in others] + turns)
    if not main and not rest:
        return ""
    count = len(others) + len(turns)
    more = (
        f'<details><summary>{count} more curve{"s" * (count > 1)}</summary><div class="plots">{rest}</div></details>'
        if rest
        else ""
    )
    bands = any(group.several for group in groups)
    drawn = (
        "Lines are means over seeds, bands their 95 % intervals (Student’s t)."
        if bands
        else "Long curves are drawn thin, with a running mean on top."
    )
    return (
        '<section aria-labelledby="curves"><h2 id="curves">Curves</h2>'
        '<p class="muted">The numbers above a plot are its last ones; point at a plot, or go along it with the arrow '
        f'keys, to read every plot at that step. {drawn}</p><div class="plots">{main}</div>{more}</section>'
    )


def _of_flows(groups: Sequence[Group], known: Sequence[Curves], split: int) -> list[Curves]:
    """The plots of runs whose student decides denoising steps: in their words, and with each reward."""
    words, trained, held_out = words_of(groups), _keys(groups, "reward/"), _keys(groups, "eval/reward/")
    rewards = (
        Curves("Rewards", "mean over training samples", {key: key.removeprefix("reward/") for key in trained}),
        Curves("Held-out rewards", "during the run", {key: key.removeprefix("eval/reward/") for key in held_out}),
    )
    fitted = [replace(curves, title=words(curves.title), unit=words(curves.unit)) for curves in known]
    throughput = Curves("Throughput", "denoising steps per second", {f"{DECIDED}_per_second": "steps per second"})
    return [*fitted[:split], *rewards, *fitted[split:], throughput]


def _is_held_out(curves: Curves) -> bool:
    return all(key.startswith("eval/") for key in curves.keys)


def _keys(groups: Sequence[Group], prefix: str) -> list[str]:
    return list(dict.fromkeys(key for run in all_runs(groups) for key in run.curves if key.startswith(prefix)))


def _other(key: str) -> Curves:
    title = f"Held-out: {key.removeprefix('eval/').replace('_', ' ')}" if key.startswith("eval/") else key
    return Curves(title, "", {key: key}, "share" if key.endswith("_fraction") or "@" in key else "number")


def _loss(groups: Sequence[Group]) -> Curves:
    terms = _keys(groups, "loss/")
    return Curves("Loss", "nats per token", {"loss": "all terms"} | {key: key.removeprefix("loss/") for key in terms})


def _unit_loss(groups: Sequence[Group]) -> Curves:
    """The plot of each term's mean in units of one token on each side, and in longer ones."""
    keys = _keys(groups, "unit_loss/")
    terms = list(dict.fromkeys(key.removeprefix("unit_loss/").rpartition("/")[0] for key in keys))
    labels = {
        f"unit_loss/{term}/{kind}": f"{term}, {words}" if len(terms) > 1 else words
        for term in terms
        for kind, words in (("one_to_one", "1:1 units"), ("spans", "longer units"))
    }
    return Curves("Loss by kind of unit", "nats per token of the student", labels)


def _spoken(groups: Sequence[Group]) -> Curves:
    """The plot of how often each of several teachers spoke."""
    shares = {key: key.removeprefix("teacher_share/") for key in _keys(groups, "teacher_share/")}
    keys = {**shares, "teacher_share_undecided": "no reward decided"}
    return Curves("How often each teacher spoke", "share of tokens", keys, "share")


def _accuracy(groups: Sequence[Group]) -> Curves:
    keys = {key: key.removeprefix("eval/") for key in _keys(groups, "eval/") if "@" in key}
    return Curves("Accuracy during the run", "held-out problems", keys, "share")


def _by_position(groups: Sequence[Group], name: str, title: str, unit: str) -> Curves:
    """A plot with a curve for each chunk of the completion."""
    keys = _keys(groups, f"{name}/from-")
    return Curves(title, unit, {key: f"from token {key.rpartition('-')[2]}" for key in keys})


def _times(groups: Sequence[Group]) -> Curves:
    if len(groups) > 1:
        return Curves("Time", "seconds per step", {"time/step": "whole step"})
    keys = {key: key.removeprefix("time/") for key in _keys(groups, "time/") if key != "time/step"}
    return Curves("Time", "seconds per step", keys)


def _eval_figures(groups: Sequence[Group], curves: Curves) -> str:
    """Figures of held-out measures, one for each set of prompts that runs were evaluated on."""
    split = tables(groups)
    titles = [f"{curves.title}, on {table.name}" if len(split) > 1 else curves.title for table in split]
    figures = [
        _figure(table.groups, replace(curves, title=title), several=len(groups) > 1)
        for table, title in zip(split, titles, strict=True)
    ]
    return "".join(figures)


def _figure(groups: Sequence[Group], curves: Curves, *, several: bool | None = None) -> str:
    runs = all_runs(groups)
    present = [key for key in curves.keys if any(run.curves.get(key) for run in runs)]
    if curves.title == "Loss" and len(present) == 2:
        present = ["loss"] if "loss" in present else present  # a single term is the whole
    series = [
        run_series(
            group,
            index,
            curves.keys[key],
            *_curve(group, key, curves.smooth),
            several=len(groups) > 1 if several is None else several,
            alone=len(present) == 1,
        )
        for index, key in enumerate(present)
        for group in groups
        if any(run.curves.get(key) for run in group.runs)
    ]
    series = [one for one in series if one.points]
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


def _curve(group: Group, key: str, smooth: bool) -> tuple[Points, Points]:
    """A metric over steps; of several seeds the mean of their running means, with its interval at each step.

    Running means first: a band is to say how runs differ, not how noisy one batch of rollouts is.
    """
    curves = [run.curves[key] for run in group.runs if run.curves.get(key)]
    if group.several and smooth:
        curves = [smoothed(curve) if len(curve) >= SMOOTH_FROM else curve for curve in curves]
    return over_seeds([dict(curve) for curve in curves])
