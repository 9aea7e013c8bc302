"""Rollout engines, imported lazily by whoever needs one."""
