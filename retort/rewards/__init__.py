"""Rewards of completions: verifiers that compare them with reference answers, and graders."""

from retort.rewards.base import ByText, GivesFeedback, GivesParts, Grade, Grader, Verifier
from retort.rewards.choose import grader_for, verifier_for
from retort.rewards.rubric import Criterion, Rubric, rubric_score
from retort.rewards.verify import CountdownVerifier, ExactVerifier, MathVerifier

__all__ = [
    "ByText",
    "CountdownVerifier",
    "Criterion",
    "ExactVerifier",
    "GivesFeedback",
    "GivesParts",
    "Grade",
    "Grader",
    "MathVerifier",
    "Rubric",
    "Verifier",
    "grader_for",
    "rubric_score",
    "verifier_for",
]
