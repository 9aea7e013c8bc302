"""The likelihood of the decided tokens, from any source. Axis letters: see `retort.core`."""

from __future__ import annotations

from torch import Tensor

from retort.core.context import Context
from retort.core.parts import Divergence


def negative_log_likelihood() -> Divergence:
    r"""The loss of supervised fine-tuning, :math:`-\log p_S(y_t)`, nats; it needs nothing of a teacher.

    Of a latent it is above the least that the noise of its step allows, which is no matter of the model: half of the
    squared distance from the mean, in standard deviations. For examples (`retort.flows.samplers.straight`) that is the
    mean square error of the velocity, the loss of flow matching.

    On tokens drawn from the teacher its gradient is, in expectation, that of the forward KL. On the student's own
    tokens its expected gradient is zero.
    """

    def value(context: Context, view: str) -> Tensor:
        return context.policy.best_logp() - context.student_logp_N

    return Divergence("negative_log_likelihood", value)
