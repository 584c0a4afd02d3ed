"""lab/scaling.py and its parts: the published laws against the papers' numbers, the fits against
known laws, the command line."""
import csv

import numpy as np
import pytest

from lab.laws import fit as method
from lab.laws.fit import curves
from lab.laws.fit_runs import FitError, by_router, fit_clark, fit_krajewski
from lab.laws.laws import (CLARK, CLARK_REFIT, KRAJEWSKI, Clark, Krajewski, clark_loss,
                           compute_optimal, dense_flops, dense_optimal, effective_params,
                           krajewski_flops, krajewski_loss, saturated_experts, shape_of)
from lab.scaling import amount, main

# Krajewski's table of compute-optimal models: dense size times 64, tokens, granularity, FLOPs,
# loss.
OPTIMA = [(100e6, 4.37e9, 8, 2.95e18, 3.133), (1e9, 28.94e9, 16, 1.93e20, 2.491),
          (3e9, 72.9e9, 16, 1.41e21, 2.245), (7e9, 137.6e9, 32, 6.46e21, 2.076),
          (70e9, 941e9, 32, 4.16e23, 1.694), (300e9, 2.96e12, 64, 5.69e24, 1.503),
          (1e12, 7.94e12, 64, 4.97e25, 1.367)]
# Final validation losses of Clark's released S-BASE runs: size -> dense, E = 2, 4, 8, ..., 512.
S_BASE = {15e6: [3.162, 3.1124, 3.0495, 2.9855, 2.9009, 2.8269, 2.7557, 2.6908, 2.6334, 2.6205],
          25e6: [3.0284, 2.9872, 2.9307, 2.8577, 2.7833, 2.7083, 2.6411, 2.5779, 2.5260, 2.4895],
          370e6: [2.4633, 2.4360, 2.3885, 2.3405, 2.2938, 2.2499, 2.2108, 2.1796, 2.1536, 2.1351],
          1.3e9: [2.242, 2.2288, 2.1863, 2.1470, 2.1136, 2.0806, 2.0544, 2.0306, 2.0145, 1.9991]}
POWERS = 2.0 ** np.arange(11)


def clark_row(N, E, loss, seed=0, **more):
    """A row as the experiments write it; the router adds a few parameters, a dense run has one
    expert."""
    active = N * (1 + E / 10_000 * (E > 1))
    return dict(arm=f"n{N:g}-e{E}", seed=seed, n_embd=N, n_expert=E, active_params=active,
                tokens=2e6,
                total_params=active if E == 1 else N * (1 + E / 2), val_loss=loss) | more


def clark_rows(law, sizes, experts, seeds=1, noise=0.003, **more):
    rng = np.random.default_rng(0)
    return [clark_row(N, E, clark_loss(law, N, E) * np.exp(noise * rng.standard_normal()), seed,
                      **more)
            for N in sizes for E in experts for seed in range(seeds)]


def fine_rows(law, sizes, tokens, granularities, seeds=1, noise=0.003, **more):
    rng = np.random.default_rng(0)
    return [dict(arm=f"g{G}", seed=seed, n_embd=N, n_expert=64, granularity=G, tokens=D,
                 active_params=N / 40,
                 total_params=N * (1 + G / 1000),
                 val_loss=krajewski_loss(law, N * (1 + min(granularities) / 1000), D, G)
                 * np.exp(noise * rng.standard_normal())) | more
            for N in sizes for D in tokens for G in granularities for seed in range(seeds)]


def assert_inside(fit, law):
    outside = {name: (getattr(law, name), interval) for name, interval in fit.interval.items()
               if not interval[0] <= getattr(law, name) <= interval[1]}
    assert not outside


# --- Krajewski's law ---

@pytest.mark.parametrize("dense, D, G, flops, loss", OPTIMA)
def test_krajewski_table_of_optima(dense, D, G, flops, loss):
    N = dense / 12 * (8 * 64 + 4)
    d_model, n_blocks = shape_of(N, 64)
    assert d_model ** 2 * (8 * 64 + 4) * n_blocks == pytest.approx(N)
    assert krajewski_flops(d_model, n_blocks, D, G, 64) == pytest.approx(flops, rel=0.01)
    assert krajewski_loss(KRAJEWSKI[64], N, D, G) == pytest.approx(loss, abs=0.03)
    tokens = flops / krajewski_flops(d_model, n_blocks, 1, POWERS, 64)
    assert POWERS[krajewski_loss(KRAJEWSKI[64], N, tokens, POWERS).argmin()] == G
    best = compute_optimal(flops)
    assert best.G == G and best.loss == pytest.approx(loss, abs=0.03)
    assert best.N == pytest.approx(N, rel=0.05) and best.D == pytest.approx(D, rel=0.05)


def test_krajewski_losses_and_routing_share_of_published_shapes():
    G = POWERS[:5]
    small = krajewski_loss(KRAJEWSKI[64], 256 ** 2 * 516 * 4, 16e9, G)
    large = krajewski_loss(KRAJEWSKI[64], 512 ** 2 * 516 * 8, 16e9, G)
    assert small == pytest.approx([3.790, 3.709, 3.655, 3.619, 3.595], abs=6e-4)
    assert large == pytest.approx([3.291, 3.227, 3.185, 3.156, 3.137], abs=6e-4)
    bare = krajewski_flops(256, 4, 1, 1, 64, c_r=0)
    shares = krajewski_flops(256, 4, 1, np.array([1, 4, 8, 16, 64]), 64) / bare - 1
    assert shares == pytest.approx([.049, .194, .389, .778, 3.11], abs=6e-3)


def test_krajewski_dense_costs_6ND_and_the_mixture_saves_what_the_paper_says():
    assert krajewski_flops(*shape_of(1e9, 1), 2e10, 1, 1, c_r=0) == pytest.approx(6 * 1e9 * 2e10)
    mixture = compute_optimal(1e20)
    assert dense_flops(mixture.loss) / 1e20 == pytest.approx(20, rel=0.1)
    assert dense_optimal(dense_flops(mixture.loss)).loss == pytest.approx(mixture.loss, abs=1e-4)
    gains = [dense_optimal(F).loss / compute_optimal(F).loss for F in (1e18, 1e20, 1e22)]
    assert min(gains) > 1.1
    saved = [dense_flops(compute_optimal(F).loss) / F for F in (1e18, 1e20, 1e22, 1e25)]
    assert saved == sorted(saved)


def test_krajewski_optimum_is_one_and_follows_the_budget_and_the_routing_cost():
    best, law = compute_optimal(1e20), KRAJEWSKI[64]
    d_model, n_blocks = shape_of(best.N, 64)
    assert krajewski_flops(d_model, n_blocks, best.D, best.G, 64) == pytest.approx(1e20)
    assert best.loss == pytest.approx(krajewski_loss(law, best.N, best.D, best.G))
    for N, G in ((best.N * 1.1, best.G), (best.N / 1.1, best.G), (best.N, best.G * 2),
                 (best.N, best.G / 2)):
        D = 1e20 / krajewski_flops(*shape_of(N, 64), 1, G, 64)
        assert krajewski_loss(law, N, D, G) > best.loss
    budgets = [compute_optimal(F) for F in (1e18, 1e20, 1e22, 1e24)]
    for name in ("N", "D", "G"):
        assert [getattr(o, name) for o in budgets] == sorted(getattr(o, name) for o in budgets)
    free, usual, dear = (compute_optimal(1e20, c_r=c_r) for c_r in (0, 14, 200))
    assert free.G == 4096 and free.G > usual.G > dear.G and free.loss < usual.loss < dear.loss


def test_krajewski_loss_falls_towards_c():
    for law in KRAJEWSKI.values():
        for more in (dict(N=1e10), dict(D=1e12), dict(G=8)):
            assert krajewski_loss(law, **dict(N=1e9, D=1e10, G=2) | more) <= krajewski_loss(law,
                                                                                            1e9,
                                                                                            1e10, 2)
        assert krajewski_loss(law, 1e300, 1e300, 1) == pytest.approx(law.c)


# --- Clark's law ---

@pytest.mark.parametrize("N, E, wanted", [(1.3e9, 64, (3.9e9, 2.65e9, 3.15e9)),
                                          (7e9, 8, (10.2e9, 8.1e9, 8.7e9))])
def test_clark_effective_parameter_counts(N, E, wanted):
    found = [effective_params(law, N, E) for law in CLARK.values()]
    assert found == pytest.approx(wanted, rel=0.007)


def test_clark_effective_parameter_count_of_the_papers_text():
    assert effective_params(CLARK["s_base"], 5e6, 128) == pytest.approx(52e6, rel=0.007)
    assert effective_params(CLARK_REFIT["s_base"], 5e6, 128) == pytest.approx(55e6, rel=0.01)


@pytest.mark.parametrize("law", [*CLARK.values(), *CLARK_REFIT.values()])
def test_clark_properties(law):
    E, N = np.array([1, 2, 8, 64, 512.]), 1e8
    saturated = saturated_experts(law, E)
    assert saturated[0] == pytest.approx(law.E_start) and (np.diff(saturated) > 0).all()
    assert saturated_experts(law, 1e12) == pytest.approx(law.E_max, rel=1e-6)
    assert (np.diff(clark_loss(law, N, E)) < 0).all() and clark_loss(law, 1e9, 8) < clark_loss(law,
                                                                                               N, 8)
    size = effective_params(law, N, E)
    assert size[0] == pytest.approx(N) and (np.diff(size) > 0).all()
    # what it is defined by
    assert clark_loss(law, size, 1) == pytest.approx(clark_loss(law, N, E))
    gain = effective_params(law, np.array([1e7, 1e8, 1e9]), 64) / np.array([1e7, 1e8, 1e9])
    assert (np.diff(gain) < 0).all()                    # experts help large models less


def test_clark_refit_predicts_the_released_losses():
    N = np.array(list(S_BASE))[:, None]
    ratio = clark_loss(CLARK_REFIT["s_base"], N, POWERS[:10]) / np.array(list(S_BASE.values()))
    assert np.sqrt(np.mean(np.log10(ratio) ** 2)) < 0.0045


# --- fits ---

def test_fit_clark_recovers_its_law():
    law = CLARK["rl_r"]
    fit = fit_clark(clark_rows(law, [15e6, 55e6, 370e6, 1.3e9], [1, 2, 8, 32, 128, 512]))
    assert_inside(fit, law)
    assert fit.law.a == pytest.approx(law.a, rel=0.1) and fit.law.c == pytest.approx(law.c,
                                                                                     rel=0.25)
    assert all(fit.identified[name] for name in "abcd")
    assert fit.interval["c"][0] > 0 and np.diff(fit.interval["a"]) < 0.03
    assert fit.rmse < 0.002 and 1.2 * fit.rmse < fit.held_out < 0.003
    assert fit.held_out_without > 0.015
    assert fit.folds == "one model size" and fit.unit == "log10 L" and fit.left_out == 0


@pytest.mark.parametrize("E", [64, 16])
def test_fit_krajewski_recovers_its_law(E):
    law = KRAJEWSKI[E]
    fit = fit_krajewski(fine_rows(law, [1.3e8, 7e8, 3.7e9], [1.6e10, 5e10, 1.3e11],
                                  [1, 2, 4, 8, 16]))
    assert_inside(fit, law)
    assert fit.law.alpha == pytest.approx(law.alpha, rel=0.2)
    assert fit.law.gamma == pytest.approx(law.gamma, rel=0.3)
    assert fit.identified["alpha"] and fit.identified["gamma"] and fit.interval["gamma"][0] > 0
    assert fit.held_out < 0.02 < fit.held_out_without and fit.unit == "nats"


def test_fit_clark_of_the_released_losses_agrees_with_the_published_refit():
    rows = [clark_row(N, E, loss) for N, losses in S_BASE.items()
            for E, loss in zip(POWERS, losses)]
    fit = fit_clark(rows)
    assert_inside(fit, CLARK_REFIT["s_base"])
    assert fit.rmse < 0.0045 and fit.held_out < fit.held_out_without / 3


def test_fit_krajewski_of_one_size_says_what_it_cannot_know():
    fit = fit_krajewski(fine_rows(KRAJEWSKI[64], [1e6], [3e6], [1, 2, 4, 8, 16], seeds=3,
                                  noise=0.005))
    assert [name for name, known in fit.identified.items() if known] == ["gamma"]
    assert_inside(fit, KRAJEWSKI[64])
    low, high = fit.interval["alpha"]
    # as wide as the prior, not stuck at its centre
    assert high / low > 5
    (curve,) = curves(fit)
    truth = krajewski_loss(KRAJEWSKI[64], 1e6, 3e6, curve.x)
    # all the same, the curve is well known
    assert curve.loss == pytest.approx(truth, rel=0.01)
    assert (curve.high - curve.low < 0.03 * truth).all()


def test_fit_clark_of_two_sizes_does_not_claim_an_interaction():
    fit = fit_clark(clark_rows(CLARK["s_base"], [5e4, 2e5], [1, 4, 16], seeds=3))
    assert not fit.identified["b"] and not fit.identified["c"] and fit.identified["a"]
    assert fit.folds == "one cell (size, experts)" and fit.held_out < fit.held_out_without / 2


def test_priors_do_not_decide_the_signs_that_are_claims():
    harmful = Krajewski(3, .15, 20, .2, .8, -.4, .3)    # experts that get worse when split
    fit = fit_krajewski(fine_rows(harmful, [1e6], [3e6], [1, 4, 16], seeds=3))
    assert fit.identified["gamma"] and fit.interval["gamma"][1] < 0
    useless = Clark(-.1, .05, -.007, 1, 2, 300)         # experts hurt, and less so in large models
    fit = fit_clark(clark_rows(useless, [1e5, 1e6, 1e7], [1, 4, 16, 64], seeds=3, noise=0.001))
    assert fit.interval["c"][1] < 0 < fit.interval["b"][0]


def test_one_bad_run_does_not_decide():
    rows = fine_rows(KRAJEWSKI[64], [1e8], [1e10], [1, 2, 4, 8, 16], seeds=2)
    rows[4]["val_loss"] *= 1.5
    (curve,) = curves(fit_krajewski(rows))
    assert curve.loss == pytest.approx(krajewski_loss(KRAJEWSKI[64], 1e8, 1e10, curve.x), rel=0.01)


def test_floor_is_a_bound_of_c():
    rows = fine_rows(Krajewski(3, .15, 20, .2, .8, .6, 1.036), [1e6], [3e6], [1, 2, 4, 8])
    fit = fit_krajewski(rows, floor=1.036)
    assert fit.interval["c"][0] > 1.036 > fit_krajewski(rows).interval["c"][0]
    with pytest.raises(FitError, match="the floor 9 is not below the best val_loss"):
        fit_krajewski(rows, floor=9)


def test_minimiser_finds_the_least_squares_of_a_line():
    x = np.linspace(-1, 1, 9)
    # small enough for Huber's square
    y = np.exp(0.01 * (2 + 3 * x + 0.1 * np.cos(9 * x)))
    problem = method.Problem({"x": x}, y, lambda theta: theta[..., None],
                             lambda t, x: np.exp(0.01 * (t[..., 0, :] + t[..., 1, :] * x)),
                             {"level": (0, 1e6), "slope": (0, 1e6)}, "nats")
    weights = np.stack([np.ones(9), np.arange(9.)])
    found = method.minimise(problem, np.zeros((3, 2, 2)) + 50., weights, np.zeros((2, 2)),
                            np.full(2, 1e6))
    for theta, w in zip(found, weights):
        want = np.polyfit(x, 100 * np.log(y), 1, w=np.sqrt(w))
        assert theta == pytest.approx(want[::-1], abs=1e-4)


# --- rows and curves ---

def test_rows_may_be_text_and_dense_or_failed_runs_are_told_apart(tmp_path):
    rows = clark_rows(CLARK["hash"], [1e5, 1e6], [1, 4, 16])
    # the config's default, which a dense model ignores
    rows[0]["n_expert"] = 8
    rows += [rows[1] | {"val_loss": ""}, rows[1] | {"val_loss": "nan"}]
    fit = fit_clark([{key: str(value) for key, value in row.items()} for row in rows])
    assert fit.left_out == 2 and fit.inputs["E"].tolist() == [1, 4, 16] * 2
    # without the routers' parameters
    assert fit.inputs["N"].tolist() == [1e5] * 3 + [1e6] * 3
    fit_again = fit_clark(rows)
    assert fit_again.law == fit.law and fit_again.interval == fit.interval


def test_routers_are_fitted_apart_with_the_dense_runs_in_each():
    rows = [row | {"router": "" if row["n_expert"] == 1 else router}
            for router in ("hash", "sinkhorn")
            for row in clark_rows(CLARK["hash"], [1e5], [1, 4])]
    parts = by_router(rows)
    assert {name: len(part) for name, part in parts.items()} == {"hash": 3, "sinkhorn": 3}
    assert sum(row["n_expert"] == 1 for row in parts["hash"]) == 2
    with pytest.raises(FitError, match="differ in router .hash, sinkhorn."):
        fit_clark(rows)


@pytest.mark.parametrize("change, says", [
    (lambda rows: rows[2].pop("granularity"), "run g4-0: granularity is missing"),
    (lambda rows: rows[2].update(tokens="many"), "run g4-0: tokens is many"),
    (lambda rows: rows[2].update(n_expert=16), "differ in n_expert .16, 64."),
    (lambda rows: rows[2].update(output_norm=False),
     r"differ in output_norm \(empty, False\), for which"),
    (lambda rows: rows[2].update(total_params=9e8), "run g4-0: total_params is 900,000,000, but"),
    (lambda rows: [row.update(granularity=4) for row in rows],
     r"5 runs with 1 value\(s\) of granularity"),
    (lambda rows: [row.update(val_loss="") for row in rows], "0 runs with 0 value"),
    (lambda rows: rows[2].update(val_loss=-1), "run g4-0: val_loss is -1"),
])
def test_rows_that_cannot_be_fitted(change, says):
    rows = fine_rows(KRAJEWSKI[64], [1e6], [3e6], [1, 2, 4, 8, 16])
    change(rows)
    with pytest.raises(FitError, match=says):
        fit_krajewski(rows)


def test_embeddings_are_subtracted_where_they_are_given():
    rows = fine_rows(KRAJEWSKI[64], [1e6, 4e6], [3e6], [1, 2, 4], embedding_params=2e5)
    assert sorted(set(fit_krajewski(rows).inputs["N"])) == pytest.approx([1.001e6 - 2e5,
                                                                          4.004e6 - 2e5])


def test_curves_pass_through_their_runs():
    fit = fit_clark(clark_rows(CLARK["s_base"], [1e5, 1e6], [1, 4, 16], noise=0.001))
    found = curves(fit, points=20)
    assert [curve.fixed for curve in found] == [{"N": 1e5}, {"N": 1e6}]
    for curve in found:
        assert curve.x.shape == curve.low.shape == (20,
                                                    ) and curve.x[[0, -1]] == pytest.approx([1, 16])
        assert (curve.low < curve.loss).all() and (curve.loss < curve.high).all()
        assert curve.run_x.tolist() == [1, 4, 16]
        assert np.interp(curve.run_x, curve.x, curve.loss) == pytest.approx(curve.run_loss,
                                                                            rel=0.01)
    lone = fine_rows(KRAJEWSKI[64], [1e6], [3e6], [1, 2, 4]) + fine_rows(KRAJEWSKI[64], [1e6],
                                                                         [9e6], [2])
    assert [curve.fixed["D"] for curve in curves(fit_krajewski(lone))] == [3e6]


# --- the program ---

def say(capsys, *words):
    status = main(list(words))
    out, err = capsys.readouterr()
    return status, out, err


def test_program_answers_what_a_budget_buys(capsys):
    status, out, _ = say(capsys, "krajewski", "--flops", "1e20")
    assert status == 0
    for text in ("c + (g / G^gamma + a) / N^alpha + b / D^beta", "N = 30.6 billion",
                 "a token passes 711 million", "D = 20.8 billion tokens", "G = 16: 1024 experts",
                 "L = 2.560 nats", "L = 3.006", "takes 21 times the FLOPs"):
        assert text in out
    status, out, _ = say(capsys, "krajewski", "--flops", "1e20", "--expansion", "16",
                         "--routing-cost", "0")
    assert status == 0 and "E = 16: a 19.64" in out and "c_r = 0 " in out


def test_program_answers_what_experts_are_worth(capsys):
    status, out, _ = say(capsys, "clark", "--router", "s_base", "--params", "1.3e9",
                         "--experts", "64")
    assert status == 0
    for text in ("log10 L = a log10 N", "Ê = 53.8", "E_max = 314.478", "L = 2.050 nats",
                 "E = 1: 2.237",
                 "effective parameters 3.91 billion", "3 times N", "N_cutoff = 937 billion"):
        assert text in out


@pytest.mark.parametrize("words, says", [
    ("clark --router sbase --params 1e9 --experts 8",
     "--router sbase: Clark's routers are s_base, rl_r, "
     "hash (did you mean s_base?)"),
    ("clark --router hash --params -5 --experts 8", "--params -5: must be between"),
    ("clark --router hash --params nan --experts 8", "--params nan: must be between"),
    ("clark --router hash --params 1e9 --experts 0", "--experts 0: must be between 1 and"),
    ("krajewski --flops 0", "--flops 0: must be between"),
    ("krajewski --flops 1e20 --flosp 3", "unknown option --flosp"),
    ("krajewski --flops 1e20 --routing-cost -1", "--routing-cost -1: must be between 0"),
    ("fit nowhere.csv --law clark", "nowhere.csv: cannot be read: No such file"),
    ("fit nowhere.csv --law clark --floor -1", "--floor -1: must be between 0"),
])
def test_program_explains_a_mistake(words, says, capsys):
    status, out, err = say(capsys, *words.split())
    assert status == 2 and not out
    assert err.startswith(f"error: {says}") and err.count("\n") == 1


def write_rows(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def test_program_fits_a_runs_csv(tmp_path, capsys):
    rows = fine_rows(KRAJEWSKI[64], [1e6], [3e6], [1, 2, 4, 8], seeds=2, output_norm="True")
    rows += [row | {"output_norm": "False", "val_loss": 9.0} for row in rows[:2]]
    path = write_rows(tmp_path / "runs.csv", rows)
    status, out, err = say(capsys, "fit", path, "--law", "krajewski")
    assert status == 2 and "the runs differ in output_norm (False, True)" in err
    assert "--only output_n" in err
    status, out, _ = say(capsys, "fit", path, "--law", "krajewski", "--only", "output_norm=True")
    assert status == 0 and "8 runs; N 1 million; D 3 million; G 1 to 8" in out
    assert out == say(capsys, "fit", path, "--law", "krajewski", "--only", "output_norm=T*,no")[1]
    lines = {line.split()[0]: line for line in out.splitlines() if line.startswith("  ")}
    assert lines["alpha"].endswith("0.115   not identified")
    assert lines["gamma"].split()[-3] == "0.58"
    assert "a fifth of the cells (size, tokens, granularity)" in out and "rms error in nats" in out
    for only, says in (("outputnorm=1", "has no column outputnorm (did you mean output_norm?)"),
                       ("output_norm=1", "no run has it; output_norm is False, True")):
        status, _, err = say(capsys, "fit", path, "--law", "krajewski", "--only", only)
        assert status == 2 and says in err


def test_program_fits_each_router(tmp_path, capsys):
    rows = clark_rows(CLARK["s_base"], [1e5, 1e6], [1, 4, 16], router="sinkhorn")
    rows += clark_rows(CLARK["hash"], [1e5, 1e6], [4, 16], router="hash")
    status, out, _ = say(capsys, "fit", write_rows(tmp_path / "runs.csv", rows), "--law", "clark")
    assert status == 0 and out.index("router hash") < out.index("router sinkhorn")
    assert out.count("6 runs; N 100 thousand to 1 million; E 1 to 16") == 2
    assert "-0.087" in out and "-0.082" in out and "without the law's term in E)" in out


def test_amounts_are_written_for_people():
    assert [amount(x) for x in (3.91e9, 2e12, 1.5e6, 42e3, 7, 3e15)] == \
        ["3.91 billion", "2 trillion", "1.5 million", "42 thousand", "7", "3e+15"]
