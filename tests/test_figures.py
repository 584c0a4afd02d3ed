"""What an experiment's figure shows: lab/papers/figure.py, lab/drawing/panels.py, measured.py."""
from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Text

from lab.drawing.measured import COLOURS, Data
from lab.drawing.panels import extent
from lab.drawing.style import GREEN, RED
from lab.experiment import Experiment
from lab.papers.figure import MOST, check_panels, experiment_figure, things
from lab.papers.student import paired
from lab.papers.tables import read_table
from settings import ConfigError

ROOT = Path(__file__).parent.parent
RECORDED = sorted(path.parent.parent.name for path in (ROOT / "results").glob("*/cpu/runs.csv"))


def rows_of(**losses):
    """A row of each arm and seed: a=[loss of seed 0, ...]."""
    return [dict(arm=arm.replace("_", "-"), seed=seed, val_loss=loss)
            for arm, values in losses.items() for seed, loss in enumerate(values)]


def figure_of(*panels, rows, curves=(), routing=(), claims={}, **spec):
    return experiment_figure(dict(panel=list(panels), **spec), claims, rows, curves, routing)


def axes_of(figure):
    return [ax for part in figure.subfigs for ax in part.axes]


def texts(artists):
    return [artist.get_text() for artist in artists]


def legend_of(ax):
    return texts(ax.get_legend().get_texts())


# --- every kind ---

def test_every_kind_of_panel_draws():
    rows = [dict(arm=f"m-{n}", seed=s, n=n, kind="even" if n % 2 == 0 else "odd",
                 val_loss=2 - 0.1 * n + 0.01 * s, gap=n, val_loss_one=1.0, val_loss_two=n,
                 flops_per_token=100)
            for n in (1, 2, 3, 4) for s in range(3)]
    curves = [dict(arm="m-1", seed=s, step=step, tokens=10**10 * step, loss=3 / step)
              for s in range(3) for step in (1, 2, 3)]
    routes = [dict(arm="m-1", seed=0, layer=1, corpus=c, expert=e, share=0.5)
              for c in ("one", "two") for e in (0, 1)]
    panels = [dict(kind="lines", x="n", y="val_loss", by="kind", xscale="log2", arms=["m-*"],
                   reference=["m-4"]),
              dict(kind="bars", y="val_loss"), dict(kind="bars", y="gap", marks={"limit": 2.5}),
              dict(kind="curves", x="flops", y="loss"),
              dict(kind="matrix", columns=["val_loss_one", "val_loss_two"]),
              dict(kind="routing", arm="m-1", experts=["first", "second"]),
              dict(kind="scatter", x="gap", y="val_loss", ylabel="mine")]
    figure = figure_of(*panels, rows=rows, curves=curves, routing=routes, title="title",
                       caption="a caption " * 40, labels={"m-{n}": "model {n}"})
    lines, close, far, curve, matrix, routed, _, _, scatter = axes_of(figure)
    assert lines.get_xlabel() == "n" and lines.get_ylabel() == "validation loss (nats per token)"
    assert legend_of(lines) == ["model 4", "odd", "even"]
    assert not close.patches and [bar.get_width() for bar in far.patches] == [1, 2, 3, 4]
    assert far.get_yticklabels()[0].get_text() == "model 1" and legend_of(far) == ["limit"]
    # 3 x 100 FLOPs x tokens
    assert list(curve.lines[0].get_xdata()) == pytest.approx([3, 6, 9])
    assert texts(matrix.texts[:2]) == ["1.000\n±0.000"] * 2
    assert texts(routed.get_xticklabels()) == ["first", "second"] and len(routed.texts) == 4
    assert scatter.get_ylabel() == "mine" and "a caption" in figure.get_supxlabel()
    assert "n = 3 seeds" in figure.get_supxlabel()
    figure.canvas.draw()


def test_bars_of_several_columns_of_one_arm_and_of_two():
    rows = [dict(arm=arm, seed=s, a=1.0 + s, b=10.0) for arm in ("one", "two") for s in range(3)]
    panel = dict(kind="bars", y="rise", columns=["a", "b"], arms=["one"])
    (ax,) = axes_of(figure_of(panel, rows=rows, labels={"a": "first"}))
    assert texts(ax.get_yticklabels()) == ["first", "b"] and ax.get_xlabel() == "rise"
    assert [bar.get_width() for bar in ax.patches] == [2.0, 10.0]
    (ax,) = axes_of(figure_of(panel | dict(arms=["*"]), rows=rows))
    assert texts(ax.get_yticklabels()) == ["one: a", "one: b", "two: a", "two: b"]


def test_tables_and_bars_are_sorted_by_what_is_asked_for():
    rows = rows_of(a=[3.0, 3.1], b=[1.0, 1.1], c=[2.0, 2.1])
    bars, matrix, _ = axes_of(figure_of(
        dict(kind="bars", y="val_loss", sort=True),
        dict(kind="matrix", columns=["val_loss"], sort="val_loss", most=0.5), rows=rows))
    assert texts(bars.get_yticklabels()) == texts(matrix.get_yticklabels()) == ["b", "c", "a"]
    assert matrix.images[0].get_clim() == (0, 0.5)


# --- differences ---

CLAIMS = {"C1": dict(says="a is better: 3 against 4", test="val_loss: a < b"),
          "C2": dict(says="a is not worse than c (here: by the margin)",
                     test="val_loss[a] < val_loss[c] + margin"),
          "C3": dict(says="both", test=["val_loss: a < b", "val_loss: c < a"]),
          "C4": dict(says="nobody ran", test="val_loss: nobody < a")}
ROWS = rows_of(a=[1.0, 2.0, 3.0], b=[1.5, 2.52, 3.51], c=[1.2, 2.22, 3.21])


def test_differences_are_those_of_the_verdict():
    claims = dict(C1="", C2="", C3="both of them", C4="")
    figure = figure_of(dict(kind="differences", claims=claims), rows=ROWS, claims=CLAIMS,
                       labels={"a": "alpha"})
    (ax,) = axes_of(figure)
    assert texts(ax.get_yticklabels()) == ["alpha < b", "alpha < c + 0.01",
                                           "both of them (worst of 2)"]
    found = paired([-0.5, -0.52, -0.51])
    means = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "o"]
    # The margin is drawn, not taken off; of C3 the inequality that did not hold is the worst.
    assert means == pytest.approx([found.mean, -0.21, 0.21])
    low, high = ax.collections[0].get_segments()[0][:, 0]
    assert (low, high) == pytest.approx((found.low, found.high))
    assert texts(ax.texts)[:4] == ["−0.510", "p < 0.001", "n = 3", "held"]
    assert [text.get_color() for text in ax.texts[3::4]] == [GREEN, GREEN, RED]
    band, = ax.patches
    assert (band.get_x(), band.get_width()) == pytest.approx((-0.01, 0.02))


def test_the_caption_says_what_the_verdicts_say():
    text = figure_of(dict(kind="bars", y="val_loss"), rows=ROWS, claims=CLAIMS,
                     caption="The paper: so.").get_supxlabel()
    assert text.startswith("The paper: so.\nHere: a is better: held; a is not worse than c: held; "
                           "both: did not hold.\nn = 3 seeds.")
    # Two claims of the same words are told apart by what is compared here.
    twice = {"A": CLAIMS["C1"], "B": CLAIMS["C1"] | dict(says="a is better (here: with care)")}
    text = figure_of(dict(kind="bars", y="val_loss"), rows=ROWS, claims=twice).get_supxlabel()
    assert text.startswith("Here: a is better: held; a is better, with care: held.")


def test_differences_to_an_arm_are_paired_by_seed():
    panels = [dict(kind="bars", y="val_loss", minus="b"),
              dict(kind="lines", x="n", y="val_loss", minus="b")]
    rows = [row | dict(n=ord(row["arm"])) for row in ROWS]
    bars, lines = axes_of(figure_of(*panels, rows=rows))
    assert texts(bars.get_yticklabels()) == ["a", "c"]
    assert list(lines.lines[0].get_ydata()) == pytest.approx([-0.51, -0.3])
    assert "minus that of b" in bars.get_xlabel() and "minus that of b" in lines.get_ylabel()
    found = paired([-0.5, -0.52, -0.51])
    assert extent([-0.5, -0.52, -0.51], "b") == pytest.approx((found.mean, found.low, found.high))
    mean, low, high = extent([-0.5, -0.52, -0.51], None)
    assert (low, high) == pytest.approx((mean - found.error, mean + found.error))


def test_differences_of_curves_are_at_equal_x():
    """b runs half as many FLOPs a token, so that its steps stand elsewhere."""
    rows = [dict(arm=arm, seed=s, val_loss=1.0, flops_per_token=f)
            for arm, f in (("a", 2e12), ("b", 1e12)) for s in range(3)]
    curves = [dict(arm=arm, seed=s, step=step, tokens=step, val_loss=level - slope * step + s)
              for arm, level, slope in (("a", 5, 2), ("b", 5.5, 1)) for s in range(3)
              for step in (1, 2, 3, 4)]
    panel = dict(kind="curves", x="flops", y="val_loss", minus="b")
    (ax,) = axes_of(figure_of(panel, rows=rows, curves=curves))
    # a at 6, 12 (3 x 2e12 x step) is b at steps 2, 4; a's later steps have no counterpart.
    assert list(ax.lines[0].get_xdata()) == pytest.approx([6, 12])
    assert list(ax.lines[0].get_ydata()) == pytest.approx([-0.5, -0.5])


# --- names and looks ---

def test_an_arm_looks_the_same_in_every_panel():
    rows = [row | dict(x=i) for i, row in enumerate(rows_of(dense=[1, 2], a=[2, 3], b=[3, 4],
                                                            c=[2, 2]))]
    spec = dict(panel=[dict(kind="scatter", x="x", y="val_loss", arms=["dense", "a"]),
                       dict(kind="scatter", x="x", y="val_loss", arms=["b", "a", "c"])],
                colours={"c": "red"})
    data = Data(spec, {}, rows)
    assert [data.look(arm)[0] for arm in ("dense", "c")] == [COLOURS["black"], COLOURS["red"]]
    assert len({data.look(arm)[0] for arm in ("a", "b", "c")}) == 3
    # of one colour: told apart by the mark
    spec["colours"] = {"*": "blue"}
    assert len({data.look(arm) for data in [Data(spec, {}, rows)] for arm in "abc"}) == 3


def test_names_for_people():
    data = Data(dict(labels={"fast": "the fast one", "m-{n}-{k}": "{n} of {k}"}), {}, [])
    assert [data.name(arm) for arm in ("fast", "m-2-8", "faster")] == ["the fast one", "2 of 8",
                                                                      "faster"]
    assert data.in_words("min(val_loss[fast], val_loss[x]) < val_loss_two[m-1-2] + margin") == (
        "min(the fast one, x) < 1 of 2 + 0.01")


def test_arms_without_rows_are_left_out():
    panels = [dict(kind="bars", y="val_loss", arms=["new"]), dict(kind="bars", y="val_loss"),
              dict(kind="curves", y="val_loss"), dict(kind="routing", arm="new"),
              dict(kind="differences", claims={"C4": "", "gpu": ""}),
              dict(kind="fit", law="clark", arms=["new"])]
    assert len(axes_of(figure_of(*panels, rows=ROWS, claims=CLAIMS))) == 1
    assert figure_of(panels[0], rows=ROWS) is None and figure_of(rows=ROWS) is None


@pytest.mark.parametrize("change, words", [
    (dict(kind="bras"), "did you mean bars?"), (dict(claims={"C9": ""}), "there is no claim C9"),
    (dict(minus="z"), "there is no arm z"), (dict(most="much"), "most = \"much\"")])
def test_a_panel_that_cannot_be_drawn(change, words):
    spec = dict(panel=[dict(kind="bars", y="val_loss") | change], claims=CLAIMS)
    with pytest.raises(ConfigError, match=r"x.toml: \[\[panel\]\] 1") as error:
        check_panels(spec, {"a", "b"}, "x.toml")
    assert words in str(error.value)
    with pytest.raises(ConfigError, match="mauve is not one of blue"):
        check_panels(dict(colours={"a": "mauve"}), {"a"}, "x.toml")


# --- the recorded figures ---

@pytest.mark.parametrize("name", RECORDED)
def test_recorded_figures_can_be_read_from_the_last_row(name):
    """At most two panels side by side, at most six lines in one, no letter below 11 pixels at a
    width of 1,000, and nobody's name as it stands in the file."""
    experiment = Experiment(str(ROOT / f"configs/papers/{name}.toml"), "cpu",
                            out=str(ROOT / "results" / name))
    rows, curves, paths = (read_table(experiment.out / f"{t}.csv")
                           for t in ("runs", "curves", "routing"))
    data = Data(experiment.spec, experiment.claims, rows, curves, paths)
    for panel in experiment.spec["panel"]:
        if panel["kind"] in ("lines", "curves"):
            assert things(panel, data) <= MOST
    figure = experiment_figure(experiment.spec, experiment.claims, rows, curves, paths)
    assert all(len({ax.get_subplotspec().colspan.start for ax in part.axes
                    if ax.get_subplotspec()}) <= 2 for part in figure.subfigs)
    smallest = min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text())
    assert smallest / 72 * 1000 / figure.get_figwidth() >= 11
    shown = [text for ax in axes_of(figure) for text in texts(ax.get_yticklabels())]
    assert not set(shown) & {arm for arm in data.arms({}) if "-" in arm or "_" in arm}
    assert np.isfinite(figure.get_size_inches()).all()
