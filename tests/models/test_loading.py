"""What is loaded is what was meant: weights that do not fit, and folders that hold no usable model, are one line."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from retort.cli import main
from retort.errors import UserError
from retort.models import files
from retort.models.files import errors_about, locate
from retort.models.lm import LanguageModel
from retort.models.load import load_model

Change = Callable[[Path], Any]
WEIGHTS = "model.safetensors"


def config(file: str = "config.json", drop: tuple[str, ...] = (), **changes: Any) -> Change:
    def change(folder: Path) -> None:
        settings = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps({key: value for key, value in settings.items() if key not in drop}))

    return change


def text(file: str, content: str | bytes) -> Change:
    return lambda folder: (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())


def without(*patterns: str) -> Change:
    def change(folder: Path) -> None:
        for pattern in patterns:
            for file in folder.glob(pattern):
                file.unlink()

    return change


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def cut(length: int) -> Change:
    return lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:length])


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    def changed(folder: Path) -> None:
        found = change(load_file(folder / WEIGHTS))
        save_file({name: x.contiguous() for name, x in found.items()}, folder / WEIGHTS, metadata={"format": "pt"})

    return changed


def one(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return tensors(lambda found: found | {name: change(found[name].clone())})


def filled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def fill(x: torch.Tensor) -> torch.Tensor:
        x.view(-1)[3] = value
        return x

    return fill


NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
#: What is wrong with the weights, and what has to be said about it.
MISFITS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "a layer missing": (
        tensors(lambda found: {name: x for name, x in found.items() if "layers.1." not in name}),
        ("11 tensor(s)", "model.layers.1.", "missing"),
    ),
    "one more layer in the config": (
        config(num_hidden_layers=3, layer_types=["full_attention"] * 3),
        ("model.layers.2.", "missing"),
    ),
    "one layer less in the config": (
        config(num_hidden_layers=1, layer_types=["full_attention"]),
        ("model.layers.1.", "not in the model"),
    ),
    "the head missing": (
        tensors(lambda found: {name: x for name, x in found.items() if name != "lm_head.weight"}),
        ("1 tensor(s) (lm_head.weight) missing",),
    ),
    "all names prefixed": (
        tensors(lambda found: {f"module.{name}": x for name, x in found.items()}),
        ("missing", "module.", "not in the model"),
    ),
    "one surplus": (tensors(lambda found: found | {"extra.weight": torch.ones(2)}), ("extra.weight", "not in the")),
    "scales of a quantisation": (
        tensors(lambda found: found | {"model.layers.0.mlp.up_proj.weight_scale": torch.ones(2)}),
        ("weight_scale", "not in the model"),
    ),
    "another width of one": (one(NORM, lambda x: x[:-1]), (NORM, "another shape", "(15,)", "(16,)")),
    "another width of all": (config(hidden_size=32), ("another shape", "...")),
    "another vocabulary": (config(vocab_size=90), ("another shape", "(90, 16)")),
    "no width": (config(intermediate_size=0), ("another shape",)),
    "NaN": (one(UP, filled(float("nan"))), (UP, "NaN or infinity")),
    "infinity": (one(UP, filled(float("inf"))), (UP, "NaN or infinity")),
    "minus infinity in the head": (one("lm_head.weight", filled(float("-inf"))), ("lm_head.weight", "NaN or infinity")),
}
#: What makes a folder unusable whatever the settings.
UNUSABLE: dict[str, tuple[Change, tuple[str, ...]]] = {
    "cut in the header": (cut(500), ("cannot be loaded", "header")),
    "cut at the end": (cut(-500), ("cannot be loaded", "not fully covered")),
    "empty weights": (cut(0), ("cannot be loaded",)),
    "no weights": (without(WEIGHTS), ("no weights in that folder",)),
    "weights are a folder": (both(without(WEIGHTS), lambda f: (f / WEIGHTS).mkdir()), ("cannot be read",)),
    "pickled": (
        both(without(WEIGHTS), text("pytorch_model.bin", b"\x80\x04.")),
        ("pickled (pytorch_model.bin)", "convert them to safetensors"),
    ),
    "gguf": (
        both(without(WEIGHTS, "*.json"), text("model-q4.gguf", "GGUF")),
        ("holds GGUF files; name the file itself (model-q4.gguf) to read it (docs/gguf.md",),
    ),
    "other framework": (both(without(WEIGHTS), text("tf_model.h5", "")), ("another framework",)),
    "a shard missing": (
        both(
            without(WEIGHTS),
            text(
                f"{WEIGHTS}.index.json",
                json.dumps({"weight_map": {NORM: "model-00001-of-00002.safetensors"}}),
            ),
        ),
        ("1 of 1 files of weights are missing (model-00001-of-00002.safetensors)",),
    ),
    "an index that is a list": (both(without(WEIGHTS), text(f"{WEIGHTS}.index.json", "[]")), ("not an index",)),
    "nothing": (without("*"), ("that folder is empty",)),
    "no config": (without("config.json"), ("no config.json",)),
    "config is a list": (text("config.json", "[1]"), ("config.json holds a list",)),
    "config is cut": (text("config.json", "{"), ("config.json is not readable as JSON",)),
    "config is binary": (text("config.json", b"\xff\xfe{}"), ("config.json is not readable as JSON",)),
    "config nests without end": (text("config.json", "[" * 100_000), ("config.json is not readable as JSON",)),
    "generation config is cut": (text("generation_config.json", "{"), ("generation_config.json is not readable",)),
    "a stop that is a word": (config("generation_config.json", eos_token_id="x"), ("generation_config.json", "'x'")),
    "a stop below zero": (config(eos_token_id=[2, -1]), ("config.json: eos_token_id", "-1")),
    "unknown type": (config(model_type="nonsense"), ("cannot be loaded", "nonsense")),
    "no type": (config(drop=("model_type", "architectures")), ("cannot be loaded", "model_type")),
    "an encoder": (config(model_type="t5", architectures=["T5"]), ("cannot be loaded",)),
    "a word for a width": (config(hidden_size="x"), ("cannot be loaded", "hidden_size")),
    "a negative width": (config(hidden_size=-16), ("cannot be loaded", "-16")),
    "no heads": (config(num_attention_heads=0), ("cannot be loaded",)),
    "an endless vocabulary": (config(vocab_size=10**12), ("cannot be loaded",)),
    "layers below zero": (config(num_hidden_layers=-1), ("cannot be loaded",)),
    "unknown activation": (config(hidden_act="foo"), ("cannot be loaded", "foo")),
    "unknown rope": (config(rope_parameters={"rope_type": "foo"}), ("cannot be loaded", "foo")),
    "unknown layers": (config(layer_types=["foo", "bar"]), ("cannot be loaded", "layer_types")),
    "an epsilon that is no number": (config(rms_norm_eps=float("nan")), ("logits are NaN or infinite",)),
    "no tokenizer": (without("tokenizer*", "special*"), ("no tokenizer in that folder",)),
    "only the tokenizer's settings": (without("tokenizer.json"), ("tokenizer",)),
    "a tokenizer without tokens": (text("tokenizer.json", "{}"), ("its tokenizer", "cannot be loaded")),
    "a tokenizer that is cut": (text("tokenizer.json", '{"version": "1.0", "tr'), ("its tokenizer",)),
    "settings of the tokenizer are a list": (text("tokenizer_config.json", "[]"), ("its tokenizer",)),
}


@pytest.fixture
def changed(model_folder: Callable[..., Path], tmp_path: Path) -> Callable[[Change], Path]:
    def make(change: Change) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(model_folder(seed=1, tie_word_embeddings=False), folder)
        change(folder)
        return folder

    return make


def load(folder: Path, role: str = "student", **more: Any) -> LanguageModel:
    return load_model(str(folder), role=role, precision="fp32", device=torch.device("cpu"), **more)  # type: ignore[arg-type]


def said(capsys: pytest.CaptureFixture[str], code: int, *parts: str) -> None:
    error = capsys.readouterr().err.strip()
    assert code == 2, error
    assert error.startswith("retort: ")
    assert "\n" not in error
    for part in parts:
        assert part in error, error


@pytest.mark.parametrize("case", [*MISFITS, *UNUSABLE])
def test_every_command_says_in_one_line_what_is_wrong_with_a_folder(
    changed: Callable[[Change], Path],
    tiny_run: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    case: str,
) -> None:
    change, parts = (MISFITS | UNUSABLE)[case]
    folder = str(changed(change))
    capsys.readouterr()  # what making the folders said
    where = ["--data", tiny_run["data"]]
    small = ["task=exact", "precision=fp32", "checks=warn", "rollout.max_new_tokens=6", "rollout.prompts=4"]
    out = ["--out", str(tmp_path / "run")]
    code = main(["train", "--student", folder, "--teacher", tiny_run["teacher"], *where, *out, *small])
    said(capsys, code, folder, *parts)
    code = main(["train", "--student", tiny_run["student"], "--teacher", folder, *where, *out, *small])
    said(capsys, code, folder, *parts)
    code = main(["eval", folder, *where, "task=exact", "precision=fp32", "max_new_tokens=4", "problems=2"])
    said(capsys, code, folder, *parts)
    code = main(["doctor", "--quick", "--json", "--student", folder, "--teacher", tiny_run["teacher"], *where, *small])
    found = json.loads(capsys.readouterr().out)
    fatal = [check for check in found["checks"] if check["verdict"] == "fatal"]
    assert (code, len(fatal)) == (2, 1)
    assert all(part in f"{fatal[0]['saw']}; {fatal[0]['remedy']}" for part in parts), fatal


@pytest.mark.parametrize("case", MISFITS)
def test_weights_that_do_not_fit_are_a_note_where_the_settings_say_so(
    changed: Callable[[Change], Path], case: str
) -> None:
    change, parts = MISFITS[case]
    folder = changed(change)
    for role in ("student", "teacher", "base"):
        with pytest.raises(UserError, match=f"^{role} "):
            load(folder, role)
    if case == "no width":
        return  # transformers warns about tensors without elements
    lm = load(folder, weights="warn")
    assert len(lm.notes) == 1
    assert all(part in lm.notes[0] for part in parts)
    again = load(folder, weights="warn")
    assert lm.digest() == again.digest(), "what is random must be the same on resume"


@pytest.mark.parametrize(
    "name",
    [
        "mtp.fc.weight",
        "model.mtp.0.norm.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "vision_tower.layers.0.weight",
        "model.visual.blocks.0.weight",
        "multi_modal_projector.linear.weight",
        "audio_tower.conv1.weight",
    ],
)
def test_parts_that_text_does_not_need_are_left_out(changed: Callable[[Change], Path], name: str) -> None:
    folder = changed(tensors(lambda found: found | {name: torch.ones(4)}))
    lm = load(folder)
    assert len(lm.notes) == 1
    assert name in lm.notes[0]
    assert "left out" in lm.notes[0]


def test_a_tied_head_need_not_be_in_the_files(model_folder: Callable[..., Path]) -> None:
    folder = model_folder(seed=1, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / WEIGHTS)
    assert load(folder).notes == []


def test_a_run_tells_what_it_goes_on_with(
    changed: Callable[[Change], Path], tiny_run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(changed(MISFITS["a layer missing"][0]))
    words = ["task=exact", "precision=fp32", "checks=warn", "steps=1", "eval.problems=0", "rollout.max_new_tokens=4"]
    words += ["rollout.prompts=4", "weights=warn", "--out", str(tmp_path / "run")]
    code = main(["train", "--student", folder, "--teacher", tiny_run["teacher"], "--data", tiny_run["data"], *words])
    assert code == 0
    assert "what is missing is random" in " ".join(capsys.readouterr().out.split())


def test_no_permission_is_said(changed: Callable[[Change], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, real = changed(lambda folder: None), Path.open

    def refused(path: Path, *args: Any, **more: Any) -> Any:
        if path.name == WEIGHTS:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **more)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(UserError, match="no permission to read .*safetensors"):
        load(folder)


def test_an_error_of_our_own_is_no_fault_of_the_folder(
    model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="^student x: cannot be loaded: TypeError"), errors_about("student x"):
        json.loads(3)  # type: ignore[arg-type]
    ours = compile("def broken(*args): return {}['ours']", files.__file__, "exec")
    found: dict[str, Any] = {}
    exec(ours, found)
    monkeypatch.setattr(files, "account", found["broken"])
    monkeypatch.setattr(LanguageModel, "head", found["broken"])
    with pytest.raises(KeyError, match="ours"):
        load(model_folder(seed=1))
    with pytest.raises(KeyError, match="ours"), errors_about("student x"):
        found["broken"]()


class _Hub(BaseHTTPRequestHandler):
    """Says of every model that it is not there, or (`mirror/...`) that it does not know what is asked."""

    def do_GET(self) -> None:
        known = "mirror" in self.path
        self.send_response(404)
        if not known:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.parametrize(
    ("name", "there", "said"),
    [
        ("nobody/nothing", True, "there is no such folder, and no such model on the hub (or a private one)"),
        ("nothing", True, "no such model on the hub"),
        ("nobody/nothing", False, "the hub cannot be reached ("),
        ("no--name/a..b", True, "no name which the hub could have"),
        ("mirror/model", True, None),
    ],
)
def test_what_the_hub_lacks_is_said_at_once(
    monkeypatch: pytest.MonkeyPatch, name: str, there: bool, said: str | None
) -> None:
    """A library asks again for two minutes; the name that it is asked about is looked up first, once."""
    server = HTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    if not there:
        server.shutdown()
        server.server_close()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    try:
        if said is None:
            assert locate(f"student {name}", name, None) == name
        else:
            with pytest.raises(UserError) as error:
                locate(f"student {name}", name, None)
            assert said in str(error.value) and "\n" not in str(error.value)
    finally:
        if there:
            server.shutdown()
            server.server_close()


def test_a_hub_that_is_not_to_be_asked_is_not() -> None:
    with pytest.raises(UserError, match="the hub is not asked, because HF_HUB_OFFLINE is set"):
        locate("teacher nobody/nothing", "nobody/nothing", None)


def test_a_gguf_file_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "model.GGUF").write_text("GGU")
    with pytest.raises(UserError, match=r"GGUF files; name the file itself \(model.GGUF\) to read it \(docs/gguf.md"):
        locate("student x", "x", str(tmp_path))
    with pytest.raises(UserError, match="no GGUF file, whatever its name says"):
        locate("student x", "x", str(tmp_path / "model.GGUF"))
