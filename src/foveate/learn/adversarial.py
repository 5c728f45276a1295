"""A reward that is learned: a discriminator's score, and the two ways for a generator to follow it.

A discriminator D learns to tell real samples x from made ones, D(x) being the log-odds that x is real:

    L_D = E_real[softplus(-D(x))] + E_made[softplus(D(x))] + penalty / 2 · E_real[|∇_x D(x)|²]

(Goodfellow et al. 2014, "Generative adversarial nets", equation 1; the penalty is R1 of Mescheder et al. 2018, "Which
training methods for GANs do actually converge?", arXiv 1801.04406: without it D's score is flat where nothing real is.)
A generator that made x maximises E[D(x)]. Both estimates are of the same gradient:

    pathwise   x = g(z, θ), D differentiable:   ∇ E[D(x)] = E[ ∇_x D(x) · ∂g(z, θ)/∂θ ]                 (a GAN)
    score      x ~ p(x; θ), any score:          ∇ E[D(x)] = E[ (D(x) - b) · ∇ log p(x; θ) ]             (REINFORCE)

The first needs a derivative of D and of what makes x; the second needs neither, and has more variance.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def discriminator_loss(real: Float[Tensor, " batch"], made: Float[Tensor, " others"]) -> Float[Tensor, ""]:
    """Cross-entropy of telling real from made by their scores, in nats a pair; 2 log 2 for one who cannot tell."""
    return F.softplus(-real).mean() + F.softplus(made).mean()


def generator_loss(made: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
    """-E[log σ(D(x))], whose gradient flows through D into what made x (Goodfellow et al. 2014, section 3)."""
    return F.softplus(-made).mean()


def gradient_penalty(scores: Float[Tensor, " batch"], samples: Float[Tensor, "batch ..."]) -> Float[Tensor, ""]:
    """R1: mean squared norm of the scores' gradient at the samples, which must require it; carries a graph."""
    (gradient,) = torch.autograd.grad(scores.sum(), samples, create_graph=True)
    return gradient.flatten(1).square().sum(1).mean()


def telling_loss(
    discriminator: Callable[..., Tensor],
    real: Float[Tensor, "batch ..."],
    made: Float[Tensor, "others ..."],
    kinds: Int[Tensor, " batch"],
    penalty: float,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """`discriminator_loss` and half of `penalty` times `gradient_penalty`, of samples of the same kinds.

    Returns:
        The loss, and for a log: mean scores of `real` and `made` ones, the loss without penalty, the penalty.
    """
    real = real.detach().requires_grad_()
    scores = discriminator(real, kinds), discriminator(made.detach(), kinds)
    loss = discriminator_loss(*scores)
    steep = gradient_penalty(scores[0], real) if penalty else loss.new_zeros(())
    told = {"real": scores[0].mean(), "made": scores[1].mean(), "discriminator_loss": loss, "gradient_penalty": steep}
    told |= {"deviation": torch.cat(scores).std()}
    return loss + penalty / 2 * steep, {name: value.detach() for name, value in told.items()}
