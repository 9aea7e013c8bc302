"""What a student decides by at each step, whatever it decides."""

from __future__ import annotations


class Policy:
    """The base of what a student decides by; it promises nothing yet.

    `retort.core.distribution.Distribution` is the kind that decides tokens. A kind that decides denoising steps stands
    beside it, and terms about that kind ask it, as terms about tokens ask `Context.student`.
    """
