"""Training. A run passes through these packages: given -> setup -> source -> teaching -> learning -> output.

`given` holds the caller's arguments: those of the Python API, and objects in place of names. `setup` prepares a run,
`source` makes rollouts, `teaching` scores them, `learning` takes the optimizer steps, and `output` writes results.

`runner` begins a run, `run` is its loop, and `callbacks` says what a caller may do while it is at work. `models` loads
the models, `storage` keeps the run's folder, `events` tells observers, and `surroundings` sets torch to its defaults
around a run.
"""
