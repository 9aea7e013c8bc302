"""Shards of a cache: safetensors files of several entries each, named by what is in them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from retort.files import flush

#: The tensors of an entry, by name.
Entry = Mapping[str, Tensor]
SUFFIX, _UNFINISHED = ".safetensors", ".unfinished-"


def digest_of(key: str, entry: Entry) -> str:
    """A digest of an entry: hex BLAKE2b of 16 bytes over its key and names, dtypes, shapes and bytes of its tensors."""
    found = hashlib.blake2b(key.encode(), digest_size=16)
    for name in sorted(entry):
        tensor = entry[name]
        found.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def save_shard(folder: Path, model: str, entries: Mapping[str, Entry]) -> tuple[Path, dict[str, str]]:
    """Writes a shard: under another name first, which a killed process leaves behind and `tidy` removes.

    Args:
        folder: The folder of the shards.
        model: Fingerprint of the model that the entries are about.
        entries: The entries by key.

    Returns:
        The file, and the digest of each entry by key.

    Raises:
        OSError: It cannot be written.
    """
    digests = {key: digest_of(key, entry) for key, entry in entries.items()}
    tensors = {
        f"{key}.{name}": tensor.detach().cpu().contiguous().clone()  # entries share no memory
        for key, entry in entries.items()
        for name, tensor in entry.items()
    }
    content = save(tensors, {"model": model, "entries": json.dumps(digests)})
    path = folder / f"{hashlib.blake2b(content, digest_size=16).hexdigest()}{SUFFIX}"
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{_UNFINISHED}{os.getpid()}-{secrets.token_hex(8)}"
    try:
        with temporary.open("xb") as file:
            lock(file.fileno())  # as long as it is held, `tidy` leaves the file alone
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
        flush(folder)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    return path, digests


def load_entries(path: Path, digests: Mapping[str, str]) -> dict[str, dict[str, Tensor]] | None:
    """Reads entries of a shard.

    Args:
        path: The file.
        digests: The digest of each entry that is wanted, by key.

    Returns:
        The whole entries by key, those that are damaged left out; None where the file is gone or cannot be read at all.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names: dict[str, list[str]] = {}
            for name in file.keys():  # noqa: SIM118, it is no mapping
                names.setdefault(name.rpartition(".")[0], []).append(name)
            found = {
                key: {name.rpartition(".")[2]: file.get_tensor(name).clone() for name in names.get(key, ())}
                for key in digests
            }
    except (OSError, SafetensorError, ValueError):
        return None
    return {key: entry for key, entry in found.items() if entry and digest_of(key, entry) == digests[key]}


def described(path: Path) -> tuple[str, dict[str, str]] | None:
    """The model that a shard is about, and the digest of each entry; None where its header is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
        entries = json.loads(about["entries"])
    except (OSError, SafetensorError, ValueError, KeyError):
        return None
    whole = isinstance(entries, dict) and all(isinstance(digest, str) for digest in entries.values())
    return (about["model"], entries) if whole and isinstance(about.get("model"), str) else None


def tidy(paths: Sequence[Path]) -> None:
    """Removes files that a killed process did not finish; those that a living one holds stay."""
    for path in paths:
        if not path.name.startswith(_UNFINISHED):
            continue
        with contextlib.suppress(OSError), path.open("rb") as file:
            if lock(file.fileno()):
                path.unlink(missing_ok=True)


def lock(handle: int) -> bool:
    """Locks an open file or folder until it is closed; False where another process holds it, or none can be held."""
    try:
        import fcntl
    except ImportError:  # not on this system: what a killed process leaves behind stays
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
