"""Evaluating models: avg@k, pass@k, entropies and divergences on held-out prompts."""

from retort.evaluate.passk import Estimate, pass_at_k

__all__ = ["Estimate", "pass_at_k"]
