"""Prompts from files, the hub, or Python; every error names its location.

`load.py` is the entry; `sources.py` and `text_files.py` read rows, `columns.py` and `rows.py` interpret them,
`conversations.py` reads formats of turns, `turns.py` splits conversations into steps, and `values.py` checks the values
of cells.
"""

from retort.data.columns import COLUMNS, PRIVILEGED
from retort.data.load import fingerprint, in_template, load_prompts, prompts_from_rows
from retort.data.sources import HUB_NAME
from retort.data.turns import each_turn

__all__ = [
    "COLUMNS",
    "HUB_NAME",
    "PRIVILEGED",
    "each_turn",
    "fingerprint",
    "in_template",
    "load_prompts",
    "prompts_from_rows",
]
