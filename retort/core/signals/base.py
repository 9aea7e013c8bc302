"""Teacher signals: a teacher's scores at each step of a pack. Axis letters: see `retort.core`.

A signal detaches its tensors, checks that they are about the same tokens as the rollouts, and refuses NaN: alignment is
    an invariant here, not a slice somewhere. `rows` cuts out a chunk, from which a term may read all that the signal
    offers; reading more is an error that names what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from retort.core.distribution import Distribution
from retort.core.needs import NeedKind, require_finite
from retort.core.policy import Policy
from retort.core.signals.units import Units
from retort.errors import SignalError

#: How far a log-prob may be above 0, or a sum of probabilities above 1, by rounding to bf16.
ROUNDING = 0.01


class SignalRows:
    """A signal's rows for the C steps of one chunk. The base class has none of the quantities."""

    #: Name of the teacher or view, for messages.
    source: str = "teacher"
    #: Width of the distribution, if there is one.
    vocab: int | None = None
    #: Whether its numbers are about units of several tokens (`Spans`); else every step is a unit by itself.
    by_unit: bool = False
    #: How far several teachers differ, [C], see `Differing`.
    differ_N: Tensor | None = None
    #: The student's ids, and how sure the teacher would be after each, [C, K] both, see `Ahead`.
    ahead: tuple[Tensor, Tensor] | None = None

    def _missing(self, what: str) -> SignalError:
        return SignalError(f"{self.source}: its signal ({type(self).__name__}) has no {what}")

    @property
    def policy(self) -> Policy:
        """The teacher's whole policy: its distribution over tokens, or its Gaussian over next latents."""
        return self.distribution

    @property
    def sampled_logp_N(self) -> Tensor:
        """Log-prob of what was decided, nats: of the sampled token, or of the next latent."""
        raise self._missing("log-prob of the sampled token")

    @property
    def entropy_N(self) -> Tensor:
        """Entropy of the whole distribution, nats."""
        raise self._missing("entropy")

    @property
    def entropy_bound_N(self) -> Tensor:
        """The entropy, nats, or where only that is known a lower bound of it."""
        return self.entropy_N

    @property
    def distribution(self) -> Distribution:
        """The whole distribution."""
        raise self._missing("full distribution")

    @property
    def logp_NV(self) -> Tensor:
        """Log-probs of the whole vocabulary, nats."""
        return self.distribution.logp_CV

    def logp_at(self, ids_NK: Tensor) -> Tensor:
        """Log-probs [C, K] of ids that another model chose, nats."""
        return self.distribution.logp_at(ids_NK)

    def logp_outside(self, ids_NK: Tensor, inside_NK: Tensor) -> Tensor:
        """Log [C] of the probability of all ids but those of `ids_NK` that `inside_NK` marks, nats."""
        return self.distribution.logp_outside(ids_NK, inside_NK)

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """The `k` most likely ids [C, K] and their log-probs under the whole distribution, nats."""
        raise self._missing("top-k")

    @property
    def hidden_ND(self) -> Tensor:
        """The teacher's last hidden states."""
        raise self._missing("hidden states")

    @property
    def disagreement_N(self) -> Tensor:
        """How far several teachers differ, nats."""
        if self.differ_N is None:
            raise self._missing("disagreement of several teachers")
        return self.differ_N

    def confidence_ahead(self, k: int) -> tuple[Tensor, Tensor]:
        """The student's `k` most likely ids and the teacher's largest probability after each, [C, K]; NaN: not asked.

        Fewer than `k` where there are fewer ids.
        """
        if self.ahead is None:
            raise self._missing("look one token ahead")
        return self.ahead[0][:, :k], self.ahead[1][:, :k]

    @property
    def units(self) -> Units:
        """The aligned units of tokens in these steps, and the teacher's distribution at the beginning of each."""
        raise self._missing("aligned units of tokens")

    def over_unit(self, values_N: Tensor) -> Tensor:
        """The sum over each step's unit, at every step of it, [N]; a step outside of all units keeps its value."""
        return values_N

    def per_step(self, values_N: Tensor) -> Tensor:
        """A number of each step's unit, divided evenly over its steps: means over steps count the unit once, [N]."""
        return values_N

    def first_only(self, values_N: Tensor) -> Tensor:
        """The values at the first step of each unit, and 0 at its other steps, [N]; others keep their values."""
        return values_N

    def candidates(self, k: int) -> Tensor | None:
        """The first `k` of the student's most likely ids that it scored, [C, K]; None: it can score any ids."""
        return None


@dataclass(frozen=True, eq=False)
class TeacherSignal:
    """Base of all signals: N steps, the tokens that were scored, and the source.

    Attributes:
        tokens_N: Ids that were scored.
        source: Name of the teacher or view, for messages.
        valid_N: False at the steps of rollouts for which the view had no context: the numbers there mean nothing, and
            terms against the view leave these steps out. None: all are valid.
        counts: Counts about the view's prompts, summed over rollouts: `no_context`, `cut`, `prompt_tokens`; each
            may be left out.
    """

    tokens_N: Tensor
    source: str = "teacher"
    valid_N: Tensor | None = field(default=None, kw_only=True)
    counts: Mapping[str, float] = field(default_factory=lambda: {}, kw_only=True)

    @property
    def steps(self) -> int:
        """N, the number of steps."""
        return len(self.tokens_N)

    @property
    def offers(self) -> frozenset[NeedKind]:
        """The kinds of `Need` that this signal meets."""
        raise NotImplementedError

    @property
    def begins_N(self) -> Tensor | None:
        """The steps at which a chunk or block may begin, bool [N], on the CPU; None: any."""
        return None

    @property
    def block_width(self) -> int:
        """Columns per step of its logits where they are not the student's ids; chunks and blocks allow for them."""
        return 0

    def lists(self, width: int) -> Mapping[NeedKind, tuple[Tensor, bool]]:
        """Ids [N, K] of a signal that lists some instead of all, by the need they meet; and whether they are all ids.

        Args:
            width: Number of ids that the student has.
        """
        return {}

    def rows(self, index_C: Tensor | slice, vocab: int | None = None) -> SignalRows:
        """The rows at some of the steps.

        Args:
            index_C: Index of the steps.
            vocab: Width that student and teacher share; ids from there on are no tokens and get no probability.
        """
        raise NotImplementedError

    def precomputed(self, index_C: slice, vocab: int | None = None) -> TeacherSignal:
        """The signal about a run of steps, with all matrix products computed at once.

        Its `rows` of smaller runs then cost no product each.
        """
        return self.select(torch.arange(*index_C.indices(self.steps), device=self.tokens_N.device))

    def select(self, index_N: Tensor) -> TeacherSignal:
        """The signal about some of the steps only, in the order given, on the device of the index."""
        raise NotImplementedError

    def hidden_states(self) -> Tensor:
        """The last hidden states at all its steps, [N, D].

        Raises:
            SignalError: The signal has none.
        """
        raise SignalError(f"{self.source}: its signal ({type(self).__name__}) has no hidden states")

    def hidden_rows(self) -> SignalRows:
        """The rows at all steps, for estimators that compare hidden states and read nothing else."""
        return _HiddenRows(self)

    def _valid(self, index: Tensor | slice) -> Tensor | None:
        return None if self.valid_N is None else take_rows(self.valid_N, index)

    def check_ids(self, ids_NK: Tensor) -> None:
        """Raises `SignalError` if it was given ids to score and is about others; most signals are about all ids."""

    def check_valid(self) -> None:
        """Raises `SignalError` unless `valid_N` is a bool per step."""
        valid_N = self.valid_N
        if valid_N is not None and (valid_N.dtype != torch.bool or valid_N.shape != self.tokens_N.shape):
            raise SignalError(
                f"{self.source}: valid_N must be bool [N] = {tuple(self.tokens_N.shape)}, "
                f"not {valid_N.dtype} {tuple(valid_N.shape)}"
            )

    def check_tokens(self, tokens_N: Tensor) -> None:
        """Raises `SignalError` unless the signal is about exactly these tokens."""
        self.check_valid()
        if self.tokens_N.shape != tokens_N.shape:
            raise SignalError(f"{self.source}: scored {len(self.tokens_N)} tokens, the rollouts have {len(tokens_N)}")
        wrong = (self.tokens_N.to(tokens_N.device) != tokens_N).nonzero()
        if len(wrong):
            step = int(wrong[0])
            raise SignalError(
                f"{self.source}: misaligned at step {step}: it scored id {int(self.tokens_N[step])}, "
                f"the rollout has id {int(tokens_N[step])}"
            )


class _HiddenRows(SignalRows):
    def __init__(self, signal: TeacherSignal) -> None:
        self.source = signal.source
        self._signal = signal

    @property
    def hidden_ND(self) -> Tensor:
        return self._signal.hidden_states()


def take_rows(values: Tensor, index: Tensor | slice) -> Tensor:
    """Some rows of a tensor, on the device of the index: a server's numbers are kept on the CPU."""
    return values[index] if isinstance(index, slice) else values[index.to(values.device)].to(index.device)


def check_logps(signal: TeacherSignal, name: str, logp: Tensor) -> None:
    """Refuses numbers that are no log-probs; -inf is one."""
    require_finite(name, logp, signal.source, allow_minus_inf=True)
    refuse(signal, logp > ROUNDING, f"{name} is above 0, which no log-prob is")


def refuse(signal: TeacherSignal, bad: Tensor, what: str) -> None:
    """Raises at the first bad step, [N] or [N, K], that is valid."""
    bad_N = bad if bad.ndim == 1 else bad.any(-1)
    if signal.valid_N is not None:
        signal.check_valid()
        bad_N = bad_N & signal.valid_N.to(bad_N.device)
    if bool(bad_N.any()):
        step = int(bad_N.nonzero()[0])
        raise SignalError(f"{signal.source}: {what} (step {step} of the batch); stopping before it is learnt")


def same_length(signal: TeacherSignal, name: str, values: Tensor) -> None:
    """Refuses values for another number of steps than the rollouts have."""
    if len(values) != signal.steps:
        raise SignalError(f"{signal.source}: {name} has {len(values)} steps, the rollouts have {signal.steps}")
