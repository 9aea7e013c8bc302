"""Training. A run flows through these rooms: given -> setup -> source -> teaching -> learning -> output.

`runner` begins a run, `run` is its loop. `models` loads what all of them need, `storage` keeps the run's folder, and
`events` tells whoever watches.
"""
