"""Who watches a run and what ends it early: observers, callbacks' hooks, trackers, signals."""
