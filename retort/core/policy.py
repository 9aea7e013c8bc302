"""The policy by which a student decides at each step."""

from __future__ import annotations


class Policy:
    """Base class of policies; it promises nothing yet.

    `retort.core.distribution.Distribution` is the policy over tokens. A policy over denoising steps would be a second
    subclass, and terms would read it as terms about tokens read `Context.student`.
    """
