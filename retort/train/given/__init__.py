"""The caller's arguments: those of the Python API, and objects in place of names."""
