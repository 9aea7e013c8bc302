"""What the speed benchmarks share: the machine in words, peak memory, work in a process of its own, tables."""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

MIB = 2**20
PACKAGES = ("torch", "transformers", "trl", "liger-kernel", "triton", "retort-distill")


def versions() -> dict[str, str]:
    """What is installed of the packages that take part; an absent one is named as absent."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def native_bf16() -> bool:
    """Whether the CPU multiplies in bf16 itself; where it does not, torch emulates it at a third of fp32's rate."""
    amx = bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())
    return amx or bool(torch.cpu._is_avx512_bf16_supported())


def machine(device: str, threads: int) -> dict[str, Any]:
    """The machine class in words (never its name), the date and the versions."""
    about: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
        "native_bf16": native_bf16(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load": [round(load, 2) for load in os.getloadavg()],
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
    }
    if device == "cuda":
        about["gpu"] = torch.cuda.get_device_name()
    return about


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def in_words(about: Mapping[str, Any]) -> str:
    """One line for the head of a table."""
    bf16 = "native bf16" if about["native_bf16"] else "no native bf16"
    what = f"{about['gpu']}, " if "gpu" in about else ""
    packages = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (
        f"{what}{about['cpu']}, {about['cores']} cores ({bf16}), {about['threads']} threads, "
        f"{about['memory_gib']} GiB, load {about['load'][0]} when started; {about['date']}; {packages}"
    )


class Peak:
    """Peak memory between `start` and `stop`, MiB above what was there at the start.

    On CUDA that is what torch allocated. On the CPU it is resident memory: the kernel's own high-water mark, which a
    process may set back to the present value, or, where it may not, the highest value of its life (`exact` is then
    False: a higher peak before the start would be reported instead).
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.exact = True
        self.before = 0.0

    def start(self) -> Peak:
        """From now on."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / MIB
            return self
        _give_back()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS: proc(5)
        except OSError:
            self.exact = False
        self.before = resident("VmRSS")
        return self

    def stop(self) -> float:
        """MiB above the start."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() / MIB - self.before
        return highest() - self.before


def _give_back() -> None:
    """Returns freed memory to the system: a call that could fill it again would seem to need nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; other libraries hold less back
    if trim is not None:
        trim(0)


def resident(field: str) -> float:
    """VmRSS or VmHWM of this process, MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}")


def highest() -> float:
    """The highest resident memory, MiB: since the mark was set back, if it was."""
    try:
        return resident("VmHWM")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def median(values: Sequence[float]) -> float:
    """The median."""
    return statistics.median(values)


def in_own_process(script: Path, arguments: Sequence[str], timeout: float = 900) -> dict[str, Any]:
    """Runs `script` again with `arguments`; its last line of output is a JSON object.

    A failure comes back as `{"failed": reason}`: one system that does not run here must not cost the others their
    numbers.
    """
    command = [sys.executable, str(script), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {timeout:.0f} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        problem = done.stderr.strip().splitlines()
        killed = "killed (out of memory?)" if done.returncode == -9 else f"exit {done.returncode}"
        return {"failed": problem[-1][:200] if problem else killed}
    return json.loads(lines[-1])


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table; None is a dash."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 0.01 else f"{value:.2f}" if abs(value) < 100 else f"{value:,.0f}"
    return str(value)


def progress(text: str) -> None:
    """Says how far it is, on the error stream: what is printed at the end is whole on its own."""
    print(text, file=sys.stderr, flush=True)


def finish(about: Mapping[str, Any], found: Mapping[str, Any], table: str, path: Path | None) -> None:
    """Prints the tables under the machine, and writes everything as JSON if asked."""
    print(in_words(about), "", table, sep="\n")
    if path is not None:
        path.write_text(json.dumps({"machine": about, **found}, indent=1) + "\n", encoding="utf-8")
