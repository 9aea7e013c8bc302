"""The models of a run: their sources, loading, precision and attention."""
