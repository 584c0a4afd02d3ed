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
    raise NotImplementedError("yours")


def mixture_loss(log_p, log_prior):
    """Mean over all tokens of -log p(x_t | x_<t), nats, a tensor (), by the mixture with these
    weights."""
    raise NotImplementedError("yours")
