"""Flow-OPD: several experts, each of one reward, taught to one flow model on its own trajectories."""

from typing import Literal, get_args

from retort.advantages import log_ratio, minus_divergence
from retort.divergences import reverse_kl
from retort.errors import UserError, did_you_mean
from retort.estimators import Estimator, pathwise, score_function
from retort.method import Limit, Method, Paper, Term, Watch, method
from retort.methods._latents import of_latents
from retort.quantities import sampled_reverse_kl
from retort.rollout.plan import RolloutPlan
from retort.teachers.view import View

#: How the KL becomes a gradient.
Gradient = Literal["direct_kl", "sampled_log_ratio", "paper_detached"]


@method(
    paper=Paper(
        title="Flow-OPD: On-Policy Distillation for Flow Matching Models",
        authors="Fang, Zhen and Huang, Wenxuan and Zeng, Yu and Zhao, Yiming and Chen, Shuang and Feng, Kaituo and "
        "Lin, Yunlong and Chen, Lin and Chen, Zehui and Cao, Shaosheng and Zhao, Feng",
        year=2026,
        arxiv="2605.08063",
    ),
    status="partial",
)
def flow_opd(
    *, gradient: Gradient = "direct_kl", scale: float = 1.0, anchor_coef: float = 0.0, samples: int = 24
) -> Method:
    r"""The KL of the student's denoising steps to an expert's, in closed form, on the student's own trajectories.

    .. math:: \ell_t = D_{KL}(N(\mu_S, \sigma_t^2 I) \Vert N(\mu_E, \sigma_t^2 I))
              = \frac{\Vert \mu_S - \mu_E \Vert^2}{2 \sigma_t^2} = w(t)\,\Vert v_S - v_E \Vert^2,
              \quad w(t) = \frac{|d|}{2} \left(\frac1s + \frac{s(1-t)}{2t}\right)^2

    with the sampler's noise s, the step d from t to the next t, and :math:`\sigma_t = s\sqrt{|d|}` ("sde" and
    "dance_sde"; `retort.flows.denoising_step`). The value is the true KL of a step in nats, summed over the elements of
    the latent; the loss is `scale` times its mean over steps.

    Args:
        gradient: `direct_kl` differentiates the KL, as the paper's loss does. `sampled_log_ratio` is the policy
            gradient of the log-ratio of the latent that was decided, as `opd`: the same expected gradient, with more
            variance. `paper_detached` is the policy gradient that the project page prints, with the detached KL as its
            reward. It has no direction in expectation, because the KL of a step does not depend on what is decided
            there; it is for study only, and a test holds it to that.
        scale: Factor of the loss, dimensionless. Released code averages over the elements of a latent (1 / their
            number); for "sde" it also leaves out the step, which is |d| times the KL and no constant factor.
        anchor_coef: lambda of the manifold anchor: that much of the KL to the view `anchor` (an aesthetic teacher) is
            added, always directly. 0: no anchor, and no such view. The paper has 0.02, the released code 0.04.
        samples: Images per prompt.

    Departures from the paper: there is no anchor by default; routing of prompts to experts and merging of experts are
    no part of the loss. The released `kl_only` mode (advantages clamped at 5, clip 1e-4, a KL that is not detached) is
    not offered.

    Example:
        >>> velocities = {"student_velocity": tensor([[1.0], [1.0]]), "teacher_velocity": tensor([[0.0], [1.0]])}
        >>> losses = flow_losses("flow_opd", **velocities, **two_steps)
        >>> losses.terms["distillation"].value  # the means differ by 0.25 * 1.125, the deviation is 0.25
        tensor([0.6328, 0.0000], dtype=torch.float64)
    """
    if gradient not in get_args(Gradient):
        raise UserError(f"method.gradient: no '{gradient}'; {did_you_mean(gradient, get_args(Gradient))}")
    if scale <= 0 or anchor_coef < 0:
        raise UserError(f"method.scale must be positive and anchor_coef at least 0, not {scale:g} and {anchor_coef:g}")
    estimators: dict[Gradient, Estimator] = {
        "direct_kl": pathwise(kl := of_latents(reverse_kl())),
        "sampled_log_ratio": score_function(of_latents(log_ratio())),
        "paper_detached": score_function(minus_divergence(kl)),
    }
    anchored = (Term("anchor", pathwise(kl), against="anchor", coef=anchor_coef),) if anchor_coef else ()
    views = {"teacher": View.same_prompt(), **({"anchor": View(model="anchor")} if anchored else {})}
    return Method(
        rollout=RolloutPlan(samples=samples),
        views=views,
        terms=(Term("distillation", estimators[gradient], coef=scale), *anchored),
        limits=(
            Limit({}, equals=("gkd", {"divergence": "reverse_kl"})),
            Limit({}, equals=("gkd", {"divergence": "forward_kl"})),
            Limit({"gradient": "sampled_log_ratio"}, equals=("opd", {})),
        ),
        watch=(Watch("reverse_kl", kl), Watch("sampled_reverse_kl", sampled_reverse_kl())),
    )
