"""Inputs of the Python API: arguments, and objects in place of names."""
