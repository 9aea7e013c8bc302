"""Observers, the hooks of callbacks, trackers and signals: what watches a run and what ends it early."""
