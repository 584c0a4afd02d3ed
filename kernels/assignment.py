"""The balanced assignment of tokens to experts that BASE layers (2103.16716) ask for."""
import torch


def balanced_assignment(scores, epsilon=None):
    """Expert of each token, (N, E) -> (N,), at most ceil(N/E) tokens each, the sum of scores within N epsilon
    of the largest possible."""
    return auction(scores, epsilon)[0]


def auction(scores, epsilon=None):
    """That assignment by an auction (Bertsekas), and what the experts cost at its end, (E,): no token would
    gain more than epsilon, in score minus price, elsewhere. The number of rounds depends on the data."""
    N, E = scores.shape
    slots = -(-N // E)
    scores = scores.float().nan_to_num()        # a NaN would be bid on for ever; the loss will tell of it
    epsilon = epsilon or 1e-3 * float(scores.max() - scores.min()) + 1e-6
    price = scores.new_zeros(E)
    bid = scores.new_zeros(N)
    owner = torch.full((N,), -1, device=scores.device)
    while E > 1 and (free := (owner < 0).nonzero().squeeze(1)).numel():
        # a token without an expert bids on the one that offers most at its present price, by as much as
        # that one is better than the second
        value, expert = (scores[free] - price).topk(2, -1)                              # (free, 2)
        owner[free] = expert[:, 0]
        bid[free] = price[expert[:, 0]] + value[:, 0] - value[:, 1] + epsilon
        # all bids by expert, the highest first, and their rank there
        order = bid.argsort(descending=True, stable=True)
        order = order[owner[order].argsort(stable=True)]
        held = owner[order]
        start = torch.searchsorted(held, torch.arange(E, device=held.device))
        rank = torch.arange(N, device=held.device) - start[held.clamp_min(0)]
        # a full expert's price is its lowest kept bid; who bid less is free again
        last = held.ge(0) & (rank == slots - 1)
        price[held[last]] = bid[order[last]]
        owner[order[held.ge(0) & (rank >= slots)]] = -1
    return owner.clamp_min(0), price
