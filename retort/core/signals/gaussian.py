"""The signal of a teacher of denoising steps: its Gaussian over each next latent. Axis letters: see `retort.core`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from retort.core.gaussian import Gaussian as GaussianPolicy
from retort.core.gaussian import check_gaussian
from retort.core.needs import NeedKind
from retort.core.policy import Policy
from retort.core.signals.base import SignalRows, TeacherSignal, same_length, take_rows
from retort.core.steps import NO_TOKEN
from retort.errors import SignalError


class _GaussianRows(SignalRows):
    def __init__(self, source: str, policy: GaussianPolicy, decided_ND: Tensor) -> None:
        self.source = source
        self._policy, self._decided_ND = policy, decided_ND

    @property
    def policy(self) -> Policy:
        return self._policy

    @property
    def sampled_logp_N(self) -> Tensor:
        return self._policy.logp_of(self._decided_ND)


@dataclass(frozen=True, eq=False)
class Gaussian(TeacherSignal):
    """Mean and standard deviation of the teacher's next latent at each step.

    A `SignalError` refuses shapes that do not fit, numbers that are not finite, and a standard deviation that is not
    positive: at 0 the KL is infinite. Steps that are not valid may hold anything.

    Attributes:
        mean_ND: Means; latents of more axes are flattened.
        std_N: Standard deviations of every element.
        decided_ND: The next latents that the student arrived at, about which it is.
    """

    mean_ND: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    std_N: Tensor = field(default_factory=lambda: torch.empty(0))
    decided_ND: Tensor = field(default_factory=lambda: torch.empty(0, 0))

    def __post_init__(self) -> None:
        for name in ("mean_ND", "std_N", "decided_ND"):
            values: Tensor = self.__dict__[name]
            object.__setattr__(self, name, values.detach())
            same_length(self, name, values)
        if self.decided_ND.shape != self.mean_ND.shape:
            shapes = f"{tuple(self.mean_ND.shape)} and {tuple(self.decided_ND.shape)}"
            raise SignalError(f"{self.source}: means and next latents have different shapes, {shapes}")
        self.check_valid()
        check_gaussian(self.mean_ND, self.std_N, self.source, self.valid_N)

    @staticmethod
    def of(
        mean_ND: Tensor, std_N: Tensor, decided_ND: Tensor, *, source: str = "teacher", valid_N: Tensor | None = None
    ) -> Gaussian:
        """Builds the signal from plain tensors; steps of latents have no tokens."""
        tokens_N = torch.full((len(decided_ND),), NO_TOKEN, dtype=torch.long, device=decided_ND.device)
        return Gaussian(tokens_N, source, mean_ND, std_N, decided_ND, valid_N=valid_N)

    @property
    def offers(self) -> frozenset[NeedKind]:
        return GaussianPolicy.offers

    def rows(self, index_C: Tensor | slice, vocab: int | None = None) -> SignalRows:
        mean_CD, std_C, decided_CD = self.mean_ND[index_C], self.std_N[index_C], self.decided_ND[index_C]
        if self.valid_N is not None:  # terms leave these steps out, but compute them
            valid_C = self.valid_N[index_C]
            mean_CD, std_C = mean_CD.masked_fill(~valid_C[:, None], 0.0), std_C.masked_fill(~valid_C, 1.0)
        return _GaussianRows(self.source, GaussianPolicy(mean_CD, std_C, self.source), decided_CD)

    def select(self, index_N: Tensor) -> Gaussian:
        taken = (take_rows(values, index_N) for values in (self.mean_ND, self.std_N, self.decided_ND))
        return Gaussian(take_rows(self.tokens_N, index_N), self.source, *taken, valid_N=self._valid(index_N))

    def to(self, device: torch.device) -> Gaussian:
        """The same on a device."""
        moved = (values.to(device) for values in (self.mean_ND, self.std_N, self.decided_ND))
        valid_N = None if self.valid_N is None else self.valid_N.to(device)
        return Gaussian(self.tokens_N.to(device), self.source, *moved, valid_N=valid_N, counts=self.counts)

    def check_decided(self, decided_ND: Tensor) -> None:
        """Raises `SignalError` unless the signal is about exactly these latents."""
        if self.decided_ND.shape != decided_ND.shape:
            shapes = f"{tuple(self.decided_ND.shape)}, the rollouts have {tuple(decided_ND.shape)}"
            raise SignalError(f"{self.source}: scored latents {shapes}")
        wrong_N = (self.decided_ND.to(decided_ND.device) != decided_ND).any(-1)
        if bool(wrong_N.any()):
            step = int(wrong_N.nonzero()[0])
            raise SignalError(f"{self.source}: misaligned at step {step}: it scored another latent than was decided")
