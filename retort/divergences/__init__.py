"""Divergences between student and teacher, one number per step, in nats. Pure functions."""

from retort.divergences.adaptive import akl, todi, total_variation
from retort.divergences.alpha_beta import ab_values, alpha_beta
from retort.divergences.byte_prefix import Direction, byte_prefix, stop_bridge
from retort.divergences.clipped import clipped, clipped_mass, clipped_values
from retort.divergences.gaussian import gaussian_kl
from retort.divergences.gold import Merge, merged_distance
from retort.divergences.jsd import jsd, jsd_values
from retort.divergences.kl import Support, forward_kl, full, kl_values, reverse_kl, teacher_top
from retort.divergences.likelihood import negative_log_likelihood
from retort.divergences.likelihoods import unit_likelihood
from retort.divergences.residual import tail_residual
from retort.divergences.sampled import k1, k2, k3
from retort.divergences.simct import Score, simct
from retort.divergences.skew import skew_forward_kl, skew_reverse_kl
from retort.divergences.sorted import sorted_distance
from retort.divergences.strict import strict_shared_kl
from retort.divergences.support import SupportChoice, Tail, Weighting, topk_jsd, topk_kl, topk_score
from retort.divergences.units import stop_forward_kl

__all__ = [
    "Direction",
    "Merge",
    "Score",
    "Support",
    "SupportChoice",
    "Tail",
    "Weighting",
    "ab_values",
    "akl",
    "alpha_beta",
    "byte_prefix",
    "clipped",
    "clipped_mass",
    "clipped_values",
    "forward_kl",
    "full",
    "gaussian_kl",
    "jsd",
    "jsd_values",
    "k1",
    "k2",
    "k3",
    "kl_values",
    "merged_distance",
    "negative_log_likelihood",
    "reverse_kl",
    "simct",
    "skew_forward_kl",
    "skew_reverse_kl",
    "sorted_distance",
    "stop_bridge",
    "stop_forward_kl",
    "strict_shared_kl",
    "tail_residual",
    "teacher_top",
    "todi",
    "topk_jsd",
    "topk_kl",
    "topk_score",
    "total_variation",
    "unit_likelihood",
]
