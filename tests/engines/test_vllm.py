"""A teacher behind a real vLLM server: its numbers are those of the same model in this process, and runs learn from it.

The model is the bundled teacher of countdown. One server has vLLM's usual limit of 20 log-probs, one has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engines.vllm import serving

from retort import config as configuration
from retort.align.pair import SameIds
from retort.core.needs import DENSE, ENTROPY, SAMPLED, Need, logp_at
from retort.core.rollouts import Group, Message, Pack, Prompt, Rollout, in_groups
from retort.core.sequences import TokenSequence
from retort.errors import UserError
from retort.models.endpoint import Endpoint, EndpointModel
from retort.models.load import load_model
from retort.tasks import countdown
from retort.teachers.base import ScoreRequest
from retort.teachers.endpoint import EndpointTeacher
from retort.teachers.local import LocalTeacher
from retort.teachers.view import View
from retort.train import runner
from retort.wire import Client

pytestmark = pytest.mark.engines

VOCAB = 266
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with serving(countdown.teacher_path(), tmp_path_factory.mktemp("vllm") / "server", 20, -1) as (some, whole):
        yield {"some": some, "whole": whole}


@pytest.fixture(scope="module")
def lm() -> Any:
    return load_model(str(countdown.teacher_path()), role="teacher", precision="fp32", device=torch.device("cpu"))


@pytest.fixture(scope="module")
def models(servers: dict[str, str], lm: Any) -> dict[str, EndpointModel]:
    clients = {name: Client(url, patience=5) for name, url in servers.items()}
    sources = {name: Endpoint.at(client, None, "", same=True) for name, client in clients.items()}
    return {name: source.open(lm.tokenizer, lm.stops) for name, source in sources.items()}


def groups(lm: Any) -> list[Group]:
    """Answers of several lengths, the longest as long as the server's context allows."""
    asked = Prompt("p", (Message("user", "1 2 3 4 = 10"),))
    draw = torch.Generator().manual_seed(0)
    made = [torch.randint(2, VOCAB, (length,), generator=draw).tolist() for length in (1, 7, 40)]
    return in_groups(
        [
            Rollout(asked, TokenSequence.of([2]).then([*own, lm.stops.primary], decided=True), member=member)
            for member, own in enumerate(made)
        ]
    )


def test_what_vllm_offers(models: dict[str, EndpointModel]) -> None:
    some, whole = (models[name].server.offers for name in ("some", "whole"))
    assert (some.form, some.top, some.whole, some.context) == ("prompt_logprobs", 20, None, 63)
    assert (whole.form, whole.whole, whole.context) == ("prompt_logprobs", VOCAB, 63)
    assert some.at >= 20
    assert not any("does not say how it tokenizes" in note for note in models["some"].notes)


@pytest.mark.parametrize("name", ["some", "whole"])
def test_its_numbers_are_those_of_the_model_in_this_process(
    models: dict[str, EndpointModel], lm: Any, name: str
) -> None:
    alignment = SameIds(VOCAB)
    near = LocalTeacher(lm, alignment=alignment, batch_tokens=4096)
    far = EndpointTeacher(models[name], alignment=alignment, batch_tokens=4096)
    asked, steps = groups(lm), sum(own.steps for group in groups(lm) for own in group)
    draw = torch.Generator().manual_seed(1)
    ids_NK = torch.stack([torch.randperm(VOCAB, generator=draw)[:20] for _ in range(steps)])
    dense = near.score(asked, ScoreRequest(View(), frozenset({DENSE}))).rows(slice(None))
    needs = frozenset({SAMPLED, Need("topk", 16), replace(ENTROPY, or_bound=True), logp_at(20)})
    said = far.score(asked, ScoreRequest(View(), needs, 1.0, ids_NK))
    said.check_tokens(Pack.of([own for group in asked for own in group]).steps.tokens_N)
    rows = said.rows(slice(None), VOCAB)
    torch.testing.assert_close(rows.sampled_logp_N, dense.sampled_logp_N, **CLOSE)
    torch.testing.assert_close(rows.topk(16)[1], dense.topk(16)[1], **CLOSE)
    torch.testing.assert_close(rows.logp_at(ids_NK), dense.logp_at(ids_NK), **CLOSE)
    assert bool((rows.entropy_bound_N <= dense.entropy_N + 1e-4).all())
    if name == "whole":
        torch.testing.assert_close(rows.entropy_N, dense.entropy_N, **CLOSE)
        warm = far.score(asked, ScoreRequest(View(), frozenset({SAMPLED}), 0.7)).rows(slice(None))
        expected = near.score(asked, ScoreRequest(View(), frozenset({SAMPLED}), 0.7)).rows(slice(None))
        torch.testing.assert_close(warm.sampled_logp_N, expected.sampled_logp_N, **CLOSE)


def test_the_older_form_says_the_same(models: dict[str, EndpointModel], lm: Any) -> None:
    """`echo` and `logprobs`, as servers have them that know no `prompt_logprobs`."""
    own = models["some"]
    server = type(own.server)(own.server.client, replace(own.server.offers, form="echo"))
    both = [
        EndpointTeacher(model, alignment=SameIds(VOCAB), batch_tokens=4096)
        for model in (own, replace(own, server=server))
    ]
    needs = frozenset({SAMPLED, Need("topk", 5)})
    first, second = (one.score(groups(lm), ScoreRequest(View(), needs)).rows(slice(None)) for one in both)
    torch.testing.assert_close(first.sampled_logp_N, second.sampled_logp_N, rtol=0, atol=1e-5)
    torch.testing.assert_close(first.topk(5)[1], second.topk(5)[1], rtol=0, atol=1e-5)


BUILTIN = {"student": "countdown:student", "data": "countdown"}
RUNS: list[tuple[str, str, dict[str, Any]]] = [
    ("some", "opd", {}),
    ("some", "eopd", {"entropy_bound": "use"}),
    ("some", "vopd", {}),
    ("whole", "eopd", {}),
    ("whole", "gkd", {"on_policy_fraction": 1.0}),
    ("whole", "vopd", {"top_k": None}),
]


@pytest.mark.parametrize(("name", "method", "given"), RUNS, ids=[f"{method}-{name}" for name, method, _ in RUNS])
def test_a_run_learns_what_it_learns_from_the_same_teacher_here(
    servers: dict[str, str], tmp_path: Path, name: str, method: str, given: dict[str, Any]
) -> None:
    settings: dict[str, Any] = {
        **BUILTIN,
        "method": {"name": method, **given},
        "steps": 2,
        "precision": "fp32",
        "device": "cpu",
        "attention": "eager",
        "rollout": {"prompts": 8, "max_new_tokens": 12},
        "optimizer": {"learning_rate": 1e-4},
        "eval": {"problems": 0},
    }
    far, near = (
        runner.start(configuration.resolve(settings, {"teacher": teacher}), tmp_path / str(place)).go()
        for place, teacher in enumerate((servers[name], "countdown:teacher"))
    )
    exact = method != "eopd" or name == "whole"  # a gate by a bound opens more rarely
    if exact:
        assert [row["loss"] for row in far.metrics] == pytest.approx([row["loss"] for row in near.metrics], abs=1e-4)
    else:
        assert far.metrics[0]["gate_open_fraction"] <= near.metrics[0]["gate_open_fraction"]
        assert "teacher_entropy_bound" in far.metrics[0]
    kl = "reverse_kl"
    assert far.metrics[0][kl] == pytest.approx(near.metrics[0][kl], abs=1e-4)


def test_what_the_server_does_not_give_is_refused_before_the_run(servers: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'gkd' needs the whole distribution.*methods that it serves: .*opd"):
        settings = {
            **BUILTIN,
            "teacher": servers["some"],
            "method": {"name": "gkd", "on_policy_fraction": 1.0},
            "steps": 1,
        }
        runner.start(configuration.resolve(settings, {"eval": {"problems": 0}}), tmp_path / "run").go()
    assert not (tmp_path / "run").exists()
