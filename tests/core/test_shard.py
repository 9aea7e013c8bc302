"""A vocabulary spread over 2 and 4 processes gives the values and gradients of one process."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, multiprocessing

from retort.core.context import Context
from retort.core.head import Head
from retort.core.per_token import Core, loss_pass, per_token
from retort.core.shard import VocabShard
from retort.core.signals import Dense
from retort.core.steps import Clock, Steps
from retort.divergences import clipped, clipped_mass, kl_values

STEPS, VOCAB, PADDED, WIDTH, CHUNK = 23, 37, 40, 6, 8


def values(context: Context) -> dict[str, Tensor]:
    student, rows = context.student, context.signal("teacher")
    ids_NK, top_logp_NK = rows.topk(12)  # more than a quarter of the ids holds
    own_ids_NK, own_logp_NK = student.topk(12)
    return {
        "reverse": student.reverse_kl(rows.distribution),
        "forward": student.forward_kl(rows.distribution),
        "jsd": student.jsd(rows.distribution, 0.4),
        "clipped": clipped(0.05).value(context, "teacher"),
        "clipped jsd": clipped(0.02, 0.4).value(context, "teacher"),
        "clipped mass": clipped_mass(0.05).value(context, "teacher"),
        "entropy": context.student_entropy_N,
        "sampled": context.student_logp_N,
        "top": kl_values(top_logp_NK.log_softmax(-1), student.logp_at(ids_NK)),
        "still": rows.entropy_N + rows.sampled_logp_N + (own_logp_NK - rows.logp_at(own_ids_NK)).sum(-1),
    }


def scalar(found: dict[str, Tensor], rows: slice) -> Tensor:
    weight_N = torch.linspace(0.5, 2.0, STEPS, dtype=torch.float64)[rows]
    return torch.stack([(value * weight_N).sum() for value in found.values() if value.requires_grad]).sum()


def evaluate(rank: int, ranks: int) -> dict[str, Tensor]:
    """Both ways of the core, on one rank's slice of the ids."""
    draw = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(STEPS, WIDTH, generator=draw, dtype=torch.float64).requires_grad_()
    weight_VD = torch.randn(PADDED, WIDTH, generator=draw, dtype=torch.float64)
    teacher_NV = 2 * torch.randn(STEPS, PADDED, generator=draw, dtype=torch.float64)
    teacher_NV[3, 5] = -math.inf
    tokens_N = torch.randint(6, VOCAB, (STEPS,), generator=draw)
    size = PADDED // ranks
    mine = slice(rank * size, (rank + 1) * size)
    shard = VocabShard(mine.start) if ranks > 1 else Head(weight_VD).shard
    weight_VD = weight_VD[mine].clone().requires_grad_()
    signal = Dense(tokens_N, "teacher", lambda rows: teacher_NV[rows, mine], size, 1.0, shard)
    head = Head(weight_VD, shard=shard)
    core = Core(values, Steps.of(tokens_N), Clock(), {"teacher": signal}, head, min(size, VOCAB - mine.start))
    found: dict[str, Tensor] = {}
    loss, at_once = loss_pass(core, hidden_ND, scalar, chunk=CHUNK)
    later = per_token(core, hidden_ND, chunk=CHUNK)
    without_infinity = {name: value for name, value in later.items() if name != "reverse"}
    for name, total in (("at once", loss), ("later", scalar(without_infinity, slice(None)))):
        hidden, weight = torch.autograd.grad(total, [hidden_ND, weight_VD])
        found |= {f"{name}: hidden": hidden, f"{name}: weight": weight}
    found |= {f"at once: {name}": value.detach() for name, value in at_once.items()}
    return found | {f"later: {name}": value.detach() for name, value in later.items()}


def work(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=ranks)
    torch.save(evaluate(rank, ranks), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_equal_one_process(ranks: int, tmp_path: Path) -> None:
    multiprocessing.start_processes(work, args=(ranks, str(tmp_path)), nprocs=ranks, start_method="spawn")
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    for name, wanted in evaluate(0, 1).items():
        if name.endswith("weight"):
            found = torch.cat([part[name] for part in parts])
        else:
            found = parts[0][name]
            assert all(torch.equal(part[name], found) for part in parts), f"{name}: ranks differ"
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12, msg=name)
