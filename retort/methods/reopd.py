"""ReOPD: one turn of an episode at a time, behind turns that somebody else has played."""

from retort.advantages import log_ratio
from retort.estimators import score_function
from retort.method import Limit, Method, Paper, Term, Watch, method
from retort.quantities import sampled_reverse_kl, student_entropy, teacher_entropy
from retort.rollout.plan import RolloutPlan, TurnCurriculum


@method(
    paper=Paper(
        title="Multi-Turn On-Policy Distillation with Prefix Replay",
        authors="Liao, Baohao and Dong, Hanze and Monz, Christof and Xu, Xinxing and Dong, Li and Wei, Furu",
        year=2026,
        arxiv="2607.04763",
        url="https://github.com/BaohaoLiao/ReOPD",
    ),
    status="partial",
)
def reopd(
    *,
    decay: float = 0.6,
    coef: float = 1.0,
    clip: float | None = None,
    samples: int = 1,
    temperature: float = 1.0,
) -> Method:
    r"""OPD on a single turn of each episode, behind turns of an expert; early turns are drawn more often.

    .. math:: P(t) \propto \kappa^t, \quad \ell = -\rho\,[\log p_T(y) - \log p_{old}(y)]

    Of an expert's way of L turns the first t are played without loss and without a token of either model, and the
    student writes the one after them; then the episode is over. t is drawn anew for each episode, from a stream of the
    run's seed. The loss is that of `opd`, in nats, divided by all counted tokens. A batch has as many turns as
    episodes, so it costs a fraction of whole episodes, and the student is taught at places to which good play leads;
    it is not taught where its own mistakes lead (`tcod` is). The reward curve of a run counts games that this one turn
    ends, so it says little; an evaluation plays whole games. Without an environment every completion is one turn, and
    it is `opd`.

    Args:
        decay: kappa, in (0, 1]; 1 draws all turns alike.
        coef: Weight of the term, dimensionless.
        clip: PPO's epsilon on the ratio to the student before the batch; null for none.
        samples: Episodes per prompt.
        temperature: Temperature of sampling and of both distributions.

    Departures: the paper replays recorded turns of the teacher with the replies that it got, and so needs no
    environment; here the environment's expert plays them, and its replies are computed. A game whose expert is not
    known begins at its beginning. With recorded conversations as the data's prompts, `opd` is the paper's own.

    Example:
        >>> retort.load("reopd").rollout.curriculum.kind
        'drawn'
        >>> student, teacher = tensor([[0.5, 0.5]]).log(), tensor([[0.9, 0.1]]).log()
        >>> token_losses("reopd", student_logits=student, teacher_logits=teacher, tokens=tensor([1])).loss  # ln 5
        tensor(1.6094)
    """
    score = score_function(log_ratio(), clip=clip)
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature, curriculum=TurnCurriculum("drawn", decay=decay)),
        temperature=temperature,
        terms=(Term("reverse", score, coef=coef),),
        limits=(Limit({"decay": 1.0}, equals=("opd", {})),),
        recipe={"optimizer": {"updates": 1}},
        watch=(
            Watch("reverse_kl", sampled_reverse_kl()),
            Watch("student_entropy", student_entropy()),
            Watch("teacher_entropy", teacher_entropy()),
            Watch("clip_fraction", score.clipped("reverse")),
        ),
    )
