"""How the choice is kept even: every balancing loss, the z-loss, the loss-free bias, RL-R's objective.

A router left alone feeds the experts that are already better, and most of them die. Each loss below takes a
Routing and returns a scalar before its coefficient; fractions that are counted carry no gradient, so the loss
pushes through the probabilities alone. Minima differ from paper to paper: coefficients do not transfer. Losses
are per layer, so that no layer makes up for another, and of the micro-batch of all processes: counts and what
enters as a product or a square are summed over them; a mean is not, since gradients are averaged anyway.

A new loss is a function `loss(routing, load, config, shape)` and its name in LOSSES; coefficients of its own go
into COEFFICIENTS. If it is no mean over sequences or tokens, its name is in OF_MICRO_BATCH as well.
"""
from functools import partial

import torch

from runtime.parallel import global_mean, global_sum


def expert_counts(expert, n_expert, keep=None):
    """Pairs sent to each expert, (P,) -> (E,) float32, without waiting for the host (bincount would)."""
    ones = torch.ones_like(expert, dtype=torch.float32) if keep is None else keep.float()
    return torch.zeros(n_expert, device=expert.device).scatter_add_(0, expert, ones)


def switch_loss(routing, load, config, shape):
    """E sum_i f_i P_i (Switch 2101.03961 eq. 4-6). Uniform: 1."""
    load = global_sum(load)
    # eq. 5: f, the share of the pairs; eq. 6: P, the mean probability
    f = load / load.sum()
    P = routing.probs.mean(0)
    return load.numel() * (f * P).sum()


def gshard_loss(routing, load, config, shape):
    """mean_i (c_i / N) m_i, c first choices, m the mean gate (GShard 2006.16668 alg. 1). Uniform: 1/E^2."""
    first = global_sum(expert_counts(routing.expert.view(-1, routing.k)[:, 0], load.numel()))
    return ((first / first.sum()) * routing.probs.mean(0)).mean()


def cv_squared(x):
    """Squared coefficient of variation of a vector."""
    return x.var(correction=0) / (x.mean() ** 2 + 1e-10)


def importance_loss(routing, load, config, shape):
    """CV^2 of the summed gates of each expert (Shazeer 1701.06538 eq. 6-7). Uniform: 0."""
    return cv_squared(global_sum(torch.zeros_like(load).scatter_add(0, routing.expert, routing.weight)))


def load_loss(routing):
    """CV^2 of the smooth load (Shazeer 1701.06538 eq. 11); 0 in evaluation, without noise. Uniform: 0."""
    smooth = routing.smooth_load
    return routing.weight.new_zeros(()) if smooth is None else cv_squared(global_sum(smooth))


def btx_loss(routing, load, config, shape, detached=False):
    """E sum_i u_i p_i, u the mean gate of expert i and p its mean probability (BTX 2403.07816 sec. 3.2).
    Uniform: 1 where gates sum to 1, a saddle and no minimum: u is not a count, both factors carry a gradient,
    and the loss falls towards uneven routing as well. detached: u is a constant, as in the other losses."""
    N = routing.probs.shape[0]
    gates = routing.weight.detach() if detached else routing.weight
    u = global_mean(torch.zeros_like(load).scatter_add(0, routing.expert, gates) / N)
    return load.numel() * (u * global_mean(routing.probs.mean(0))).sum()


def per_sequence(routing, shape):
    """f (B, E) = E / (k T) counts and P (B, E) = mean probability, of each sequence by itself."""
    (B, T), E, k = shape, routing.probs.shape[-1], routing.k
    counts = torch.zeros(B, E, device=routing.expert.device)
    counts.scatter_add_(1, routing.expert.view(B, T * k), torch.ones(B, T * k, device=counts.device))
    return counts * (E / (k * T)), routing.probs.view(B, T, E).mean(1)


def deepseek_loss(routing, load, config, shape):
    """sum_i f_i P_i, mean over sequences (DeepSeekMoE 2401.06066 eq. 12-14; V2 2405.04434 eq. 23). Uniform: 1."""
    f, P = per_sequence(routing, shape)
    # a mean over experts in place of the sum would weaken it E times, and routing would collapse quietly
    return (f * P).sum(-1).mean()


def device_loss(routing, config, shape):
    """The same over groups: f' the mean f, P' the sum of P in a group (DeepSeek-V2 eq. 26-28). Uniform: 1."""
    f, P = (t.unflatten(-1, (config.n_groups, -1)) for t in per_sequence(routing, shape))
    return (f.mean(-1) * P.sum(-1)).sum(-1).mean()


def comm_loss(routing, config, shape):
    """sum_j f''_j P''_j over D groups (DeepSeek-V2 eq. 29-31). Uniform: 1 where a token uses M groups."""
    (B, T), D = shape, config.n_groups
    # the groups that each token's experts lie in, and whether it is sent to group j at all
    group = routing.expert.view(B, T, -1) // (routing.probs.shape[-1] // D)             # (B, T, k)
    sent = torch.zeros(B, T, D, device=group.device).scatter_(-1, group, 1.0)
    # eq. 30: f'' = D / (M T) tokens sent to group j; eq. 31: P'' = its summed mean probability
    f = sent.sum(1) * (D / (config.topk_groups * T))                                    # (B, D)
    P = routing.probs.view(B, T, D, -1).sum(-1).mean(1)
    return (f * P).sum(-1).mean()


def z_loss(routing):
    """mean over tokens of logsumexp(z)^2, which keeps logits small (ST-MoE 2202.08906 eq. 5)."""
    return routing.logits.logsumexp(-1).square().mean()


LOSSES = dict(switch=switch_loss, gshard=gshard_loss, importance_load=importance_loss, btx=btx_loss,
              btx_detached=partial(btx_loss, detached=True), deepseek=deepseek_loss, loss_free=deepseek_loss,
              quantile=deepseek_loss)
# Settings that some read beside balance_loss; and those that differ if a batch is cut into micro-steps.
COEFFICIENTS = dict(importance_load=("load_loss",), deepseek=("device_loss", "comm_loss"),
                    loss_free=("bias_rate",))
OF_MICRO_BATCH = {"switch", "gshard", "importance_load", "btx", "btx_detached", "quantile"}
BY_BIAS = ("loss_free", "quantile")     # these move the bias of a router that has one, and need no loss
PRICE_RATE = 0.1    # averages some 20 batches: one alone is noisy, older ones had another router's prices


def coefficients(balance):
    """Names of the settings that a balance reads."""
    return () if balance == "none" else ("balance_loss", *COEFFICIENTS.get(balance, ()))


def auxiliary_losses(routing, load, config, shape):
    """(aux, balance, z): what enters the objective with its coefficients, and the two losses before them. load
    (E,): what was sent before any capacity limit; shape = (B, T). ValueError for a router that lacks a part."""
    zero = torch.zeros((), device=load.device)
    balance = z = zero
    # the balance loss; beside a bias it is the sequence loss of DeepSeek-V3 (its coefficient: 0.0001),
    # whose f counts the experts that were chosen, where eq. 18 counts the k best without the bias
    if config.balance != "none":
        require(routing.probs, "probs", f"ffn.balance = \"{config.balance}\"", "steerable", config)
        balance = LOSSES[config.balance](routing, load, config, shape)
    aux = config.balance_loss * balance
    # what some of them add to it
    if config.balance == "importance_load":
        aux = aux + config.load_loss * load_loss(routing)
    if config.balance == "deepseek" and config.device_loss:
        aux = aux + config.device_loss * device_loss(routing, config, shape)
    if config.balance == "deepseek" and config.comm_loss:
        aux = aux + config.comm_loss * comm_loss(routing, config, shape)
    # and the z-loss, which any router with logits can have
    if config.z_loss:
        require(routing.logits, "logits", "ffn.z_loss", "logits", config)
        z = z_loss(routing)
        aux = aux + config.z_loss * z
    return aux, balance, z


def require(found, what, setting, trait, config):
    """Raises ValueError where a router does not return what its traits promise."""
    if found is None:
        raise ValueError(f"{setting} needs {what} in the Routing of router {config.router}, which returned "
                         f"none: return them, or say {trait}=False in its traits (routers.py)")


@torch.no_grad()
def update_bias(bias, load, rate):
    """Loss-free balancing (2408.15664 alg. 1): b_i += u sign(mean load - load_i), in place, minus the mean of
    these steps: that changes no choice among these experts, and their mean bias does not drift.

    `load` (E,) must come from the batch just finished, all micro-steps and processes together: the bias of
    the present batch would tell a token what later tokens chose.
    """
    step = torch.sign(load.mean() - load)
    bias += rate * (step - step.mean())


def update_quantile(bias, scores, k):
    """Quantile balancing (Su 2026, kexue.fm/archives/11619), in place: the bias b (E,), mean 0, with which
    each expert would be among the k best s + b of its share k / E of these tokens, if the others' stayed;
    scores s (N, E). It serves the next batch, or micro-batch; processes take the mean of theirs."""
    # a token's cutoff is its (k+1)-th largest s + b; expert j gets token i if b_j > cutoff_i - s_ij
    cutoff = (scores + bias).topk(min(k + 1, len(bias)), -1).values[:, -1:]             # (N, 1)
    wanted = global_mean((cutoff - scores).kthvalue(max(1, len(scores) * k // len(bias)), 0).values)
    bias.copy_(wanted - wanted.mean())


def remember_prices(router, prices):
    """Moves router.prices (E,), mean 0, towards those of this batch, or micro-batch; of several processes
    towards the mean of theirs. The average begins at the first batch, since 0 would bias it."""
    rate = torch.where(router.prices.any(), PRICE_RATE, 1.0)
    router.prices.lerp_(global_mean(prices - prices.mean()), rate)


def policy_loss(stats, token_loss, coefficient):
    """() REINFORCE for the layers whose router sampled an expert (Clark et al. 2202.01169 sec. 3.3):
    -(r - b) log pi(e) + (r - b)^2, with the reward r = -token_loss (B, T), the token's log-likelihood."""
    loss, reward = torch.zeros((), device=token_loss.device), -token_loss.detach()
    for s in stats:
        if s.log_prob is not None:
            # whitened over the batch, so that a step follows the router's choice, not the model's progress
            advantage = (reward - s.baseline).detach()
            white = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-5)
            policy = -(white * s.log_prob).mean()
            value = (reward - s.baseline).square().mean()
            loss = loss + coefficient * (policy + value)
    return loss


def entropy(probs, load):
    """Mean entropy of the routing distribution in nats; without probabilities that of the load."""
    if probs is None:
        load = global_sum(load)
        probs = (load / load.sum()).unsqueeze(0)
    p = probs.detach()
    return -(p * p.clamp_min(1e-20).log()).sum(-1).mean()
