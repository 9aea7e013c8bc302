"""The party that scores: the teachers of a run, by name."""
