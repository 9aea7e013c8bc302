"""Prompts from files, the hub, or Python: with every mistake in them named by its place.

`load.py` has the way in; `sources.py` and `text_files.py` know where rows come from, `columns.py` and `rows.py` what
they say, `conversations.py` how turns are written, and `values.py` what a cell may hold.
"""

from retort.data.columns import COLUMNS, PRIVILEGED
from retort.data.load import fingerprint, in_template, load_prompts, prompts_from_rows
from retort.data.sources import HUB_NAME

__all__ = ["COLUMNS", "HUB_NAME", "PRIVILEGED", "fingerprint", "in_template", "load_prompts", "prompts_from_rows"]
