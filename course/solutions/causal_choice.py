"""Experts that choose: why it looks ahead, and a form that does not.

lecture 2 · difficulty 3 of 5 · importance 4 of 5 · 30 minutes · 5 points

In expert choice (Zhou et al. 2202.09368) the roles are turned: each expert takes the C tokens that
have the highest probability for it, C = N k / E, so that all loads are equal by construction. The
probabilities are a softmax over the experts; the gate is the probability itself, and 0 where the
expert does not take the token. A token may get no expert, or several.

In a language model that is a leak. Among the N = B T tokens that compete are later ones of the same
text, so that whether a token is processed depends on words that come after it. Nothing fails in
training, but generation cannot do the same, since there the later tokens do not exist yet.

1. `expert_choice`: the C best of all tokens of the batch, for each expert.
2. `leak`: a test that finds out, for any way to choose. Replace what comes after position t and see
   whether a gate at or before t changes. Such a test finds most bugs of this kind in any model.
3. `causal_choice`: at each position by itself, each expert takes C = B k / E of the B sequences of
   the batch (as Krajewski et al. 2402.07871 group them). What stays: a text sees its neighbours in
   the batch.
"""
import torch


def expert_choice(probs, C):
    """probs (B, T, E), each row sums to 1 -> gates (B, T, E): the probability where the expert
    takes the token, else 0, with their gradient. Each expert takes C of all B T tokens."""
    B, T, E = probs.shape
    flat = probs.reshape(B * T, E)
    # along the tokens, not along the experts: each column has its own C winners
    gates, token = flat.topk(C, dim=0)                                          # (C, E) each
    # all else is exactly 0, which also says who was not taken
    return torch.zeros_like(flat).scatter(0, token, gates).view(B, T, E)


def leak(choose, probs, t):
    """The largest change (float) of a gate at the positions 0 ... t when other probabilities stand
    at all positions after t; 0.0 if choose does not look ahead. choose: a function from
    probabilities (B, T, E) to gates (B, T, E). probs (B, T, E) stays as it is."""
    before, largest = choose(probs)[:, :t + 1], 0.0
    # one draw can leave the winners what they are: several, and not too gentle
    random = torch.Generator().manual_seed(0)
    for _ in range(8):
        other = probs.clone()
        later = torch.randn(other[:, t + 1:].shape, generator=random) * 3
        other[:, t + 1:] = later.softmax(-1)
        # behind t all may change, and does
        change = (choose(other)[:, :t + 1] - before).abs().max()
        largest = max(largest, float(change))
    return largest


def causal_choice(probs, k):
    """probs (B, T, E) -> gates (B, T, E), as expert_choice, but at each position each expert takes
    C of the B sequences. C is B k / E, rounded, and at least 1."""
    B, T, E = probs.shape
    # a group is one position: it holds one token of each sequence, none of them later than another
    C = max(1, round(B * k / E))
    gates, sequence = probs.topk(C, dim=0)                                      # (C, T, E) each
    return torch.zeros_like(probs).scatter(0, sequence, gates)


# ---- the check ----
from course.check import ask, close, grads, shape  # noqa: E402
from ffn import Context  # noqa: E402
from routers import ROUTERS  # noqa: E402
from settings import FFNConfig  # noqa: E402


def oracle(probs, k):
    """Gates (B, T, E) of the repository's router, given these probabilities."""
    B, T, E = probs.shape
    router = ROUTERS["expert_choice"](FFNConfig(n_expert=E, top_k=k, router="expert_choice"), E)
    router.score = torch.nn.Identity()              # its logits are its input: softmax(log p) = p
    routing = router(probs.view(B * T, E).log(), Context(torch.zeros(B, T, dtype=torch.long)))
    place = routing.token * E + routing.expert
    return torch.zeros(B * T * E).index_add(0, place, routing.weight).view(B, T, E)


def over_all(probs, k):
    """The same with all tokens at one position: they compete with each other."""
    return oracle(probs.reshape(-1, 1, probs.shape[-1]), k).view_as(probs)


def drawn(B, T, E, seed):
    random = torch.Generator().manual_seed(seed)
    return (torch.randn(B, T, E, generator=random) * 1.5).softmax(-1)


def check(mine):
    for seed, (B, T, E, k) in enumerate(((3, 4, 4, 1), (2, 6, 3, 1), (5, 3, 5, 2), (1, 8, 4, 4))):
        over_the_batch(mine, drawn(B, T, E, seed), k)
    finds_leaks(mine)
    for seed, (B, T, E, k) in enumerate(((8, 5, 4, 2), (3, 4, 8, 1), (7, 3, 4, 1), (4, 6, 2, 2))):
        at_each_position(mine, drawn(B, T, E, seed), k)


def over_the_batch(mine, probs, k):
    (B, T, E), C = probs.shape, probs[..., 0].numel() * k // probs.shape[-1]
    got, want = mine.expert_choice(probs.clone(), C), over_all(probs, k)
    shape("what expert_choice returns", got, (B, T, E))
    taken, right = got != 0, want != 0
    each = taken.sum(-1)
    ask((each != each[0, 0]).any() or not (right.sum(-1) != right.sum(-1)[0, 0]).any(),
        f"every token has {int(each[0, 0])} experts: here tokens choose, by a top-k over the "
        "experts; let each expert choose among the tokens")
    load = taken.sum((0, 1))
    e = int((load != C).int().argmax())
    ask(load[e] == C, f"expert {e} takes {int(load[e])} tokens, not C = {C}")
    per_text = taken.sum(1)
    ask(B == 1 or (per_text != per_text[0]).any() or not (right.sum(1) != right.sum(1)[0]).any(),
        "every expert takes as many tokens of each sequence: here all tokens of the batch compete, "
        "not those of one sequence")
    gates(mine.expert_choice, probs, C, got, want, "expert_choice")


def gates(choose, probs, number, got, want, name):
    """The same tokens are taken, the gates are the probabilities, and they have a gradient."""
    B, T, E = probs.shape
    ask(torch.equal(got != 0, want != 0), f"{name} takes other tokens than those that have the "
        f"highest probability for the expert (B = {B}, T = {T}, E = {E})")
    sums = got.sum(-1)[(got != 0).any(-1)]
    ask(not torch.allclose(sums, torch.ones_like(sums)) or torch.allclose(got, want),
        f"the gates of {name} sum to 1 for each token that was taken: the gate is the probability "
        "as it is, not divided by the sum of the taken")
    close(f"the gates of {name}", got, want)
    close(f"the gradient of the gates of {name} to the probabilities",
          grads(lambda p: choose(p, number), probs)[0], grads(lambda p: p * (want != 0), probs)[0],
          hint="is the gate a copy without its gradient?")


CHOOSERS = {        # what it does -> (probabilities to gates, whether it looks ahead)
    "expert choice over all tokens": (lambda p: over_all(p, 1), True),
    "one that weighs a token by the next one": (lambda p: p * p.roll(-1, 1), True),
    "one that divides by the sum over all positions": (lambda p: p / p.sum(1, keepdim=True), True),
    "token choice": (lambda p: p * (p == p.max(-1, keepdim=True).values), False),
    "one that averages over the past": (lambda p: p.cumsum(1) / 9, False),
    "expert choice at each position by itself": (lambda p: oracle(p, 1), False),
}


def finds_leaks(mine):
    probs = drawn(4, 6, 4, 9)
    for t in (0, 2, 4):
        for what, (choose, ahead) in CHOOSERS.items():
            given = probs.clone()
            found = float(mine.leak(choose, given, t))
            ask(torch.equal(given, probs), "leak changed the probabilities that it was given: "
                "change a clone, or the second choice is compared with itself")
            nearest = " (does the token at t + 1 change?)" if "next" in what else ""
            ask(found > 0 or not ahead, f"leak at t = {t} returns {found:g} for {what}, which "
                f"looks ahead: put quite other probabilities behind t{nearest}")
            ask(found == 0 or ahead, f"leak at t = {t} returns {found:g} for {what}, which does "
                "not look ahead: compare the gates at positions 0 ... t alone, and change only "
                "what is behind t")


def at_each_position(mine, probs, k):
    B, T, E = probs.shape
    got, want = mine.causal_choice(probs.clone(), k), oracle(probs, k)
    shape("what causal_choice returns", got, (B, T, E))
    other = probs.clone()
    other[:, T // 2:] = drawn(B, T, E, 77)[:, T // 2:]
    moved = (mine.causal_choice(other, k) - got)[:, :T // 2].abs().amax((0, 2))
    ask(not moved.any(), f"a change of the tokens from position {T // 2} on changes gates of "
        f"causal_choice at position {int(moved.argmax())}: it still looks ahead")
    load, C = (got != 0).sum(0), int((want[:, 0, 0] != 0).sum())
    t, e = divmod(int((load != C).int().argmax()), E)
    ask(load[t, e] == C, f"at position {t} expert {e} takes {int(load[t, e])} of B = {B} sequences "
        f"(E = {E}, k = {k}), not C = {C}: B k / E is {B * k / E:g}, rounded, and at least 1")
    gates(mine.causal_choice, probs, k, got, want, "causal_choice")


WRONG = [
    ("gates, token = flat.topk(C, dim=0)", "gates, token = flat.topk(C * E // (B * T), dim=1)\n"
     "    return torch.zeros_like(flat).scatter(1, token, gates).view(B, T, E)",
     "here tokens choose"),
    ("gates, token = flat.topk(C, dim=0)", "gates, token = probs.topk(C // B, dim=1)\n"
     "    return torch.zeros_like(probs).scatter(1, token, gates)",
     "all tokens of the batch compete"),
    ("flat.topk(C, dim=0)", "flat.topk(C + 1, dim=0)", "tokens, not C = 3"),
    ("return torch.zeros_like(flat).scatter(0, token, gates).view(B, T, E)",
     "g = torch.zeros_like(flat).scatter(0, token, gates).view(B, T, E)\n"
     "    return g / g.sum(-1, keepdim=True).clamp_min(1e-9)", "sum to 1 for each token"),
    ("scatter(0, token, gates).view", "scatter(0, token, gates.detach()).view",
     "without its gradient"),
    ("other[:, t + 1:] = later.softmax(-1)",
     "other[:, t + 2:] = later.softmax(-1)[:, 1:]", "does the token at t + 1 change?"),
    ("later = torch.randn(other[:, t + 1:].shape, generator=random) * 3",
     "later = probs[:, t + 1:].log() + 1e-3", "quite other probabilities"),
    ("other = probs.clone()", "other = probs", "changed the probabilities that it was given"),
    ("change = (choose(other)[:, :t + 1] - before)",
     "change = (choose(other) - choose(probs))", "which does not look ahead"),
    ("gates, sequence = probs.topk(C, dim=0)",
     "gates, sequence = probs.topk(max(1, round(T * k / E)), dim=1)\n"
     "    return torch.zeros_like(probs).scatter(1, sequence, gates)", "it still looks ahead"),
    ("C = max(1, round(B * k / E))", "C = max(1, B * k // E)", "rounded, and at least 1"),
    ("C = max(1, round(B * k / E))", "C = min(B, k)", "rounded, and at least 1"),
]
