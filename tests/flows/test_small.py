"""Small velocity models: their schedule, their words, and folders that are damaged, foreign or hostile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from retort.errors import UserError
from retort.flows.small import SmallConfig, SmallFlow
from retort.flows.small_net import SmallNet

CONFIG = SmallConfig(latent_shape=(3, 8, 8), words=("a", "ring"), width=8, layers=1, heads=2, shift=3.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    SmallFlow.new(CONFIG, seed=0).save(tmp_path / "flow")
    return tmp_path / "flow"


def changed(folder: Path, **settings: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings), encoding="utf-8")
    return folder


def test_new_weights_come_from_the_seed_alone() -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    one, same, other = (SmallFlow.new(CONFIG, seed).module.state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["patch_in.weight"], other["patch_in.weight"])


def test_the_shift_moves_steps_to_high_noise() -> None:
    flow = SmallFlow.new(CONFIG, 0)
    even = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0], dtype=torch.float64)
    torch.testing.assert_close(flow.sigmas(4), 3 * even / (1 + 2 * even))
    assert flow.identity == {"architecture": "small flow, latents 3 x 8 x 8", "schedule": "linear, shift 3"}


def test_patches_are_put_together_as_they_were_cut() -> None:
    """With a network that hands its patches on, the latent comes out as it went in."""
    config = SmallConfig(latent_shape=(2, 4, 8), words=("a",), patch=2, width=8, layers=1, heads=1)
    net = SmallNet(config)
    width, values = config.width, config.patch_values
    assert (config.patches, values) == (8, width)
    with torch.no_grad():
        for layer in (net.patch_in, net.patch_out):
            layer.weight.copy_(torch.eye(width))
            layer.bias.zero_()
        net.position.zero_()
        latents = torch.randn(2, 2, 4, 8, generator=torch.Generator().manual_seed(0))
        out = net(latents, torch.ones(2), torch.zeros(2, 1))
        # Each patch, of one row and column for both channels, is normalised over its 8 values.
        cut = latents.reshape(2, 2, 2, 2, 4, 2).permute(0, 2, 4, 1, 3, 5)
        again = out.reshape(2, 2, 2, 2, 4, 2).permute(0, 2, 4, 1, 3, 5)
    expected = torch.nn.functional.layer_norm(cut.flatten(3), (8,), eps=1e-6)
    torch.testing.assert_close(again.flatten(3), expected)


def test_the_order_of_words_does_not_matter_and_their_number_does() -> None:
    flow = SmallFlow.new(CONFIG, 0)
    assert flow.condition(["ring a", "a ring", "a a", ""]).tensors["words"].tolist() == [[1, 1], [1, 1], [2, 0], [0, 0]]


def test_an_unknown_word_is_named() -> None:
    flow = SmallFlow.new(CONFIG, 0)
    with pytest.raises(
        UserError, match=r"prompt 'a rign': this model does not know the word 'rign'; did you mean 'ring'"
    ):
        flow.condition(["a ring", "a rign"])
    with pytest.raises(UserError) as caught:
        flow.condition(["a \x1b[31m" + "x" * 900])
    assert len(str(caught.value)) < 400 and "\x1b" not in str(caught.value)


def test_weights_may_be_stored_shorter_and_open_as_fp32(folder: Path, tmp_path: Path) -> None:
    flow = SmallFlow.open(folder)
    flow.save(tmp_path / "short", dtype=torch.bfloat16)
    again = SmallFlow.open(tmp_path / "short").module.state_dict()
    for name, own in flow.module.state_dict().items():
        assert again[name].dtype == torch.float32
        assert torch.equal(again[name], own.bfloat16().float())
    assert all(own.requires_grad for own in SmallFlow.open(folder).module.parameters())


def test_float64_stays(folder: Path, tmp_path: Path) -> None:
    flow = SmallFlow.open(folder)
    flow.module.double()
    flow.save(tmp_path / "long")
    assert next(SmallFlow.open(tmp_path / "long").module.parameters()).dtype == torch.float64


BAD_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "a later format": ({"retort_flow": 2}, "retort_flow: "),
    "huge": ({"width": 10**9}, "width: "),
    "many layers": ({"layers": 10**9}, "layers: "),
    "two axes": ({"latent_shape": [3, 8]}, "latent_shape must be"),
    "negative": ({"latent_shape": [3, -8, 8]}, "latent_shape must be"),
    "no fit": ({"patch": 3}, "patch must divide"),
    "heads": ({"heads": 3}, "multiple of heads"),
    "twice": ({"words": ["a", "a"]}, "a word is there twice"),
    "another kind": ({"shift": "3"}, "shift: "),
    "surplus": ({"hidden_size": 8}, "hidden_size: "),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_settings_that_are_wrong_are_named(folder: Path, name: str) -> None:
    settings, words = BAD_SETTINGS[name]
    with pytest.raises(UserError) as caught:
        SmallFlow.open(changed(folder, **settings))
    message = str(caught.value)
    assert words in message and "config.json" in message and "\n" not in message


def test_sizes_are_compared_before_weights_are_read(folder: Path) -> None:
    """A config.json that asks for gigabytes beside a small file is refused without them."""
    with pytest.raises(UserError, match=r"missing|by config.json"):
        SmallFlow.open(changed(folder, width=2048, layers=48, mlp=8))


def test_other_files_are_refused(folder: Path) -> None:
    config, weights = folder / "config.json", folder / "model.safetensors"
    whole = weights.read_bytes()
    cases = {
        "damaged one": whole[: len(whole) // 2],
        "no safetensors file": b"x" * 200,
        "no safetensors": b"",
    }
    for words, content in cases.items():
        weights.write_bytes(content)
        with pytest.raises(UserError, match=words.split()[-1]) as caught:
            SmallFlow.open(folder)
        assert "\n" not in str(caught.value)
    weights.unlink()
    with pytest.raises(UserError, match=r"model.safetensors: missing"):
        SmallFlow.open(folder)
    config.write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match=r"no 'retort_flow' in it"):
        SmallFlow.open(folder)
    config.write_text("{")
    with pytest.raises(UserError, match="no JSON"):
        SmallFlow.open(folder)
    config.write_text("[" * 100_000)
    with pytest.raises(UserError, match="no JSON"):
        SmallFlow.open(folder)
    config.write_text(" " * 1_000_001)
    with pytest.raises(UserError, match="longer than"):
        SmallFlow.open(folder)
    with pytest.raises(UserError, match="cannot be read"):
        SmallFlow.open(folder / "nowhere")


def test_tensors_of_another_model_are_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    own = load_file(file)
    cases = {
        "'patch_out.bias' is missing": {name: value for name, value in own.items() if name != "patch_out.bias"},
        "'lora' is in it, but not in": {**own, "lora": torch.zeros(1)},
        r"'patch_in.bias' is \(7,\), and \(8,\) by": {**own, "patch_in.bias": torch.zeros(7)},
        "no finite number": {**own, "patch_in.bias": torch.full((8,), float("nan"))},
        r"no finite number \(torch.int64\)": {**own, "patch_in.bias": torch.zeros(8, dtype=torch.int64)},
    }
    for words, tensors in cases.items():
        save_file(tensors, file)
        with pytest.raises(UserError, match=words):
            SmallFlow.open(folder)
