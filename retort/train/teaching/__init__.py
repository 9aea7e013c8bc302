"""The teachers of a run, by name: what is requested of each, and their scores."""
