"""The settings of several teachers together."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from retort.config.sections import Section


class TeachersSection(Section):
    """Several teachers in the place of one, see docs/several-teachers.md."""

    models: list[str] = Field(
        default_factory=list,
        description="names of the models in [models] that teach together, in the place of `teacher`; none: one teacher",
    )
    combine: Literal["route", "mixture", "product", "best"] = Field(
        default="route",
        description="route: each prompt has its teacher, see by; mixture: of each token's distributions the weighted "
        "mean; product: their weighted geometric mean, renormalised; best: for each prompt the teacher whose log-probs "
        "of the completions go best with their rewards",
    )
    by: str = Field(
        default="domain",
        description="of route, what names a prompt's teacher: domain, the column of that name in the data (another "
        "one by columns.domain=NAME), or a function of a prompt as module:name",
    )
    weights: list[float] | None = Field(
        default=None,
        description="of mixture and product, a weight for each of models, at least 0, divided by their sum; default: "
        "all alike",
    )

    @model_validator(mode="after")
    def _fits(self) -> TeachersSection:
        """Refuses settings that do nothing, or that say nothing."""
        changed = {name for name in ("combine", "by", "weights") if getattr(self, name) != _default(type(self), name)}
        problem = None
        if not self.models and changed:
            problem = f"{sorted(changed)[0]} does nothing without teachers.models; name two models of [models] there"
        elif self.models and (len(self.models) < 2 or len(set(self.models)) < len(self.models)):
            problem = "models must be two different names or more; a single teacher is `teacher`"
        elif self.by != "domain" and self.combine != "route":
            problem = f"by is for combine = route, not {self.combine}; leave it out"
        elif self.by != "domain" and not re.fullmatch(r"[^:]+:[^:]+", self.by):
            problem = "by must be domain, or a function of a prompt as module:name; map a column by columns.domain=NAME"
        elif self.weights is not None and self.combine not in ("mixture", "product"):
            problem = f"weights are for combine = mixture or product, not {self.combine}; leave them out"
        elif self.weights is not None and (len(self.weights) != len(self.models) or min(self.weights) < 0):
            problem = f"weights must be {len(self.models)} numbers of at least 0, one for each of models"
        elif self.weights is not None and not sum(self.weights):
            problem = "weights must not all be 0"
        if problem is not None:
            raise PydanticCustomError("teachers", "{problem}", {"problem": problem})
        return self


def _default(section: type[Section], name: str) -> Any:
    return section.model_fields[name].get_default(call_default_factory=True)
