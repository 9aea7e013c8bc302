"""What the caller handed over: arguments of the Python API, and objects in place of names."""
