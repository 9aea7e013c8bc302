"""Learning from one batch of rollouts: optimizer steps. Axis letters: see `retort.core`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from retort.config.sections import OptimizerSection
from retort.core import reduce
from retort.core.definition import Values
from retort.core.losses import TokenLoss
from retort.core.random_streams import permutation
from retort.errors import RunError
from retort.loss.terms import batch_scales, counted, losses, term_values
from retort.method import Method
from retort.models.sharding import clip, full
from retort.train.learning.diagnose import add_noise_floor, add_positions, add_turns
from retort.train.learning.passes import Batch, Passes, fill
from retort.train.learning.rounds import Round, every_value
from retort.train.learning.spread_head import rounds
from retort.train.learning.variance import adam_variance
from retort.train.storage.metrics import Means, Stopwatch

#: Gives the passes with gradient over some rollouts of a batch, by their place in the pack.
Rounds = Callable[[Passes, Batch, Sequence[int]], Iterator[Round]]


@dataclass(frozen=True, eq=False)
class Update:
    """The optimizer steps on a batch.

    Attributes:
        passes: The student.
        settings: The settings of optimizer and updates.
        optimizer: The optimizer of the student.
        factor: Maps an optimizer step to a factor on the learning rate.
        variance_every: Batches from one measurement of the gradient's variance to the next; 0 for none.
        moved: Called after every optimizer step with their number in the run, for weights that follow the student's.
        rounds: Gives the passes with gradient over some rollouts of a batch, by their place in the pack.
    """

    passes: Passes
    settings: OptimizerSection
    optimizer: torch.optim.Optimizer
    factor: Callable[[int], float]
    variance_every: int = 0
    moved: Callable[[int], None] | None = None
    rounds: Rounds = rounds


def learn(update: Update, batch: Batch, updates_done: int, watch: Stopwatch) -> tuple[int, Means, dict[str, Tensor]]:
    """Takes all optimizer steps on one batch of rollouts.

    Args:
        update: The settings of the steps.
        batch: The scored rollouts.
        updates_done: Number of optimizer steps before this batch.
        watch: Collects the times.

    Returns:
        Optimizer steps done, the means to log, and the per-step values of the first pass over the batch, [N] each.
    """
    passes, settings, pack, optimizer = update.passes, update.settings, batch.pack, update.optimizer
    every = update.variance_every
    logged = Means()
    recorded: dict[str, Tensor] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    rollouts = len(pack.rollouts)
    for epoch in range(settings.epochs):
        order = permutation(batch.clock.seed, "data", "updates", batch.clock.step, epoch, count=rollouts)
        parts = min(settings.updates, rollouts)
        for part in range(parts):
            chosen = sorted(order[part * rollouts // parts : (part + 1) * rollouts // parts])
            if epoch == part == 0 and every and batch.clock.step % every == 0:
                with watch("variance"):
                    variance = batch_variance(passes, batch, chosen, update.rounds)
                if variance is not None:
                    logged.add("batch_gradient_variance", variance)
            values = _gradients(update, batch, chosen, logged, watch)
            if epoch == part == 0 and _one_distribution(batch.method):
                add_noise_floor(logged, pack, chosen, values["student_logp"])
            if epoch == 0:
                index_N = pack.steps_of(chosen)
                for name, values_N in values.items():
                    recorded.setdefault(name, torch.full_like(values_N, math.nan))[index_N] = values_N[index_N]
            with watch("optimizer"):
                passes.lm.sharding.sum_gradients()
                norm = clip(parameters, settings.grad_clip)
                if not math.isfinite(norm):
                    raise RunError(f"step {batch.clock.step + 1}: the gradient is {norm}; stopping before the update")
                rate = settings.learning_rate * update.factor(updates_done)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            logged.add("grad_norm", norm)
            if batch.method.adam_variance:
                logged.add("adam_variance", adam_variance(optimizer))
            logged.add("lr", rate)
            updates_done += 1
            if update.moved is not None:
                with watch("optimizer"):
                    update.moved(updates_done)
    return updates_done, logged, recorded


def _gradients(
    update: Update, batch: Batch, chosen: Sequence[int], logged: Means, watch: Stopwatch
) -> dict[str, Tensor]:
    """Forward and backward over the rollouts of one optimizer step; values [N], NaN for other rollouts."""
    method, pack, passes = batch.method, batch.pack, update.passes
    every, scale_N = every_value(batch), _scales(batch, chosen)
    found: dict[str, Tensor] = {}
    names = ["loss", *(f"loss/{term.name}" for term in method.terms)]
    parts_done = [(one, *_backward(one, every, scale_N, watch)) for one in update.rounds(passes, batch, chosen)]

    def finished() -> list[list[float]]:
        with watch("backward"):  # a GPU is waited for once, after all of them
            added = torch.stack([added for _, added, _ in parts_done]).tolist() if parts_done else []
        for (one, _, values), row in zip(parts_done, added, strict=True):
            if not math.isfinite(row[0]):
                raise one.not_finite(values)
            fill(found, pack, one.own, values)
        return added

    total = dict.fromkeys(names, 0.0)
    for row in (row for rows in passes.world.each(finished) for row in rows):
        for name, value in zip(names, row, strict=True):
            total[name] += value
    found = batch.share.columns(found, len(pack))
    for name, value in total.items():
        logged.add(name, value)
    # Curves are about what the student generates; where it never does (data alone), about what it reads.
    alone = "student" in method.rollout.sources
    generated_N = torch.tensor([r.source == "student" or not alone for r in pack.rollouts])[batch.steps.rollout_N]
    # Decided by the whole batch, because an optimizer step may have no episode of several turns.
    turn_N = batch.steps.turn_N
    turn_N = None if turn_N is None or not bool(turn_N.any()) else turn_N
    for watched in batch.watches:
        values_N, valid_N = found[f"watch.{watched.name}"], batch.valid.get(watched.against)
        if valid_N is not None:
            values_N.masked_fill_(~valid_N, math.nan)
        inside_N = ~values_N.isnan() & generated_N
        kept_N = values_N[inside_N]
        if watched.summed_up is None:
            logged.add_sum(watched.name, float(kept_N.double().sum()), len(kept_N))
        elif len(kept_N):
            logged.add(watched.name, watched.summed_up(kept_N))
        if watched.by_position:
            longest = batch.clock.longest or int(batch.steps.position_N.max()) + 1
            add_positions(logged, watched.name, kept_N, batch.steps.position_N[inside_N], longest)
        if watched.summed_up is None and turn_N is not None:
            add_turns(logged, watched.name, kept_N, turn_N[inside_N])
    return found


def _backward(
    one: Round, every: Values, scale_N: Mapping[str, Tensor], watch: Stopwatch
) -> tuple[Tensor, dict[str, Tensor]]:
    """Adds the gradient of a round; returns its own part of the loss and its terms, float64, and their values.

    All of it stays on the device, and nothing here waits for it: the caller checks whether it is finite.
    """
    batch, device = one.batch, one.passes.lm.device
    counted_N = counted(batch.method, batch.valid, len(batch.steps))

    def at(index_N: Tensor, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: column_N[index_N].to(device) for name, column_N in columns.items()}

    here = at(one.own_N, scale_N)
    own_part = partial(_terms, batch, at(one.own_N, counted_N), here)
    part = partial(_terms, batch, at(one.index_N, counted_N), at(one.index_N, scale_N))
    loss, values = one.losses(every, part, own_part, watch)
    with watch("backward"):
        loss.backward()
    values = {name: value_N.detach() for name, value_N in values.items()}
    own_loss, terms = own_part(values, slice(None))
    totals = [reduce.total(terms[term.name], here[term.name]) for term in batch.method.terms]
    return torch.stack([x.detach().double() for x in (one.loss(loss, own_loss), *totals)]), values


def batch_variance(passes: Passes, batch: Batch, chosen: Sequence[int], rounds: Rounds = rounds) -> float | None:
    r"""The variance of one optimizer step's gradient over prompts and completions, summed over all weights.

    .. math:: \frac{n}{n-1} \Big( \sum_p \lVert G_p \rVert^2 - \frac{1}{n} \big\lVert \sum_p G_p \big\rVert^2 \Big)

    with :math:`G_p` the part of the gradient from the rollouts of one visit to a prompt, and n visits. It estimates
    :math:`E\lVert G \rVert^2 - \lVert E\,G \rVert^2` of the step's gradient G, before clipping, in the units of
    `grad_norm` squared, without bias if visits are independent draws. They are the unit because they are what is drawn:
    completions of one prompt are not independent, and micro-batches are an accident of memory. Denominators count as
    given.

    Costs a forward and a backward pass over the batch, a prompt at a time, and room for a second gradient. It leaves no
    gradient behind and changes nothing else.

    Args:
        passes: The student; no gradient may be waiting.
        batch: The scored rollouts.
        chosen: Indices of the rollouts of the optimizer step.
        rounds: As in `Update`.

    Returns:
        The variance; None if all rollouts are of one visit.
    """
    visits: dict[int, list[int]] = {}
    for rollout in chosen:
        visits.setdefault(int(batch.pack.group_R[rollout]), []).append(rollout)
    if len(visits) < 2:
        return None
    parameters = list(passes.lm.trainable().values())
    whole = [torch.zeros_like(p) for p in parameters]
    scale_N, idle = _scales(batch, chosen), Stopwatch()
    squares = 0.0
    for visit in visits.values():
        for one in rounds(passes, batch, visit):
            _backward(one, term_values(batch.method), scale_N, idle)
        passes.lm.sharding.sum_gradients()
        squares += _square([p.grad for p in parameters if p.grad is not None])
        for total, parameter in zip(whole, parameters, strict=True):
            if parameter.grad is not None:
                total += parameter.grad
            parameter.grad = None
    count = len(visits)
    return count / (count - 1) * (squares - _square(whole) / count)


def _square(tensors: Sequence[Tensor]) -> float:
    return sum(float(full(torch.linalg.vector_norm(x, dtype=torch.float64))) ** 2 for x in tensors)


def _one_distribution(method: Method) -> bool:
    """Whether what the rollout engine reported and what is learnt are log-probs of one distribution."""
    return method.rollout.top_p == 1.0 and method.rollout.temperature == method.temperature


def _scales(batch: Batch, chosen: Sequence[int]) -> dict[str, Tensor]:
    """The loss scale of each step in this optimizer step, [N], by term."""
    index_N = batch.pack.steps_of(chosen)
    counted_N = counted(batch.method, batch.valid, len(batch.steps))
    here = {name: in_N[index_N] for name, in_N in counted_N.items()}
    cut = batch_scales(batch.method, batch.steps.select(index_N), here)
    return {
        name: torch.zeros(len(batch.steps), dtype=torch.float64).index_copy(0, index_N, scale_N)
        for name, scale_N in cut.items()
    }


def _terms(
    batch: Batch,
    counted_N: Mapping[str, Tensor],
    scale_N: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    rows: slice,
) -> tuple[Tensor, dict[str, TokenLoss]]:
    """The part of the loss from some steps, and the terms behind it."""
    return losses(
        batch.method,
        values,
        batch.clock,
        counted_N={name: in_N[rows] for name, in_N in counted_N.items()},
        scale_N={name: scale_N[rows] for name, scale_N in scale_N.items()},
    )
