"""How far several teachers differ. Axis letters: see `retort.core`."""

from torch import Tensor

from retort.core.context import Context
from retort.core.needs import DISAGREEMENT
from retort.core.parts import Quantity


def teacher_disagreement() -> Quantity:
    r"""How far the teachers of a combination differ at each step, nats.

    The Jensen-Shannon divergence with equal weights, :math:`\frac1T \sum_i KL(p_i \| \frac1T \sum_j p_j)`: 0 where all
    are equal, ln T at most. A single teacher has none, and a method that needs it is refused there. To learn where they
    agree, weigh a term by a gate on it:

        >>> from retort.quantities import teacher_disagreement
        >>> from retort.weights import below
        >>> below(teacher_disagreement(), 0.1).name
        'teacher_disagreement < 0.1'
    """

    def value(context: Context, view: str) -> Tensor:
        return context.signal(view).disagreement_N

    return Quantity("teacher_disagreement", value, frozenset({DISAGREEMENT}))
