"""The page of the simulator of a cluster, from the file of results of `cluster_sim.py`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cluster_fit as fit
import cluster_gpus as gpus
import measure

#: Share by which a prediction may be off.
ALLOWED = 0.15
INTRO = """# A cluster, simulated

<!-- Written by benchmarks/cluster_sim.py page; edit benchmarks/cluster_sim_page.py. -->

How many steps an hour, and who waits, on more machines than anybody here has? `benchmarks/cluster_sim.py` simulates a
run event by event ([simpy](https://simpy.readthedocs.io)): ranks that learn, processes that generate, servers of the
teacher, environments. It is fed with the times of stages. Below they are measured on two cores, and the simulator has
to predict other runs there. Then they are computed for GPUs, from published rates and **assumptions**.

```sh
python benchmarks/cluster_sim.py measure --rounds 3 --ahead    # ten minutes on a machine of its own
python benchmarks/cluster_sim.py predict                       # some minutes
python benchmarks/cluster_sim.py page                          # needs matplotlib
```

## What is simulated

* Batch j is written with the weights after max(0, j − s) steps, s being the staleness. Before step i the trainer hands
  out its weights and asks for batch i + s. Step i waits until batch i is written and scored. So but for the first
  batches, every token is s steps old when it is learnt: the histogram has one bar.
* The prompts of a batch are dealt out to the processes that generate at the start, in order. Each of them steps up to
  64 sequences together, and takes in new ones as others end. A batch begins when the one before is complete, because
  all processes then take new weights *together*. The other way, *each* when its part is written, is not offered by
  Retort.
* A server of the teacher scores one request after another. In the predictions it is asked for a group (all completions
  of a prompt) as soon as that is written, as Retort does for one rank with vLLM; with others it asks for a whole batch.
* Not simulated: a batch that starts in the slots of the last one's long completions with older weights in them,
  processes that fail, networks that are shared, a decoder of many experts that generates.
"""


def write(results: Path, docs: Path) -> None:
    """Writes the page and its plot."""
    found = json.loads(results.read_text(encoding="utf-8"))
    (docs / "cluster-sim.md").write_text(page(found), encoding="utf-8")
    plot(found["gpus"]["runs"], docs / "images" / "cluster-sim.svg")


def page(found: Mapping[str, Any]) -> str:
    """Markdown."""
    parts = [INTRO, *_validated(found), *_stated(), *_predicted(found["gpus"]), *_shared(found["gpus"]["shared"])]
    return "\n\n".join(part.strip("\n") for part in [*parts, *_published(found["gpus"])]) + "\n"


def _validated(found: Mapping[str, Any]) -> list[str]:
    rounds = found["rounds"]
    rows, compared = [], fit.compared(rounds)
    for one in compared:
        fed = " and ".join(str(given.prompts) for given in fit.given(one.setting.name))
        fed = (
            f"one process with {' and '.join(str(own.prompts) for own in fit.given(fit.ONE))}; {fed}"
            * (one.setting.ranks > 1)
            or fed
        )
        rows.append(
            [
                one.setting.key,
                len(one.ratios),
                fed,
                f"{statistics.median(one.predicted):.2f}",
                f"{statistics.median(one.measured):.2f}",
                f"{one.ratio:.2f} ({min(one.ratios):.2f}–{max(one.ratios):.2f})",
                "yes" if abs(one.ratio - 1) <= ALLOWED else "**no**",
            ]
        )
    head = ["run", "rounds", "fed with batches of", "predicted, s", "measured, s", "ratio", f"within {ALLOWED:.0%}"]
    loads = ", ".join(str(one["load"]) for one in rounds)
    return [
        "## Validated on two cores",
        "Seconds of a step, from the end of one to the end of the next, on the built-in pair. In each round all runs "
        "are made one after another; the simulator gets the median stage times of the small batches of that round, and "
        "predicts the large one, whose times it never sees. Ratios are predicted over measured: the median over "
        "rounds, and their range. Two ranks are predicted from one process; of their own small batch only what they "
        "exchange is taken. Of a small run that writes ahead only what handing out the weights takes is fed.",
        measure.in_words(found["machine"]).replace(", load", "; load")
        + f". Load average after each round, from other work on the same two cores: {loads}.",
        measure.markdown(head, rows),
        _verdict(compared),
    ]


def _verdict(compared: Sequence[fit.Compared]) -> str:
    """What the table shows, and what it does not."""
    met = sum(abs(one.ratio - 1) <= ALLOWED for one in compared)
    spread = max(max(one.measured) / min(one.measured) for one in compared)
    ratios = ", ".join(f"{one.quietest:.2f}" for one in compared)
    said = f"**Within {ALLOWED:.0%}: {met} of {len(compared)}.** "
    if spread > 1.5:
        said += (
            f"These are no quiet rounds: the same run took up to {spread:.1f} times as long in one as in another, and "
            "the load changed between the small batches of a round and its large one. In the least busy round of each "
            f"the ratios were {ratios}, in the order of the table. The command is to be repeated on a machine of its "
            "own before anybody leans on the rows that miss. "
        )
    return said + (
        "The stages of a run in one process only add up, so such rows check stage times; ranks and processes besides "
        "check how one waits for another. Teachers that several runs share were not measured.\n\nEarlier tries on the "
        "same day, on the same idle machine, missed: fed with batches of 8 and 32, for 64 and 96 prompts, the ratios "
        "were 0.94, 0.82 and 0.82 (small batches fit into caches, so a token of a large one takes longer); fed with 32 "
        "and 64, for 128 and 192, they were 0.96, 0.91, 0.86 and 0.82 once, and 0.94, 0.82, 0.82 and 0.83 another "
        "time: a line through two points that differ by a tenth from run to run is off by three times that at twice "
        "the distance. One process with 64 prompts beside another that did the same took 1.08, 0.99 and 0.92 times as "
        "long. With more for each of two ranks (160 prompts above, 96 and 48 in those tries) they fall further behind "
        "what one process and an exchange would take: what busy cores share, caches and memory, is not simulated."
    )


def _stated() -> list[str]:
    rows = [[name, f"{value:g}", words] for name, (value, words) in gpus.ASSUMED.items()]
    rates = [
        [
            f"{users} sequences, {prompt} + {completion} tokens",
            f"{published:,}",
            f"{gpus.decode_rate(users, prompt, completion):,.0f}",
            f"{gpus.decode_rate(users, prompt, completion) / published:.2f}",
        ]
        for users, prompt, completion, published in gpus.RATES
    ]
    work, (ranks, generators, teachers) = gpus.Work(), gpus.EIGHT
    return [
        "## What is assumed of GPUs",
        "Student Qwen3-8B, teacher Qwen3-32B or Qwen3-Coder-30B-A3B, in bf16, on H200 (4.8 TB/s, 989 Tflop/s on "
        f"paper). Of eight GPUs {ranks} learn, {generators} generate and {teachers} holds the teacher. A step on "
        f"eight GPUs has {work.rollouts} trajectories, {work.samples} of each prompt; on more GPUs as many times "
        f"more. A prompt has {work.prompt} tokens, a completion {work.mean:,.0f} on average (lognormal, spread "
        f"{work.sigma}), at most {work.longest:,}. **All of this paragraph but the two rates is an assumption**, and "
        f"so is this table:",
        measure.markdown(["", "value", "what it is"], rows),
        "With these, decoding Qwen3-8B in 8 bits on one H100 (3.35 TB/s) comes to the following tokens a second, "
        "beside what [silybench](https://github.com/tgarg01/silybench-data) published for vLLM 0.30 (2026-09-24). The "
        "three lines were seen when the first two assumptions were chosen.",
        measure.markdown(["at once", "published", "computed", "ratio"], rates),
    ]


def _predicted(found: Mapping[str, Any]) -> list[str]:
    base = {row["gpus"]: row["seconds"] for row in found["runs"] if not row["staleness"]}
    rows = [
        [
            row["gpus"],
            row["staleness"],
            ("together" if row["together"] else "each") if row["staleness"] else "–",
            f"{row['seconds']:.0f}",
            f"{3600 / row['seconds']:.0f}",
            f"{base[row['gpus']] / row['seconds']:.2f}",
            *(f"{100 * row['busy'][role]:.0f}" for role in ("trainer", "generator", "teacher")),
            f"{100 * row['waiting']:.0f}",
        ]
        for row in found["runs"]
    ]
    head = ["GPUs", "staleness", "weights", "step, s", "steps an hour", "speed-up"]
    head += [f"{role} busy, %" for role in ("trainers", "generators", "teachers")] + ["trainer waits, %"]
    gain = {
        row["staleness"]: base[64] / row["seconds"] for row in found["runs"] if row["gpus"] == 64 and row["together"]
    }
    each = {
        row["staleness"]: base[64] / row["seconds"]
        for row in found["runs"]
        if row["gpus"] == 64 and not row["together"]
    }
    return [
        "## 8, 64 and 512 GPUs",
        measure.markdown(head, rows),
        "![speed-up over synchronous, against the staleness, for 8, 64 and 512 GPUs](images/cluster-sim.svg)",
        f"* The longest completion of a batch sets the pace. A staleness of 1 hides learning and scoring behind it "
        f"(64 GPUs: {gain[1]:.2f} times as fast), and **more than 1 gains nothing** ({gain[4]:.2f} at 4) while all "
        f"processes that generate take weights together: they wait for the longest. Where each takes them by itself, "
        f"2 gain more ({each[1]:.2f} at 1, {each[2]:.2f} at 2, {each[4]:.2f} at 4).",
        "* The larger the batch, the longer its longest completion: a step on 512 GPUs takes longer than one on 8, "
        "though each process has the same number of completions. Cutting completions (`rollout.max_new_tokens`) moves "
        "this more than staleness does.",
        "* Ranks that learn are idle most of the time in this split. Fewer ranks and more that generate are faster, "
        "as far as memory lets ranks be fewer ([layouts](cluster.md#which-layout-for-which-size)).",
    ]


def _shared(found: Sequence[Mapping[str, Any]]) -> list[str]:
    ranks, generators, _ = gpus.EIGHT
    rows = []
    for row in found:
        total = row["runs"] * (ranks + generators) + row["teachers"]
        each = row["runs"] * 3600 / row["seconds"] * gpus.Work().rollouts / total
        rows.append(
            [
                row["teacher"],
                row["runs"],
                row["teachers"],
                total,
                f"{row['seconds']:.0f}",
                f"{100 * row['busy']['teacher']:.0f}",
                f"{each:.0f}",
            ]
        )
    head = ["teacher", "runs", "servers", "GPUs", "step, s", "teachers busy, %", "trajectories an hour and GPU"]
    return [
        "## Teachers of their own, or shared",
        f"Runs of {ranks} GPUs that learn and {generators} that generate, one step ahead, and so many servers of the "
        "teacher for all of them.",
        measure.markdown(head, rows),
        "The dense teacher, four times as large as the student, works for more than half of the time of one run: two "
        "runs that share it slow one another. A teacher of few active weights serves eight runs without being felt, "
        "and the GPUs that are saved make the others worth more. A server that several runs share is `retort serve` on "
        "a machine of its own, whose address each run names as its teacher.",
    ]


def _published(found: Mapping[str, Any]) -> list[str]:
    own = found["published"]
    low, high = (sorted(round(row["seconds"]) for row in own)[place] for place in (0, -1))

    def span(values: Sequence[float]) -> str:
        return f"{100 * min(values):.0f}–{100 * max(values):.0f} %"

    by = {name: [row["busy"]["teacher"] for row in own if row["teacher"] == name] for name in (fit_name(own))}
    dense, sparse = by[gpus.TEACHER.name], by[gpus.SPARSE.name]
    synchronous = [row["waiting"] for row in found["runs"] if not row["staleness"]]
    rows = [
        ["step, Qwen3-8B, 32B and 30B-A3B teachers, 8 B200", "46 s", f"{low}–{high} s"],
        ["teachers busy in it", "3.2–5.6 %", f"{span(dense)} (32B alone), {span(sparse)} (30B-A3B alone)"],
        ["trainer waits for rollouts, 35B-A3B, 16 B200, four frameworks", "53–84 %", f"{span(synchronous)} (8B, H200)"],
    ]
    return [
        "## Beside published figures",
        "Published: the benchmark of on-policy distillation by SemiAnalysis (reports of September 2026, eight and "
        "sixteen B200). How its eight GPUs were divided, how many trajectories a step had and how lengths spread is "
        f"not known here: four that generate, two that learn, {gpus.Work().rollouts} trajectories and spreads of "
        f"{gpus.SPREADS[0]} to {gpus.SPREADS[1]} are assumed.",
        measure.markdown(["", "published", "simulated"], rows),
        "* The simulated step is longer. The published runs wrote 36–41 s of their 46; with a spread below "
        f"{gpus.SPREADS[0]}, or fewer trajectories, so would these. Nothing was fitted to them.",
        "* The published use of teachers is a mean over both, and over a run with its start. The simulated one lies "
        "above it for the dense teacher and around it for the sparse one. That teachers idle nearly all of the time "
        "holds where they have few active weights or completions are long; a dense one of 32 B is worth a look before "
        "it is shared.",
        "* The shares of waiting are those of another student, frameworks that overlap in part, and other GPUs. They "
        "agree in what matters: rollouts are most of a step.",
    ]


def fit_name(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The teachers of some rows, in order."""
    return list(dict.fromkeys(row["teacher"] for row in rows))


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The speed-up over a synchronous run against the staleness, one panel for each number of GPUs."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "retort", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    sizes = sorted({row["gpus"] for row in rows})
    figure, panes = pyplot.subplots(1, len(sizes), sharey=True, figsize=(9, 2.8), squeeze=False)
    for axes, size in zip(panes.flat, sizes, strict=True):
        own = [row for row in rows if row["gpus"] == size]
        base = next(row["seconds"] for row in own if not row["staleness"])
        for together, label, color in (
            (True, "weights taken together", "#0b5cad"),
            (False, "each by itself", "#b4441a"),
        ):
            line = [(row["staleness"], base / row["seconds"]) for row in own if row["together"] == together]
            line = [(0, 1.0), *[point for point in sorted(line) if point[0]]]
            axes.plot(*zip(*line, strict=True), color=color, marker="o", markersize=3, label=label)
        axes.set_title(f"{size} GPUs", fontsize=9)
        axes.set_xlabel("staleness")
        axes.spines[["top", "right"]].set_visible(False)
    panes[0][0].set_ylabel("speed-up")
    panes[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None}, facecolor="white")
    pyplot.close(figure)
