"""What every method of tokens promises: on a toy model in float64, and through the pipeline of a run.

What is true of methods of either kind of step is asked of all that are registered; `test_contract_latents.py` has what
is true of those that teach denoising steps.
"""

import doctest
import inspect
import json
import math
import re
from pathlib import Path
from typing import Any

import pipeline
import pytest
import torch
from torch import Tensor
from toy import Toy

import retort.methods
from retort import config as configuration
from retort import registry
from retort.core.head import Head
from retort.core.needs import can_meet
from retort.core.signals import Dense, TeacherSignal
from retort.errors import UserError
from retort.functional import linear_token_losses, token_losses
from retort.loss.terms import check_needs, wanted
from retort.teachers.local import reduced
from retort.train import runner
from retort.train.storage import checkpoint

pytestmark = pytest.mark.usefixtures("images_as_text")

NAMES = registry.for_tokens()
#: Also those that only a flow model can learn by.
EVERY = registry.names()
#: Methods whose loss is not 0 at student == teacher, and why.
NOT_ZERO = {
    **dict.fromkeys(("cl_egrsd", "egrsd", "rlsd", "ropd"), "the reward gives the direction, whatever the teacher says"),
    "atod": "the reward has a term of its own",
    "sod": "the reward has a term of its own",
    "dasd": "its advantage holds the verifier's, whatever the teacher says",
    "eopd": "the forward term's minimum is the truncated teacher: its value there is -ln of the top-k mass",
    "lgr": "its reward is for what the teacher says one token later",
    "unisd": "a wrong demonstration that says the same is not a margin away",
    "uni_opd": "right rollouts are moved up and wrong ones down where the teacher prefers neither",
}


#: Methods whose weights are decided by a whole batch, so that halves of it are other batches, and why.
WHOLE_BATCH = {
    "sdft": "the first tokens of half an answer are not those of the answer, and are not in the denominator",
    "pw_opsd": "a relative position in half an answer is another one",
    "rlsd": "rewards are whitened over a group, which a half may cut",
    "ropd": "as rlsd",
    "sod": "as rlsd, and a half may end within a turn",
    "atod": "as sod",
    "egrsd": "entropies are divided by the largest of the batch, and answers longer than all others earn no bonus",
    "cl_egrsd": "as egrsd",
    "dasd": "a rollout's entropies are compared with one another, and a half may end within it",
    "dopd": "its regimes begin at means over the batch",
    "sead": "its zones are shares of the batch; a run's micro-batches, below, share them",
    "unisd": "disagreement is over a quantile of the batch's, and a half is divided by its own rollouts",
    "uni_opd": "a half is divided by its own rollouts, and has other groups",
    "topd": "returns are normalised over a prompt, and a half may end within a completion",
    "tropd": "its draws are keyed by the place in the answer",
    "va_opd": "siblings are compared, and a half may end within a rollout",
    **dict.fromkeys(("mad_opd", "mt_opd", "opad"), "a half is divided by its own rollouts"),
}

#: Further settings in which a step is checked through the pipeline of a run: those with something of the whole batch.
STEPS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in NAMES),
    ("sead", {"scope": "rollout"}),
    ("opd", {"correction": "sequence", "samples": 2}),
    ("topd", {"normalise": False}),
    ("sdpo", {"distillation_weight": 0.5}),
    ("peer_opd", {"reduction": "rollout_sums"}),
    ("cl_egrsd", {"baseline": "group", "length_bonus": 0.0, "scale": "smoothed", "samples": 2}),
    ("local_teachability", {"max_segment": 1, "shortest": 1, "divide_by": "kept"}),
    # Longer segments: with those of one token this loss nearly cancels, and fp32 leaves it fewer than five digits.
    ("local_teachability", {"max_segment": 4, "shortest": 1}),
    ("opct", {"discount": 0.9}),
    ("opsd", {"top_k": 4, "teacher_weight": 0.5}),
    ("tcod", {"reduction": "turns", "kl": "forward"}),
    ("uni_opd", {"calibration": "mask", "balance_scope": "batch", "margin_over": "kept"}),
    ("unisd", {"preset": "sequence_agreement", "cap_quantile": 0.9, "divergence_coef": 2.0}),
    ("unisd", {"preset": "matching_only"}),
]
#: Methods that remember something from batch to batch, in settings in which three batches move it.
STATEFUL: dict[str, dict[str, Any]] = {
    "arkd": {"on_policy_fraction": 0.5},
    "cl_egrsd": {},
    "decoupled_kl": {"lengths": [2, 4, 6], "probe_every": 1},
    "sdft": {},
    "egrsd": {},
    "peer_opd": {},
    "sdpo": {},
    "skew_kl": {"validate_every": 1},
    "unisd": {"update_every": 1},
}


#: Methods whose loss is 0 but for rounding, whatever its gradient, and why; their gradients are compared as all are.
CANCELS = {"topd": "normalised advantages add up to 0"}
#: What is left of their loss: terms around 1 are fp32, each rounded by half of its last place at most.
ROUNDED = torch.finfo(torch.float32).eps / 2

#: Methods that look at the order of a rollout's tokens, which is not to be shuffled then.
IN_ORDER: dict[str, str] = {
    "cl_egrsd": "its gate looks a few tokens ahead",
    "pw_opsd": "it weighs by the place in the answer",
    "sdft": "the first tokens of an answer are left out",
    "topd": "its returns are of what follows",
    "tropd": "its draws are keyed by the place in the answer",
}


@pytest.mark.parametrize("name", NAMES)
def test_zero_when_student_equals_teacher(name: str) -> None:
    toy = Toy()
    losses = toy.losses(registry.load(name), same=True)
    if name in NOT_ZERO:
        # Advantages of a group add up to 0, and so may their loss, but not its gradient.
        gradient = max(float(gradient.abs().max()) for gradient in toy.gradients(losses.loss))
        assert max(abs(losses.loss.item()), gradient) > 1e-6, f"{name} is 0 after all: {NOT_ZERO[name]}?"
        return
    assert losses.loss.abs().item() < 1e-12
    for gradient in toy.gradients(losses.loss):
        assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk", [1, 5, 36, 64])
def test_chunked_equals_dense_in_value_and_gradient(name: str, chunk: int) -> None:
    toy, method = Toy(), registry.load(name)
    mask = torch.rand(len(toy.tokens), generator=torch.Generator().manual_seed(1)) > 0.3
    dense = toy.losses(method, mask=mask, old_logp=toy.old)
    linear = toy.linear(method, mask=mask, old_logp=toy.old, chunk=chunk)
    torch.testing.assert_close(linear.loss, dense.loss, rtol=1e-12, atol=1e-12)
    for term, values in dense.terms.items():
        torch.testing.assert_close(linear.terms[term].value, values.value, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(linear.terms[term].weight, values.weight, rtol=1e-12, atol=1e-12)
        assert torch.equal(linear.terms[term].counted, mask)
    for ours, theirs in zip(toy.gradients(linear.loss), toy.gradients(dense.loss), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_reaches_the_teacher_or_the_weights(name: str) -> None:
    toy, method = Toy(), registry.load(name)
    losses = toy.losses(method)
    frozen = toy.frozen(method)
    if frozen:  # a method of rewards alone asks no teacher
        assert torch.autograd.grad(losses.loss, frozen, allow_unused=True) == (None,) * len(frozen)
    assert all(not term.weight.requires_grad for term in losses.terms.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_is_a_slice(name: str) -> None:
    toy, method = Toy(), registry.load(name)
    mask = torch.arange(len(toy.tokens)) % 3 != 0
    poisoned = toy.logits.detach().clone()
    poisoned[~mask] = math.nan
    whole = toy.losses(method, mask=mask, student_logits=poisoned)
    sliced = toy.losses(method, mask.nonzero().squeeze(-1))
    torch.testing.assert_close(whole.loss, sliced.loss, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_order_and_micro_batches_do_not_matter(name: str) -> None:
    toy, method = Toy(), registry.load(name)
    order = torch.randperm(len(toy.tokens), generator=torch.Generator().manual_seed(2))
    if name in IN_ORDER:
        order = torch.cat([(toy.rollouts == rollout).nonzero().squeeze(-1) for rollout in (3, 0, 4, 2, 1)])
    whole = toy.losses(method)
    moved = toy.losses(method, order)
    torch.testing.assert_close(whole.loss, moved.loss, rtol=1e-12, atol=1e-13)
    if name in WHOLE_BATCH:
        return
    halves = [torch.arange(0, 20), torch.arange(20, len(toy.tokens))]
    parts = [toy.losses(method, half).loss * len(half) / len(toy.tokens) for half in halves]
    torch.testing.assert_close(whole.loss, torch.stack(parts).sum(), rtol=1e-12, atol=1e-13)


LIMITS = [(name, place) for name in NAMES for place in range(len(registry.load(name).limits))]


@pytest.mark.parametrize(("name", "place"), LIMITS)
def test_limits_hold_in_value_and_gradient(name: str, place: int) -> None:
    toy = Toy()
    limit = registry.load(name).limits[place]
    other, settings = limit.equals
    ours = toy.losses(registry.load(name, **limit.settings), old_logp=toy.old)
    theirs = toy.losses(registry.load(other, **settings), old_logp=toy.old)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-13, atol=1e-13)
    for one, two in zip(toy.gradients(ours.loss), toy.gradients(theirs.loss), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_needs_are_sufficient(name: str) -> None:
    """The smallest signal that answers the declared needs gives the very same loss as the whole distribution."""
    toy, method = Toy(), registry.load(name)
    small: dict[str, TeacherSignal] = {}
    for view in method.views:
        hidden, head = toy.view(view)
        whole = Dense.of(hidden @ head.T, toy.tokens, temperature=method.temperature, hidden_ND=hidden)
        needs = method.needs(view)
        k = max((need.k for need in needs if need.kind == "logp_at"), default=0)
        ids_NK = toy.logits.detach().div(method.temperature).topk(min(k, toy.vocab)).indices if k else None
        kinds = {need.kind for need in needs}
        small[view] = toy.ahead(needs, reduced(whole, needs, ids_NK) if kinds.isdisjoint({"dense", "spans"}) else whole)
    if all(isinstance(signal, Dense) for signal in small.values()):
        pytest.skip("needs the whole distribution")
    ours = toy.losses(method, teacher_logits=small.pop("teacher", None), extra_views=small)
    torch.testing.assert_close(ours.loss, toy.losses(method).loss, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_needs_are_minimal(name: str) -> None:
    """A teacher that lacks any one of the needs is refused, by name, before anything is computed."""
    method = registry.load(name)
    able = dict.fromkeys(method.views, frozenset({"dense", "hidden", "lookahead"}))
    for view in method.views:
        for need in method.needs(view):
            lacking = frozenset(other.kind for other in method.needs(view) if other.kind != need.kind)
            if can_meet(lacking, need):
                continue  # another need implies it
            with pytest.raises(UserError, match=f"method '{name}' needs"):
                check_needs(method, {**able, view: lacking})  # type: ignore[arg-type]
        if not method.needs(view):
            continue
        with pytest.raises(UserError, match="was not given"):
            check_needs(method, {other: kinds for other, kinds in able.items() if other != view})  # type: ignore[arg-type]
    check_needs(method, able)  # type: ignore[arg-type]
    assert method.needs() <= wanted(method, "teacher", frozenset({"dense"}))


def test_a_teacher_of_sampled_log_probs_serves_opd_and_no_other() -> None:
    sampled = {"teacher": frozenset({"sampled"})}
    check_needs(registry.load("opd"), sampled)  # type: ignore[arg-type]
    for name in ("eopd", "gkd", "vopd"):
        with pytest.raises(UserError, match="gives only: sampled"):
            check_needs(registry.load(name), sampled)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", EVERY)
def test_one_file_one_function_all_defaults(name: str) -> None:
    build = registry.builder(name)
    assert build.__name__ == name
    for parameter in inspect.signature(build).parameters.values():
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert parameter.default is not inspect.Parameter.empty
        assert registry.described(name).get(parameter.name), f"{name}: {parameter.name} is not documented"
    made = registry.load(name)
    assert made.paper is not None
    assert made.summary.endswith(".")
    assert made.settings == registry.defaults(name)
    source = inspect.getsource(inspect.getmodule(build))  # type: ignore[arg-type]
    assert len(source.splitlines()) <= 120


#: What the example of each method follows, as a reader is told.
BEFORE = doctest.script_from_examples(retort.methods.__doc__ or "")


def examples(name: str) -> list[doctest.Example]:
    return doctest.DocTestParser().get_examples(registry.builder(name).__doc__ or "", name)


def complaints(name: str, found: list[doctest.Example]) -> str:
    """What differs between what examples show and what they print."""
    names: dict[str, object] = {}
    exec(BEFORE, names)
    said: list[str] = []
    doctest.DocTestRunner(verbose=False).run(doctest.DocTest(found, names, name, None, 0, None), out=said.append)
    return "".join(said)


@pytest.mark.parametrize("name", EVERY)
def test_the_example_in_the_docstring_is_right(name: str) -> None:
    found = examples(name)
    assert any(name in example.source for example in found), "the docstring has no example that makes the method"
    assert any(re.search(r"\d", example.want) for example in found), "the example shows no number"
    assert complaints(name, found) == ""


def test_no_two_methods_have_the_same_example() -> None:
    plain = {name: "".join(one.source.replace(name, "") for one in examples(name)) for name in EVERY}
    assert len(set(plain.values())) == len(plain)


def test_a_wrong_number_in_an_example_is_noticed() -> None:
    found = examples("opd")
    found[-1].want = "tensor(-0.4800)\n"
    assert "-0.4700" in complaints("opd", found)


def test_paper_defaults() -> None:
    """Pinned: the defaults are the papers'."""
    assert registry.defaults("eopd") == {
        "entropy_threshold": 0.8,
        "entropy_bound": "refuse",  # no paper's: what to do with a bound in place of the entropy
        "top_k": 16,
        "forward_coef": 1.0,
        "clip": 0.2,
        "samples": 1,
        "temperature": 1.0,
        "top_p": 1.0,
    }
    corrections = dict.fromkeys(("correction", "correction_low", "correction_high"))
    assert registry.defaults("opd") == {"coef": 1.0, "clip": None, "samples": 1, "temperature": 1.0, **corrections}
    assert registry.defaults("vopd") == {"top_k": 20, "baseline_coef": 1.0, "samples": 1, "temperature": 1.0}
    assert registry.defaults("gkd") == {
        "divergence": "jsd",
        "teacher_weight": 0.5,
        "on_policy_fraction": 0.5,
        "samples": 1,
        "temperature": 0.9,
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"entropy_treshold": 1.0}, "did you mean 'entropy_threshold'"),
        ({"top_k": "many"}, "method.top_k"),
        ({"top_k": 0}, "at least 1"),
        ({"clip": -1.0}, "clip must be positive"),
        ({"samples": 0}, "samples must be at least 1"),
    ],
)
def test_bad_settings_are_one_clear_line(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        registry.load("eopd", **settings)
    assert "\n" not in str(caught.value)


def test_unknown_method_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'eopd'"):
        registry.load("eodp")


def test_head_transformations_are_honoured() -> None:
    toy = Toy()
    bias = torch.linspace(-1, 1, 23, dtype=torch.float64)
    head = Head(toy.head, bias, scale=0.5, soft_cap=3.0)
    products = torch.tanh(0.5 * (toy.hidden @ toy.head.T + bias) / 3.0) * 3.0
    linear = linear_token_losses(
        "eopd",
        student_hidden=toy.hidden,
        student_head=head,
        teacher_hidden=toy.teacher_hidden,
        teacher_head=toy.teacher_head,
        tokens=toy.tokens,
        chunk=7,
    )
    dense = token_losses("eopd", student_logits=products, teacher_logits=toy.teacher_logits, tokens=toy.tokens)
    torch.testing.assert_close(linear.loss, dense.loss)
    for ours, theirs in zip(toy.gradients(linear.loss), toy.gradients(dense.loss), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_a_wider_teacher_gives_its_padding_no_probability(name: str) -> None:
    toy, method = Toy(), registry.load(name)
    torch.testing.assert_close(toy.losses(method, padded=9).loss, toy.losses(method).loss)


@pytest.mark.parametrize(("name", "given"), STEPS, ids=["-".join([name, *given]) for name, given in STEPS])
def test_packs_and_micro_batches_give_what_padding_gives(
    name: str, given: dict[str, Any], tiny_run: dict[str, Any]
) -> None:
    """Ragged answers and episodes in one pack, in a few and one by one: loss and gradient are those of padded rows.

    To fp32's rounding, in which values are stored between passes and the tiny models' norms compute.
    """
    setup = pipeline.prepared(tiny_run, name, **given)
    assert setup.student.packs
    assert setup.student.shared_prefixes
    pack = pipeline.ragged(setup, pipeline.TURNS)
    plain = pipeline.by_padding(setup, pack)
    largest = max(float(gradient.abs().max()) for gradient in plain.gradients.values())
    assert largest > 0
    cuts = set[int]()
    for batch_tokens in (10**6, 20, 1):
        cuts.add(len(setup.student.batches([r.sequence for r in pack.rollouts], batch_tokens)))
        # The second update is against what the score pass stored, by a student that has not moved.
        for step in pipeline.as_run(setup, pack, batch_tokens):
            assert step.loss == pytest.approx(plain.loss, rel=1e-5, abs=ROUNDED if name in CANCELS else None)
            assert step.gradients.keys() == plain.gradients.keys()
            for parameter, gradient in step.gradients.items():
                torch.testing.assert_close(gradient, plain.gradients[parameter], rtol=1e-5, atol=2e-6 * largest)
    assert {1, len(pack.rollouts)} < cuts, "all, some, and one at a time"


@pytest.mark.parametrize("name", NAMES)
@pipeline.models_once()
def test_state_survives_save_and_load(name: str, tiny_run: dict[str, Any], tmp_path: Path) -> None:
    """Two steps, a checkpoint, a third step; and that third step again by a run that loads the checkpoint."""
    sections: dict[str, Any] = {
        "method": {"name": name, **STATEFUL.get(name, {})},
        "steps": 3,
        "eval": {"problems": 0},
        "optimizer": {"learning_rate": 0.1},
    }
    settings = pipeline.for_method(tiny_run, registry.load(**sections["method"]))
    run = runner.start(configuration.resolve(configuration.merge(settings, sections)), tmp_path)
    run.open()
    fresh = checkpoint.load(run.save()).parts
    run.go()
    saved = checkpoint.load(tmp_path / "checkpoints" / "step-2").parts
    whole, lines = everything(tmp_path), last_lines(tmp_path)
    if name in STATEFUL:
        moved = [
            key for key, x in saved.items() if key not in fresh or not x.nan_to_num().equal(fresh[key].nan_to_num())
        ]
        assert moved, f"what {name} remembers has not moved, so that this test would not notice its loss"
    else:
        assert not saved, f"{name} remembers {sorted(saved)}: name it in STATEFUL, in settings that move it"
    again = runner.resume(tmp_path / "checkpoints" / "step-2")
    assert again.step == 2
    again.go()
    resumed = everything(tmp_path)
    assert resumed.keys() == whole.keys()
    for key, value in resumed.items():
        assert torch.equal(value, whole[key]), key
    assert last_lines(tmp_path) == lines


def everything(folder: Path) -> dict[str, Tensor]:
    """All that a run has moved by its end: weights, the optimizer, and whatever the method remembers."""
    found = checkpoint.load(folder / "checkpoints" / "step-3")
    adam = {f"adam/{name}": x for name, x in found.optimizer.whole().items()}
    return {**found.weights.whole(), **adam, **found.parts}


def last_lines(folder: Path) -> list[dict[str, Any]]:
    """What was logged and recorded of the last step, without what depends on the clock or was paid for before."""
    found = [json.loads((folder / name).read_text().splitlines()[-1]) for name in ("metrics.jsonl", "rollouts.jsonl")]
    timed = ("time/", "tokens_per_second")
    asked = ("judge/calls", "judge/prompt_tokens", "judge/completion_tokens", "judge/unusable")  # not asked again
    return [{key: value for key, value in row.items() if not key.startswith(timed + asked)} for row in found]
