"""The index of a cache, in SQLite: which shard holds an entry, and which shard was used longest ago.

The index holds nothing that the shards do not, except the order of use: without it, it is made anew from them.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from retort.errors import UserError
from retort.files import reason

FILE = "index.sqlite"
#: Held by a process while it opens the index.
_LOCK = "index.lock"
#: Seconds that a process waits for another one that is changing the index.
_PATIENCE = 120.0
#: Number of keys in one query; SQLite allows some thousands.
_AT_ONCE = 500
_TABLES = """
create table if not exists shards (name text primary key, model text not null, size integer not null,
    used integer not null);
create table if not exists entries (key text primary key, shard text not null, digest text not null);
create index if not exists entries_by_shard on entries (shard);
create table if not exists models (fingerprint text primary key, size integer not null);
create table if not exists names (name text not null, fingerprint text not null, primary key (name, fingerprint));
"""


@dataclass(frozen=True)
class Held:
    """Where an entry is.

    Attributes:
        shard: Name of the shard.
        digest: Digest of the entry.
    """

    shard: str
    digest: str


class Index:
    """The index of a cache. Any number of processes may use it at once, on one machine."""

    def __init__(self, folder: Path) -> None:
        """Opens the index of a folder, and makes it where there is none.

        Raises:
            UserError: It is damaged, or the folder cannot be written.
        """
        self.path = folder / FILE
        with self._named():
            # The caller's transactions are explicit: sqlite3 begins none by itself.
            self._database = sqlite3.connect(self.path, timeout=_PATIENCE, isolation_level=None)
            # SQLite does not wait where two processes set the mode of a new file at once: the second has an error.
            with FileLock(folder / _LOCK, timeout=_PATIENCE):
                self._database.execute("pragma journal_mode = wal")
                self._database.executescript(_TABLES)
            # A process that is killed loses nothing; of a power cut the last rows may be lost, which shards replace.
            self._database.execute("pragma synchronous = normal")

    def close(self) -> None:
        """Closes the index."""
        self._database.close()

    def find(self, keys: Sequence[str]) -> dict[str, Held]:
        """Where entries are, by key; those that are nowhere are left out. Their shards count as used now."""
        found = self._held(keys)
        if found:
            with self._changing() as database:
                now = _next(database)
                shards = [(now, name) for name in sorted({own.shard for own in found.values()})]
                database.executemany("update shards set used = ? where name = ?", shards)
        return found

    def has(self, keys: Sequence[str]) -> set[str]:
        """Those of some keys that are stored; their shards do not count as used."""
        return set(self._held(keys))

    def add(self, shard: str, model: str, size: int, entries: Mapping[str, str]) -> None:
        """Adds a shard, once its file is there.

        Args:
            shard: Name of the shard.
            model: Fingerprint of the model that its entries are about.
            size: Bytes of the file.
            entries: Digest of each entry, by key.
        """
        with self._changing() as database:
            row = (shard, model, size, _next(database))
            database.execute("insert or replace into shards values (?, ?, ?, ?)", row)
            rows = [(key, shard, digest) for key, digest in entries.items()]
            database.executemany("insert or replace into entries values (?, ?, ?)", rows)

    def drop(self, shard: str) -> None:
        """Removes a shard whose file is gone or damaged, with its entries."""
        with self._changing() as database:
            _drop(database, shard)

    def forget(self, keys: Sequence[str]) -> None:
        """Removes entries that are damaged."""
        with self._changing() as database:
            database.executemany("delete from entries where key = ?", [(key,) for key in keys])

    def shards(self) -> set[str]:
        """The names of all shards."""
        with self._named():
            return {name for (name,) in self._database.execute("select name from shards")}

    def add_model(self, fingerprint: str, size: int, names: Sequence[str]) -> None:
        """Adds a stored model, once its folder is there; `names` are all that users call it."""
        with self._changing() as database:
            database.execute("insert or replace into models values (?, ?)", (fingerprint, size))
            database.executemany("insert or replace into names values (?, ?)", [(one, fingerprint) for one in names])

    def models(self) -> set[str]:
        """The fingerprints of all stored models."""
        with self._named():
            return {found for (found,) in self._database.execute("select fingerprint from models")}

    def named(self, names: Sequence[str]) -> list[str]:
        """The fingerprints of the stored models that are called by one of these names."""
        query = "select distinct fingerprint from names where name in (%s) order by fingerprint"
        with self._named():
            rows = self._database.execute(query % ", ".join("?" * len(names)), list(names))
            return [found for (found,) in rows]

    def size(self) -> int:
        """Bytes of all shards and stored models."""
        with self._named():
            return _size(self._database)

    def over(self, limit: int) -> tuple[list[str], list[str]]:
        """Removes what was used longest ago until the rest is within a limit.

        Args:
            limit: Bytes.

        Returns:
            Names of the shards, and fingerprints of the models without a shard, whose files are to be removed.
        """
        with self._changing() as database:
            total = _size(database)
            shards, models = list[str](), list[str]()
            for name, size in database.execute("select name, size from shards order by used, name").fetchall():
                if total <= limit:
                    break
                _drop(database, name)
                shards.append(name)
                total -= size
            query = "select fingerprint, size from models where fingerprint not in (select model from shards)"
            for fingerprint, size in database.execute(query).fetchall():
                if total <= limit:
                    break
                for table in ("models", "names"):
                    database.execute(f"delete from {table} where fingerprint = ?", (fingerprint,))
                models.append(fingerprint)
                total -= size
        return shards, models

    def _held(self, keys: Sequence[str]) -> dict[str, Held]:
        found: dict[str, Held] = {}
        with self._named():
            for start in range(0, len(keys), _AT_ONCE):
                some = list(keys[start : start + _AT_ONCE])
                query = f"select key, shard, digest from entries where key in ({', '.join('?' * len(some))})"
                found |= {key: Held(shard, digest) for key, shard, digest in self._database.execute(query, some)}
        return found

    @contextlib.contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        """Within, no other process changes the index; all that is done here is done, or nothing."""
        with self._named():
            self._database.execute("begin immediate")
            try:
                yield self._database
            except BaseException:
                self._database.execute("rollback")
                raise
            self._database.execute("commit")

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Turns errors of SQLite into one line."""
        try:
            yield
        except (sqlite3.OperationalError, OSError, Timeout) as error:
            raise UserError(
                f"the cache's index {self.path} cannot be used: {reason(error)}; it must be on a disk of this machine "
                "that can be written (cache.dir)"
            ) from None
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"the cache's index {self.path} is damaged ({reason(error)}); remove it and the files beside it that "
                "begin with its name: it is made anew from the shards"
            ) from None


def _next(database: sqlite3.Connection) -> int:
    """A number above those of all uses so far."""
    return int(database.execute("select coalesce(max(used), 0) + 1 from shards").fetchone()[0])


def _size(database: sqlite3.Connection) -> int:
    query = "select (select coalesce(sum(size), 0) from shards) + (select coalesce(sum(size), 0) from models)"
    return int(database.execute(query).fetchone()[0])


def _drop(database: sqlite3.Connection, shard: str) -> None:
    database.execute("delete from entries where shard = ?", (shard,))
    database.execute("delete from shards where name = ?", (shard,))
