"""The benches of the lab: who takes part, on what, and with which settings. Nothing is tuned for any method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from retort import registry
from retort.tasks.coached import TEMPLATES


@dataclass(frozen=True)
class Entry:
    """One row of a table.

    Attributes:
        method: Its method.
        settings: Of the method, where they are not its paper's defaults.
        note: Why they are not.
        run: Further settings of the run, such as a teacher.
        shown: What the method's teacher sees besides the student's prompt, in words.
        rewards: Whether rewards take part, in words; empty: as the method says.
        weaker: Models of the run that are none of the built-in ones (`weaker_models`), by the name that the run has for
            them.
    """

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    run: Mapping[str, Any] = field(default_factory=dict)
    shown: str = ""
    rewards: str = ""
    weaker: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """A task, its models, and who takes part.

    Attributes:
        name: Of its page and of its plots.
        folder: Where in the folder of the runs its own are; empty for that folder itself.
        base: Settings that all its runs share.
        samples: Rollouts per prompt, of every method that lets one choose.
        entries: Who takes part, by name; controls first.
        judge: What `retort serve` serves for those of its runs that ask a judge; empty if none does.
        control: The row in whose first run the teacher is evaluated; empty for all of `opd`.
    """

    name: str
    base: Mapping[str, Any]
    samples: int
    entries: Callable[[], Mapping[str, Entry]]
    folder: str = ""
    judge: str = ""
    control: str = ""


def needs_more(method: str) -> bool:
    """Whether a method needs rewards or a teacher that is shown more than the student, so more than bare prompts."""
    made = registry.load(method)
    shown = any(view.render is not None for view in made.views.values())
    return made.grading is None and (made.needs_rewards is not None or shown)


def asks_several(method: str) -> bool:
    """Whether a method asks models besides student, teacher and base."""
    known = {"student", "teacher", "base"}
    return any(model not in known for view in registry.load(method).views.values() for model in view.models)


def reads_images(method: str) -> bool:
    """Whether a method compares images, of which the prompts of these tasks have none."""
    return any(view.images is not None for view in registry.load(method).views.values())


def outside() -> dict[str, Entry]:
    """Every method that is registered and learns from another model on the student's own prompt, and its variants."""
    found: dict[str, Entry] = {}
    for method in registry.for_tokens():
        if needs_more(method) or asks_several(method) or registry.load(method).grading is not None or method in NEWER:
            continue
        own = {name: Entry(*entry) for name, entry in _OUTSIDE.items() if entry[0] == method}
        found.update(own or {method: Entry(method)})
    return found


def itself() -> dict[str, Entry]:
    """Every method that the other bench leaves out, and its variants; before them the controls."""
    found = dict(_CONTROLS)
    for method in registry.names():
        if needs_more(method) and not asks_several(method) and not reads_images(method):
            own = {name: entry for name, entry in _ITSELF.items() if entry.method == method}
            found.update(own or {method: Entry(method)})
    return {**found, **_PAIRED}


#: Methods that have a bench of their own, beside `opd` and `eopd`.
NEWER = frozenset({"resopd", "tropd", "topd", "opd2", "ida_opd", "w2s_opd", "lgr", "reopd"})
#: The built-in models and prompts, 40 batches of 64 prompts x 4 rollouts.
_COUNTDOWN: Mapping[str, Any] = {
    "student": "countdown:student",
    "teacher": "countdown:teacher",
    "data": "countdown",
    "steps": 40,
    "precision": "fp32",
    "threads": 1,
    "rollout": {"prompts": 64, "max_new_tokens": 14, "max_prompt_tokens": 8, "parallel": 4096},
    "optimizer": {
        "learning_rate": 1e-3,
        "schedule": "cosine",
        "warmup": 10,
        "weight_decay": 0.0,
        "beta2": 0.98,
        "updates": 1,
        "batch_tokens": 8192,
    },
    "eval": {
        "problems": 200,
        "samples": 8,
        "top_p": 1.0,
        "temperature": 1.0,
        "max_new_tokens": 14,
        "every": 20,
        "threshold": 0.8,
    },
    "checkpoint": {"every": 0},
    "record": {"rollouts": 1},
}
#: The student that reads hints, 30 batches of 16 prompts x 8 rollouts. Why this learning rate: see the page.
_COACHED: Mapping[str, Any] = {
    **{name: value for name, value in _COUNTDOWN.items() if name != "teacher"},
    "student": "coached:student",
    "data": "coached",
    "templates": dict(TEMPLATES),
    "steps": 30,
    "rollout": {"prompts": 16, "max_new_tokens": 14, "max_prompt_tokens": 24, "parallel": 4096},
    "optimizer": {**_COUNTDOWN["optimizer"], "learning_rate": 1e-4, "warmup": 5},
    "eval": {**_COUNTDOWN["eval"], "problems": 128, "every": 15},
}
#: Methods that take part more than once, or not with their defaults: name in the lab -> method, settings, and why.
_OUTSIDE: Mapping[str, tuple[str, Mapping[str, Any], str]] = {
    "eopd": ("eopd", {"top_k": 8}, "top-8 of 266 ids; the paper's top-16 is of 150,000"),
    "gkd": ("gkd", {}, "half of the prompts with the data's own answer"),
    "gkd, reverse KL": ("gkd", {"divergence": "reverse_kl", "on_policy_fraction": 1.0, "temperature": 1.0}, ""),
    "gkd, forward KL": ("gkd", {"divergence": "forward_kl", "on_policy_fraction": 1.0, "temperature": 1.0}, ""),
    "gkd, JSD": ("gkd", {"divergence": "jsd", "on_policy_fraction": 1.0, "temperature": 1.0}, ""),
    "skew_kl": ("skew_kl", {}, "the run ends before the first validation, so all completions are the data's"),
    "skew_kl, student writes": ("skew_kl", {"on_policy_fraction": 1.0}, ""),
    "decoupled_kl": ("decoupled_kl", {}, ""),
    "decoupled_kl, teacher writes": ("decoupled_kl", {"prefix": "teacher"}, ""),
    "temperature": ("temperature", {}, "forward KL at a loss temperature of 2"),
    "temperature, reverse KL": ("temperature", {"divergence": "reverse_kl"}, "also at 2"),
    "arkd": ("arkd", {}, "all completions are the data's, one per prompt"),
    "local_teachability": (
        "local_teachability",
        {
            **{"of": "opd", "settings": {"samples": 4}, "max_segment": 2},
            **{"top_k": 16, "margin": "gap", "divide_by": "kept"},  # as the published runs were made
        },
        "around opd; segments of 2 tokens, because an answer has 12; of its first reading (`top_k=16`, `margin=gap`, "
        "`divide_by=kept`)",
    ),
    "sead": ("sead", {"curriculum": None}, "without its curriculum"),
    "sead, easy to hard": ("sead", {}, "the easiest of the prompts, in the order of their difficulty"),
}
_BIGGER: Mapping[str, Any] = {"teacher": "coached:teacher"}
_REWARD_ALONE: Mapping[str, Any] = {"share": 0.0}
#: Who is no method of a self-teacher, and says what one is worth.
_CONTROLS: Mapping[str, Entry] = {
    "reward alone": Entry("rlsd", _REWARD_ALONE, "`rlsd` with lambda = 0, which is GRPO", shown="nothing"),
    "right answers alone": Entry(
        "rlsd",
        _REWARD_ALONE,
        "29 batches of a cold start on the data's responses (likelihood), one answer each to 128 prompts, so that the "
        "tokens are as many; the last batch is `reward alone`",
        run={
            "cold_start": {"steps": 29, "loss": "sft", "answers": "dataset"},
            "rollout": {**_COACHED["rollout"], "prompts": 128},
        },
        shown="the response, which is what is learnt",
        rewards="no",
    ),
    "opd, bigger teacher": Entry("opd", run=_BIGGER, shown="nothing"),
    "gkd, forward KL, bigger teacher": Entry(
        "gkd",
        {"divergence": "forward_kl", "on_policy_fraction": 1.0, "temperature": 1.0},
        "on the student's rollouts alone, at temperature 1",
        run=_BIGGER,
        shown="nothing",
    ),
}
_ITSELF: Mapping[str, Entry] = {
    "opsd": Entry("opsd", shown="solution"),
    "opsd, no clip": Entry("opsd", {"kl_clip": None}, "the plain forward KL", shown="solution"),
    "opsd, reasons first": Entry(
        "opsd",
        {"reason_first": True},
        "a rationale for each visit to a prompt",
        shown="solution, and what it wrote about it",
    ),
    "pw_opsd": Entry("pw_opsd", shown="solution"),
    "sdft": Entry("sdft", {}, "leaves out the first 3 tokens of 12, the paper of hundreds", shown="demonstration"),
    "sdft, teacher writes": Entry(
        "sdft",
        {"generate_from_teacher": True},
        "completions are written with the demonstration in sight; likewise the first 3 tokens",
        shown="demonstration",
    ),
    "sdpo": Entry("sdpo", {}, "its top-100 are more than a third of all ids", shown="a right sibling, else feedback"),
    "peer_opd": Entry(
        "peer_opd", {}, "likewise its top-100", shown="two right siblings and a wrong one, else feedback"
    ),
    "peer_opd, no failures": Entry(
        "peer_opd", {"failures": 0}, "likewise its top-100", shown="two right siblings, else feedback"
    ),
    "peer_opd, excerpts": Entry(
        "peer_opd",
        {"summaries": 2},
        "likewise its top-100; excerpts are whole completions here",
        shown="as `peer_opd`, and excerpts of two further siblings",
    ),
    "peer_opd, summaries": Entry(
        "peer_opd",
        {"summaries": 2, "summary": "written"},
        "likewise its top-100; a summary of each rollout",
        shown="as `peer_opd`, and what it wrote about two further siblings",
    ),
    "rlsd": Entry("rlsd", shown="solution"),
    "egrsd": Entry("egrsd", {}, "its bonus for short completions is nearly constant here", shown="solution"),
    "egrsd, no gate": Entry("egrsd", {"gate": 0.0}, "likewise the bonus; gamma = 0", shown="solution"),
    "cl_egrsd": Entry("cl_egrsd", {}, "likewise the bonus", shown="solution"),
    "dasd": Entry("dasd", {"context": "solution"}, "the answer alone is in the prompt", shown="solution"),
    "unisd": Entry(
        "unisd",
        {},
        "all components (`star`)",
        shown="a demonstration, a wrong response, the problems most alike",
    ),
    "unisd, random": Entry(
        "unisd",
        {"context": "random"},
        "all components, contexts drawn at random",
        shown="a demonstration, a wrong response, other problems",
    ),
    "unisd, induced": Entry(
        "unisd",
        {"context": "induced"},
        "all components; three instructions for each visit to a prompt",
        shown="a demonstration, a wrong response, what it wrote about other problems",
    ),
    "unisd, base": Entry("unisd", {"preset": "base"}, "no component", shown="demonstration"),
    "dopd": Entry("dopd", {}, "its top-128 are nearly half of all ids", run=_BIGGER, shown="hint, to both teachers"),
    "uni_opd": Entry("uni_opd", {}, "8 rollouts a prompt, not 16", run=_BIGGER, shown="nothing"),
    "sod": Entry("sod", {}, "of one turn, so its weights of turns are 1", run=_BIGGER, shown="nothing"),
    "atod": Entry("atod", {}, "of one turn, so its weights of turns are 0.75", run=_BIGGER, shown="nothing"),
}
#: On the prompts with a misleading suggestion.
_BAIT: Mapping[str, Any] = {"data": "bait"}
_PAIRED: Mapping[str, Entry] = {
    "opct": Entry("opct", run=_BAIT, shown="the prompt without its suggestion"),
    "reward alone, misled": Entry("rlsd", _REWARD_ALONE, "on the prompts of `opct`", run=_BAIT, shown="nothing"),
}
#: On prompts that cannot be compared with the others'.
PAIRED = frozenset(_PAIRED)

OUTSIDE = Bench("lab", _COUNTDOWN, 4, outside)
ITSELF = Bench("lab-itself", _COACHED, 8, itself)
#: The same at the learning rate of the task's recipe, for a section of the same page.
FASTER = Bench(
    "lab-itself",
    {**_COACHED, "optimizer": {**_COACHED["optimizer"], "learning_rate": 5e-4}},
    8,
    itself,
    folder="rate-5e-4",
)
#: Who writes a text before it scores, beside who does the same without.
_WRITTEN = (
    *("opsd", "opsd, reasons first", "sdft", "sdft, teacher writes"),
    *("peer_opd", "peer_opd, excerpts", "peer_opd, summaries"),
    *("unisd, base", "unisd, random", "unisd", "unisd, induced"),
)
#: The same runs as those of the bench before, for a table of their own.
WRITTEN = Bench("lab-written", _COACHED, 8, lambda: {name: _ITSELF[name] for name in _WRITTEN})
#: Episodes of many turns in the built-in environment: 30 batches of 12 games x 4 episodes.
_ROOMS: Mapping[str, Any] = {
    "student": "rooms:student",
    "teacher": "rooms:teacher",
    "data": "rooms",
    "steps": 30,
    "precision": "fp32",
    "threads": 1,
    "rollout": {"prompts": 12, "max_new_tokens": 64, "max_prompt_tokens": 48, "parallel": 512},
    "optimizer": {**_COUNTDOWN["optimizer"], "learning_rate": 5e-4, "warmup": 5},
    "eval": {"problems": 150, "samples": 2, "top_p": 1.0, "temperature": 1.0, "max_new_tokens": 64},
    "checkpoint": {"every": 0},
    "record": {"rollouts": 1},
}
_GROWS = "one more turn every batch, so that the last half of the run has the whole horizon of 16"
_AGENTS: Mapping[str, Entry] = {
    "reward alone": Entry("sod", {"coef": 0.0}, "`sod` with a weight of 0 for the teacher, which is GRPO"),
    "opd": Entry("opd"),
    "eopd": Entry("eopd", {"top_k": 8}, "top-8 of 59 ids; the paper's top-16 is of 150,000"),
    "tcod, forward": Entry("tcod", {"curriculum": "forward", "every": 1}, _GROWS),
    "tcod, backward": Entry("tcod", {"curriculum": "backward", "every": 1}, "one more turn every batch"),
    "reopd": Entry("reopd", {}, "one turn an episode, so that it learns from far fewer tokens"),
    "sod": Entry("sod"),
    "atod": Entry("atod", {"anneal_steps": 20}, "annealed over 20 of 30 batches; the paper over 80"),
}
#: Texts alone against log-probs: who talks here is a judge by rules, which solves the problems, too.
_TALK: Mapping[str, Any] = {name: value for name, value in _COUNTDOWN.items() if name != "teacher"}
_WITH_TEACHER: Mapping[str, Any] = {"teacher": "countdown:teacher"}
_TALKERS: Mapping[str, Entry] = {
    "reward alone": Entry(
        "sod",
        {"coef": 0.0},
        "`sod` with a weight of 0 for the teacher, which is GRPO",
        _WITH_TEACHER,
        rewards="the verifier's",
    ),
    "ropd": Entry("ropd", {}, "4 rollouts a prompt, not 8", rewards="the judge's points"),
    "ropd, as the paper": Entry(
        "ropd",
        {"normalisation": "population", "reduction": "rollouts"},
        "advantages over the deviation of their group, the mean over completions; likewise 4 rollouts",
        rewards="the judge's points",
    ),
    "the teacher's texts alone": Entry(
        "sod",
        {"coef": 0.0},
        "39 batches of a cold start on right answers (likelihood), one each to 256 prompts; the last is `reward alone`",
        run={
            **_WITH_TEACHER,
            "cold_start": {"steps": 39, "loss": "sft", "answers": "dataset"},
            "rollout": {**_COUNTDOWN["rollout"], "prompts": 256},
        },
        rewards="no",
    ),
    "opd": Entry("opd", run=_WITH_TEACHER, rewards="no; the log-probs of a model"),
}
AGENTS = Bench("lab-agents", _ROOMS, 4, lambda: _AGENTS)
JUDGES = Bench(
    "lab-judges",
    {**_TALK, "eval": {**_COUNTDOWN["eval"], "every": 10}},
    4,
    lambda: _TALKERS,
    judge="rules:countdown",
)
#: Pictures of shapes: 40 batches of 64 prompts x 4 rollouts, as the task's recipe has them but for what all share.
_SHAPES: Mapping[str, Any] = {
    "student": "shapes:student",
    "teacher": "shapes:teacher",
    "data": "shapes",
    "steps": 40,
    "precision": "fp32",
    "threads": 1,
    "rollout": {"prompts": 64, "max_new_tokens": 28, "max_prompt_tokens": 40, "parallel": 512},
    "optimizer": {**_COUNTDOWN["optimizer"], "learning_rate": 5e-4, "warmup": 5},
    "eval": {"problems": 200, "samples": 4, "top_p": 1.0, "temperature": 1.0, "max_new_tokens": 28, "every": 20},
    "checkpoint": {"every": 0},
    "record": {"rollouts": 1},
}
_EVEN = {"temperature": 1.0}
_LOOKERS: Mapping[str, Entry] = {
    "opd": Entry("opd"),
    "gkd, reverse KL": Entry(
        "gkd",
        {"divergence": "reverse_kl", "on_policy_fraction": 1.0, **_EVEN},
        "the divergence of `va_opd`, all tokens alike",
    ),
    "gkd": Entry("gkd", {"on_policy_fraction": 1.0, **_EVEN}, "JSD, on the student's rollouts alone, at temperature 1"),
    "va_opd": Entry(
        "va_opd", {**_EVEN, "top_p": 1.0}, "sampled at temperature 1, as all others", shown="both pictures"
    ),
}
SHAPES = Bench("lab-shapes", _SHAPES, 4, lambda: _LOOKERS)
_TEACHER_BASE = {"teacher_base": "teacher_base"}
_WEAK_PAIR = {"teacher": "weak", "teacher_minus": "weaker"}
#: Both are worse than the student before a run.
_WORSE_PAIR = {"teacher": "halfway", "teacher_minus": "weaker"}
_BEYOND: Mapping[str, Entry] = {
    "opd": Entry("opd"),
    "eopd": Entry("eopd", {"top_k": 8}, "top-8 of 266 ids; the paper's top-16 is of 150,000"),
    "resopd": Entry("resopd"),
    "tropd": Entry("tropd", {"top_k": 8}, "top-8 of 266 ids; the paper's top-64 is of 150,000"),
    "tropd, refused left out": Entry("tropd", {"forward_coef": 0.0}, "refused tokens teach nothing"),
    "topd": Entry("topd", {}, "one update of each batch, as all others; 4 rollouts a prompt, not 8"),
    "topd, sixteen updates": Entry(
        "topd",
        {},
        "a batch in sixteen parts with an update each, as the paper has it",
        run={"optimizer": {**_COUNTDOWN["optimizer"], "updates": 16}},
    ),
    "topd, token reward": Entry(
        "topd", {"returns": "token", "normalise": False}, "the bounded reward alone, without returns and normaliser"
    ),
    "opd2": Entry(
        "opd2",
        {"top_k": 266, "temperature": 1.0},
        "at temperature 1 and not 0.7, as all others; its base is the teacher after a tenth of its training",
        weaker=_TEACHER_BASE,
    ),
    "opd2, scale 1": Entry(
        "opd2",
        {"top_k": 266, "temperature": 1.0, "scale": 1.0},
        "likewise, and the reward as it is, not times 0.1",
        weaker=_TEACHER_BASE,
    ),
    "ida_opd": Entry("ida_opd"),
    "w2s_opd": Entry(
        "w2s_opd",
        {},
        "no teacher: two smaller models, one after further training, with which it is ahead of the student before",
        weaker=_WEAK_PAIR,
    ),
    "lgr": Entry("lgr"),
    "lgr, threshold 0.5": Entry(
        "lgr", {"top_k": 4, "entropy_threshold": 0.5}, "four ids, above an entropy of 0.5 nats"
    ),
    "lgr, threshold 1": Entry("lgr", {"top_k": 4, "entropy_threshold": 1.0}, "four ids, above an entropy of 1 nat"),
    "w2s_opd, alpha 0.3": Entry("w2s_opd", {"alpha": 0.3}, "likewise, a third of the difference", weaker=_WEAK_PAIR),
    "w2s_opd, worse pair": Entry(
        "w2s_opd",
        {},
        "a small model after 700 and after 500 steps; both are behind the student",
        weaker=_WORSE_PAIR,
    ),
    "opd, worse teacher": Entry(
        "opd",
        {},
        "its teacher is the better model of the pair of `w2s_opd, worse pair`",
        weaker={"teacher": _WORSE_PAIR["teacher"]},
    ),
}
#: The newer methods on the first bench's task; the variance of whole gradients is measured at every tenth batch.
BEYOND = Bench(
    "lab-beyond",
    {**_COUNTDOWN, "record": {"rollouts": 1, "gradient_variance_every": 10}},
    4,
    lambda: _BEYOND,
)
#: Small pictures of characters, whose experts each know one reward: 60 batches of 32 pictures. What is not said here is
#: as the task's recipe has it.
_GLYPHS: Mapping[str, Any] = {
    "data": "glyphs",
    "steps": 60,
    "rollout": {"prompts": 16},
    "optimizer": {"learning_rate": 1e-3, "updates": 2},
    "eval": {"problems": 96, "samples": 4, "every": 0},
    "checkpoint": {"every": 0},
    "record": {"rollouts": 1},
}
_ALONE: Mapping[str, Any] = {"flow": {"start": "student"}}
#: GRPO on the rewards of both domains, without a term of the teacher; as many pictures, in groups of eight.
_GRPO: Mapping[str, Any] = {"coef": 0.0, "samples": 8, "clip_low": None, "clip_high": None}
_FEW: Mapping[str, Any] = {"rollout": {"prompts": 4}}
#: At the learning rate of the others, a policy gradient over latents of 1,728 elements diverges within six batches.
_SLOW: Mapping[str, Any] = {"optimizer": {"learning_rate": 2e-5, "updates": 2}}
_DENOISERS: Mapping[str, Entry] = {
    "flow_opd": Entry("flow_opd", {}, "2 pictures a prompt, not 24; it begins with the mean of the experts"),
    "flow_opd, from the student": Entry("flow_opd", {}, "the same without that beginning", run=_ALONE),
    "flow_opd, after samples": Entry(
        "flow_opd",
        {},
        "20 of the 60 batches learn from the experts' samples",
        run={**_ALONE, "cold_start": {"steps": 20}},
    ),
    "flow_opd, sampled": Entry("flow_opd", {"gradient": "sampled_log_ratio"}, "the log-ratio of what was decided"),
    "flow_opd, sampled, 2e-5": Entry(
        "flow_opd", {"gradient": "sampled_log_ratio"}, "the same at a fiftieth of the learning rate", run=_SLOW
    ),
    "GRPO-mix": Entry("sod", _GRPO, "rewards alone, from the mean of the experts; `sod` without its teacher", run=_FEW),
    "GRPO-mix, 2e-5": Entry("sod", _GRPO, "the same at a fiftieth of the learning rate", run={**_FEW, **_SLOW}),
    "GRPO-mix, 2e-5, from the student": Entry("sod", _GRPO, "from the student", run={**_FEW, **_SLOW, **_ALONE}),
    "diffusion_opd": Entry("diffusion_opd", {}, "2 pictures a prompt, not 8; the experts by routing, too"),
}
GLYPHS = Bench("lab-glyphs", _GLYPHS, 2, lambda: _DENOISERS, control="flow_opd")
#: Points in the plane: 40 batches of 192 points, as the task's recipe has them.
_PLANE: Mapping[str, Any] = {
    "data": "plane",
    "steps": 40,
    "rollout": {"prompts": 48},
    "eval": {"problems": 96, "samples": 8, "every": 0},
    "checkpoint": {"every": 0},
    "record": {"rollouts": 1},
}
_EIGHT: Mapping[str, Any] = {"rollout": {"prompts": 24}}
_SLOWER: Mapping[str, Any] = {"optimizer": {"learning_rate": 2e-4}}
_IN_THE_PLANE: Mapping[str, Entry] = {
    "flow_opd": Entry("flow_opd", {}, "4 points a prompt, not 24; it begins with the mean of the experts"),
    "flow_opd, from the student": Entry("flow_opd", {}, "the same without that beginning", run=_ALONE),
    "flow_opd, after samples": Entry(
        "flow_opd",
        {},
        "10 of the 40 batches learn from the experts' samples",
        run={**_ALONE, "cold_start": {"steps": 10}},
    ),
    "flow_opd, sampled": Entry("flow_opd", {"gradient": "sampled_log_ratio"}, "the log-ratio of what was decided"),
    "flow_opd, detached": Entry(
        "flow_opd", {"gradient": "paper_detached"}, "the form of the project page, which has no direction"
    ),
    "opd": Entry("opd", {}, "with its paper's clip and correction"),
    "gkd": Entry(
        "gkd",
        {"divergence": "reverse_kl", "on_policy_fraction": 1.0, "temperature": 1.0},
        "reverse KL on the student's trajectories alone",
    ),
    "GRPO-mix": Entry("sod", _GRPO, "rewards alone, from the mean of the experts: `sod` without teacher", run=_EIGHT),
    "GRPO-mix, 2e-4": Entry("sod", _GRPO, "the same at a tenth of the learning rate", run={**_EIGHT, **_SLOWER}),
    "GRPO-mix, 2e-4, from the student": Entry("sod", _GRPO, "from the student", run={**_EIGHT, **_SLOWER, **_ALONE}),
}
PLANE = Bench("lab-plane", _PLANE, 4, lambda: _IN_THE_PLANE, control="flow_opd")
BENCHES: Mapping[str, Bench] = {
    "outside": OUTSIDE,
    "itself": ITSELF,
    "itself-5e-4": FASTER,
    "written": WRITTEN,
    "agents": AGENTS,
    "judges": JUDGES,
    "shapes": SHAPES,
    "beyond": BEYOND,
    "glyphs": GLYPHS,
    "plane": PLANE,
}
