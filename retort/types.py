"""The public door to the values that flow through Retort; they live in `retort.core`."""

from retort.core.losses import TokenLoss, TokenLosses
from retort.core.needs import DENSE, ENTROPY, HIDDEN, SAMPLED, Need, logp_at
from retort.core.rollouts import Group, Message, Pack, Prompt, Rollout, Status

__all__ = [
    "DENSE",
    "ENTROPY",
    "HIDDEN",
    "SAMPLED",
    "Group",
    "Message",
    "Need",
    "Pack",
    "Prompt",
    "Rollout",
    "Status",
    "TokenLoss",
    "TokenLosses",
    "logp_at",
]
