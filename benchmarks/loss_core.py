"""The loss core beside others': time, memory and error of one forward and backward pass with the head's gradient.

    pip install '.[benchmarks]'                   # or without: what is missing is left out, and said
    python benchmarks/loss_core.py               # fp32, and bf16 where the CPU multiplies in it
    python benchmarks/loss_core.py --device cuda --steps 16384

Exact reverse KL, KL(student || teacher), at a vocabulary of 151,936, widths 1024 (student) and 2048 (teacher). The
floor is what cannot be saved: the four matrix products (two of logits, two of gradients), timed in the same round with
the faster of PyTorch's own library and oneDNN. Systems take turns, so that whatever else the machine does hits all
alike; the best of the rounds counts. Memory is the peak above the inputs, each system in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import torch
from torch import Tensor

import retort
from retort.core.context import Context
from retort.core.head import Head
from retort.core.per_token import Core, per_token
from retort.core.signals import Dense
from retort.core.steps import Clock, Steps
from retort.divergences import forward_kl, jsd, reverse_kl
from retort.estimators import pathwise
from retort.functional import linear_token_losses
from retort.rollout.plan import RolloutPlan

VOCAB, WIDTH, TEACHER_WIDTH = 151_936, 1024, 2048
#: Of `--small`, a trial of the script itself.
SMALL = 4096, 64


@dataclass
class Inputs:
    """Hidden states and heads; the student's are leaves."""

    hidden_ND: Tensor
    weight_VD: Tensor
    teacher_ND: Tensor
    teacher_VD: Tensor
    tokens_N: Tensor
    mask_N: Tensor

    @staticmethod
    def make(
        steps: int, dtype: torch.dtype, device: str, *, masked: bool = False, vocab: int = VOCAB, width: int = WIDTH
    ) -> Inputs:
        """Logits with a deviation of about 1."""
        draw = torch.Generator().manual_seed(0)

        def normal(rows: int, columns: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(rows, columns, generator=draw) * scale).to(device, dtype)

        wide = width * TEACHER_WIDTH // WIDTH
        mask_N = torch.ones(steps, dtype=torch.bool) if not masked else torch.arange(steps) % 2 == 0
        return Inputs(
            normal(steps, width).requires_grad_(),
            normal(vocab, width, width**-0.5).requires_grad_(),
            normal(steps, wide),
            normal(vocab, wide, wide**-0.5),
            torch.randint(vocab, (steps,), generator=draw).to(device),
            mask_N.to(device),
        )

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Of hidden states and head, taken away."""
        found = self.hidden_ND.grad, self.weight_VD.grad
        self.hidden_ND.grad = self.weight_VD.grad = None
        assert found[0] is not None
        assert found[1] is not None
        return found[0], found[1]


System = Callable[[Inputs], Tensor]
#: What counts seconds; `--processor-time` sets another.
CLOCK: Callable[[], float] = time.perf_counter


def _learn(method: retort.Method, given: Inputs) -> Tensor:
    losses = linear_token_losses(
        method,
        student_hidden=given.hidden_ND,
        student_head=given.weight_VD,
        teacher_hidden=given.teacher_ND,
        teacher_head=given.teacher_VD,
        tokens=given.tokens_N,
        mask=given.mask_N,
    )
    losses.loss.backward()
    return losses.loss.detach()


def retort_once(given: Inputs) -> Tensor:
    """The public function; gradients are formed in the forward pass."""
    return _learn(retort.load("gkd", divergence="reverse_kl", temperature=1.0), given)


def retort_twice(given: Inputs) -> Tensor:
    """Values first, weights afterwards: the logits are made again in the backward pass."""
    kept_N = given.mask_N.nonzero().squeeze(1)
    head, teacher_ND = Head(given.teacher_VD), given.teacher_ND[kept_N]
    tokens_N = given.tokens_N[kept_N]
    signal = Dense(tokens_N, "teacher", lambda rows: head.logits(teacher_ND[rows]), head.width)

    def reverse(context: Context) -> dict[str, Tensor]:
        return {"reverse": context.student.reverse_kl(context.signal("teacher").distribution)}

    core = Core(reverse, Steps.of(tokens_N), Clock(), {"teacher": signal}, Head(given.weight_VD), head.width)
    loss = per_token(core, given.hidden_ND[kept_N])["reverse"].mean()
    loss.backward()
    return loss.detach()


def retort_four(given: Inputs) -> Tensor:
    """Four divergences in one loss, in one pass."""
    parts = (reverse_kl(), forward_kl(), jsd(0.5), jsd(0.1))
    method = retort.Method(RolloutPlan(), tuple(retort.Term(f"part{i}", pathwise(p)) for i, p in enumerate(parts)))
    return _learn(method, given)


def dense(given: Inputs) -> Tensor:
    """Whole logits in fp32, by autograd."""
    kept_N = given.mask_N
    with torch.no_grad():
        teacher_NV = (given.teacher_ND[kept_N] @ given.teacher_VD.t()).float().log_softmax(-1)
    student_NV = (given.hidden_ND[kept_N] @ given.weight_VD.t()).float().log_softmax(-1)
    loss = (student_NV.exp() * (student_NV - teacher_NV)).sum(-1).mean()
    loss.backward()
    return loss.detach()


def trl(given: Inputs) -> Tensor:
    """The loss of TRL's DistillationTrainer, called as the trainer calls it."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    loss, *_ = _chunked_divergence_loss(
        given.hidden_ND[None],
        given.teacher_ND[None],
        given.weight_VD,
        given.teacher_VD,
        given.mask_N.long()[None],
        beta=1.0,
    )
    loss.backward()
    return loss.detach()


def liger(given: Inputs) -> Tensor:
    """Liger's chunked fused linear JSD; at beta = 1 it is reverse KL."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    labels_N = torch.where(given.mask_N, given.tokens_N, -100)
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=given.hidden_ND.is_cuda
    )(given.hidden_ND, given.weight_VD, given.teacher_ND, given.teacher_VD, labels_N)
    loss = loss[0] if isinstance(loss, tuple) else loss
    loss.backward()
    return loss.detach()


def liger_triton(given: Inputs) -> Tensor:
    """Liger's Triton kernel, for CUDA."""
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    if not given.hidden_ND.is_cuda:
        raise NotImplementedError("runs on CUDA only")
    labels_N = torch.where(given.mask_N, given.tokens_N, -100)
    loss = LigerFusedLinearJSD(jsd_beta=1.0)(
        given.hidden_ND, given.weight_VD, given.teacher_ND, given.teacher_VD, labels_N
    )
    loss.backward()
    return loss.detach()


SYSTEMS: Mapping[str, System] = {
    "retort, one pass": retort_once,
    "retort, recompute": retort_twice,
    "dense": dense,
    "TRL": trl,
    "Liger": liger,
    "Liger, Triton": liger_triton,
}


def floor(given: Inputs) -> float:
    """Seconds of the four products; the student's and the teacher's logits by the faster library."""
    hidden_ND, weight_VD = given.hidden_ND.detach(), given.weight_VD.detach()
    gradient_NV = torch.randn(len(hidden_ND), len(weight_VD), device=hidden_ND.device).to(hidden_ND.dtype)
    pairs = ((hidden_ND, weight_VD), (given.teacher_ND, given.teacher_VD))
    plain = sum(_seconds(lambda x=x, w=w: x @ w.t()) for x, w in pairs)
    if hidden_ND.device.type == "cpu" and hidden_ND.dtype == torch.float32:
        multiply: Any = torch.ops.mkldnn._linear_pointwise
        plain = min(plain, sum(_seconds(lambda x=x, w=w: multiply(x, w, None, "none", [], "")) for x, w in pairs))
    back = (lambda: gradient_NV @ weight_VD, lambda: gradient_NV.t() @ hidden_ND)
    return plain + sum(_seconds(product) for product in back)


def _seconds(run: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = CLOCK()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return CLOCK() - start


def installed(device: str) -> tuple[dict[str, System], list[str]]:
    """Systems that run here, and why the others do not."""
    found, missing = dict(SYSTEMS), list[str]()
    small = Inputs.make(4, torch.float32, device, vocab=64, width=8)
    for name, system in SYSTEMS.items():
        try:
            system(small)
            small.gradients()
        except Exception as error:  # whatever a foreign package does at import
            missing.append(f"{name} left out: {type(error).__name__}: {str(error).splitlines()[0]}")
            del found[name]
    return found, missing


def times(
    systems: Mapping[str, System],
    steps: int,
    dtype: torch.dtype,
    device: str,
    rounds: int,
    *,
    vocab: int = VOCAB,
    width: int = WIDTH,
) -> dict[str, Any]:
    """Best seconds per system over interleaved rounds, with no step masked and with half of them, and the floor."""
    best: dict[str, float] = {}
    whole, half = (
        Inputs.make(steps, dtype, device, masked=masked, vocab=vocab, width=width) for masked in (False, True)
    )
    for _ in range(rounds):
        best["floor"] = min(best.get("floor", float("inf")), floor(whole))
        for name, system in systems.items():
            for label, given in ((name, whole), (f"{name}, half masked", half)):
                try:
                    best[label] = min(best.get(label, float("inf")), _seconds(lambda s=system, g=given: s(g)))
                    given.gradients()
                except torch.OutOfMemoryError:  # what does not fit is a result, too
                    best[label] = float("nan")
    return best


def errors(
    systems: Mapping[str, System], dtype: torch.dtype, device: str, *, vocab: int = VOCAB, width: int = WIDTH
) -> dict[str, float]:
    """Relative Frobenius norm of the difference of both gradients from float64 on the same inputs, at 16 steps."""
    given = Inputs.make(16, dtype, device, vocab=vocab, width=width)
    exact = Inputs(
        *(values.detach().double() for values in vars(given).values() if values.is_floating_point()),
        given.tokens_N,
        given.mask_N,
    )
    exact.hidden_ND.requires_grad_()
    exact.weight_VD.requires_grad_()
    teacher_NV = (exact.teacher_ND @ exact.teacher_VD.t()).log_softmax(-1)
    student_NV = (exact.hidden_ND @ exact.weight_VD.t()).log_softmax(-1)
    (student_NV.exp() * (student_NV - teacher_NV)).sum(-1).mean().backward()
    wanted = exact.gradients()
    found: dict[str, float] = {}
    for name, system in systems.items():
        system(given)
        found[name] = max(
            float((mine.double() - theirs).norm() / theirs.norm())
            for mine, theirs in zip(given.gradients(), wanted, strict=True)
        )
    return found


def peak(name: str, steps: int, dtype: str, device: str, vocab: int = VOCAB, width: int = WIDTH) -> float:
    """MiB above the inputs; on a CPU in a process of its own, on a GPU the allocator knows."""
    if device == "cuda":
        try:
            return _peak_here(name, str(steps), dtype, device, str(vocab), str(width))
        except torch.OutOfMemoryError:
            return float("nan")
    command = [sys.executable, __file__, "--peak", name, str(steps), dtype, device, str(vocab), str(width)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _peak_here(name: str, steps: str, dtype: str, device: str, vocab: str, width: str) -> float:
    kind: torch.dtype = getattr(torch, dtype)
    system = {**SYSTEMS, "four terms": retort_four}[name]
    system(Inputs.make(8, kind, device, vocab=64, width=8))  # imports and libraries are no memory of the pass
    given = Inputs.make(int(steps), kind, device, vocab=int(vocab), width=int(width))
    peak = measure.Peak(device).start()
    system(given)
    return peak.stop()


def table(
    dtype: str, steps: int, best: Mapping[str, float], wrong: Mapping[str, float], room: Mapping[str, float]
) -> str:
    """Markdown."""
    lines = [
        f"{dtype}, N = {steps}; floor {best['floor']:.2f} s",
        "",
        "| | seconds | over the floor | half masked / none | gradient error | peak above inputs, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for name in wrong:
        half = best[f"{name}, half masked"] / best[name]
        cells = (
            f"{best[name]:.2f} | {best[name] / best['floor']:.2f} | {half:.2f} | {wrong[name]:.1e} | {room[name]:,.0f}"
        )
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """The command."""
    if sys.argv[1:2] == ["--peak"]:
        print(_peak_here(*sys.argv[2:]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="*", default=[256, 1024])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", nargs="*", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--small", action="store_true", help="a trial of the script itself")
    parser.add_argument("--width", type=int, default=WIDTH, help="of the student; the teacher is twice as wide")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="count the processor's seconds and not the clock's, on a machine with other work (with OMP_NUM_THREADS=1)",
    )
    arguments = parser.parse_args()
    if arguments.processor_time:
        global CLOCK
        CLOCK = time.process_time
    vocab, width = SMALL if arguments.small else (VOCAB, arguments.width)
    shape = {"vocab": vocab, "width": width}
    dtypes = arguments.dtype or [
        "float32",
        *(["bfloat16"] if arguments.device != "cpu" or measure.native_bf16() else []),
    ]
    systems, missing = installed(arguments.device)
    results: dict[str, Any] = {"machine": measure.machine(arguments.device, torch.get_num_threads())}
    print(measure.in_words(results["machine"]), *missing, sep="\n")
    for dtype in dtypes:
        kind: torch.dtype = getattr(torch, dtype)
        wrong = errors(systems, kind, arguments.device, **shape)
        for steps in arguments.steps:
            best = times(systems, steps, kind, arguments.device, arguments.rounds, **shape)
            room = {name: peak(name, steps, dtype, arguments.device, vocab, width) for name in systems}
            results[f"{dtype}, N = {steps}"] = {"seconds": best, "gradient error": wrong, "peak MiB": room}
            print("\n" + table(dtype, steps, best, wrong, room), flush=True)
    if arguments.small:
        return
    sizes = (1024, 4096, 16_384, 65_536)
    flat = {
        name: {steps: peak(name, steps, "float32", arguments.device, 32_000, 64) for steps in sizes}
        for name in ("retort, one pass", "four terms")
    }
    results["flat"] = flat
    print("\nRetort in fp32, vocabulary 32,000, widths 64 and 128: MiB above the inputs\n")
    print(
        measure.markdown(["", *(f"N = {steps:,}" for steps in sizes)], [[n, *row.values()] for n, row in flat.items()])
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
