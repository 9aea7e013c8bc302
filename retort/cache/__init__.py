"""A cache of teachers' scores on disk, shared between runs: what was scored once need not be scored again."""
