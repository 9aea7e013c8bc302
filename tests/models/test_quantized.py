"""Frozen models in fewer bits: what they say, what is counted of them, and what is refused in a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from retort import api
from retort.core.sequences import TokenSequence
from retort.errors import UserError
from retort.models import quantized
from retort.models.in_memory import InMemoryModel
from retort.models.lm import LanguageModel
from retort.models.load import load_model, refuse_bits
from retort.preflight.rounding import rounding_checks
from retort.preflight.trial import run_trial
from retort.train import runner
from retort.train.models.models import located
from retort.train.output.card import card
from retort.train.output.identity import identity
from retort.train.output.summary import summary
from retort.train.setup.memory import forecast
from retort.train.setup.prepare import prepare

pytest.importorskip("torchao")
pytest.importorskip("bitsandbytes")
BITS: tuple[quantized.Bits, ...] = (8, 4)


def loaded(folder: Path, bits: quantized.Bits | None = None) -> LanguageModel:
    return load_model(str(folder), role="teacher", precision="fp32", device=torch.device("cpu"), bits=bits)


@pytest.fixture(scope="module")
def folder() -> Path:
    """A trained model: of random weights no bit would be missed. And wide enough for the kernels of four bits."""
    return Path(located("countdown:teacher"))


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[quantized.Bits | None, LanguageModel]:
    return {bits: loaded(folder, bits) for bits in (None, *BITS)}


def texts() -> list[TokenSequence]:
    return [TokenSequence.of([5 + n]).then([9, 12 + n, 7, 20][: 2 + n], decided=True) for n in range(3)]


def logp(lm: LanguageModel, sequences: list[TokenSequence]) -> torch.Tensor:
    return lm.head().logits(lm.all_hidden(sequences, 64)).log_softmax(-1)


def test_it_says_nearly_what_the_whole_model_says(models: dict[Any, LanguageModel]) -> None:
    whole = logp(models[None], texts())
    noise = {bits: float((whole.exp() * (whole - logp(models[bits], texts()))).sum(-1).mean()) for bits in BITS}
    assert 0 < noise[8] < noise[4] / 10, "each bit less is felt"
    assert noise[4] < 0.05


@pytest.mark.parametrize("bits", BITS)
def test_a_token_does_not_depend_on_what_is_computed_with_it(models: dict[Any, LanguageModel], bits: Any) -> None:
    together = logp(models[bits], texts())
    alone = torch.cat([logp(models[bits], [text]) for text in texts()])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert models[bits].packs == models[None].packs


@pytest.mark.parametrize("bits", BITS)
def test_it_is_counted_as_what_it_is(models: dict[Any, LanguageModel], folder: Path, bits: Any) -> None:
    lm, whole = models[bits], models[None]
    assert (lm.parameters, lm.device) == (whole.parameters, whole.device)
    assert lm.rounded.startswith(f"rounded to {bits} bits when loaded")

    def layers(own: LanguageModel) -> int:
        named = [p for name, p in own.model.named_parameters() if "proj" in name]
        return sum(part.numel() * part.element_size() for p in named for part in quantized.plain(p))

    assert layers(lm) < layers(whole) * (bits / 32) * 1.4, "codes, and some scales"
    assert torch.equal(lm.head().weight_VD, whole.head().weight_VD), "the head is whole"
    assert lm.digest() == loaded(folder, bits).digest() != whole.digest()
    assert not any(p.requires_grad for p in lm.model.parameters())


def test_what_cannot_be_rounded_is_refused_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="student x: bits = 8 is for frozen models, and the student learns"):
        refuse_bits("student x", 8, "student", "x")
    file = tmp_path / "x.gguf"
    file.touch()
    with pytest.raises(UserError, match="bits = 4 is for whole weights, and a GGUF file has its own"):
        refuse_bits("teacher x", 4, "teacher", str(file))
    held = InMemoryModel(None, None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="bits = 8 is for models in a folder"):
        refuse_bits("teacher x", 8, "teacher", held)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs torchao and accelerate: pip install 'retort-distill\[quantized\]'"):
        quantized.need(8, "teacher x")


def test_a_run_with_a_rounded_teacher_says_so_everywhere_and_resumes(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    settings = {**tiny_run, "models": {"teacher": {"bits": 8}}, "steps": 2}
    setup, whole = prepare(api.assemble(settings)), prepare(api.assemble(tiny_run))
    assert "rounded to 8 bits when loaded" in summary(setup)["teacher"]
    assert "rounded to 8 bits when loaded" in card(setup, {}, 1)
    assert forecast(setup).models < forecast(whole).models
    found = rounding_checks(setup, run_trial(setup))
    assert [check.name for check in found] == ["rounding of the teacher"]
    assert 0 < dict(found[0].values)["rounding"] < 1e-2 and "in 8 bits the teacher is" in found[0].saw
    assert rounding_checks(whole, run_trial(whole)) == []
    digests = [identity(one)["digests"]["the teacher's weights"] for one in (setup, whole)]
    assert digests[0] != digests[1]
    run = runner.start(api.assemble(settings), tmp_path / "run")
    run.go()
    from retort import config as configuration

    again = configuration.read_json(tmp_path / "run" / "config.json")
    assert again.models["teacher"].bits == 8 and again.teacher == tiny_run["teacher"]
    rows = runner.resume(tmp_path / "run", steps=3).go().metrics
    assert [row["step"] for row in rows] == [1, 2, 3]
    with pytest.raises(UserError, match="student .*: bits = 8 is for frozen models"):
        prepare(api.assemble({**tiny_run, "models": {"student": {"bits": 8}}}))
    with pytest.raises(UserError, match="models.teacher.bits: Input should be 8 or 4"):
        api.assemble({**tiny_run, "models": {"teacher": {"bits": 2}}})
