"""A model that `retort serve` holds, as a source beside folders and names of the hub: its small files and its words."""

from __future__ import annotations

import base64
import binascii
import re
import shutil
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from pydantic import ValidationError

from retort.errors import UnreachableError, UserError, quoted
from retort.models.sent_images import SentImages
from retort.wire import Client
from retort.wire.client import MissingPathError
from retort.wire.protocol import ABOUT, FILES, VERSION, About

#: Seconds for which a server is waited for before a run.
_FIRST = 5.0
#: Files that a tokenizer and a configuration are read from; a server can name no other, and none in another folder.
_FILE = re.compile(r"[A-Za-z0-9_-]+\.(json|jinja|txt|model|tiktoken)")


class OtherServer(UserError):
    """What answers is another kind of server."""


@dataclass(frozen=True, eq=False)
class Server:
    """A server that speaks Retort's protocol.

    Attributes:
        client: Speaks to it.
        about: Its model, as it describes it.
        folder: The model's small files, for as long as this object lives.
        narrow: Whether hidden states travel in bf16 whatever the model's precision is.
        images: Sends it images.
    """

    client: Client
    about: About
    folder: Path
    narrow: bool = False
    images: SentImages = field(kw_only=True)

    @staticmethod
    def at(client: Client, *, narrow: bool = False) -> Server:
        """Asks a server what it has.

        Args:
            client: Speaks to it.
            narrow: See the attribute.

        Raises:
            OtherServer: Something else than `retort serve` answers there.
            UserError: Nothing answers there, or `retort serve` of another protocol.
        """
        url = client.url
        try:
            about = about_of(client, patience=min(client.patience, _FIRST))
            files = client.get_json(FILES)
        except UnreachableError as error:
            raise UserError(f"{error}; `retort serve MODEL` starts one") from None
        except MissingPathError:
            raise OtherServer(f"{url}: something answers there, but it is no `retort serve`") from None
        contents = _files(url, files)
        found = Server(client, about, Path(mkdtemp(prefix="retort-")), narrow, images=SentImages(client))
        weakref.finalize(found, shutil.rmtree, found.folder, ignore_errors=True)
        for name, content in contents.items():
            (found.folder / name).write_bytes(content)
        return found

    @property
    def name(self) -> str:
        """Its address, for messages."""
        return self.client.url


def about_of(client: Client, *, patience: float | None = None) -> About:
    """The description of a server's model.

    Raises:
        UserError: It is none, or of another version of the protocol.
    """
    found = client.get_json(ABOUT, patience=patience)
    spoken = found.get("protocol") if isinstance(found, dict) else None
    if spoken != VERSION:
        raise UserError(
            f"{client.url}: it speaks version {quoted(spoken)} of Retort's protocol, and this is {VERSION}; "
            "install the same version of Retort on both sides"
        )
    try:
        return About.model_validate(found, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{client.url}: its description of the model cannot be read: {where}: {first['msg']}") from None


def _files(url: str, found: Any) -> dict[str, bytes]:
    """The files of an answer, by name.

    Raises:
        UserError: They are none, or would be written elsewhere.
    """
    if not isinstance(found, dict) or not found:
        raise UserError(f"{url}: it sends no files of a tokenizer")
    files: dict[str, bytes] = {}
    for name, content in found.items():
        if not _FILE.fullmatch(name) or not isinstance(content, str):
            raise UserError(f"{url}: it sends a file {quoted(name)}, which no tokenizer has")
        try:
            files[name] = base64.b64decode(content, validate=True)
        except (binascii.Error, ValueError):
            raise UserError(f"{url}: its file {name} cannot be read") from None
    return files
