"""Curves of single methods: each has a plot with a title of its own, and a label at a token."""

from __future__ import annotations

import pytest

from retort import registry
from retort.report.curves import PLOTS
from retort.report.rollouts import KNOWN

NEWER = ["ida_opd", "lgr", "opd2", "reopd", "resopd", "topd", "tropd", "w2s_opd"]


@pytest.mark.parametrize("name", NEWER)
def test_curves_have_titles(name: str) -> None:
    titles = {key: one.title for one in PLOTS for key in one.keys}
    watched = {watch.name: watch.every for watch in registry.load(name).watch}
    assert watched.keys() <= titles.keys()
    # What is measured now and then is no number of a token.
    assert {key for key, every in watched.items() if every == 1} <= KNOWN.keys()


def test_no_curve_is_plotted_twice() -> None:
    keys = [key for one in PLOTS for key in one.keys]
    assert len(keys) == len(set(keys))
