"""Samples side by side: one row for each prompt and one column for each model; points as scatter plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from retort.errors import counted
from retort.report.alike import tables
from retort.report.axes import minus
from retort.report.groups import Group
from retort.report.read import RunFiles
from retort.report.result import AFTER, BEFORE, TEACHER
from retort.report.samples import Album, Sample, samples_of
from retort.report.scatter import Cloud, scatter_figures
from retort.report.words import escape, listed

#: Most prompts and models of a grid, and most samples of a prompt and a model.
MOST_PROMPTS, MOST_MODELS, MOST_MEMBERS = 12, 12, 4

#: Id, text and domain.
_Prompt = tuple[str, str, str]


@dataclass(frozen=True)
class _Column:
    """A model and its samples."""

    name: str
    who: str
    run: RunFiles
    samples: Sequence[Sample]

    def is_expert(self, domain: str) -> bool:
        """Whether it is the teacher that a domain names."""
        return bool(domain) and domain in (self.who, self.who.removeprefix("teacher").strip(" :,"))


def samples_section(groups: Sequence[Group]) -> str:
    """The section with samples of all models, each prompt's from the same noise; empty where there are none."""
    album = Album()
    split = [(table.name, _columns(table.groups, len(groups) > 1)) for table in tables([g for g in groups if g.whos()])]
    parts = [(name, _grid(columns, album) + _clouds(columns)) for name, columns in split]
    parts = [(name, shown) for name, shown in parts if shown]
    if not parts:
        return ""
    on = "<h3 class=on>On {}</h3>" if len(parts) > 1 else ""
    shown = "".join(f"{on.format(escape(name))}{part}" for name, part in parts)
    first = " Of the first seed of each." if any(group.several for group in groups) else ""
    return (
        '<section aria-labelledby="samples"><h2 id="samples">Samples</h2>'
        '<p class="muted">Of held-out prompts, denoised without added noise. Samples of one prompt and one number '
        f"begin with the same noise in all models.{first}</p>{_left_out(album)}{shown}</section>"
    )


def _left_out(album: Album) -> str:
    if not album.left_out:
        return ""
    count = sum(album.left_out.values())
    why = listed([f"{number} {reason}" for reason, number in album.left_out.items()])
    text = f"{counted(count, 'image')} {'is' if count == 1 else 'are'} left out: {why}."
    return f'<p class="muted">{escape(text)}</p>'


def _columns(groups: Sequence[Group], several: bool) -> list[_Column]:
    """Before, after each run, teachers; what runs share stands there once."""
    found: list[_Column] = []
    for group in groups:
        run = group.runs[0]
        for who in group.whos():
            own = samples_of(run, who)
            shared = who != AFTER and any(one.who == who and one.samples == own for one in found)
            if own and not shared:
                found.append(_Column(f"{who}, {group.name}", who, run, own))
    whos = [one.who for one in found]
    named = [
        one if several and (one.who == AFTER or whos.count(one.who) > 1) else replace(one, name=one.who)
        for one in found
    ]
    order = {BEFORE: 0, AFTER: 1}
    return sorted(named, key=lambda one: order.get(one.who, 2))[:MOST_MODELS]


# --- images ---


def _grid(columns: Sequence[_Column], album: Album) -> str:
    with_images = [one for one in columns if any(sample.image is not None for sample in one.samples)]
    prompts: dict[_Prompt, None] = {}
    for column in with_images:
        prompts |= {(one.prompt, one.text, one.domain): None for one in column.samples if one.image is not None}
    if not prompts:
        return ""
    chosen = list(prompts)[:MOST_PROMPTS]
    with_images = _without_routed(with_images, chosen)
    head = "".join(f'<th scope="col">{escape(column.name)}</th>' for column in with_images)
    body = "".join(_prompt_row(key, with_images, album) for key in chosen)
    more = f" The first {len(chosen)} of {len(prompts)} prompts." if len(prompts) > len(chosen) else ""
    experts = any(column.is_expert(domain) for column in with_images for _, _, domain in chosen)
    ring = " A frame marks the teacher of the prompt’s domain." if experts else ""
    return (
        f'<p class="muted">Rewards stand beneath each image.{ring}{more}</p>'
        '<div class="scroll" tabindex="0" role="region" aria-label="Images by prompt and model">'
        f'<table class="grid-of-samples"><thead><tr><th scope="col">Prompt</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _without_routed(columns: Sequence[_Column], prompts: Sequence[_Prompt]) -> list[_Column]:
    """Without the teacher that is each prompt's own expert, where all experts have columns: they hold the same."""
    known = all(any(one.is_expert(domain) for one in columns) for _, _, domain in prompts)
    return [one for one in columns if not (known and one.who == TEACHER)]


def _prompt_row(key: _Prompt, columns: Sequence[_Column], album: Album) -> str:
    _, text, domain = key
    about = f"<small>{escape(domain)}</small>" if domain else ""
    cells = "".join(_cell(key, column, album) for column in columns)
    return f'<tr><th scope="row">{escape(text or key[0])}{about}</th>{cells}</tr>'


def _cell(key: _Prompt, column: _Column, album: Album) -> str:
    own = [one for one in column.samples if (one.prompt, one.text, one.domain) == key and one.image is not None]
    own = sorted(own, key=lambda one: one.member)[:MOST_MEMBERS]
    expert = ' class="expert"' if column.is_expert(key[2]) else ""
    shown = "".join(_image(one, column, album) for one in own) or '<span class="muted">–</span>'
    return f'<td{expert}><div class="members">{shown}</div></td>'


def _image(sample: Sample, column: _Column, album: Album) -> str:
    picture = album.picture(column.run, sample.image or "")
    spoken = f"sample {sample.member + 1} of {column.name}: {sample.text}"
    rewards = "".join(f"<span>{escape(name)} <b>{_reward(value)}</b></span>" for name, value in sample.rewards.items())
    sharp = ' class="sharp"' if picture.sharp else ""
    image = f'<img{sharp} src="{picture.url}" alt="{escape(spoken)}">' if picture.url else _gap(picture.why)
    return f"<figure>{image}<figcaption>{rewards}</figcaption></figure>"


def _gap(why: str) -> str:
    return f'<span class="no-image">{escape(why.split(":")[0])}</span>'


def _reward(value: float) -> str:
    return minus(f"{value:.2f}" if abs(value) < 100 else f"{value:.3g}")


# --- points ---


def _clouds(columns: Sequence[_Column]) -> str:
    with_points = [(one, points) for one in columns if (points := [s for s in one.samples if s.point])]
    if not with_points:
        return ""
    kind = _kinds([sample for _, points in with_points for sample in points])
    taught = [
        sample.point
        for column, points in with_points
        for sample in points
        if sample.point and not column.who.startswith("student") and _routed(column, sample, with_points)
    ]
    clouds = [
        Cloud(
            column.name,
            [(sample.point, kind.get(_kind(sample, kind), 0)) for sample in points if sample.point],
            [] if not column.who.startswith("student") else taught,
            _means(points),
        )
        for column, points in with_points
    ]
    return scatter_figures(clouds, list(kind))


def _routed(column: _Column, sample: Sample, columns: Sequence[tuple[_Column, Sequence[Sample]]]) -> bool:
    """Whether a teacher's sample is one of its own domain, where teachers are named by domains."""
    named = any(other.is_expert(sample.domain) for other, _ in columns)
    return column.is_expert(sample.domain) or not named


def _kinds(samples: Sequence[Sample]) -> Mapping[str, int]:
    """What the colours of points tell apart, in order: prompts if they are few, else domains."""
    for kinds in (
        dict.fromkeys(one.text or one.prompt for one in samples),
        dict.fromkeys(one.domain for one in samples),
    ):
        if len(kinds) <= MOST_COLORS:
            return {kind: index for index, kind in enumerate(kinds)}
    return {}


def _kind(sample: Sample, kinds: Mapping[str, int]) -> str:
    text = sample.text or sample.prompt
    return text if text in kinds else sample.domain


def _means(samples: Sequence[Sample]) -> dict[str, float]:
    """The mean of each reward."""
    found: dict[str, list[float]] = {}
    for sample in samples:
        for name, value in sample.rewards.items():
            found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


#: Colours of points; more kinds than these would not be told apart.
MOST_COLORS = 6
