"""lab/plots.py and lab/drawing: reading logs, what the figures show, the command line."""
import json
import struct
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

import model
import train
from data.prepare import prepared
from data.tokenizers import Tokenizer
from lab import plots
from ffn import FeedForward, plain_stats
from lab.drawing import ancestry, block
from lab.drawing.logs import LogError, column, open_run, read_columns, read_log, smooth
from lab.drawing.style import AMOUNTS, new_figure
from lab.papers import evaluate
from lab.papers.figure import experiment_figure
from lab.papers.probes import PROBES
from model import GPT, load_config
from runtime import checkpoint
from runtime.config import to_toml
from runtime.watch import usage

COLUMNS = ("step,tokens,seconds,loss,val_loss,val_bpb,lr,grad_norm,tokens_per_second,balance_loss,"
           "z_loss,aux_loss,max_expert_share,entropy,dropped,experts_used,unevenness,"
           "expert_load").split(",")


def write_log(folder, steps=60, kind="moe", evals=10, dropped=0.0, bits=1.5, best=1.0, settings=()):
    """A run folder with a log like train.py's: layers 1 and 3 of 4 sparse, 4 experts, one without
    tokens."""
    folder.mkdir()
    sizes = [("model.vocab_size", "256"), ("ffn.kind", kind), ("model.n_embd", "16"),
             ("ffn.n_expert", "4")]
    (folder / "config.toml").write_text(to_toml(load_config(None, sizes + list(settings))))
    lines = [",".join(COLUMNS), f"0,0,0,,{best + 4},{(best + 4) * bits}" + "," * 12]
    for step in range(1, steps + 1):
        loss = best + 4 * np.exp(-step / 10)
        row = dict(step=step, tokens=100 * step, loss=f"{loss:.8g}")
        if evals and step % evals == 0:
            row |= dict(val_loss=f"{loss:.8g}", val_bpb=f"{loss * bits:.8g}")
        if kind == "moe":
            loads = f";{10 + step} 10 10 10;;20 10 0 10"
            row |= dict(max_expert_share=0.5, dropped=dropped, expert_load=loads)
        if kind == "peer":
            row |= dict(experts_used=0.5 + step / 200, unevenness=2 / step)
        lines.append(",".join(str(row.get(name, "")) for name in COLUMNS))
    lines = lines if evals else lines[:1] + lines[2:]
    (folder / "log.csv").write_text("\r\n".join(lines) + "\r\n", newline="")
    return folder


def png_size(path):
    """(width, height) in pixels, from the header."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:])


# --- reading ---

def test_a_log_becomes_columns_with_nan_where_a_row_has_no_value(tmp_path):
    log = read_log(write_log(tmp_path / "run") / "log.csv")
    assert set(log) == {*COLUMNS, "loss_low", "loss_high"}
    assert log["step"].tolist() == list(range(61))
    assert np.isnan(log["loss"][0]) and np.isnan(log["lr"]).all()
    steps, values = column(log, "val_loss")
    assert steps.tolist() == [0, 10, 20, 30, 40, 50, 60] and values[0] == 5.0
    assert list(log["expert_load"]) == [1, 3]
    assert np.isnan(log["expert_load"][1][0]).all() and log["expert_load"][1][5].tolist() == [15,
                                                                                              10,
                                                                                              10,
                                                                                              10]
    assert column(log, "no such column")[0].size == 0


@pytest.mark.parametrize("cut, last", [(1, 60), (3, 60), (40, 59)])
def test_of_a_line_that_was_cut_off_no_cut_cell_is_read(tmp_path, cut, last):
    path = write_log(tmp_path / "run") / "log.csv"
    path.write_bytes(path.read_bytes().rstrip()[:-cut])
    log = read_log(path)
    assert log["step"][-1] == last and log["loss"][-1] == read_columns(path, ["loss"])["loss"][-1]
    loads = log["expert_load"][3]
    assert np.isnan(loads[-1]).all() == (last == 60)
    assert loads[59].tolist() == [20, 10, 0, 10]


@pytest.mark.parametrize("touch", [
    lambda data: data.replace(b"\r\n", b"\n"), lambda data: b"\xef\xbb\xbf" + data,
    lambda data: data.replace(b"\r\n", b"\n").rstrip(b"\n"),
    lambda data: b"\xef\xbb\xbf" + data.rstrip(b"\r\n"),
    lambda data: b"\r\n".join(b'"%s"' % line.replace(b",", b'","')
                              for line in data.split(b"\r\n") if line) + b"\r\n"],
    ids=["git", "mark", "no end", "mark, no end", "quotes"])
def test_a_log_that_an_editor_has_touched_is_the_same_log(tmp_path, touch):
    path = write_log(tmp_path / "run") / "log.csv"
    before = read_log(path), read_columns(path, COLUMNS[:6])
    path.write_bytes(touch(path.read_bytes()))
    after = read_log(path), read_columns(path, COLUMNS[:6])
    np.testing.assert_equal(after, before)


def test_columns_may_be_missing_new_and_in_any_order(tmp_path, capsys):
    folder = write_log(tmp_path / "run")
    rows = [line.split(",") for line in (folder / "log.csv").read_text().splitlines()]
    kept = [COLUMNS.index(name) for name in ("expert_load", "loss", "step", "max_expert_share")]
    lines = [",".join([row[i] for i in kept] + [new])
             for row, new in zip(rows, ["thinking"] + ["0.5"] * (len(rows) - 1))]
    before = read_log(folder / "log.csv")
    (folder / "log.csv").write_text("\n".join(lines))
    log = read_log(folder / "log.csv")
    assert log["thinking"].tolist() == [0.5] * 61
    np.testing.assert_equal(log["expert_load"], before["expert_load"])
    result = program(capsys, folder)
    assert result.status == 0 and result.out.split() == [str(folder / name)
                                                         for name in ("loss.png", "load.png")]
    (folder / "log.csv").write_text("step\n1\n2\n")
    assert program(capsys, folder).out.split() == [str(folder / "loss.png")]


def test_a_long_log_is_read_in_seconds(tmp_path):
    """300,000 rows in a third of the ten seconds that a million may take."""
    folder = write_log(tmp_path / "run", steps=1)
    row = f",100,0.5,1.25,,,{'0.0123456,' * 11};10 20 30 40;;20 10 0 10\n".split(",", 1)[1]
    with open(folder / "log.csv", "w") as file:
        file.write(",".join(COLUMNS) + "\n")
        file.writelines(f"{step},{row}" for step in range(1, 300_001))
    start = time.process_time()
    log = read_log(folder / "log.csv")
    assert time.process_time() - start < 3.3
    assert len(log["step"]) <= 4000 and (log["loss"] == 1.25).all() and log["step"][-1] > 299_900
    # some rows of each group are enough to show how the work is shared
    assert np.allclose(log["expert_load"][3][0] / log["expert_load"][3][0].sum() * 40,
                       [20, 10, 0, 10])


def test_a_long_log_shows_between_what_its_losses_lie(tmp_path, monkeypatch):
    folder = write_log(tmp_path / "run", steps=1000)
    run = open_run(folder)
    assert not plots.loss_figure(run).axes[0].collections
    run.log = read_log(folder / "log.csv", points=101)
    full = read_log(folder / "log.csv")["loss"]
    assert run.log["loss_low"][3] == full[30:40].min()
    assert run.log["loss_high"][3] == full[30:40].max()
    ax = plots.loss_figure(run).axes[0]
    assert len(ax.collections) == 1
    assert [text.get_text() for text in ax.get_legend().get_texts()][0].endswith("least to largest")


def test_rows_of_another_length_are_left_out(tmp_path):
    path = write_log(tmp_path / "run") / "log.csv"
    path.write_text(path.read_text() + "61,7\n\n62" + "," * 40 + "\n")
    assert read_log(path)["step"][-1] == 60


def test_a_long_log_is_averaged_in_groups_and_keeps_its_evaluations(tmp_path):
    path = write_log(tmp_path / "run", steps=1000, evals=100) / "log.csv"
    full, short = read_log(path), read_log(path, points=101)
    # groups of 10, the last of one row
    assert len(short["step"]) == 101 and len(full["step"]) == 1001
    assert column(short, "val_loss")[1].tolist() == column(full, "val_loss")[1].tolist()
    assert short["loss"][3] == pytest.approx(full["loss"][30:40].mean())
    assert short["loss"][0] == pytest.approx(full["loss"][1:10].mean()) # step 0 has none
    assert short["expert_load"][1][3].tolist() == full["expert_load"][1][30:40].sum(0).tolist()
    assert short["step"][3] == 34.5


@pytest.mark.parametrize("content", ["", ",".join(COLUMNS) + "\r\n", "\0\0\n\xff",
                                     "a,b\r\n1,2\r\n"])
def test_an_empty_or_foreign_log_is_an_error_that_names_it(tmp_path, content):
    (tmp_path / "log.csv").write_text(content)
    with pytest.raises(LogError, match="log.csv: holds no step yet"):
        read_log(tmp_path / "log.csv")


def test_a_field_may_be_long(tmp_path):
    loads = ";".join([" ".join(["123456"] * 1024)] * 30)
    (tmp_path / "log.csv").write_text(f"step,expert_load\n1,{loads}\n")
    assert len(read_log(tmp_path / "log.csv")["expert_load"]) == 30


def test_smooth_does_not_lag():
    x = np.arange(1000.0)
    assert np.allclose(smooth(x)[10:-10], x[10:-10])
    noise = np.random.default_rng(0).normal(size=1000)
    assert smooth(noise).std() < 0.3 and smooth(np.array([])).size == 0


# --- figures ---

def test_loss_figure_shows_the_log(tmp_path):
    run = open_run(write_log(tmp_path / "run"))
    figure = plots.loss_figure(run)
    ax = figure.axes[0]
    raw, _, validation = ax.lines
    assert raw.get_ydata()[-1] == run.log["loss"][-1] and len(validation.get_xdata()) == 7
    low, high = ax.get_ylim()
    assert low < 1.0 < high < 5.0                                   # without the first plunge
    assert {a.get_xlabel() or a.get_ylabel() for a in ax.child_axes} == {
        "training tokens (millions)", "validation bits per byte"}
    title = figure.get_suptitle()
    assert max(map(len, title.splitlines())) <= 88                      # what 11 inches hold
    title = " ".join(title.split())
    total, active = (f"{n / 1e6:.3g} M" for n in GPT(run.config).num_params())
    assert title.startswith("run 4 layers, 16 wide, moe, 4 experts, 2 for each token, router topk")
    assert f"{active} of {total} parameters active" in title


def test_load_maps_show_share_times_experts():
    load = np.array([[np.nan] * 4, [10, 20, 10, 0], [30, 10, 0, 0], [5, 5, 5, 5]])
    ax = new_figure(4, 3, "").subplots()
    image, middle, relative = plots.load_map(ax, np.arange(4.0), load)
    assert np.allclose(relative, [[1, 2, 1, 0], [3, 1, 0, 0], [1, 1, 1, 1]])
    assert middle.tolist() == [1.5, 2.5, 3.5]
    assert image.get_array().mask.T.tolist() == [[False] * 3 + [True], [False] * 2 + [True] * 2,
                                                 [False] * 4]
    assert image.cmap == AMOUNTS
    _, middle, relative = plots.load_map(ax, np.arange(4.0), load, columns=1)
    assert np.allclose(relative, [[45 / 25, 35 / 25, 15 / 25, 5 / 25]])


def test_load_figure_has_a_map_per_sparse_layer_and_dropped_pairs_if_any(tmp_path):
    figure = plots.load_figure(open_run(write_log(tmp_path / "run")))
    assert [a.get_title(loc="left") for a in figure.axes if a.get_title(loc="left")] == ["layer 1",
                                                                                         "layer 3"]
    assert not any("dropped" in a.get_ylabel() for a in figure.axes)
    busiest = next(a for a in figure.axes if "busiest" in a.get_ylabel())
    assert np.allclose(busiest.lines[1].get_ydata(), 2.0)               # layer 3: 20 of 40, times 4
    figure = plots.load_figure(open_run(write_log(tmp_path / "capacity", dropped=0.2)))
    dropped = next(a for a in figure.axes if "dropped" in a.get_ylabel())
    assert np.allclose(dropped.lines[0].get_ydata(), 20)
    assert plots.load_figure(open_run(write_log(tmp_path / "dense", kind="dense"))) is None


def test_comparison_puts_the_best_first_and_tokens_below(tmp_path):
    runs = [open_run(write_log(tmp_path / seed, best=best, evals=n,
                               settings=[("train.seed", seed)]))
            for seed, best, n in [("3", 1.3, 10), ("1", 1.1, 10), ("2", 1.2, 0)]]
    figure = plots.compare_figure(runs)
    ax = figure.axes[0]
    assert [t.get_text().split(" ")[0] for t in ax.get_legend().get_texts()] == ["1", "2", "3"]
    assert "training" in ax.get_legend().get_texts()[1].get_text()
    assert ax.lines[0].get_xdata()[-1] == pytest.approx(6000 / 1e6) and "nats" in ax.get_ylabel()
    assert figure.get_suptitle().endswith("runs differ in train.seed")


def test_runs_of_different_tokenizers_are_compared_in_bits_per_byte(tmp_path):
    runs = [open_run(write_log(tmp_path / str(bits), bits=bits)) for bits in (1.4, 0.5)]
    ax = plots.compare_figure(runs).axes[0]
    assert ax.get_ylabel() == "bits per byte"
    assert ax.lines[1].get_ydata()[0] == pytest.approx(5 * 0.5)


def test_usage_histogram_is_sorted_and_agrees_with_the_metrics():
    used = np.random.default_rng(1).random(5000) < 0.9
    load = np.random.default_rng(0).exponential(size=5000) * used
    ax = new_figure(4, 3, "").subplots()
    plots.usage_histogram(ax, load)
    y = ax.lines[0].get_ydata()
    used, uneven = usage(torch.tensor(load))
    assert ax.lines[0].get_label() == f"{used:.1%} used, unevenness {uneven:.2f}"
    assert (np.diff(y[~np.isnan(y)]) <= 0).all() and y[0] == pytest.approx(load.max() / load.mean())
    assert np.isnan(y).mean() == pytest.approx(1 - used, abs=1e-3)


def test_validation_loads_come_from_the_checkpoint(tmp_path):
    """Experts too many for the log: the best checkpoint is run over the validation batches."""
    (tmp_path / "text.txt").write_text("the cat sat on the mat, and the dog did not. " * 300)
    settings = [("data.name", str(tmp_path / "text.txt")), ("data.dir", str(tmp_path / "data")),
                ("train.batch_size", "2"), ("train.eval_batches", "3"), ("model.block_size", "16"),
                ("model.n_layer", "2"), ("model.n_head", "2"), ("ffn.peer_path", "readable"),
                ("ffn.n_keys", "6"), ("ffn.peer_top_k", "2")]
    folder = write_log(tmp_path / "run", kind="peer", settings=settings)
    run = open_run(folder)
    _, tokenizer = prepared(run.config.data)
    header = dict(step=1, config=run.config.to_dict(), tokenizer=tokenizer.to_dict(),
                  ancestry=dict(kind="train", run="run", parents=[]))
    checkpoint.save(folder / "ckpt_best.pt", header, GPT(run.config).state_dict())
    loads = plots.validation_loads(run)
    assert list(loads) == [1] and loads[1].shape == (36,)
    tokens, heads = 3 * 2 * 16, run.config.ffn.peer_heads
    # the weights of a head sum to 1
    assert loads[1].sum() == pytest.approx(tokens * heads, rel=1e-4)
    assert [path.name for path in plots.draw([run])] == ["loss.png", "usage.png"]
    assert png_size(folder / "usage.png") == (1950, 975)


def test_in_maps_dark_is_little_and_white_is_none():
    bright = [AMOUNTS(share)[:3] @ np.array([0.3, 0.59, 0.11]) for share in np.linspace(0, 1, 20)]
    assert (np.diff(bright) > 0).all() and bright[-1] < 0.85
    assert AMOUNTS(np.ma.masked)[:3] == (1, 1, 1)
    paths = [dict(arm="a", seed=0, layer=1, corpus=corpus, expert=e, share=share)
             for corpus, shares in (("x", (0, 1)), ("y", (0.25, 0.75)))
             for e, share in enumerate(shares)]
    rows = [dict(arm=arm, seed=0, one=one, two=2 * one) for arm, one in (("a", 1.0), ("b", 1.5))]
    panels = [dict(kind="routing", arm="a"), dict(kind="matrix", columns=["one", "two"])]
    figure = experiment_figure(dict(panel=panels), {}, rows, [], paths)
    shares, losses = (ax.images[0] for ax in figure.axes[:2])
    assert shares.get_array().mask.tolist() == [[True, False], [False, False]]
    assert losses.get_array().tolist() == [[0, 0], [0.5, 1]]
    # a bar says what each colour means
    assert [ax.get_ylabel() for ax in figure.axes[2:]] == ["% of the corpus's tokens",
                                                           "above the best of its column"]


# --- layers that nobody has heard of ---

class Stripes(FeedForward):
    """Several experts, or one, or very many: token t goes to expert t mod E."""

    def __init__(self, config, d, vocab_size=0, layer=0, n_layer=1):
        super().__init__()
        self.n_expert, self.many = config.n_expert, config.n_expert > 50
        self.weight = torch.nn.Parameter(torch.ones(self.n_expert, d))

    def forward(self, x, ctx):
        expert = ctx.token_ids % self.n_expert
        load = torch.bincount(expert.flatten(), minlength=self.n_expert).float()
        stats = plain_stats(ctx)._replace(load=load, top_expert=expert, dropped=None, entropy=None)
        return x * self.weight[expert], stats


@pytest.mark.parametrize("n, pictures", [(1, []), (3, ["load.png"]), (60, ["usage.png"])])
def test_a_layer_of_an_unknown_kind_is_logged_evaluated_and_plotted(
        corpora, tmp_path, capsys, monkeypatch, n, pictures):
    monkeypatch.setitem(model.KINDS, "stripes", Stripes)
    folder = tmp_path / "run"
    assert train.main([*arguments(corpora, folder), "--ffn.kind=stripes",
                       f"--ffn.n_expert={n}", "--ffn.top_k=1"]) == 0
    log = read_log(folder / "log.csv")
    assert {load.shape[1] for load in log["expert_load"].values()} == {n}
    assert evaluate.main([str(folder), "--probes", *(set(PROBES) - {"math_right"})]) == 0
    row = json.loads((folder / "evaluation.json").read_text())
    assert row["val_loss"] > 0 and row["max_expert_share"] <= 1 and "dropped" not in row
    capsys.readouterr()
    result = program(capsys, folder)
    assert result.status == 0 and not result.err
    assert result.out.split() == [str(folder / name) for name in ["loss.png", *pictures]]


# --- the program ---

def program(capsys, *argv):
    try:
        status = plots.main([str(a) for a in argv])
    except SystemExit as e:
        status = e.code
    return SimpleNamespace(status=status, **capsys.readouterr()._asdict())


def test_one_run(tmp_path, capsys):
    folder = write_log(tmp_path / "run", dropped=0.1)
    result = program(capsys, folder)
    assert result.status == 0 and not result.err
    assert result.out.split() == [str(folder / "loss.png"), str(folder / "load.png")]
    assert png_size(folder / "loss.png") == (1650, 975)
    assert png_size(folder / "load.png")[0] == 1650 and png_size(folder / "load.png")[1] > 1000


def test_several_runs_share_a_figure_and_keep_their_own_loads(tmp_path, capsys):
    folders = [write_log(tmp_path / "moe"), write_log(tmp_path / "dense", kind="dense"),
               write_log(tmp_path / "peer", kind="peer", evals=0)]
    result = program(capsys, *folders, "--out", tmp_path / "both.png")
    assert result.status == 0 and not result.err
    assert result.out.split() == [str(path) for path in (
        tmp_path / "both.png", folders[0] / "load.png", folders[2] / "usage.png")]
    assert png_size(tmp_path / "both.png") == png_size(folders[2] / "usage.png") == (1650, 975)


def test_several_runs_write_over_no_picture_of_one(tmp_path, capsys):
    folders = [write_log(tmp_path / name, kind="dense") for name in "ab"]
    program(capsys, folders[0])
    before = (folders[0] / "loss.png").read_bytes()
    result = program(capsys, *folders)
    assert result.out.split() == [str(folders[0] / "compare.png")] and result.status == 0
    assert (folders[0] / "loss.png").read_bytes() == before


@pytest.mark.parametrize("out, written", [("name", "name.png"), ("there", "there/loss.png"),
                                          ("there/", "there/loss.png"), ("x.pdf", "x.pdf"),
                                          ("there/name", "there/name.png")])
def test_out_says_what_was_written(tmp_path, capsys, monkeypatch, out, written):
    monkeypatch.chdir(tmp_path)
    write_log(tmp_path / "run", kind="dense")
    (tmp_path / "there").mkdir()
    assert program(capsys, "run", "--out", out).out.split() == [written]
    assert (tmp_path / written).is_file() and not (tmp_path / "run/loss.png").exists()


def test_a_compared_run_without_rows_is_named(tmp_path, capsys):
    folders = [write_log(tmp_path / "new", kind="dense"), write_log(tmp_path / "old", kind="dense"),
               tmp_path / "newest"]
    (folders[0] / "log.csv").write_text(",".join(COLUMNS) + "\r\n")
    folders[2].mkdir()
    result = program(capsys, *folders)
    assert result.status == 0 and result.out.split() == [str(folders[0] / "compare.png")]
    legend = plots.compare_figure([open_run(f, begun=False) for f in folders]).axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [
        "old (1.010)", "new (no row yet)", "newest (no row yet)"]
    result = program(capsys, folders[0], folders[2])
    assert result.status == 2 and "logged a step yet" in result.err


def test_a_run_that_has_only_begun(tmp_path, capsys):
    """A row before the first step, no loss yet, no config: what there is is drawn."""
    folder = write_log(tmp_path / "run", steps=0)
    (folder / "config.toml").unlink()
    result = program(capsys, folder)
    assert result.status == 0 and not result.err
    assert result.out.split() == [str(folder / "loss.png")]


@pytest.mark.parametrize("argv, words", [
    (["nowhere"], "nowhere: no such run folder"), (["{}"], "log.csv: no log to draw"),
    ([], "RUN_DIR"),
    (["{}/run", "--out", "{}/no/x.png"], "cannot be written"),
    (["{}/run", "--out", "{}/x.doc"], "cannot be written"), (["{}/bad"], "config.toml"),
    (["{}/run", "--uot", "x"], "did you mean --out")])
def test_mistakes_are_one_line_and_status_2(tmp_path, capsys, argv, words):
    write_log(tmp_path / "run", steps=5)
    (write_log(tmp_path / "bad", steps=5) / "config.toml").write_text("[model\n")
    result = program(capsys, *(a.format(tmp_path) for a in argv))
    assert result.status == 2 and not result.out
    assert result.err.startswith("error: ") and result.err.count("\n") == 1 and words in result.err


def test_a_damaged_row_of_loads_is_left_out(tmp_path):
    folder = write_log(tmp_path / "run")
    good = read_log(folder / "log.csv")["expert_load"][1]
    lines = (folder / "log.csv").read_text().splitlines(keepends=True)
    first = lines[1].rpartition(",")[2]
    for bad in (";7;;1 2 3 4\n", "x y z\n", first.replace(" ", "", 1)):
        lines[1] = lines[1].rpartition(",")[0] + "," + bad
        (folder / "log.csv").write_text("".join(lines))
        load = read_log(folder / "log.csv")["expert_load"][1]
        assert np.isnan(load[0]).all() and np.array_equal(load[1:], good[1:])


# --- ancestry

def save_with(ancestry, folder):
    header = dict(step=0, config=load_config().to_dict(), tokenizer=Tokenizer.byte().to_dict(),
                  ancestry=ancestry)
    checkpoint.save(folder / "ckpt_last.pt", header, {})


def test_a_family_shows_each_run_once_and_right_of_its_parents(tmp_path, monkeypatch):
    seed = dict(kind="train", run="runs/seed", parents=[])
    branches = [dict(kind="train", run=f"runs/{name}", parents=[seed]) for name in ("code", "docs")]
    mix = dict(kind="mix", run="runs/mix", parents=[*branches, seed])
    last = dict(kind="train", run="runs/tuned", parents=[mix])
    kinds, parents = ancestry.family(last)
    assert kinds == {"runs/tuned": "train", "runs/mix": "mix", "runs/code": "train",
                     "runs/docs": "train",
                     "runs/seed": "train"}
    at = ancestry.places(parents)
    assert [at[f"runs/{name}"][0] for name in ("seed", "code", "docs", "mix", "tuned")] == [0, 1, 1,
                                                                                            2, 3]
    assert {at["runs/code"][1], at["runs/docs"][1]} == {-0.5, 0.5} and len(set(at.values())) == 5
    for header, expected in ((last, 5), (seed, 0)):
        save_with(header, tmp_path)
        figure = ancestry.ancestry_figure(tmp_path)
        # 6 arrows
        assert len(figure.axes[0].texts) - 6 == expected if figure else expected == 0


def test_a_made_model_that_nobody_trained_yet_shows_its_ancestry(tmp_path, capsys):
    made = dict(kind="merge", run="runs/average",
                parents=[dict(kind="train", run="runs/a", parents=[])])
    save_with(made, tmp_path)
    result = program(capsys, tmp_path)
    assert result.status == 0 and result.out.split() == [str(tmp_path / "ancestry.png")]


# --- the picture of a block

def test_the_picture_of_a_block_is_written_and_its_words_keep_apart(tmp_path, capsys):
    assert block.main(["--out", str(tmp_path / "block.png")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/block.png\n"
    assert png_size(tmp_path / "block.png") == (2400, 1350)
    figure = block.block_figure()
    FigureCanvasAgg(figure).draw()                                      # places the words
    boxes = [text.get_window_extent() for text in figure.axes[0].texts if text.get_text()]
    apart = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    assert not apart and all(figure.bbox.containsx(b.x0) and figure.bbox.containsx(b.x1)
                             for b in boxes)


from test_train import arguments, corpora  # noqa: E402,F401 (a fixture)
