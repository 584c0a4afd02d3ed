"""Which model knows this text? A posterior in log space.

lecture 5 · difficulty 3 of 5 · importance 3 of 5 · 30 minutes · 4 points

J language models, each of a domain of its own, predict one text together (Branch-Train-Merge, Li
2022, 2208.03306; the posterior is DEMix's, 2108.05036):

    p(x_t | x_<t) = sum over j of p(D = j | x_<t) p_j(x_t | x_<t)
    p(D = j | x_<t)  is proportional to  p(D = j) times the product over s < t of p_j(x_s | x_<s)

A model that has predicted the text well so far gets a large weight for the next token. The weight
may not know the token that is predicted: with it the mixture would look into the answer. Of the
first token the models know nothing, so its weights are the prior.

The product has one factor a token. A hundred tokens at 8 nats each make e^-800, which is 0 also in
float64, and 0 / 0 is no weight. So work with logarithms to the end.

It matters because models are weighed like this wherever several answer: by evidence, in log space,
without looking ahead. The released code of DEMix and of Branch-Train-Merge multiplies the prior by
the last token's likelihood alone; the papers have the product.
"""
import torch.nn.functional as F


def log_weights(log_p, log_prior):
    """log p(D = j | x_<t) for the prediction of each token, (J, B, T): weights of sum 1 over the
    models. log_p (J, B, T): log p_j(x_t | x_<t), what model j gave to the token that came at each
    place of B texts. log_prior (J,): log p(D = j); a prior of 0 is -inf."""
    # what is known before token t: the sum over s < t, without t itself, and 0 before the first
    evidence = F.pad(log_p.cumsum(-1), (1, 0))[..., :-1]
    # the prior counts once, not once a token
    joint = log_prior.view(-1, 1, 1) + evidence
    # divided by the sum over the models; log_softmax takes the largest out first: no 0 / 0
    return joint.log_softmax(0)


def mixture_loss(log_p, log_prior):
    """Mean over all tokens of -log p(x_t | x_<t), nats, a tensor (), by the mixture with these
    weights."""
    # log of sum_j w_j p_j: probabilities are mixed. sum_j w_j log p_j would mix losses
    mixed = (log_weights(log_p, log_prior) + log_p).logsumexp(0)                # (B, T)
    return -mixed.mean()


# ---- the check ----
import math  # noqa: E402

import torch  # noqa: E402

from course.check import ask, close, shape  # noqa: E402
from grow.ensemble import known_before, log_posterior  # noqa: E402


def here(log_p, log_prior, kind="product"):
    """The same by this repository."""
    return log_posterior(known_before(log_p), log_prior, kind)


def loss_here(log_p, log_prior):
    return -(here(log_p, log_prior) + log_p).logsumexp(0).mean()


def check(mine):
    for J, B, T in ((3, 2, 6), (2, 1, 9), (4, 3, 1)):
        log_p = -torch.rand(J, B, T, dtype=torch.float64) * 3
        check_weights(mine, log_p, (torch.arange(J) + 1.).double().log().log_softmax(0))
        check_loss(mine, log_p, (torch.arange(J) + 1.).double().log().log_softmax(0))
    check_extremes(mine)


def check_weights(mine, log_p, log_prior):
    J, B, T = log_p.shape
    found = mine.log_weights(log_p.clone(), log_prior.clone())
    shape("log_weights", found, (J, B, T))
    ask(found.max() < 1e-6,
        f"a log weight is {found.max():.3g}, but no weight is above 1: divide by their sum")
    total = found.exp().sum(0)
    ask((total - 1).abs().max() < 1e-5,
        f"the weights of a token sum to {total.flatten()[0]:.4g} over the {J} "
        "models, not to 1: divide by their sum")
    close("the sum over the models of the weights", total, torch.ones(B, T), 1e-5, 0)
    # of the first token nothing is known
    first, prior = found[:, 0, 0].exp(), log_prior.exp()
    ask(not torch.allclose(first, torch.full_like(first, 1 / J)), f"the weights of the first token are all "
        f"1/{J}: they are the prior, {rounded(prior)}")
    ask(not torch.allclose(first, (log_prior + log_p[:, 0, 0]).softmax(0)), "the weights of the first token, "
        f"{rounded(first)}, already know that token: its likelihood counts from the second on")
    ask(T == 1 or not torch.allclose(first, (log_prior + log_p[:, 0].sum(-1)).softmax(0)),
        "the weights of the "
        f"first token, {rounded(first)}, are those of the whole text: only what was read before may count")
    close("the weights of the first token", first, prior, 1e-5, 1e-6,
          "nothing is read yet, so they are the prior")
    check_causal(mine, log_p, log_prior, found)
    if T > 2:
        check_product(found, log_p, log_prior)
    close("the log weights", found, here(log_p, log_prior), 1e-5, 1e-6)


def rounded(numbers):
    return [round(float(n), 2) for n in numbers]


def check_causal(mine, log_p, log_prior, found):
    J, B, T = log_p.shape
    for t in range(T):
        other = log_p.clone()
        other[0, :, t:] -= 1.5
        changed = (mine.log_weights(other, log_prior) - found).abs().amax((0, 1)) > 1e-9
        early = changed[:t + 1].nonzero().flatten().tolist()
        ask(not early,
            f"the weights of token {early and early[0]} change with the likelihood of token {t}: they "
            "may know the tokens before theirs and no others")
    if B > 1:
        other = log_p.clone()
        other[0, 1] -= 1.5
        ask(torch.allclose(mine.log_weights(other, log_prior)[:, 0], found[:, 0]),
            "the weights of one text change with another text of the batch: each has a posterior of its own")


def check_product(found, log_p, log_prior):
    """Which evidence the weights hold, on their differences, which do not depend on the division."""
    T = log_p.shape[2]
    odds = (found[1] - found[0] - (log_prior[1] - log_prior[0]))[0, -1]
    ratio = (log_p[1] - log_p[0])[0]                        # (T,)
    last = f"model 1's odds over model 0's before token {T - 1}"
    ask(not torch.isclose(odds, ratio[-2]), f"{last} hold the likelihood of token {T - 2} alone: they are "
        f"the product over all {T - 1} tokens before")
    ask(not torch.isclose(odds, ratio[:-1].mean()), f"{last} hold the mean log-likelihood, not its sum: "
        "evidence grows with the text")
    ask(not torch.isclose(odds, ratio[:-1].sum() + (T - 1) * (log_prior[1] - log_prior[0])),
        f"{last} hold the prior {T} times: it counts once, each token's likelihood once")
    ask(not torch.isclose(odds, torch.zeros(()).double()) or abs(ratio[:-1].sum()) < 1e-6,
        f"{last} are those of the prior: the text that was read says nothing")
    ask(not torch.isclose(odds, ratio[:-2].sum()),
        f"{last} do not hold token {T - 2}, the last that was read")


def check_loss(mine, log_p, log_prior):
    J, B, T = log_p.shape
    found, want = mine.mixture_loss(log_p.clone(), log_prior.clone()), loss_here(log_p, log_prior)
    shape("mixture_loss", found, ())
    weights = here(log_p, log_prior)
    for value, sentence in {
            -(weights.exp() * log_p).sum(0).mean(): "this is sum_j w_j log p_j, a mean of losses, which is "
            "never lower: mix the probabilities, log sum_j w_j p_j",
            -(weights + log_p).exp().sum(0).mean(): "the logarithm of the mixture is missing",
            -(log_prior.view(-1, 1, 1) + log_p).logsumexp(0).mean(): "the weights are those of the prior",
            want * B * T: "this is the sum over the tokens, not the mean",
            want * T: "this is the sum over the positions: the mean is over all B T tokens",
            -want: "the sign: a loss is minus the log-probability",
            want / math.log(2): "these are bits, not nats"}.items():
        ask(torch.isclose(found, want, rtol=1e-6) or not torch.isclose(found, value, rtol=1e-6),
            f"mixture_loss is {found:.4f}, not {want:.4f}: {sentence}")
    close("mixture_loss", found, want, 1e-5)


def check_extremes(mine):
    """A long text, and a model that the prior leaves out."""
    log_p = -torch.rand(2, 1, 2000, dtype=torch.float64) * 2 - 6
    log_p[1] -= 1
    even = torch.full((2,), 0.5, dtype=torch.float64).log()
    found = mine.log_weights(log_p, even)
    bad = (~found.isfinite()).flatten(0, 1).any(0).nonzero().flatten().tolist()
    ask(not bad,
        f"the log weights of token {bad and bad[0]} of 2000 are {bad and found[:, 0, bad[0]].tolist()}: "
        "a product of probabilities became 0; stay with logarithms, and divide by log_softmax or logsumexp")
    close("the log weights of a long text", found, here(log_p, even), 1e-5, 1e-6)
    left_out = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64).div(2).log()
    log_p = -torch.rand(3, 2, 5, dtype=torch.float64)
    found, loss = mine.log_weights(log_p, left_out), mine.mixture_loss(log_p, left_out)
    ask(not found.isnan().any() and not loss.isnan(), "where a model has prior 0, a weight is NaN: -inf is a "
        "log weight, but -inf minus -inf and 0 times -inf are nothing")
    close("the weights, where a model has prior 0", found.exp(), here(log_p, left_out).exp(), 1e-5, 1e-6)
    close("mixture_loss, where a model has prior 0", loss, loss_here(log_p, left_out), 1e-5)


WRONG = [
    ("F.pad(log_p.cumsum(-1), (1, 0))[..., :-1]", "log_p.cumsum(-1)", "already know that token"),
    ("F.pad(log_p.cumsum(-1), (1, 0))[..., :-1]", "F.pad(log_p, (1, 0))[..., :-1]",
     "alone: they are the product"),
    ("F.pad(log_p.cumsum(-1), (1, 0))[..., :-1]", "F.pad(log_p.cumsum(-1), (2, 0))[..., :-2]",
     "do not hold token"),
    ("F.pad(log_p.cumsum(-1), (1, 0))[..., :-1]", "log_p.sum(-1, keepdim=True).expand_as(log_p)",
     "those of the whole text"),
    ("F.pad(log_p.cumsum(-1), (1, 0))[..., :-1]", "F.pad(log_p[..., 1:].cumsum(-1), (1, 0))",
     "and no others"),
    ("log_prior.view(-1, 1, 1) + evidence", "evidence", "they are the prior"),
    ("log_prior.view(-1, 1, 1) + evidence",
     "F.pad((log_prior.view(-1, 1, 1) + log_p).cumsum(-1), (1, 0))[..., :-1] + log_prior.view(-1, 1, 1)",
     "it counts once"),
    ("joint.log_softmax(0)", "joint", "not to 1"),
    ("joint.log_softmax(0)", "joint.log_softmax(-1)", "not to 1"),
    ("joint.log_softmax(0)", "(joint.exp() / joint.exp().sum(0)).log()", "probabilities became 0"),
    ("joint = log_prior", "evidence = evidence.sum(1, keepdim=True).expand_as(log_p)\n    joint = log_prior",
     "another text of the batch"),
    ("(log_weights(log_p, log_prior) + log_p).logsumexp(0)",
     "(log_weights(log_p, log_prior).exp() * log_p).sum(0)", "a mean of losses"),
    ("-mixed.mean()", "-mixed.sum(-1).mean()", "sum over the positions"),
    ("-mixed.mean()", "mixed.mean()", "the sign"),
]
