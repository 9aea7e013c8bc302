"""A store of scores in a folder: entries by key, in shards and an index.

Whatever is killed at whatever moment, nothing is damaged: a shard is whole or has another name, a shard that the index
does not know is added to it, and of what the index knows and is not there, nothing is stored.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from torch import Tensor

from retort.cache.index import Held, Index
from retort.cache.shards import SUFFIX, Entry, described, load_entries, lock, save_shard, tidy
from retort.errors import UserError
from retort.files import reason, remove
from retort.models.lm import LanguageModel
from retort.models.stored import read_record, save_stored

#: Folders of shards and of stored models.
SHARDS, MODELS = "shards", "models"
_UNFINISHED = ".unfinished-"


class Store:
    """Entries by key. Several processes on one machine may use one folder at once.

    Attributes:
        folder: The folder.
        limit: Bytes that shards and stored models may take together.
        damaged: Number of entries that were not what was stored, and count as not stored.
        unsaved: Number of entries that could not be stored because of an error of the disk.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        """Names a folder; nothing is read or written before the first use."""
        self.folder, self.limit = folder.expanduser().resolve(), limit
        self.damaged, self.unsaved = 0, 0

    @cached_property
    def _index(self) -> Index:
        """The index. The folder is made where there is none, and what a killed process left behind is repaired.

        Raises:
            UserError: The folder cannot be made, or its index cannot be used.
        """
        try:
            for own in (SHARDS, MODELS):
                (self.folder / own).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the cache {self.folder} cannot be made: {reason(error)}; set cache.dir to a folder"
            ) from None
        index = Index(self.folder)
        _repair(self.folder, index)
        return index

    @property
    def exists(self) -> bool:
        """Whether there is anything in the folder."""
        return (self.folder / SHARDS).is_dir()

    @property
    def size(self) -> int:
        """Bytes of shards and stored models."""
        return self._index.size()

    def take_faults(self) -> tuple[int, int]:
        """The counts of `damaged` and `unsaved`, which then begin anew."""
        taken, self.damaged, self.unsaved = (self.damaged, self.unsaved), 0, 0
        return taken

    def get(self, keys: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        """Entries by key, their tensors on the CPU; those that are not stored, or are damaged, are left out."""
        held = self._index.find(list(dict.fromkeys(keys)))
        shards: dict[str, dict[str, Held]] = {}
        for key, own in held.items():
            shards.setdefault(own.shard, {})[key] = own
        found: dict[str, dict[str, Tensor]] = {}
        for shard, entries in shards.items():
            path = self._path(shard)
            if not _own_name(shard):
                self._index.drop(shard)
                continue
            loaded = load_entries(path, {key: own.digest for key, own in entries.items()})
            if loaded is None:
                # It is gone where another process made room; else its header is damaged.
                self.damaged += len(entries) if path.exists() else 0
                self._index.drop(shard)
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
                continue
            wrong = [key for key in entries if key not in loaded]
            if wrong:
                self.damaged += len(wrong)
                self._index.forget(wrong)
            found |= loaded
        return found

    def has(self, keys: Sequence[str]) -> set[str]:
        """Those of some keys that the index knows; nothing is read of them."""
        return self._index.has(list(dict.fromkeys(keys)))

    def put(self, model: str, entries: Mapping[str, Entry]) -> None:
        """Stores entries, and makes room for them where the limit is passed. A full disk is counted, not raised.

        Args:
            model: Fingerprint of the model that they are about.
            entries: The entries by key.
        """
        if not entries:
            return
        try:
            path, digests = save_shard(self.folder / SHARDS, model, entries)
        except OSError:
            self.unsaved += len(entries)
            return
        with contextlib.suppress(FileNotFoundError):  # another process made room
            self._index.add(path.name.removesuffix(SUFFIX), model, path.stat().st_size, digests)
        self._make_room()

    def keep_model(self, lm: LanguageModel, digests: Mapping[str, str], fingerprint: str) -> None:
        """Stores what of a model is needed to use its entries without it, unless that is stored already.

        Args:
            lm: The model.
            digests: Its `digests_of`.
            fingerprint: Its `fingerprint_of`.

        Raises:
            UserError: It cannot be written.
        """
        folder = self.folder / MODELS / fingerprint
        if read_record(folder) is None:
            temporary = folder.with_name(f"{_UNFINISHED}{os.getpid()}-{secrets.token_hex(8)}")
            try:
                remove(folder)  # a damaged one
                temporary.mkdir()
                with _held(temporary):
                    save_stored(lm, temporary, digests, fingerprint)
                    with contextlib.suppress(OSError):  # another process stored the same at the same time
                        temporary.rename(folder)
            except OSError as error:
                raise UserError(f"the cache {self.folder} cannot be written: {reason(error)}") from None
            finally:
                with contextlib.suppress(OSError):
                    remove(temporary)
        self._index.add_model(fingerprint, _bytes(folder), names_of(lm.name))

    def model(self, name: str) -> Path | None:
        """The folder of the stored model that has a name; None where none has.

        Raises:
            UserError: Several have it.
        """
        own = [one for one in self._index.named(names_of(name)) if _own_name(one)]
        found = [path for one in own if (path := self.folder / MODELS / one).is_dir()]
        if len(found) > 1:
            raise UserError(
                f"the cache {self.folder} holds the scores of {len(found)} different models that were all called "
                f"{name}, and cannot tell which is meant; load the model (cache.only=false), or use another cache"
            )
        return found[0] if found else None

    def _path(self, shard: str) -> Path:
        return self.folder / SHARDS / f"{shard}{SUFFIX}"

    def _make_room(self) -> None:
        shards, models = self._index.over(self.limit)
        paths = [self._path(one) for one in shards if _own_name(one)]
        for path in [*paths, *(self.folder / MODELS / one for one in models if _own_name(one))]:
            with contextlib.suppress(OSError):
                remove(path)


def _own_name(name: str) -> bool:
    """Whether a name in an index is one that a cache gives: another would be a path out of the cache's folder."""
    return re.fullmatch(r"[0-9a-f]{32}", name) is not None


def names_of(name: str) -> list[str]:
    """The names by which a model is found again: as the user wrote it, and the whole path of a folder."""
    return list(dict.fromkeys((name, str(Path(name).expanduser().resolve()))))


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Within, whether this process alone holds a folder that is not finished."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield lock(handle)
    finally:
        os.close(handle)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _repair(folder: Path, index: Index) -> None:
    """Adds shards and stored models that the index does not know, and removes what was not finished."""
    files, known = list((folder / SHARDS).iterdir()), index.shards()
    tidy(files)
    for path in files:
        name = path.name.removesuffix(SUFFIX)
        if path.suffix != SUFFIX or name in known:
            continue
        found = described(path)
        if found is None:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            continue
        with contextlib.suppress(FileNotFoundError):
            index.add(name, found[0], path.stat().st_size, found[1])
    stored = index.models()
    for path in list((folder / MODELS).iterdir()):
        if path.name.startswith(_UNFINISHED):
            with contextlib.suppress(OSError), _held(path) as alone:
                if alone:
                    remove(path)
        elif path.name not in stored and (record := read_record(path)) is not None:
            index.add_model(path.name, _bytes(path), names_of(record["name"]))
