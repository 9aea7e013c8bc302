"""The cache of a run's teachers: which of them it serves, and how often it did."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from retort.cache.store import Store
from retort.cache.teacher import CachedModel, CachedTeacher, Tally
from retort.config import Config
from retort.errors import UserError
from retort.method import Method
from retort.models.endpoint import Endpoint
from retort.models.lm import LanguageModel
from retort.models.stored import StoredModel
from retort.ranks import World
from retort.teachers.base import Teacher, most_ahead
from retort.teachers.local import LocalTeacher
from retort.teachers.several import SeveralTeachers
from retort.teachers.spanned import SpanTeacher
from retort.train.models.models import Source


@dataclass(frozen=True, eq=False)
class Cached:
    """Teachers with a cache.

    Attributes:
        store: The store that they share.
        teachers: By name, those that are asked through it; several together, where it serves one of them.
        tally: What was found in it.
    """

    store: Store
    teachers: Mapping[str, Teacher]
    tally: Tally = field(default_factory=Tally)

    def metrics(self, world: World) -> dict[str, float]:
        """What was found since the last call, on all ranks: `hit_rate`, and where there were any, two kinds of faults.

        `damaged` counts entries that were not what was stored, `unsaved` those that the disk did not take.
        """

        def own() -> tuple[int, int, int, int]:
            return (*self.tally.take(), *self.store.take_faults())

        asked, found, damaged, unsaved = (sum(counts) for counts in zip(*world.each(own), strict=True))
        rate = {"teacher_cache/hit_rate": found / asked} if asked else {}
        faults = {"teacher_cache/damaged": damaged, "teacher_cache/unsaved": unsaved}
        return rate | {name: float(count) for name, count in faults.items() if count}


def cached(config: Config, models: Mapping[str, Teacher], student: LanguageModel, ranks: int) -> Cached | None:
    """The teachers of a run that a cache serves, where the settings name one: frozen models.

    Args:
        config: The resolved configuration.
        models: The teachers by name.
        student: The model that learns.
        ranks: Number of ranks.

    Raises:
        UserError: Ranks would compute a teacher's layers together, while each finds other scores in the cache.
    """
    if config.cache.dir is None:
        return None
    if ranks > 1 and config.ranks.teacher == "sharded":
        raise UserError(
            "ranks.teacher = sharded computes all ranks' scores together, and each finds other ones in the cache; set "
            "ranks.teacher=replicated, or leave out cache.dir"
        )
    store, tally = Store(Path(config.cache.dir), config.cache.limit_bytes), Tally()
    found: dict[str, Teacher] = {}
    for name, teacher in models.items():
        # Of several ranks, each keeps a slice of weights that are the student's, too, and all gather them together.
        if isinstance(teacher, LocalTeacher) and (ranks == 1 or teacher.lm.model is not student.model):
            found[name] = _of(teacher, CachedModel.of(store, teacher.lm, tally))
    for name, teacher in models.items():
        if isinstance(teacher, SeveralTeachers) and not found.keys().isdisjoint(teacher.teachers):
            found[name] = teacher.of({**teacher.teachers, **found})
    return Cached(store, found, tally)


def _of(teacher: LocalTeacher, model: CachedModel) -> CachedTeacher:
    """A teacher with a cache: of hidden states where no smaller signal will do, else of signals."""
    whole, of_units = teacher.with_states(model.states), isinstance(teacher, SpanTeacher)
    return CachedTeacher(whole if isinstance(teacher.lm, StoredModel) else teacher, model, whole, states_only=of_units)


def refuse_unknown_weights(config: Config, models: Mapping[str, tuple[str, Source]]) -> None:
    """Refuses a cache of scores by a model that nothing tells from another one.

    Args:
        config: The resolved configuration.
        models: By name, each model of the run: its path for messages, and its source.

    Raises:
        UserError: A cache is named, and a model is behind a server of completions, which says nothing of its weights.
    """
    if config.cache.dir is None:
        return
    for name, (path, source) in models.items():
        if isinstance(source, Endpoint):
            raise UserError(
                f"{name} = {path}: a server of completions does not say which weights it has, so its scores cannot be "
                "stored for other runs; leave out cache.dir (--cache), or serve the model with `retort serve`"
            )


@contextlib.contextmanager
def hint_at_cache(config: Config, paths: Mapping[str, str]) -> Iterator[None]:
    """Within, an error of a run with a model that is not there says so where the cache holds scores of that model."""
    try:
        yield
    except UserError as error:
        folder = config.cache.dir
        store = None if folder is None else Store(Path(folder), config.cache.limit_bytes)
        if store is None or config.cache.only or not store.exists:
            raise
        absent = [
            name
            for name, path in paths.items()
            if path.rstrip("/") in str(error) and not Path(path).exists() and store.model(path) is not None
        ]
        if not absent:
            raise
        raise UserError(
            f"{error}; the cache {folder} holds scores of the {absent[0]}: cache.only=true runs from them alone"
        ) from None


def stored_models(config: Config, method: Method, paths: Mapping[str, str]) -> dict[str, Path]:
    """Folders of what the cache holds of models that are not to be loaded, by name; empty unless `cache.only` is set.

    Args:
        config: The resolved configuration.
        method: The method, with what comes before it.
        paths: Paths of all models of the run, by name.

    Raises:
        UserError: The cache holds nothing of one, or a teacher would have to generate.
    """
    if not config.cache.only or config.cache.dir is None:
        return {}
    phases = [method] if method.before is None else [method.before[1], method]
    generates = next((phase.name for phase in phases if "teacher" in phase.rollout.sources), None)
    if generates is not None:
        raise UserError(
            f"the completions of method '{generates}' are a teacher's, which cache.only=true does not load; set "
            "cache.only=false, or learn from the data's completions"
        )
    views = [(phase.name, view) for phase in phases for view in phase.views.values() if view.draft is not None]
    writes = next((name for name, view in views if set(view.models) - {"student"}), None)
    if writes is not None:
        raise UserError(
            f"the teachers of method '{writes}' write before they score, and cache.only=true does not load them; set "
            "cache.only=false"
        )
    looks = next((phase.name for phase in phases for view in phase.views if most_ahead(phase.needs(view))), None)
    if looks is not None:
        raise UserError(
            f"the teacher of method '{looks}' reads candidates that are not stored, and cache.only=true does not load "
            "it; set cache.only=false"
        )
    store, found = Store(Path(config.cache.dir), config.cache.limit_bytes), dict[str, Path]()
    for name, path in paths.items():
        if path == paths["student"]:
            continue
        folder = store.model(path) if store.exists else None
        if folder is None:
            raise UserError(
                f"the cache {store.folder} holds no scores of the {name} {path}; `retort score DATA --teacher {path} "
                f"--student {paths['student']} --method {method.name} --cache {config.cache.dir}` stores some"
            )
        found[name] = folder
    return found
