"""Divergences between student and teacher, one number per step, in nats. Pure functions."""

from retort.divergences.jsd import jsd, jsd_values
from retort.divergences.kl import Support, forward_kl, full, kl_values, reverse_kl, teacher_top
from retort.divergences.likelihood import negative_log_likelihood
from retort.divergences.sampled import k1, k2, k3

__all__ = [
    "Support",
    "forward_kl",
    "full",
    "jsd",
    "jsd_values",
    "k1",
    "k2",
    "k3",
    "kl_values",
    "negative_log_likelihood",
    "reverse_kl",
    "teacher_top",
]
