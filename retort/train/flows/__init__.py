"""Runs whose student decides denoising steps: its source of trajectories, its passes, and what such a run leaves."""
