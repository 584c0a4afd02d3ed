"""Finer experts for the same FLOPs.

lecture 4 · difficulty 2 of 5 · importance 4 of 5 · 30 minutes · 4 points

A layer has n_expert experts of hidden width d_ff, and a token visits top_k of them. Granularity G
(Krajewski 2024, 2402.07871) cuts every expert into G narrower ones along its hidden width. A token
then visits G times as many, so that its feed-forward FLOPs and the parameters stay what they were.
Input and output of an expert keep the width d.

Two costs do not stay. The router has a row of d numbers for every expert there is, not only for
those that a token visits. And FLOPs that the router takes are tokens that the same budget cannot
train on.

    FLOPs of a token in a layer = 2 d E (router) + k experts of some matrices, d w numbers each

A multiply-add is 2 FLOPs. Bias, activation, softmax and top-k are not counted.

Write the arithmetic. Then, before you look at any figure, write into predict() what you expect of
models with 8 experts, 2 layers and d = 64, at a fixed budget of 480 steps with G = 1 (983,040
tokens of a Markov source). Equal FLOPs there are those of the paper's count, in which a layer takes
14 d E for routing and 72 d^2 for all else. Each sparse layer ends in a norm, as in the paper. The
check prints what came out: three seeds, recorded in results/fine_grained.

It matters because every comparison of sparse models rests on such a count. One that forgets the
router always finds that the finest experts are best.
"""


def split(G, d_ff, n_expert, top_k):
    """(w, E, k): hidden width, number and choices of a token, of the experts at granularity G, int.
    d_ff, n_expert and top_k are those of G = 1. ValueError if G does not divide d_ff."""
    # a width that is rounded would change the FLOPs that should stay equal
    if d_ff % G:
        raise ValueError(f"G = {G} does not divide d_ff = {d_ff}")
    # narrower by G, G times as many, G times as many visited: E w and k w stay
    return d_ff // G, G * n_expert, G * top_k


def flops(d, w, E, k, matrices):
    """Forward FLOPs of one token in the layer, router included. matrices: those of an expert, each
    of d w numbers: 2, or 3 with SwiGLU."""
    # the router scores all E experts, also those that the token does not visit
    router = 2 * d * E
    # a token passes k experts and all their matrices
    return router + k * matrices * 2 * d * w


def steps(G, steps_1, d, d_ff, n_expert, top_k, matrices, other):
    """Training steps that a model with granularity G gets for the FLOPs that steps_1 steps with
    G = 1 take, rounded down, int; all steps have the same number of tokens. It has one such layer,
    and `other` are the forward FLOPs of a token in all the rest."""
    # the budget is that of the whole model: what is no expert dilutes the router's growth
    coarse = other + flops(d, *split(1, d_ff, n_expert, top_k), matrices)
    fine = other + flops(d, *split(G, d_ff, n_expert, top_k), matrices)
    # backward passes cost twice the forward pass in both, which cancels
    return steps_1 * coarse // fine


def predict():
    """Your predictions, as a dict of numbers:

    gain_at_equal_tokens    nats by which G = 4 ends below G = 1 after equally many tokens, +- 0.1
    best_at_equal_flops     the G of 1, 2, 4, 8 and 32 with the lowest loss at equal FLOPs; half or
                            twice the best one passes, too
    worst_at_equal_flops    the G of these with the highest"""
    return dict(
        # the law's fit for 64 experts gives 3.790 - 3.655 = 0.135 nats from G = 1 to G = 4
        gain_at_equal_tokens=0.135,
        # every doubling gains less than the one before and costs twice as much routing
        best_at_equal_flops=4,
        # 256 experts of width 8 at d = 64: by the paper's count routing then costs 0.78 times all
        # else, so that it sees 277 steps instead of 480
        worst_at_equal_flops=32)


# ---- the check ----
import csv  # noqa: E402
from pathlib import Path  # noqa: E402
from statistics import mean  # noqa: E402

import torch  # noqa: E402

from course.check import Wrong, ask  # noqa: E402
from model import GPT  # noqa: E402
from settings import Config, FFNConfig, ModelConfig  # noqa: E402

RUNS = Path(__file__).parents[2] / "results" / "fine_grained" / "cpu" / "runs.csv"


def check(mine):
    for case in ((4, 256, 8, 1, 2), (2, 48, 3, 2, 3), (8, 64, 4, 1, 3), (1, 40, 5, 2, 2)):
        check_split(mine, *case)
    try:
        found = mine.split(3, 256, 8, 1)
        raise Wrong(f"split(G = 3, d_ff = 256, ...) is {found}: 3 does not divide 256, so raise a ValueError")
    except ValueError:
        pass
    for case in ((64, 4, 256, 8, 1, 2), (32, 2, 48, 3, 2, 3), (16, 8, 64, 4, 1, 3), (24, 1, 40, 5, 2, 2)):
        check_flops(mine, *case)
    # layers in which routing is a small and a large part of the model
    for case in ((64, 256, 8, 1, 2), (32, 48, 16, 2, 3)):
        for G in (1, 2, 8, 16):
            check_steps(mine, G, *case)
    check_prediction(mine.predict())


def layer_of(d, G, d_ff, n_expert, top_k, matrices):
    """A model of this repository, without numbers, and its only sparse layer."""
    ffn = FFNConfig(n_expert=n_expert, top_k=top_k, granularity=G, d_ff=d_ff, moe_layers=[0],
                    activation="swiglu" if matrices == 3 else "gelu", gate_order="softmax_then_topk")
    with torch.device("meta"):
        model = GPT(Config(ModelConfig(n_layer=2, n_embd=d, n_head=2, block_size=32, vocab_size=50), ffn))
    return model, model.blocks[0].ffn


def check_split(mine, G, d_ff, n_expert, top_k, matrices):
    given = f"split({G}, {d_ff}, {n_expert}, {top_k})"
    found = mine.split(G, d_ff, n_expert, top_k)
    ask(isinstance(found, tuple) and len(found) == 3 and all(isinstance(n, int) for n in found),
        f"{given} is {found!r}, not three whole numbers (w, E, k)")
    _, layer = layer_of(16, G, d_ff, n_expert, top_k, matrices)
    want = layer.experts.w_out.shape[2], layer.n_expert, layer.n_active
    (w, E, k), (w_want, E_want, k_want) = found, want
    for wrong, sentence in [
            (w != w_want, f"the hidden width is {w}, not d_ff / G = {w_want}: experts become narrower"),
            (E == n_expert != E_want, f"there are still {E} experts, which hold 1/{G} of the parameters: "
                                      f"{E_want} keep them"),
            (k == top_k != k_want, f"a token still visits {k}, a width of {k * w} instead of {top_k * d_ff}: "
                                   f"it must visit G times as many, {k_want}")]:
        ask(not wrong, f"{given} is {found}: {sentence}")
    ask(found == want, f"{given} is {found}, not {want}")


def check_flops(mine, d, G, d_ff, n_expert, top_k, matrices):
    _, layer = layer_of(d, G, d_ff, n_expert, top_k, matrices)
    (E, _, w), k, want = layer.experts.w_out.shape, layer.n_active, layer.flops_per_token()
    given = f"flops(d={d}, w={w}, E={E}, k={k}, matrices={matrices})"
    found = mine.flops(d, w, E, k, matrices)
    ask(isinstance(found, (int, float)), f"{given} is {found!r}, not a number")
    router, one = 2 * layer.router.score.weight.numel(), (want - 2 * layer.router.score.weight.numel()) // k
    for value, sentence in {
            want / 2: "half as many: a multiply-add is 2 FLOPs",
            k * one: "the router is missing: it scores every expert",
            k * one + 2 * d * k: f"the router scores all {E} experts, not only the {k} that the token visits",
            router + E * one: f"a token passes {k} experts, not all {E}",
            router + one: f"a token passes {k} experts, not one",
            router + k * one * 2 // matrices: "SwiGLU has a third matrix"}.items():
        ask(found == want or found != value, f"{given} is {found:,}, not {want:,}: {sentence}")
    ask(found == want, f"{given} is {found:,}, not {want:,}")


def check_steps(mine, G, d, d_ff, n_expert, top_k, matrices, steps_1=480):
    (coarse, layer), (fine, finer) = (layer_of(d, g, d_ff, n_expert, top_k, matrices) for g in (1, G))
    total = [model.flops_per_token() for model in (coarse, fine)]
    own = [one.flops_per_token() for one in (layer, finer)]
    want = steps_1 * total[0] // total[1]
    found = mine.steps(G, steps_1, d, d_ff, n_expert, top_k, matrices, total[0] - own[0])
    given = f"steps for G = {G}, d = {d}, d_ff = {d_ff}, {n_expert} experts, matrices = {matrices}"
    for value, sentence in {
            steps_1: "the router grows with G, so that a step costs more",
            steps_1 * total[1] // total[0]: "a model whose tokens cost more gets fewer of them",
            steps_1 * own[0] // own[1]: "the budget is that of the whole model, not of this layer"}.items():
        ask(found == want or found != value, f"{given} are {found}, not {want}: {sentence}")
    ask(found == want, f"{given} are {found!r}, not {want}")
    ask(isinstance(found, int), f"{given} are {found!r}: a whole number, {want}")


def check_prediction(found):
    names = ["gain_at_equal_tokens", "best_at_equal_flops", "worst_at_equal_flops"]
    ask(isinstance(found, dict) and sorted(found) == sorted(names),
        f"predict() is {found!r}, not a dict of {', '.join(names)}")
    ask(all(isinstance(n, (int, float)) for n in found.values()), f"predict() is {found}: numbers are wanted")
    with open(RUNS, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    loss = {arm: mean(float(row["val_loss"]) for row in rows if row["arm"] == arm)
            for arm in {row["arm"] for row in rows}}
    tokens, equal = ({G: loss[f"{kind}-{G}"] for G in sizes} for kind, sizes in (
        ("tokens", (1, 2, 4, 8)), ("flops", (2, 4, 8, 32))))
    equal = {1: tokens[1]} | equal                      # the budget is that of G = 1
    plain = loss["no-norm-1"] - loss["no-norm-4"]
    gain, best, worst = tokens[1] - tokens[4], min(equal, key=equal.get), max(equal, key=equal.get)
    print("validation loss, nats a token, means of three seeds (results/fine_grained/cpu)\n"
          f"  equal tokens  {'   '.join(f'G = {G}: {nats:.3f}' for G, nats in tokens.items())}\n"
          f"  equal FLOPs   {'   '.join(f'G = {G}: {nats:.3f}' for G, nats in equal.items())}\n"
          f"  G = 4 gains {gain:.3f} nats at equal tokens. These layers end in a norm; without one G = 1\n"
          f"  ends at {loss['no-norm-1']:.3f} and G = 4 at {loss['no-norm-4']:.3f}: a gain of {plain:.3f}.")
    mine = found["gain_at_equal_tokens"]
    ask(abs(mine - gain) <= 0.1, f"you predict that G = 4 ends {mine:g} nats below G = 1 at equal tokens; "
        f"it was {gain:.3f} (band: 0.1 nats): read the law's table for a guess")
    mine = found["best_at_equal_flops"]
    ask(mine in equal and best / 2 <= mine <= best * 2, f"you predict that G = {mine:g} is best at equal "
        f"FLOPs; it was {best} (band: its neighbours): what does one more doubling gain, and what does it "
        "cost?")
    mine = found["worst_at_equal_flops"]
    ask(mine == worst, f"you predict that G = {mine:g} is worst at equal FLOPs; it was {worst}: how many "
        "tokens does each see?")


WRONG = [
    ("return d_ff // G, G * n_expert", "return d_ff, G * n_expert", "experts become narrower"),
    ("G * n_expert, G * top_k", "n_expert, G * top_k", "hold 1/4 of the parameters"),
    ("G * n_expert, G * top_k", "G * n_expert, top_k", "instead of 256"),
    ("if d_ff % G:", "if False:", "raise a ValueError"),
    ("router = 2 * d * E", "router = 0", "the router is missing"),
    ("router = 2 * d * E", "router = 2 * d * k", "not only the 4"),
    ("router + k * matrices", "router + E * matrices", "not all 32"),
    ("router + k * matrices * 2", "router / 2 + k * matrices", "a multiply-add is 2 FLOPs"),
    ("k * matrices * 2 * d * w", "k * 2 * 2 * d * w", "SwiGLU has a third matrix"),
    ("steps_1 * coarse // fine", "steps_1 * fine // coarse", "gets fewer of them"),
    ("fine = other + flops(d, *split(G,", "fine = other + flops(d, *split(1,", "the router grows with G"),
    ("return steps_1 * coarse // fine", "return steps_1 * (coarse - other) // (fine - other)",
     "not of this layer"),
    ("gain_at_equal_tokens=0.135", "gain_at_equal_tokens=-0.1", "ends -0.1 nats below"),
    ("best_at_equal_flops=4", "best_at_equal_flops=32", "G = 32 is best"),
    ("worst_at_equal_flops=32", "worst_at_equal_flops=1", "G = 1 is worst"),
]
