"""Plots of curves that one or two methods have, as `Curves` takes them: title, unit, metrics with labels, kind."""

from __future__ import annotations

from collections.abc import Mapping

from retort.report.plots import Kind

OF_METHODS: tuple[tuple[str, str, Mapping[str, str], Kind], ...] = (
    (
        "Student’s tail at contract positions",
        "probability off the teacher’s first token",
        {"contract_tail": "student’s", "contract_tail_boundary": "(1 - p) / c"},
        "number",
    ),
    (
        "Tokens that the teacher accepts",
        "share of tokens",
        {"accepted_fraction": "as drawn", "acceptance_probability": "expected: 1 less the total variation"},
        "share",
    ),
    ("Forward KL, refused tokens", "nats per token", {"forward_kl_refused": "forward KL, refused"}, "number"),
    ("Teacher’s mass on its own top-k", "mean over tokens", {"teacher_own_topk_mass": "top-k mass"}, "share"),
    ("Drawn outside of the teacher’s top-k", "share of tokens", {"sampled_tail": "outside"}, "share"),
    (
        "Reverse KL with one bucket for the tail",
        "nats per token, at most the whole",
        {"bucket_reverse_kl": "with a bucket"},
        "number",
    ),
    ("Log-ratio to the proximal teacher", "nats per token", {"proximal_log_ratio": "log-ratio"}, "number"),
    ("Rewards that the gate keeps", "share of tokens", {"delta_kept": "kept"}, "share"),
    ("Tokens whose update lowers the entropy", "share of tokens", {"lowers_entropy": "lower it"}, "share"),
    (
        "Influence on the entropy",
        "nats squared per token, first order",
        {"entropy_influence": "influence"},
        "number",
    ),
    ("Tokens after which the teacher looked ahead", "share of tokens", {"looked_ahead": "looked at"}, "share"),
    (
        "Reward for what the teacher says next",
        "deviations among candidates, mean over tokens",
        {"lookahead_reward": "reward"},
        "number",
    ),
    (
        "Reverse KL to the composed target",
        "nats per token",
        {"composed_reverse_kl": "to the target", "reverse_kl_base": "to the base"},
        "number",
    ),
    ("Entropy of the composed target", "nats per token", {"composed_entropy": "target"}, "number"),
)
#: The same at a token: label, unit, and what it means.
OF_TOKENS: Mapping[str, tuple[str, str, str]] = {
    "accepted_fraction": ("accepted", "", "1 where the draw took the teacher’s word for it"),
    "acceptance_probability": ("probability of that", "", "teacher’s over student’s, at most 1"),
    "forward_kl_refused": ("forward KL, refused", "nats", "on the teacher’s top-k, learnt where it was not accepted"),
    "teacher_own_topk_mass": ("teacher’s top-k mass", "", "probability that its top-k holds"),
    "sampled_tail": ("outside of the top-k", "", "1 where the token is none of the teacher’s top-k"),
    "bucket_reverse_kl": ("reverse KL with a bucket", "nats", "all ids outside of the teacher’s top-k taken together"),
    "proximal_log_ratio": ("log-ratio to the proximal teacher", "nats", "has a bound from below"),
    "delta_kept": ("kept by the gate", "", "1 where both rewards have one sign"),
    "entropy_influence": ("influence on the entropy", "", "below 0 where learning this makes the student more certain"),
    "lowers_entropy": ("lowers the entropy", "", "1 where the influence is below 0"),
    "looked_ahead": ("looked ahead", "", "1 where the teacher was asked for the next token, too"),
    "lookahead_reward": ("reward for what follows", "", "how sure the teacher is after it, in deviations"),
    "composed_reverse_kl": ("reverse KL to the target", "nats", "the target is composed of several models"),
    "composed_entropy": ("target’s entropy", "nats", "how uncertain the composed target is about this token"),
    "reverse_kl_base": ("reverse KL to the base", "nats", "how far the student has moved here"),
}
