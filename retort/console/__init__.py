"""The output of a run on a terminal or in a notebook."""
