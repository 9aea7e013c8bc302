"""What a piece of writing is worth: verifiers that compare it with the answer."""

from retort.rewards.own import Grade
from retort.rewards.verify import (
    CountdownVerifier,
    ExactVerifier,
    GivesFeedback,
    GivesParts,
    MathVerifier,
    Verifier,
    verifier_for,
)

__all__ = [
    "CountdownVerifier",
    "ExactVerifier",
    "GivesFeedback",
    "GivesParts",
    "Grade",
    "MathVerifier",
    "Verifier",
    "verifier_for",
]
