"""The smooth load of noisy top-k.

lecture 2 · difficulty 4 of 5 · importance 3 of 5 · 35 minutes · 6 points

How many tokens an expert gets is a count: no gradient. Shazeer et al. (1701.06538, appendix A) made
a load with a gradient out of the noise that their router adds to its logits:

    H_i = z_i + e_i s_i, e ~ N(0, 1)          the noisy logits, whose k largest are chosen (eq. 4)
    P_i = the chance that expert i is among the k largest if its own e_i is drawn once more,
          while the noise of the others stays as it is                             (eq. 8 and 9)
    load_i = sum over the tokens of P_i                                                 (eq. 10)
    L = CV(load)^2, the variance of the loads over the square of their mean             (eq. 11)

Expert i is chosen again if its new H_i is above a bar: the k-th largest H of the *other* experts.
From that bar, z_i and s_i follows P_i, with the distribution function of the normal distribution.
"""
import torch


def bar(noisy, k):
    """noisy (N, E), the logits H -> (N, E): what each expert must beat to be among the k largest,
    the k-th largest of the H of the other experts. k < E; no two H of a token are equal."""
    top = noisy.topk(k + 1, -1).values                                              # (N, k+1)
    kth, next_one = top[:, k - 1:k], top[:, k:]
    # one of the k largest is not among its own others: without it, the (k+1)-th moves up to place k
    return torch.where(noisy > next_one, next_one, kth)


def smooth_load(clean, noisy, std, k):
    """clean z, noisy H and std s, each (N, E) -> the load (E,), with gradients to all three."""
    # e is drawn anew, so H_i is not in it, but z_i: z + e s > bar for e > (bar - z) / s
    chance = torch.special.ndtr((clean - bar(noisy, k)) / std)                      # (N, E)
    return chance.sum(0)


def cv_squared(load):
    """(E,) -> (): the variance over the square of the mean. The E loads are all there are, and no
    sample of more: divide by E, not by E - 1."""
    # without a unit, so that it does not depend on how many tokens there are; 0 for an even load
    return load.var(correction=0) / load.mean() ** 2


# ---- the check ----
import balance  # noqa: E402
from course.check import ask, close, grads, shape  # noqa: E402
from routers import ROUTERS  # noqa: E402
from settings import FFNConfig  # noqa: E402

SIZES = (5, 4, 2), (3, 6, 1), (7, 5, 4), (1, 3, 2)        # N, E, k


def batch(N, E, k):
    """(clean, noise, std) and what the repository's router makes of them, its smooth load."""
    router = ROUTERS["noisy_topk"](FFNConfig(n_expert=E, top_k=k), 2 * E)
    # its input holds both logits, and its two matrices pick them out
    router.score.weight.data = torch.eye(E, 2 * E)
    router.noise.weight.data = torch.eye(2 * E)[E:]
    random = torch.Generator().manual_seed(10 * N + E)
    x = torch.randn(N, 2 * E, generator=random)
    seed = 100 + N

    def oracle(clean, raw):
        torch.manual_seed(seed)
        return router.train()(torch.cat([clean, raw], 1), None).smooth_load

    torch.manual_seed(seed)
    return x[:, :E], torch.randn(N, E), x[:, E:], oracle


def check(mine):
    for N, E, k in SIZES:
        clean, noise, raw, oracle = batch(N, E, k)
        std = torch.nn.functional.softplus(raw).clamp_min(0.01)
        noisy = clean + noise * std
        bars(mine, noisy, k)
        got = mine.smooth_load(clean.clone(), noisy.clone(), std.clone(), k)
        shape("the load", got, (E,))
        want = oracle(clean, raw)
        if not torch.allclose(got, want, rtol=1e-5):
            diagnose(mine, got, clean, noisy, std, k)
        close("the load", got, want, hint=f"N = {N}, E = {E}, k = {k}")

        def through(clean, raw):
            std = torch.nn.functional.softplus(raw).clamp_min(0.01)
            return mine.smooth_load(clean, clean + noise * std, std, k)

        theirs, ours = grads(through, clean, raw), grads(oracle, clean, raw)
        for name, a, b in zip(("clean", "std"), theirs, ours):
            ask(a.any(), f"the load has no gradient to {name}: a smooth load is made to have one")
            close(f"the gradient to {name}", a, b, rtol=1e-4,
                  hint="the bar carries one as well, since it is another expert's H")
        variation(mine, want)


def bars(mine, noisy, k):
    """The bar is the k-th largest of the others, counted here expert by expert."""
    (N, E), got = noisy.shape, mine.bar(noisy.clone(), k)
    shape("bar", got, (N, E))
    for n in range(N):
        for i in range(E):
            others = sorted((noisy[n, j].item() for j in range(E) if j != i), reverse=True)
            value = got[n, i].item()
            chosen = sum(o > noisy[n, i] for o in others) < k
            among = "one of the" if chosen else "not among the"
            name = f"the bar of token {n}, expert {i}, which is {among} k = {k} largest,"
            ask(not chosen or value < others[k - 1] + 1e-6, f"{name} is too high: leave expert {i} "
                "out before you take the k-th largest")
            ask(chosen or value > others[k - 1] - 1e-6, f"{name} is too low: it must beat the k-th "
                "largest, since all of the k that were chosen are others")
            close(name, value, others[k - 1])


def diagnose(mine, got, clean, noisy, std, k):
    """Raises Wrong for what is often mistaken."""
    bars = mine.bar(noisy, k)

    phi, far = torch.special.ndtr, (clean - bars) / std
    for chance, why in (
            (phi(far) / len(clean), "the load is a mean over the tokens, and eq. 10 is their sum"),
            (phi((noisy - bars) / std), "you measure from H, with the noise that was drawn: its "
             "own is drawn once more, so measure from z, the clean logit"),
            (phi(clean - bars), "the distance to the bar is not divided by std"),
            (phi(far / std), "you divide by the variance: std is a standard deviation"),
            (phi(-far), "this is the chance to stay below the bar: the sign"),
            (far.sigmoid(), "the noise is normal, so it is torch.special.ndtr, not the sigmoid"),
            (torch.erf(far) / 2 + 0.5, "Phi(x) is (1 + erf(x / sqrt(2))) / 2: the square root of 2 "
             "is missing"),
            ((noisy > bars).float(), "this is the count of the tokens, which has no gradient")):
        ask(not torch.allclose(got, chance.sum(0), rtol=1e-4), why)


def variation(mine, load):
    got, want = mine.cv_squared(load.detach()), balance.cv_squared(load.detach())
    E = len(load)
    shape("cv_squared", got, ())
    for other, why in (
            (want * E / (E - 1), f"divides by E - 1 = {E - 1}: torch's var estimates that of a "
             f"larger population, and these E = {E} loads are all there are"),
            (want.sqrt(), "is the coefficient of variation: square it"),
            (want * load.mean() ** 2, "is the variance alone: over the square of the mean it does "
             "not depend on the number of tokens")):
        ask(abs(got - other) > 1e-5 * want, f"cv_squared {why}")
    close("cv_squared", got, want, rtol=1e-4)


WRONG = [
    ("return torch.where(noisy > next_one, next_one, kth)", "return kth.expand_as(noisy)",
     "before you take the k-th largest"),
    ("return torch.where(noisy > next_one, next_one, kth)", "return next_one.expand_as(noisy)",
     "is too low: it must beat the k-th largest"),
    ("(clean - bar(noisy, k)) / std", "(noisy - bar(noisy, k)) / std", "measure from z"),
    ("(clean - bar(noisy, k)) / std", "clean - bar(noisy, k)", "not divided by std"),
    ("(clean - bar(noisy, k)) / std", "(clean - bar(noisy, k)) / std ** 2", "by the variance"),
    ("(clean - bar(noisy, k)) / std", "(bar(noisy, k) - clean) / std", "to stay below the bar"),
    ("torch.special.ndtr((clean", "torch.sigmoid((clean", "not the sigmoid"),
    ("torch.special.ndtr((clean - bar(noisy, k)) / std)",
     "(torch.erf((clean - bar(noisy, k)) / std) / 2 + 0.5)", "square root of 2"),
    ("bar(noisy, k)) / std", "bar(noisy, k).detach()) / std", "the bar carries one as well"),
    ("return chance.sum(0)", "return chance.mean(0)", "eq. 10 is their sum"),
    ("torch.special.ndtr((clean - bar(noisy, k)) / std)", "(noisy > bar(noisy, k)).float()",
     "which has no gradient"),
    ("load.var(correction=0)", "load.var()", "divides by E - 1"),
    ("load.var(correction=0) / load.mean() ** 2", "load.std(correction=0) / load.mean()",
     "square it"),
    (" / load.mean() ** 2", "", "the variance alone"),
]
