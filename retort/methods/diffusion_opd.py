"""Distillation of one frozen flow model into another, on the student's own trajectories."""

from retort.divergences import reverse_kl
from retort.errors import UserError
from retort.estimators import pathwise
from retort.method import Limit, Method, Paper, Term, Watch, method
from retort.methods._latents import of_latents
from retort.quantities import sampled_reverse_kl
from retort.rollout.plan import RolloutPlan


@method(
    paper=Paper(
        title="Online Policy Distillation for Diffusion Models",
        authors="{The authors of verl-omni}",
        year=2026,
        url="https://github.com/verl-project/verl-omni/blob/main/docs/algo/diffusion_opd.md",
    ),
    status="faithful",
)
def diffusion_opd(*, scale: float = 1.0, samples: int = 8) -> Method:
    r"""The KL of the student's denoising steps to one teacher's, in closed form, as the only loss.

    .. math:: \ell_t = \frac{\Vert \mu_S - \mu_T \Vert^2}{2 \sigma_t^2}

    with the standard deviation of the step, which the sampler gives to both models. The value is the true KL of a step
    in nats, summed over the elements of the latent; the loss is `scale` times its mean over steps.

    Args:
        scale: Factor of the loss, dimensionless (`distill_loss_coef`). The released code averages over the elements of
            a latent, which is a scale of 1 / their number, and only for "cps" and "dance_sde": for "sde" it leaves the
            size of the step out of the deviation.
        samples: Images per prompt.

    Departures from the released code: the value is the KL and not its mean over elements; the sum with a policy
    gradient of rewards, and the mean square of velocities, are not offered.

    Example:
        >>> velocities = {"student_velocity": tensor([[1.0], [1.0]]), "teacher_velocity": tensor([[0.0], [2.0]])}
        >>> losses = flow_losses(retort.load("diffusion_opd", scale=0.5), **velocities, **two_steps)
        >>> losses.loss  # both means differ by 0.25 * 1.125: half of 0.6328 nats
        tensor(0.3164, dtype=torch.float64)
    """
    if scale <= 0:
        raise UserError(f"method.scale must be positive, not {scale:g}")
    kl = of_latents(reverse_kl())
    return Method(
        rollout=RolloutPlan(samples=samples),
        terms=(Term("distillation", pathwise(kl), coef=scale),),
        limits=(
            Limit({}, equals=("gkd", {"divergence": "reverse_kl"})),
            Limit({"scale": 0.1}, equals=("flow_opd", {"scale": 0.1})),
        ),
        watch=(Watch("reverse_kl", kl), Watch("sampled_reverse_kl", sampled_reverse_kl())),
    )
