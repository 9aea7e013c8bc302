"""What would fail in the middle or at the end of a run is found before its first step."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from support import make_tokenizer

from retort import config as configuration
from retort.core.sequences import TokenSequence
from retort.errors import UserError
from retort.models.adapter import Adapter
from retort.models.lm import LanguageModel
from retort.models.load import load_model
from retort.models.lora import add_adapter
from retort.models.rehearsal import rehearse_export
from retort.preflight.doctor import examine
from retort.train import runner

MIXTURE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}


def mixture(folder: Path, family: str = "Qwen3Moe") -> Path:
    tokenizer = make_tokenizer()
    ids = {"vocab_size": len(tokenizer), "eos_token_id": 2, "pad_token_id": 1, "bos_token_id": None}
    experts: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
    if family == "Qwen3Moe":
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**MIXTURE, **ids, **experts)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.35)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load(folder: Path) -> LanguageModel:
    return load_model(str(folder), role="student", precision="fp32", device=torch.device("cpu"))


def merged_settings(tiny_run: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return configuration.merge(tiny_run, changes)  # type: ignore[return-value]


@pytest.mark.parametrize("target", ["experts", "mlp", "self_attn"])
def test_what_is_no_single_layer_is_refused_as_a_target(tmp_path: Path, target: str) -> None:
    lm = load(mixture(tmp_path / "student", "Mixtral"))
    with pytest.raises(UserError, match=rf"lora.targets: '{target}' is a Mixtral\w+, no single layer .* all-linear"):
        add_adapter(lm, rank=3, alpha=6.0, targets=["q_proj", target])


@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral"])
def test_an_adapter_on_experts_is_merged_as_it_learnt(tmp_path: Path, family: str) -> None:
    lm = load(mixture(tmp_path / "student", family))
    own = {name: weight.shape for name, weight in lm.weights().items()}
    add_adapter(lm, rank=3, alpha=6.0)
    assert any("experts" in name for name in lm.trainable())
    rehearse_export(lm)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in lm.trainable().values():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    assert lm.adapter is not None
    merged = lm.adapter.merged()
    assert {name: x.shape for name, x in merged.items() if name in own} == own
    lm.model.save_pretrained(tmp_path / "merged", state_dict=merged)
    lm.tokenizer.save_pretrained(tmp_path / "merged")
    again = load(tmp_path / "merged")
    asked = [TokenSequence(torch.randint(5, 50, (20,), generator=draw), torch.arange(20) > 0)]
    with torch.no_grad():
        ours_ND, bare_ND = lm.hidden(asked), lm.bare().hidden(asked)
        torch.testing.assert_close(again.hidden(asked), ours_ND, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(bare_ND, ours_ND, atol=1e-2)
        lm.adapter.save(tmp_path / "adapter")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's, about names of its own
            opened: Any = PeftModel.from_pretrained(load(tmp_path / "student").model, str(tmp_path / "adapter"))
        peft_logits = opened(input_ids=asked[0].tokens_L[None]).logits
        torch.testing.assert_close(
            peft_logits, again.model(input_ids=asked[0].tokens_L[None]).logits, rtol=1e-4, atol=1e-4
        )
    assert lm.adapter.layers
    plain = load(tmp_path / "student")
    assert {name: x.shape for name, x in lm.weights().items()} == {n: x.shape for n, x in plain.weights().items()}


def test_a_mixture_trains_with_an_adapter_to_the_end(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    student = str(mixture(tmp_path / "student"))
    settings = merged_settings(tiny_run, student=student, lora={"rank": 4}, steps=1, eval={"problems": 0})
    run = runner.start(configuration.resolve(settings), tmp_path / "run")
    run.go()
    again, adapter = load(tmp_path / "run" / "model"), run.student.adapter
    assert adapter is not None
    for name, weight in again.model.state_dict().items():
        torch.testing.assert_close(weight, adapter.merged()[name])


def test_what_cannot_be_merged_is_refused_before_the_first_step(
    tiny_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora import Linear

    real = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda layer, name: real(layer, name)[:-1])
    settings = configuration.resolve(merged_settings(tiny_run, lora={"rank": 2}))
    with pytest.raises(UserError, match=r"lora.targets: .*could not be merged"):
        runner.start(settings, tmp_path / "run")
    found = examine(settings, quick=True)
    assert found.verdict == "fatal"


@pytest.mark.parametrize("part", ["model", "tokenizer", "adapter", "conversion"])
def test_what_cannot_be_written_is_refused_before_the_first_step(
    tiny_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    outside = compile("def fail(*args, **more): raise ValueError('not today')", "elsewhere.py", "exec")
    found: dict[str, Any] = {}
    exec(outside, found)
    if part == "adapter":
        monkeypatch.setattr(Adapter, "save", found["fail"])
    elif part == "conversion":
        monkeypatch.setattr("transformers.core_model_loading.revert_weight_conversion", found["fail"])
    else:
        kind = transformers.PreTrainedModel if part == "model" else transformers.PreTrainedTokenizerBase
        monkeypatch.setattr(kind, "save_pretrained", found["fail"])
    settings = configuration.resolve(merged_settings(tiny_run, lora={"rank": 2}))
    with pytest.raises(UserError, match="could not be written at the end: not today"):
        runner.start(settings, tmp_path / "run")


def grown(model_folder: Callable[..., Path], tmp_path: Path, name: str = "grown", seed: int = 1) -> str:
    """A folder whose tokenizer has one token more than its model has rows."""
    import shutil

    folder = tmp_path / name
    shutil.copytree(model_folder(seed=seed), folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(folder)
    return str(folder)


def with_think(prompts_file: Path, tmp_path: Path, column: str | None) -> str:
    rows = [json.loads(line) for line in prompts_file.read_text().splitlines()]
    if column is not None:
        rows[7][column] = f"{rows[7][column]} <think>"
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("column", "method", "who"),
    [
        ("prompt", {"name": "opd"}, "student"),
        ("prompt", {"name": "opd"}, "teacher"),
        ("response", {"name": "gkd", "on_policy_fraction": 0.5}, "student"),
        ("solution", {"name": "opsd"}, "student"),
    ],
)
def test_an_id_without_a_row_is_refused_where_the_data_holds_it(
    model_folder: Callable[..., Path],
    tiny_run: dict[str, Any],
    prompts_file: Path,
    tmp_path: Path,
    column: str,
    method: dict[str, Any],
    who: str,
) -> None:
    alone = method["name"] == "opsd"
    models: dict[str, Any] = {"student": tiny_run["student"], "teacher": None if alone else tiny_run["teacher"]}
    models["student"] = grown(model_folder, tmp_path)
    models["teacher"] = None if alone else grown(model_folder, tmp_path, "other", seed=9)
    if who == "teacher":
        wide = load(Path(models["student"]))
        wide.model.resize_token_embeddings(wide.rows + 1)
        wide.model.save_pretrained(models["student"])
    settings = {**tiny_run, **models, "method": method, "eval": {"problems": 0}}
    fine = configuration.resolve({**settings, "data": with_think(prompts_file, tmp_path, None)})
    vocabulary = examine(fine, quick=True)["vocabulary"]
    assert vocabulary.verdict == "warn"
    assert "hold none" in vocabulary.saw
    bad = configuration.resolve({**settings, "data": with_think(prompts_file, tmp_path, column)})
    with pytest.raises(UserError, match=rf"row '.*': its {column} holds '<think>'"):
        runner.start(bad, tmp_path / "run")
    assert examine(bad, quick=True).verdict == "fatal"


def test_answers_that_grow_past_a_switch_of_the_rotary_factors_are_a_finding(
    tiny_run: dict[str, Any], tmp_path: Path
) -> None:
    tokenizer = make_tokenizer()
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 24}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [1.0, 4.0, 8.0, 16.0]}
    ids = {"vocab_size": len(tokenizer), "eos_token_id": 2, "pad_token_id": 1, "bos_token_id": None}
    torch.manual_seed(0)
    shape = MIXTURE | {"original_max_position_embeddings": 24}
    model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**shape, **ids, rope_parameters=rope))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.5)
    model.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    for longest, verdict in ((6, "ok"), (30, "fatal")):
        rollout = {"max_new_tokens": longest}
        settings = merged_settings(tiny_run, student=str(tmp_path / "student"), rollout=rollout)
        found = examine(configuration.resolve(settings), quick=True)["lengths"]
        assert found.verdict == verdict, found
        assert "24 tokens" in found.saw
