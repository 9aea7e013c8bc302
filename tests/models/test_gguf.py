"""GGUF files as models: what is read, what is said about them, and bad ones."""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("gguf", reason="the extra [gguf] is not installed")
pytest.importorskip("accelerate", reason="the extra [gguf] is not installed")

from gguf_files import tiny_qwen3, write_gguf
from trained import LINES, trained

import retort
from retort.errors import UserError
from retort.models import gguf
from retort.models.described import describe
from retort.models.files import locate
from retort.models.gguf_reader import reader_class
from retort.models.lm import LanguageModel
from retort.models.load import load_model

IDS_RL = torch.arange(1, 9)[None]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", chat=True, rule="qwen2")


def load(path: Path, role: str = "student", **settings: Any) -> LanguageModel:
    return load_model(str(path), role=role, precision="fp32", device=torch.device("cpu"), **settings)


def test_plain_numbers_are_the_model_that_was_written(tmp_path: Path) -> None:
    lm = load(write_gguf(tmp_path / "plain.gguf", rounded="F32"))
    assert torch.equal(lm.model(input_ids=IDS_RL).logits, tiny_qwen3(0)(input_ids=IDS_RL).logits)
    assert lm.rounded == "" and lm.notes == [] and lm.context == lm.tokenizer.model_max_length == 256
    for line in LINES:
        assert lm.tokenizer(line).input_ids == trained("byte-level")(line).input_ids


def test_rounded_numbers_are_named_and_learn(file: Path) -> None:
    lm, was = load(file), tiny_qwen3(0)(input_ids=IDS_RL).logits.detach()
    logits = lm.model(input_ids=IDS_RL).logits
    assert 0 < float((logits.detach() - was).abs().max()) < 0.3 * float(was.std())
    assert lm.rounded == "quantised to Q8_0 (GGUF)"
    assert {parameter.dtype for parameter in lm.trainable().values()} == {torch.float32}
    logits.logsumexp(-1).sum().backward()
    assert all(bool(parameter.grad.abs().sum()) for parameter in lm.trainable().values())  # type: ignore[union-attr]


def test_template_and_stop_token_are_those_of_the_header(file: Path) -> None:
    end = trained("byte-level").convert_tokens_to_ids("<end>")
    lm, described = load(file), describe(str(file), None, "student")
    assert lm.stops.ids == {end} and described.context == 256
    for tokenizer in (lm.tokenizer, described.tokenizer):
        shown = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
        assert shown == "<|im_start|>user a<end>" and tokenizer.eos_token == "<end>"


def test_what_is_saved_is_an_ordinary_folder(file: Path, tmp_path: Path) -> None:
    lm = load(file)
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    assert "quantization" not in (tmp_path / "config.json").read_text() and str(file.parent) not in str(
        [part.read_text() for part in tmp_path.glob("*.json")]
    )
    again = load(tmp_path)
    assert torch.equal(again.model(input_ids=IDS_RL).logits, lm.model(input_ids=IDS_RL).logits)
    assert again.stops == lm.stops and again.rounded == ""
    assert again.tokenizer(LINES[0]).input_ids == lm.tokenizer(LINES[0]).input_ids


def test_digits_stand_alone_where_the_rule_says_so(tmp_path: Path) -> None:
    lm = load(write_gguf(tmp_path / "digits.gguf", rule="smollm"))
    assert lm.notes == []
    assert lm.tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]


@pytest.mark.parametrize("rule", ["gpt-2", "qwen2", "llama-bpe", "smollm"])
def test_a_tokenizer_that_is_saved_reads_the_same_again(tmp_path: Path, rule: str) -> None:
    from transformers import AutoTokenizer

    file = str(write_gguf(tmp_path / "rule.gguf", rule=rule, chat=True))
    tokenizer: Any = gguf.read_tokenizer(file)
    gguf.read_config(file).save_pretrained(tmp_path / "saved")  # a family beside it decides how some are opened
    tokenizer.save_pretrained(tmp_path / "saved")
    again: Any = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in (*LINES, "12345 e\u0301", "a\n\n\n\tb  12", "<end><think>"):
        assert again(text).input_ids == tokenizer(text).input_ids, text
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert again.special_tokens_map == tokenizer.special_tokens_map and again.chat_template == tokenizer.chat_template
    assert (tokenizer("e\u0301").input_ids == tokenizer("\u00e9").input_ids) == (rule == "qwen2")  # as Qwen's own does


@pytest.mark.parametrize(("rule", "named"), [("new-rule", "new-rule"), (None, "default")])
def test_a_rule_that_is_not_followed_is_said(tmp_path: Path, rule: str | None, named: str) -> None:
    (note,) = load(write_gguf(tmp_path / "rule.gguf", rule=rule)).notes
    assert "text is split as GPT-2 does" in note and f"({named})" in note


@pytest.mark.parametrize("big_endian", [False, True])
def test_the_fast_reader_reads_what_the_plain_one_does(file: Path, tmp_path: Path, big_endian: bool) -> None:
    from gguf import GGUFEndian, GGUFReader, GGUFWriter

    if big_endian:
        file = tmp_path / "big.gguf"
        writer = GGUFWriter(file, "qwen3", endianess=GGUFEndian.BIG)
        writer.add_array("texts", ["", "a", "é\n", "<s>" * 90])
        writer.add_array("numbers", [1.5, -2.0])
        writer.add_tensor("weight", torch.arange(6.0).reshape(2, 3).numpy())
        for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            write()
        writer.close()
    plain, fast = GGUFReader(file), reader_class()(file)
    assert plain.fields.keys() == fast.fields.keys() and len(plain.fields) > 3
    for name, field in plain.fields.items():
        own = fast.fields[name]
        assert (own.offset, own.data, own.types) == (field.offset, field.data, field.types), name
        assert [(part.dtype, part.tolist()) for part in own.parts] == [
            (part.dtype, part.tolist()) for part in field.parts
        ], name
    assert plain.tensors
    for one, other in zip(plain.tensors, fast.tensors, strict=True):
        assert (one.name, one.tensor_type, one.data_offset) == (other.name, other.tensor_type, other.data_offset)
        assert one.data.dtype == other.data.dtype and (one.data == other.data).all()


def cut(path: Path, to: int) -> Path:
    path.write_bytes(path.read_bytes()[:to])
    return path


def split(count: int, there: int) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        names = [path.parent / f"x-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
        first = write_gguf(names[0], parts=count)
        for other in names[1:there]:
            other.write_bytes(b"GGUF")
        return first

    return make


def counted(path: Path) -> Path:
    """A header that says it holds more than any file could."""
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60))
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


BAD = {
    "another file": (lambda path: written(path, b'{"prompt": "a"}'), "that is no GGUF file"),
    "empty": (lambda path: written(path, b""), "that is no GGUF file"),
    "only its name": (lambda path: written(path, b"GGUF"), "its header cannot be read (EOFError)"),
    "an old version": (lambda path: written(path, b"GGUF" + struct.pack("<IQQ", 1, 0, 0)), "its header cannot be read"),
    "counts without end": (counted, "its header cannot be read (EOFError)"),
    "cut in the header": (lambda path: cut(write_gguf(path), 4000), "its header cannot be read (EOFError)"),
    "cut in the weights": (lambda path: cut(write_gguf(path), 60_000), "60,000 of "),
    "a vocabulary only": (lambda path: written(path, b"GGUF" + struct.pack("<IQQ", 3, 0, 0)), "holds no weights"),
    "a text for a number of parts": (
        lambda path: written(path, b"GGUF" + struct.pack("<IQQQ11sIQ1s", 3, 0, 1, 11, b"split.count", 8, 1, b"2")),
        "holds no weights",
    ),
    "a part missing": (split(3, 2), "1 of them are missing (x-00003-of-00003"),
    "all parts": (split(2, 2), "one of 2 files that hold the model together, which transformers does not read"),
    "an unknown family": (lambda path: write_gguf(path, architecture="nonsense"), "nonsense"),
    "a tensor missing": (
        lambda path: write_gguf(path, without="blk.1.ffn_up.weight"),
        "1 tensor(s) (model.layers.1.mlp",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_line(name: str, tmp_path: Path) -> None:
    make, words = BAD[name]
    path = make(tmp_path / "model.gguf")
    with pytest.raises(UserError) as error:
        load(path)
    assert words in str(error.value) and str(error.value).startswith("student ") and "\n" not in str(error.value)


def test_every_cut_is_noticed(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    for length in (*range(5, 9000, 97), *range(9000, len(whole) - 64, 7919)):  # the last bytes are padding
        assert gguf.wrong_with(written(tmp_path / "cut.gguf", whole[:length])), length


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_missing_package_names_the_extra(file: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else found(name, *rest)
    )
    with pytest.raises(UserError, match=rf"needs {package}: pip install 'retort-distill\[gguf\]'"):
        locate("teacher x", "x", str(file))


def test_no_such_file(tmp_path: Path) -> None:
    for name in (str(tmp_path / "x.gguf"), "models/x.gguf"):  # the hub is not asked for the second
        with pytest.raises(UserError, match="no such file"):
            locate("teacher x", name, None)


def test_a_run_reads_both_models_from_files(file: Path, tmp_path: Path, tiny_run: dict[str, Any]) -> None:
    """Summary, card, export and going on: all of them know the file."""
    teacher = write_gguf(tmp_path / "teacher.gguf", seed=1, rounded="Q4_0", chat=True, rule="qwen2")
    settings = {name: tiny_run[name] for name in ("task", "precision", "device", "checks")}
    settings |= {"eval": {"problems": 0}, "rollout": {"prompts": 4, "max_new_tokens": 6}}
    out, pair = tmp_path / "run", {"student": file, "teacher": teacher}
    distil = partial(retort.distill, quiet=True)
    distil(**pair, method="opd", data=tiny_run["data"], out=out, steps=2, settings=settings)
    card = (out / "model" / "README.md").read_text()
    assert "`tiny.gguf` (" in card and "parameters, quantised to Q8_0 (GGUF))" in card
    assert "quantised to Q4_0 (GGUF))" in card and "license: apache-2.0" in card
    assert (out / "model" / "model.safetensors").is_file()
    assert "quantization" not in (out / "model" / "config.json").read_text()
    assert json.loads((out / "config.json").read_text())["student"] == str(file)
    distil(resume=out, steps=3)
    write_gguf(teacher, seed=2, rounded="Q4_0", chat=True, rule="qwen2")
    with pytest.raises(UserError, match="the teacher's weights"):
        distil(resume=out, steps=4)
