"""`ranks.head=vocabulary` is refused before anything is loaded, where something needs all ids at once."""

from __future__ import annotations

import pytest

from retort import config as configuration
from retort import registry
from retort.errors import UserError
from retort.train.setup import whole_head
from retort.train.setup.whole_head import needs_whole_head, refuse_slices

#: Those that sort ids, or read log-probs of all of them; of `resopd` that is the curve of its variance.
WHOLE = ["abkd", "akl", "gold", "resopd", "simct", "simple_ctkd", "skew_kl", "strict_ct", "todi"]


def test_which_methods_need_all_ids() -> None:
    assert [name for name in registry.names() if needs_whole_head(registry.load(name))] == WHOLE


@pytest.mark.parametrize(("size", "head"), [(1, "vocabulary"), (2, "auto"), (2, "gathered"), (2, "vocabulary")])
def test_slices_are_refused_where_they_were_asked_for(monkeypatch: pytest.MonkeyPatch, size: int, head: str) -> None:
    class World:
        pass

    world = World()
    world.size = size  # type: ignore[attr-defined]
    monkeypatch.setattr(whole_head, "here", lambda: world)
    config = configuration.resolve({"method": {"name": "akl"}, "ranks": {"head": head}})
    refuse_slices(config, None)
    reason = needs_whole_head(registry.load("akl"))
    if (size, head) != (2, "vocabulary"):
        refuse_slices(config, reason)
        return
    with pytest.raises(UserError, match=r"ranks.head=vocabulary: method 'akl' .* set ranks.head=gathered"):
        refuse_slices(config, reason)
