"""Reads a model of transformers from a folder or hub name, and checks that all weights come from its files.

transformers fills in weights that a checkpoint lacks with random numbers, drops unknown ones, and mentions it in a log.
Here its own account (`output_loading_info`) decides: a mismatch is an error that names the keys.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from retort.errors import RetortError, UserError
from retort.models import gguf
from retort.models.in_memory import InMemoryModel
from retort.models.server import Server
from retort.models.weight_faults import OTHER_PARTS, PARTS, account
from retort.models.weight_files import weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: The treatment of weights that do not fit: an error, or a note.
Weights = Literal["refuse", "warn"]

#: Files that a tokenizer may be read from.
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json", "tokenization_*.py")
_GGUF = (
    "holds GGUF files; name the file itself ({}) to read it (docs/gguf.md), or better take the folder that it was "
    "made from"
)
#: Seconds in which the hub has to answer whether it has a model.
_HUB_SECONDS = 10.0
_LIBRARY = str(Path(__file__).parents[1])


@contextlib.contextmanager
def errors_about(label: str, what: str = "cannot be loaded") -> Iterator[None]:
    """Turns errors of other libraries within the block into one line about the model.

    Errors that begin in Retort's own code are passed on: they are not the model's fault.

    Args:
        label: Role and name of the model.
        what: What failed.

    Raises:
        UserError: An error was raised outside of Retort.
    """
    try:
        yield
    except RetortError:
        raise
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of the tokenizers library is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if _raised_in_retort(error):
            raise
        raise UserError(f"{label}: {what}: {_one_line(error)}") from error


def locate(label: str, name: str, source: str | Server | None) -> str:
    """The location for transformers to read a model from, once the files there are checked.

    Args:
        label: Role and name of the model.
        name: The user's name for it.
        source: Its location, if not `name`; of a server's model, the small files.

    Raises:
        UserError: The folder does not exist, is not readable, or holds no model that can be read.
    """
    if isinstance(source, Server):
        return str(source.folder)
    path = Path(source or name).expanduser()
    found: str | None = None
    try:
        there = path.exists()
        if there:
            found = _wrong_with(path)
    except PermissionError as error:
        where = error.filename or path
        raise UserError(f"{label}: no permission to read {where}; change it, or choose another folder") from None
    except OSError as error:
        raise UserError(f"{label}: {path} cannot be read: {_one_line(error)}") from None
    except ValueError:
        raise UserError(f"{label}: no such folder; the name holds a character that no name can have") from None
    if found is not None:
        raise UserError(f"{label}: {found}")
    if there:
        return str(path)
    file = path.suffix.lower() == ".gguf"
    if file or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{label}: no such {'file' if file else 'folder'}")
    problem = _wrong_on_hub(name)
    if problem is not None:
        raise UserError(f"{label}: there is no such folder, and {problem}")
    return name


def _wrong_on_hub(name: str) -> str | None:
    """The reason why the hub lacks a model, where that is certain; libraries retry a missing one for minutes."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return None
        if constants.HF_HUB_OFFLINE:
            return "the hub is not asked, because HF_HUB_OFFLINE is set; unset it, or name a folder"
        HfApi().model_info(name, timeout=_HUB_SECONDS)
    except HFValidationError:
        return "that is no name which the hub could have; name a folder, or owner/name"
    except GatedRepoError:
        return None  # it exists; the libraries report whether the user has access
    except RepositoryNotFoundError:
        return "no such model on the hub (or a private one); mind the spelling, or log in with `hf auth login`"
    except HfHubHTTPError:
        return None  # the hub answered otherwise: a mirror may have the files all the same
    except Exception as error:
        if not isinstance(error, OSError) and "TransportError" not in [kind.__name__ for kind in type(error).__mro__]:
            return None
        return f"the hub cannot be reached ({_one_line(error)}); look after the network, or name a folder"
    return None


def _denoises(folder: Path) -> bool:
    """Whether a folder holds a flow model, which has no tokenizer of its own."""
    try:
        with (folder / "config.json").open("rb") as file:
            return b'"retort_flow"' in file.read(1_000_000)
    except OSError:
        return (folder / "model_index.json").is_file()


def read_tokenizer(
    name: str, source: str | InMemoryModel | Server | None, role: str, *, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    """Reads the tokenizer of a model; copies it, where the caller holds it in memory.

    Raises:
        UserError: There is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    label = f"{role} {name}"
    location = "" if isinstance(source, InMemoryModel) else locate(label, name, source)
    local = Path(location)
    if location and local.is_dir() and not any(True for pattern in _TOKENIZER_FILES for _ in local.glob(pattern)):
        if _denoises(local):
            raise UserError(f"{label}: a flow model, which denoises and makes no text; name a model of text")
        raise UserError(f"{label}: no tokenizer in that folder; copy the tokenizer's files (tokenizer.json, ...) there")
    with errors_about(f"{label}: its tokenizer"):
        tokenizer: Any = (
            copy.deepcopy(source.tokenizer)
            if isinstance(source, InMemoryModel)
            else gguf.read_tokenizer(location)
            if gguf.is_gguf(location)
            else AutoTokenizer.from_pretrained(location, trust_remote_code=trust_remote_code)
        )
        ids = set(tokenizer.get_vocab().values())
        added = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    if ids <= added:  # transformers makes such a tokenizer where it finds no vocabulary
        raise UserError(
            f"{label}: its tokenizer has no tokens but {len(ids)} special one(s); is tokenizer.json in the folder?"
        )
    return cast("PreTrainedTokenizerBase", tokenizer)


def read_model(
    name: str,
    source: str | InMemoryModel | None,
    role: str,
    *,
    dtype: torch.dtype,
    attention: str | None,
    trust_remote_code: bool,
    weights: Weights = "refuse",
    quantised: Mapping[str, Any] | None = None,
    images: bool = False,
) -> tuple[PreTrainedModel, list[str]]:
    """Reads a model whose weights are those of its files, and returns it with notes for the user.

    Args:
        name: The user's name for it, for messages.
        source: Its location, if not `name`; or a model that the caller holds, which is copied.
        role: Role of the model, for messages.
        dtype: Dtype of its weights.
        attention: Attention implementation of transformers; None for its default.
        trust_remote_code: Run code that comes with the model.
        weights: The treatment of weights that are missing, left over, of the wrong shape or not finite.
        quantised: Further arguments of `from_pretrained`, to round the weights.
        images: Whether it reads images, too.

    Raises:
        UserError: It cannot be read, or its weights do not fit it.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    label = f"{role} {name}"
    if isinstance(source, InMemoryModel):
        with errors_about(label, "cannot be copied"):
            held = source.copy(learns=role == "student", dtype=dtype, attention=attention)
        return held, _weight_notes(label, weights, *account(held, {}, set()))
    location = locate(label, name, source)
    file = gguf.is_gguf(location)
    kind = AutoModelForImageTextToText if images else AutoModelForCausalLM
    # Random weights (missing ones, where the settings allow it) are the same when a run is resumed.
    with errors_about(label), torch.random.fork_rng([]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # the check of shapes reports it
        warnings.filterwarnings("ignore", ".*torch.jit", DeprecationWarning)  # what rounds weights is compiled by it
        torch.manual_seed(0)
        where = gguf.arguments(location) if file else {"pretrained_model_name_or_path": location}
        with gguf.fast_reader() if file else contextlib.nullcontext():
            loaded: Any = kind.from_pretrained(
                **where,
                **(quantised or {}),
                dtype=dtype,
                attn_implementation=attention,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # so that one account lists all mismatches
                output_loading_info=True,
            )
    model, info = loaded
    if file:
        gguf.without_leftovers(model)
    others = PARTS if images else OTHER_PARTS
    wrong, notes = account(model, info, set() if file else _dropped(location, model, others), others)
    notes += gguf.notes(location) if file else []
    return cast("PreTrainedModel", model), _weight_notes(label, weights, wrong, notes)


def _weight_notes(label: str, weights: Weights, wrong: list[str], notes: list[str]) -> list[str]:
    """Notes about a model's weights; raises `UserError` where they are wrong and that is refused."""
    if wrong:
        message = f"{label}: its weights are not those of its config.json: {'; '.join(wrong)}"
        if weights == "refuse":
            raise UserError(f"{message}. To go on all the same (with random numbers for what is missing): weights=warn")
        notes.append(f"{message}; what is missing is random")
    return [note if note.startswith(label) else f"{label}: {note}" for note in notes]


def _dropped(location: str, model: Any, others: re.Pattern[str]) -> set[str]:
    """Names of tensors in a model's files that transformers silently leaves out."""
    from safetensors import safe_open

    patterns = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    patterns.append(others)  # with `inv_freq`, which transformers drops where a model computes it
    names = set[str]()
    for file in weight_files(location):
        with safe_open(file, framework="pt") as weights:
            names.update(weights.keys())
    return {name for name in names if any(pattern.search(name) for pattern in patterns)}


def _wrong_with(path: Path) -> str | None:
    """The reason why a folder cannot be read as a model, as far as its files show."""
    if not path.is_dir():
        return gguf.wrong_with(path) if gguf.is_gguf(str(path)) else "that is a file; name the folder of the model"
    names = {file.name for file in path.iterdir()}
    if not names:
        return "no config.json: that folder is empty"
    if (path / "model" / "config.json").is_file() and not any(name.endswith(".safetensors") for name in names):
        return f"that is the folder of a run, whose student is in {path / 'model'}"
    files = sorted(name for name in names if name.lower().endswith(".gguf"))
    if files and not any(name.endswith(".safetensors") for name in names):
        return _GGUF.format(files[0])
    if "config.json" not in names:
        return "no config.json in that folder, so it is not a model folder"
    for name in ("config.json", "generation_config.json"):
        if name in names:
            found = _wrong_with_settings(path / name)
            if found is not None:
                return found
    index = path / "model.safetensors.index.json"
    if index.is_file() and not (path / "model.safetensors").is_file():
        return _wrong_with_index(index, names)
    weights = [name for name in names if name.endswith(".safetensors")]
    pickles = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt")))
    if not weights and pickles:
        return (
            f"its weights are pickled ({pickles[0]}), and unpickling can run code; convert them to safetensors "
            "(save_pretrained of a recent transformers does)"
        )
    if not weights and names & {"tf_model.h5", "flax_model.msgpack"}:
        return "its weights are of another framework; convert them to safetensors"
    if not weights:
        return "no weights in that folder (model.safetensors)"
    for name in sorted({*weights, *names & {"tokenizer.json", "tokenizer_config.json"}}):
        with (path / name).open("rb"):  # permission
            pass
    return None


def _wrong_with_settings(file: Path) -> str | None:
    """The fault of a config.json or generation_config.json."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        return f"{file.name} is not readable as JSON: {_one_line(error)}"
    if not isinstance(settings, dict):
        return f"{file.name} holds a {type(settings).__name__} where an object with settings should be"
    stops = cast("dict[str, Any]", settings).get("eos_token_id")
    ids: list[Any] = [] if stops is None else cast("list[Any]", stops) if isinstance(stops, list) else [stops]
    if any(isinstance(stop, bool) or not isinstance(stop, int) or stop < 0 for stop in ids):
        return f"{file.name}: eos_token_id is {str(stops)[:60]!r}; it must be a token's id, or a list of them"
    return None


def _wrong_with_index(index: Path, names: set[str]) -> str | None:
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{index.name} is not an index of weights ({_one_line(error)}); copy it again"
    missing = sorted(str(shard) for shard in shards - names)
    if missing:
        return f"{len(missing)} of {len(shards)} files of weights are missing ({missing[0]}); copy them again"
    for shard in sorted(shards):
        with (index.parent / str(shard)).open("rb"):
            pass
    return None


def _raised_in_retort(error: BaseException) -> bool:
    """Whether Retort's own code raised an error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code.co_filename.startswith(_LIBRARY)


def _one_line(error: BaseException) -> str:
    """An error's text, in one line without control characters."""
    if isinstance(error, KeyError):
        return f"it lacks or does not know {str(error)[:200]}"
    text = " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())
    kind = "" if isinstance(error, (OSError, ValueError, ImportError, RuntimeError)) and text else type(error).__name__
    text = ": ".join(part for part in (kind, text) if part)
    return text if len(text) <= 300 else f"{text[:297]}..."
