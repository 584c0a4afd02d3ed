"""What experts are worth: two scaling laws.

lecture 4 · difficulty 3 of 5 · importance 3 of 5 · 40 minutes · 5 points

Clark et al. 2022 (2202.01169, eq. 1) give the loss of a model in which each token visits one of E
experts. N are the parameters of the dense model that it is at E = 1, and all models read 130
billion tokens:

    log10 L = a log10 N + b log10 Ê + c log10 N log10 Ê + d         (L in nats a token)
    1/Ê = 1/(E - 1 + 1/(1/E_start - 1/E_max)) + 1/E_max

Ê are the experts that count: E_start of them at E = 1, E_max at infinitely many. The effective
parameters N' of (N, E) are those of the dense model with the same predicted loss.

Krajewski et al. 2024 (2402.07871) let the tokens D vary, too, and cut experts to granularity G:

    L = c + (g / G^gamma + a) / N^alpha + b / D^beta                (nats a token)
    N = d^2 (8 E + 4) blocks                all experts counted, embeddings not
    FLOPs = (72 d^2 + 14 d E G) D blocks    of training; 14 d E G are the routing
    d = 64 blocks                           not rounded: a shape that gives back the paper's table

Here E is the expansion, the feed-forward parameters over those of the dense model. A budget of
FLOPs buys a size, a number of tokens and a granularity; find the best.

A law comes as an object with its coefficients as attributes: law.a, law.b, law.c, law.d,
law.E_start and law.E_max, or law.a, law.alpha, law.b, law.beta, law.g, law.gamma and law.c. All
numbers are plain floats.

It matters because "how many experts, how fine, on how many tokens" is asked before every large
run, and because both laws show where the gain ends.
"""
import math

GRANULARITIES = [2 ** i for i in range(13)]             # what optimum() chooses G from


def experts_that_count(law, E):
    """Clark's Ê of E experts."""
    # at E = 1 the inner sum is 1/(1/E_start - 1/E_max), and Ê comes out as E_start, not 1
    start = 1 / (1 / law.E_start - 1 / law.E_max)
    return 1 / (1 / (E - 1 + start) + 1 / law.E_max)


def clark_loss(law, N, E):
    """Clark's L for a dense size N and E experts."""
    n, e = math.log10(N), math.log10(experts_that_count(law, E))
    # c > 0: the slope over experts, b + c log10 N, is flatter in a larger model
    return 10 ** (law.a * n + law.b * e + law.c * n * e + law.d)


def effective_parameters(law, N, E):
    """N', the size of the dense model with the loss of (N, E), so that N' = N at E = 1."""
    # a dense model has Ê = E_start: log10 L = (a + c log10 E_start) log10 N' + b log10 E_start + d
    start = math.log10(law.E_start)
    slope = law.a + law.c * start
    # solve that line for the loss of (N, E)
    rest = law.b * start + law.d
    return 10 ** ((math.log10(clark_loss(law, N, E)) - rest) / slope)


def krajewski_loss(law, N, D, G):
    """Krajewski's L for N parameters in all, D tokens and granularity G."""
    # granularity and size share a term: finer experts make the parameters worth more
    return law.c + (law.g / G ** law.gamma + law.a) / N ** law.alpha + law.b / D ** law.beta


def training_flops(N, D, G, E):
    """FLOPs that train N parameters in all, with expansion E and granularity G, on D tokens."""
    # N = d^2 (8 E + 4) blocks and d = 64 blocks, so N = 64^2 (8 E + 4) blocks^3
    blocks = (N / (64 ** 2 * (8 * E + 4))) ** (1 / 3)
    d = 64 * blocks
    # a token meets 12 d^2 weights a block, each for 6 FLOPs there and back, and the router's d E G
    return (12 * d * d * 6 + d * E * G * 14) * D * blocks


def optimum(law, flops, E):
    """(N, D, G) with the lowest loss that this many training FLOPs can buy, G one of GRANULARITIES.
    N to about 1 %."""
    best = (math.inf,)
    for G in GRANULARITIES:
        # at each size the budget leaves so many tokens; try sizes in steps of 2 %
        for i in range(1200):
            N = 1e6 * 1.02 ** i
            D = flops / training_flops(N, 1, G, E)
            best = min(best, (krajewski_loss(law, N, D, G), N, D, G))
    return best[1:]


# ---- the check ----
from course.check import ask, close  # noqa: E402
from lab.laws import laws  # noqa: E402


def number(name, found):
    """The answer as a float, refused if it is none."""
    ask(isinstance(found, (int, float)) and not isinstance(found, bool),
        f"{name} is {found!r}, not a number")
    return float(found)


def same(found, want):
    return math.isclose(found, want, rel_tol=1e-4)


def check(mine):
    for router in ("s_base", "hash", "rl_r"):
        check_clark(mine, router, laws.CLARK[router])
    for E in (64, 16):
        check_krajewski(mine, laws.KRAJEWSKI[E], E)
        for flops in (3e18, 1e20, 5e24):
            check_optimum(mine, laws.KRAJEWSKI[E], flops, E)


def check_clark(mine, router, law):
    for E in (1, 8, 64, 512, 1e9):
        name = f"Ê of {router} at E = {E:g}"
        found, want = number(name, mine.experts_that_count(law, E)), laws.saturated_experts(law, E)
        ask(same(found, want) or not same(found, E), f"{name} is E itself: it starts at E_start = "
            f"{law.E_start:g} and ends at E_max = {law.E_max:g}")
        ask(same(found, want) or E > 1, f"{name} is {found:.4g}, not E_start = {law.E_start:g}")
        ask(found < law.E_max * 1.001, f"{name} is {found:.4g}, more than E_max = {law.E_max:g}")
        close(name, found, want, 1e-5)
    for N, E in ((5e6, 128), (1.3e9, 64), (7e9, 8), (15e6, 1)):
        check_loss(mine, f"L of {router} at N = {N:g}, E = {E}", law, N, E)
    for N, E in ((15e6, 1), (1.3e9, 1), (5e6, 128), (1.3e9, 64)):
        check_effective(mine, f"N' of {router} at N = {N:g}, E = {E}", law, N, E)


def check_loss(mine, name, law, N, E):
    found, want = number(name, mine.clark_loss(law, N, E)), laws.clark_loss(law, N, E)
    n, e = math.log(N), math.log(laws.saturated_experts(law, E))
    natural = law.a * n + law.b * e + law.c * n * e + law.d
    for value, sentence in {
            laws.clark_loss(law._replace(E_start=1, E_max=1e30), N, E): "E stands where Ê belongs",
            laws.clark_loss(law._replace(c=0), N, E): "the term c log10 N log10 Ê is missing",
            math.log10(want): "this is log10 L, not L",
            math.exp(math.log10(want)): "log10 L is a logarithm to the base 10, so L = 10^...",
            math.exp(natural): "the logarithms are to the base 10; to the base e, c and d would be others",
            10 ** natural: "the logarithms of N and Ê are to the base 10, too"}.items():
        ask(same(found, want) or not same(found, value),
            f"{name} is {found:.4g}, not {want:.4g}: {sentence}")
    close(name, found, want, 1e-5)


def check_effective(mine, name, law, N, E):
    found, want = number(name, mine.effective_parameters(law, N, E)), laws.effective_params(law, N, E)
    ask(E > 1 or same(found, N), f"{name} is {found:.4g}: a dense model is worth itself, {N:.4g}. It has "
        f"Ê = E_start = {law.E_start:g}, not 1, so its slope is a + c log10 E_start and its level "
        "b log10 E_start + d")
    ask(E == 1 or not same(found, N * E), f"{name} is N E: experts are worth less than their parameters")
    ask(E == 1 or found > N, f"{name} is {found:.4g}, less than the {N:.4g} that are there without experts")
    dense, sparse = laws.clark_loss(law, found, 1), laws.clark_loss(law, N, E)
    ask(same(found, want), f"{name} is {found:.4g}, not {want:.4g}: a dense model of that size has L = "
        f"{dense:.4f}, the {E} experts {sparse:.4f}")


def check_krajewski(mine, law, E):
    for N, D, G in ((64 * 7e6, 16e9, 1), (64 * 1e9, 3e10, 16), (6e7, 1e9, 4)):
        name = f"L at N = {N:g}, D = {D:g}, G = {G} (E = {E})"
        found, want = number(name, mine.krajewski_loss(law, N, D, G)), laws.krajewski_loss(law, N, D, G)
        for value, sentence in {
                want - law.c: "the loss c that no size removes is missing",
                laws.krajewski_loss(law, D, N, G): "N and D are swapped",
                want + law.g / G ** law.gamma * (1 - N ** -law.alpha):
                    "g / G^gamma is divided by N^alpha, too",
                laws.krajewski_loss(law, N * 12 / (8 * E + 4), D, G):
                    "N counts all experts, not only those that a token visits"}.items():
            ask(same(found, want) or not same(found, value),
                f"{name} is {found:.4f}, not {want:.4f}: {sentence}")
        close(name, found, want, 1e-5)
        check_flops(mine, N, D, G, E)


def check_flops(mine, N, D, G, E):
    name = f"training FLOPs at N = {N:g}, D = {D:g}, G = {G}, E = {E}"
    (d, blocks), found = laws.shape_of(N, E), number(name, mine.training_flops(N, D, G, E))
    want = laws.krajewski_flops(d, blocks, D, G, E)
    active = laws.shape_of(N, 1)                        # the shape if N were 12 d^2 blocks
    for value, sentence in {
            laws.krajewski_flops(d, blocks, D, G, E, 0): "routing, d E G 14 a block and token, is missing",
            laws.krajewski_flops(d, blocks, D, 1, E): "routing grows with G: there are E G experts to choose "
                                                      "from",
            laws.krajewski_flops(*active, D, G, E): "N counts all experts, d^2 (8 E + 4) a block, so that "
                                                    f"d is {d:.0f} and not {active[0]:.0f}",
            want + (8 * E - 8) * d * d * 6 * D * blocks: "a token meets 12 d^2 weights a block, not all "
                                                         "(8 E + 4) d^2",
            want - 12 * d * d * 4 * D * blocks: "6 FLOPs a weight and token: 2 forward and 4 backward",
            want / blocks: "all blocks count"}.items():
        ask(same(found, want) or not same(found, value),
            f"{name} are {found:.4g}, not {want:.4g}: {sentence}")
    close(name, found, want, 1e-5)


def check_optimum(mine, law, flops, E):
    given, found = f"optimum for {flops:g} FLOPs at E = {E}", mine.optimum(law, flops, E)
    ask(isinstance(found, tuple) and len(found) == 3, f"{given} is {found!r}, not a tuple (N, D, G)")
    N, D, G = (number(f"{name} of the {given}", n) for name, n in zip("NDG", found))
    ask(G in GRANULARITIES, f"{given} has G = {G:g}, which is not one of GRANULARITIES")
    best, spent = laws.compute_optimal(flops, E), laws.krajewski_flops(*laws.shape_of(N, E), D, G, E)
    ask(abs(spent / flops - 1) < 0.01,
        f"{given} is N = {N:.3g}, D = {D:.3g}, G = {G:g}, which take {spent:.3g} FLOPs")
    loss = laws.krajewski_loss(law, N, D, G)
    with_G = best.loss if G == best.G else laws.compute_optimal(flops, E, granularities=[int(G)]).loss
    ask(with_G < best.loss + 1e-5, f"{given} has G = {G:g}, whose best loss is {with_G:.4f}; G = {best.G} "
        f"reaches {best.loss:.4f}. Each G has its own best N and D")
    ask(loss < best.loss + 1e-4, f"{given} is N = {N:.3g}, D = {D:.3g}, G = {G:g} with L = {loss:.4f}; N = "
        f"{best.N:.3g}, D = {best.D:.3g} reach {best.loss:.4f} with the same G and FLOPs")


WRONG = [
    ("return 1 / (1 / (E - 1 + start) + 1 / law.E_max)", "return E", "is E itself"),
    ("E - 1 + start", "E + start", "not E_start"),
    ("(E - 1 + start) + 1 / law.E_max)", "(E - 1 + start))", "not E_start"),
    ("math.log10(N), math.log10(experts_that_count(law, E))", "math.log10(N), math.log10(E)",
     "E stands where"),
    ("n, e = math.log10(N), math.log10(exp", "n, e = math.log(N), math.log(exp",
     "of N and Ê are to the base 10, too"),
    ("law.c * n * e + law.d)", "law.d)", "is missing"),
    ("slope = law.a + law.c * start", "slope = law.a", "a dense model is worth itself"),
    ("    rest = law.b * start + law.d", "    rest = law.d", "a dense model is worth itself"),
    ("return 10 ** ((math.log10(clark_loss(law, N, E)) - rest) / slope)", "return N * E",
     "worth less than their parameters"),
    ("(law.g / G ** law.gamma + law.a) / N", "law.g / G ** law.gamma + law.a / N", "divided by N^alpha, too"),
    ("return law.c + (law.g", "return (law.g", "no size removes"),
    ("12 * d * d * 6 + d * E * G * 14", "12 * d * d * 6", "routing, d E G 14"),
    ("d * E * G * 14", "d * E * 14", "routing grows with G"),
    ("12 * d * d * 6", "(8 * E + 4) * d * d * 6", "not all (8 E + 4)"),
    ("12 * d * d * 6", "12 * d * d * 2", "2 forward and 4 backward"),
    ("(64 ** 2 * (8 * E + 4))", "(64 ** 2 * 12)", "counts all experts"),
    ("for G in GRANULARITIES:", "for G in [1]:", "has G = 1, whose best loss"),
    ("1e6 * 1.02 ** i", "1e9 * 1.00002 ** i", "with L ="),
]
