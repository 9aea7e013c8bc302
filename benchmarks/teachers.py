"""A teacher on a server: bytes and time for each scored token, several clients that share it, and noise floors.

    python benchmarks/teachers.py                            # all parts; some minutes
    python benchmarks/teachers.py --parts wire --rounds 9
    python benchmarks/teachers.py --vllm PYTHON              # an interpreter that has vLLM (`make engines`): its rows

Every server is a process of its own on this machine, with one thread, as each client has. The parts:

* `wire`: a model with a vocabulary of 65,536 and random weights. Each kind of number that a method may ask for,
  from the model in this process, from `retort serve` and from vLLM, in turns. Bytes are counted by a relay between
  client and server, HTTP's own included; the timed requests go without it.
* `clients`: 1, 2 and 4 processes at once that have one `retort serve` of that model score, and do nothing else.
* `noise`: the built-in teacher on its student's completions: how far the log-probs of a server, or of rounded weights,
  are from those of the model in fp32 in this process. Rows of 8 and 4 bits need the extra `quantized`.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import large_vocabulary
import measure
import servers
import torch
from scored_work import (
    KINDS,
    Spent,
    Work,
    apart,
    endpoint,
    gives,
    load,
    local,
    logp_NV,
    numbers,
    random_work,
    served,
    written_work,
)

from retort.tasks import countdown

#: The teacher of `wire` and `clients`: number of ids; width and layers. The student is not used.
VOCAB = 65_536
SHAPES = {"student": (64, 1), "teacher": (512, 4)}
#: Prompts, completions of each, and tokens of either.
SIZES = (4, 2, 32)
#: Kinds that `clients` ask for: with the first the server multiplies with the head, with the second the client does.
SHARED = tuple(KINDS)[1], tuple(KINDS)[4]
#: Clients at once.
COUNTS: tuple[int, ...] = (1, 2, 4)


def model_folder(folder: Path) -> str:
    """The teacher with a large vocabulary; made on first use."""
    if not (folder / "teacher" / "config.json").exists():
        large_vocabulary.build_pair(folder, vocab=VOCAB, shapes=SHAPES)
    return str(folder / "teacher")


# Bytes and seconds.


def wire(arguments: argparse.Namespace) -> str:
    """Each kind of number, from each server."""
    folder = model_folder(arguments.models)
    lm = load(folder)
    vocab = lm.head().width
    work, far = random_work(vocab, *SIZES), list[Far]()
    with ExitStack() as started:
        server = started.enter_context(servers.ours(folder, "precision=fp32", "device=cpu"))
        relay = servers.Relay(server.url)
        far.append(Far("retort serve", served(server.url, vocab), served(relay.url, vocab), relay, server.cpu))
        relay.reset()
        far[0].counted.lm.head()
        once = relay.received
        if arguments.vllm:
            server = started.enter_context(servers.vllm(arguments.vllm, folder))
            relay = servers.Relay(server.url)
            teacher, counted = (endpoint(url, lm, vocab) for url in (server.url, relay.url))
            far.append(Far("vLLM", teacher, counted, relay, server.cpu))
        rows = [row for kind in KINDS for row in compared(kind, work, local(lm, vocab), far, arguments.rounds)]
    width = lm.head().weight_VD.shape[1]
    about = f"{vocab:,} ids, {width} wide, {work.steps} scored tokens; the head, once: {once / 1e6:.0f} MB"
    return f"{about}\n\n{measure.markdown(WIRE, rows)}"


WIRE = (
    "asked for", "from", "bytes sent", "bytes received", "log-probs of all ids: times as many", "CPU ms, in process",
    "CPU ms, client", "CPU ms, server", "times as long (rounds)", "largest difference",
)  # fmt: skip


@dataclass(frozen=True)
class Far:
    """A teacher behind a server.

    Attributes:
        name: In the table.
        teacher: Which is timed.
        counted: The same behind a relay.
        relay: Which counts.
        cpu: Gives the seconds of CPU that the server has used.
    """

    name: str
    teacher: Any
    counted: Any
    relay: servers.Relay
    cpu: Callable[[], float]


def compared(kind: str, work: Work, near: Any, far: Sequence[Far], rounds: int) -> list[list[Any]]:
    """Rows about one kind, all per scored token, one for each server that gives it; all take turns.

    Args:
        kind: One of `KINDS`.
        work: What is scored.
        near: The teacher in this process.
        far: The teachers behind servers.
        rounds: How often; one more that is not counted comes first.
    """
    far = [own for own in far if gives(own.teacher, kind)]
    here, there, busy = list[Spent](), {own.name: list[Spent]() for own in far}, dict[str, float]()
    for turn in range(rounds + 1):
        here.append(Spent.by(lambda: numbers(near, work, kind)))
        for own in far:
            before = own.cpu()
            there[own.name].append(Spent.by(lambda own=own: numbers(own.teacher, work, kind)))
            busy[own.name] = (busy[own.name] if turn > 1 else 0.0) + (own.cpu() - before)
    rows = list[list[Any]]()
    for own in far:
        own.relay.reset()
        numbers(own.counted, work, kind)
        up, down = own.relay.sent / work.steps, own.relay.received / work.steps
        pairs = list(zip(here[1:], there[own.name][1:], strict=True))
        ratios = [far_away.wall / nearby.wall for nearby, far_away in pairs]
        cpu = [measure.median([one.cpu for one in side]) for side in zip(*pairs, strict=True)]
        milliseconds = [1000 * seconds / work.steps for seconds in (*cpu, busy[own.name] / rounds)]
        times = f"{measure.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        rows.append(
            [
                *(kind, own.name, f"{up:,.0f}", f"{down:,.0f}", f"{4 * work.vocab / (up + down):,.0f}"),
                *(*milliseconds, times, shown(apart(here[-1].found, there[own.name][-1].found))),
            ]
        )
    return rows


# Several at once.


def clients(arguments: argparse.Namespace) -> str:
    """Several processes that only have one server score."""
    folder, rows = model_folder(arguments.models), list[list[Any]]()
    with servers.ours(folder, "precision=fp32", "device=cpu") as server, Clients(server.url, max(COUNTS)) as all_:
        rates: dict[tuple[str, int], list[list[float]]] = {}
        busy = dict.fromkeys(itertools.product(SHARED, COUNTS), 0.0)
        for _ in range(arguments.rounds):
            for kind, count in busy:
                before = server.cpu()
                rates.setdefault((kind, count), []).append(all_.score(kind, count))
                busy[kind, count] += server.cpu() - before
    for (kind, count), found in rates.items():
        # All begin together and the slowest ends last: rates of clients that wait in turn do not add up.
        together = measure.median([count * min(own) for own in found])
        alone = measure.median([min(own) for own in rates[kind, 1]])
        each = measure.median([1000 / rate for own in found for rate in own])
        work = 1000 * busy[kind, count] / (arguments.rounds * count * SIZES[0] * SIZES[1] * SIZES[2])
        rows.append([kind, count, each, together, f"{together / alone:.2f}", work])
    return measure.markdown(CLIENTS, rows)


CLIENTS = "asked for", "clients", "ms/token, each", "tokens/s, together", "of one alone", "CPU ms/token, server"


class Clients:
    """Processes that have one server score, when they are told to."""

    def __init__(self, url: str, count: int) -> None:
        words = [sys.executable, str(Path(__file__).resolve()), "--worker", url]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        self.each: list[Any] = [subprocess.Popen(words, env=servers.surroundings(), **pipes) for _ in range(count)]

    def __enter__(self) -> Clients:
        for process in self.each:
            if process.stdout.readline() != "ready\n":
                raise SystemExit("a client ended before it had begun")
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.each:
            process.kill()
            process.communicate()

    def score(self, kind: str, count: int) -> list[float]:
        """Tokens per second of the first so many, which begin together and do the same once."""
        for process in self.each[:count]:
            process.stdin.write(f"{kind}\n")
            process.stdin.flush()
        return [float(process.stdout.readline()) for process in self.each[:count]]


def worker(url: str) -> None:
    """One client: scores what it is told to by lines, and says how many tokens a second that were."""
    from retort.models.server import about_of
    from retort.wire import Client

    vocab = about_of(Client(url)).vocab
    teacher, work = served(url, vocab), random_work(vocab, *SIZES)
    for kind in SHARED:
        numbers(teacher, work, kind)
    print("ready", flush=True)
    for line in sys.stdin:
        kind = line.strip()
        spent = Spent.by(lambda kind=kind: numbers(teacher, work, kind))
        print(work.steps / spent.wall, flush=True)


# Noise.


def noise(arguments: argparse.Namespace) -> str:
    """How far the log-probs of others are from those in fp32 in this process."""
    folder = str(countdown.teacher_path())
    lm, work = load(folder), written_work(64)
    vocab = work.vocab
    exact, rounded = local(lm, vocab), local(load(folder, precision="bf16"), vocab)
    with (
        servers.ours(folder, "precision=fp32", "device=cpu") as full,
        servers.ours(folder, "precision=bf16", "device=cpu") as half,
    ):
        rows: list[list[Any]] = [
            ["retort serve, fp32", *differences(exact, served(full.url, vocab), work)],
            ["the same, server.payload=bf16", *differences(exact, served(full.url, vocab, narrow=True), work)],
            ["bf16, in this process", *differences(exact, rounded, work)],
            ["retort serve, bf16, from bf16 in this process", *differences(rounded, served(half.url, vocab), work)],
        ]
    for bits, package in ((8, "torchao"), (4, "bitsandbytes")):
        if importlib.util.find_spec(package) is None:
            rows.append([f"{bits} bits ({package} is not installed)", None, None, None, None])
            continue
        rows.append([f"{bits} bits, in this process", *differences(exact, local(load(folder, bits=bits), vocab), work)])
    for dtype in ("float32", "bfloat16") if arguments.vllm else ():
        with servers.vllm(arguments.vllm, folder, dtype, -1) as server:
            rows.append([f"vLLM, {dtype}", *differences(exact, endpoint(server.url, lm, vocab), work)])
    return f"{work.steps} tokens\n\n{measure.markdown(NOISE, rows)}"


NOISE = "weights", "mean difference", "largest", "mean KL", "largest difference of an entropy"


def differences(one: Any, other: Any, work: Work) -> list[str]:
    """Of the sampled tokens' log-probs, mean and largest, of the distributions, and of entropies; nats a token."""
    p_NV, q_NV = (logp_NV(teacher, work).double() for teacher in (one, other))
    tokens_N1 = work.tokens_N[:, None]
    sampled_N = (p_NV.gather(1, tokens_N1) - q_NV.gather(1, tokens_N1)).abs()
    # In float64 the terms of tokens that are all but impossible cancel, which their logarithms alone do not.
    kl_N = (p_NV.exp() * (p_NV - q_NV)).sum(-1)
    entropies = [-(own.exp() * own).sum(-1) for own in (p_NV, q_NV)]
    found = sampled_N.mean(), sampled_N.max(), kl_N.mean().abs(), (entropies[0] - entropies[1]).abs().max()
    return [shown(float(value)) for value in found]


def shown(value: float) -> str:
    """A difference; one of nothing at all is 0."""
    return f"{value:.1e}" if value else "0"


PARTS = {"wire": wire, "clients": clients, "noise": noise}


def main(given: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vllm", help="an interpreter that has vLLM")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "retort-teachers")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--worker", metavar="URL", help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    torch.set_num_threads(1)
    if arguments.worker:
        worker(arguments.worker)
        return
    about, tables = measure.machine("cpu", 1), dict[str, str]()
    for part in arguments.parts:
        measure.progress(part)
        tables[part] = PARTS[part](arguments)
        measure.progress(tables[part])
    text = "\n\n".join(f"## {part}\n\n{table}" for part, table in tables.items())
    measure.finish(about, {"tables": tables}, text, arguments.json)


if __name__ == "__main__":
    main()
