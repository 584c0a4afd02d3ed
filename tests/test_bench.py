"""lab/bench.py: what it writes and refuses, and that its numbers mean what they say. No time is
tested."""
import json
import math
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import kernels.peer as kernels_peer
import lab.bench as bench
import moe
from data import binfile
from ffn import Context
from lab.timing import measure
from lab.timing import moe as bench_moe
from lab.timing import peer as bench_peer
from lab.timing.moe import MoEShape
from lab.timing.peer import PEERShape

TINY_MOE = MoEShape(T=64, d=32, E=8, k=2, n=16)
TINY_PEER = PEERShape(m=16, d=32, h=2, k=4, T=64, d_key=16)
KEYS = ["bench", "device", "shape", "path", "dtype", "direction", "ms", "ratio_to_dense", "tflops",
        "ceiling_share", "peak_mib", "saved_mib", "note"]


@pytest.fixture
def machine():
    return measure.find_machine("cpu", 1, 2, size=64, copy_mib=1)


@pytest.fixture
def tiny(monkeypatch):
    """The program with one tiny shape for each bench and time enough, on a machine that emulates
    nothing; returns its main."""
    monkeypatch.setattr(bench, "LIMITS", {"quick": (math.inf, math.inf)})
    monkeypatch.setattr(measure, "EMULATED", math.inf)
    small = {"model.n_layer": 1, "model.n_embd": 32, "model.block_size": 16, "train.batch_size": 2,
             "ffn.d_ff": 32}
    dense = bench.model_config(**small, **{"ffn.kind": "dense"})
    monkeypatch.setattr(bench, "find_machine", partial(measure.find_machine, size=64, copy_mib=1))
    monkeypatch.setattr(bench, "MOE_SHAPES", {"cpu": [TINY_MOE]})
    monkeypatch.setattr(bench, "PEER_SHAPES", {"cpu": [TINY_PEER]})
    sets = {"tiny": {"dense": dense, "moe": bench.model_config(**small)}}
    monkeypatch.setattr(bench, "model_sets", lambda device: sets)
    return lambda *arguments: bench.main([*arguments, "--device", "cpu", "--shapes", "quick"])


# ---- rows ----

def written_rows(main, name, path):
    assert main(name, "--json", str(path)) == 0
    rows = json.loads(path.read_text())
    for row in rows:
        assert list(row) == KEYS == list(measure.KEYS)
        assert (row["bench"], row["device"]) == (name, "cpu")
        assert row["direction"] in ("fwd", "fwd+bwd") or row["path"] == "all"
        assert row["dtype"] in ("float32", "bfloat16")
        assert (row["ms"] or 0) > 0 or row["note"]
        assert all(row[key] is None or row[key] >= 0 for key in KEYS[6:-1])
    ceilings = [row for row in rows if row["path"].startswith("ceiling")]
    assert len(ceilings) == 3 and all(row["ceiling_share"] == 1 for row in ceilings)
    return [row for row in rows if row not in ceilings]


def test_moe_rows(tiny, tmp_path, capsys):
    rows = written_rows(tiny, "moe", tmp_path / "rows.json")
    ours = {"dense", "loop", "padded", "grouped", "grouped_mm"}
    for direction in "fwd", "fwd+bwd":
        for dtype in "float32", "bfloat16":
            some = [row for row in rows if (row["direction"], row["dtype"]) == (direction, dtype)]
            assert ours <= {row["path"] for row in some} and some[0]["ratio_to_dense"] == 1
    assert {row["shape"] for row in rows} == {"T64 d32 E8 k2 n16"}
    assert not any(row[key] is None for row in rows for key in KEYS[:-1] if row["path"] in ours)
    printed = capsys.readouterr().out
    assert "equal active FLOPs" in printed and "x dense" in printed
    table = printed[printed.index("  path"):].split("\n\n")[0].splitlines()
    # aligned
    assert len(table) == 1 + len(rows) // 2
    assert len({len(line) for line, row in zip(table, [rows[0], *rows]) if not row["note"]}) == 1


def test_model_rows(tiny, tmp_path, capsys):
    rows = written_rows(tiny, "model", tmp_path / "rows.json")
    assert [(row["path"], row["dtype"], row["direction"]) for row in rows] == [
        (path, dtype, "fwd+bwd") for dtype in ("float32", "bfloat16") for path in ("dense", "moe")]
    row, printed = rows[0], capsys.readouterr().out
    assert row["shape"] == "tiny B2 T16 L1 d32 V256" and "tokens/s" in printed
    assert f"{2 * 16 / row['ms'] * 1e3:,.0f}"[:3] in printed


def test_peer_rows(tiny, tmp_path, capsys):
    rows = written_rows(tiny, "peer", tmp_path / "rows.json")
    parts = {}
    for row in rows:
        parts.setdefault(row["shape"], set()).add(row["path"])
    assert parts.pop("N16^2 T64 d32 h2 k4 retrieval alone") == {"readable", "lean, fused"}
    assert parts.pop("N16^2 T64 d32 h2 k4 layer") >= {"dense", "readable", "lean"}
    assert parts == {f"N16^2 T64 d32 h2 k4 experts alone, {spread}": {"floor", "readable", "lean"}
                     for spread in ("uniform", "zipf")}
    by = {(row["path"], row["direction"]): row
          for row in rows if row["shape"].endswith("alone, uniform")}
    assert by["floor", "fwd+bwd"]["ms"] == pytest.approx(3 * by["floor", "fwd"]["ms"], rel=1e-3)
    floor, lean = by["floor", "fwd"]["ms"], by["lean", "fwd"]
    assert lean["ceiling_share"] == pytest.approx(floor / lean["ms"], rel=1e-3)
    assert lean["saved_mib"] < by["readable", "fwd"]["saved_mib"] / 3
    assert "lean takes" in capsys.readouterr().out


def test_nothing_is_written_unasked(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tiny("peer") == 0 and not list(tmp_path.iterdir())


# ---- the check before the timing ----

def scaled(x, routing, experts):
    return moe.dispatch_loop(x, routing, experts) * 1.0001


def gate_without_gradient(x, routing, experts):
    weight = routing.weight.detach() + 0 * routing.weight
    return moe.dispatch_loop(x, routing._replace(weight=weight), experts)


@pytest.mark.parametrize("path, what", [
    (scaled, "its output"), (gate_without_gradient, "its gradient of x")])
def test_a_wrong_path_stops_the_bench(tiny, tmp_path, capsys, monkeypatch, path, what):
    monkeypatch.setitem(moe.DISPATCH, "grouped", path)
    assert tiny("moe", "--json", str(tmp_path / "rows.json")) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "path grouped is wrong" in error and what in error
    rows = json.loads((tmp_path / "rows.json").read_text())
    # the ceilings are kept
    assert rows and all(row["path"].startswith("ceiling") for row in rows)


def test_rows_that_cannot_be_written_end_in_one_line(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(binfile.os, "replace", no_space)
    assert tiny("moe", "--json", str(tmp_path / "rows.json")) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "rows.json" in error and "disk" in error


def no_space(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("wrong_row", [False, True])
def test_a_wrong_expert_path_stops_the_bench(tiny, capsys, monkeypatch, wrong_row):
    def backward_table(x, dy, dh, a, idx, n_expert, out, accumulate):
        good = lean[2](x, dy, dh, a, idx, n_expert, out, accumulate)
        if not wrong_row:
            return good * 1.001
        unused = (~torch.isin(torch.arange(n_expert), idx)).nonzero()[0]
        good[unused] = 1e-3
        return good

    lean = kernels_peer.PASSES["lean"]
    monkeypatch.setitem(kernels_peer.PASSES, "lean", (*lean[:2], backward_table))
    # tokens, who leave experts unused
    monkeypatch.setattr(bench_peer, "CHECKED", 16)
    assert tiny("peer") == 1
    assert "path lean is wrong: its gradient of the table" in capsys.readouterr().err


def test_paths_are_right_under_every_skew():
    """Shared experts, loads imposed: zipf falls with the expert's number, half and empty as they
    say."""
    loads = {}
    for skew in "zipf", "half", "empty":
        shape = MoEShape(T=64, d=32, E=16, k=2, n=16, shared=1, skew=skew)
        layers = bench_moe.build_layers(shape, torch.float32, "cpu", bench_moe.paths_of("cpu"))
        ctx = Context(torch.zeros(1, shape.T, dtype=torch.long))
        x, dy = (torch.randn(1, shape.T, shape.d) for _ in range(2))
        bench_moe.check_layers(shape, torch.float32, layers, x.requires_grad_(), dy, ctx)
        loads[skew] = layers["loop"](x, ctx)[1].load
    assert loads["zipf"][:4].sum() > 1.5 * loads["zipf"][8:].sum()
    assert loads["half"][0] >= 32 and loads["half"].argmax() == 0
    assert loads["empty"][:2].sum() == 0 and (loads["empty"][2:] > 0).all()


# ---- other packages ----

class Theirs(torch.nn.Linear):
    """Another package's layer, which answers with more than its output."""

    def forward(self, x):
        return super().forward(x), "logits"


def broken(*_):
    raise AttributeError("module has no attribute\n_moe")


class BrokenLater(torch.nn.Linear):
    def forward(self, x):
        return broken()


@pytest.mark.parametrize("name, module, builder", [("moe", bench_moe, "mixtral_block"),
                                                   ("peer", bench_peer, "peer_pytorch")])
@pytest.mark.parametrize("build, note", [
    (lambda *_: Theirs(32, 32), None),
    (broken, "cannot run: AttributeError: module has no attribute _moe"),
    (lambda *_: BrokenLater(32, 32), "cannot run: AttributeError: module has no attribute _moe")])
def test_a_peer_is_a_line_whatever_it_does(tiny, tmp_path, capsys, monkeypatch, name, module,
                                           builder, build, note):
    monkeypatch.setattr(module, "version_of", lambda package: "9.9")
    monkeypatch.setattr(module, builder, build)
    monkeypatch.setattr(module, "dtypes_of", lambda *_: (torch.float32,), raising=False)
    rows = [row for row in written_rows(tiny, name, tmp_path / "rows.json")
            if row["path"].endswith(" 9.9")]
    assert [row["direction"] for row in rows] == ["fwd", "fwd+bwd"]
    assert {row["note"] for row in rows} == {note}
    assert all((row["ms"] is None) == (note is not None) for row in rows)
    lines = [line for line in capsys.readouterr().out.splitlines() if " 9.9 " in line]
    assert len([line for line in lines if (note or "") in line]) >= 2


def test_the_real_peers_run_where_they_are_installed():
    pytest.importorskip("transformers")
    shape = MoEShape(T=6, d=16, E=4, k=2, n=8)
    (peer,) = bench_moe.peers_of(shape, torch.float32, "cpu").values()
    y, _ = peer(torch.randn(1, 6, 16, requires_grad=True), None)
    y.sum().backward()
    assert y.shape == (1, 6, 16)
    assert bench_moe.peers_of(shape._replace(shared=1), torch.float32, "cpu") == {}


# ---- limits ----

def test_an_emulated_dtype_is_one_line(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure.Machine, "emulates", lambda self, dtype: dtype == torch.bfloat16)
    rows = written_rows(tiny, "moe", tmp_path / "rows.json")
    (row,) = [row for row in rows if row["dtype"] == "bfloat16"]
    assert row["path"] == "all" and row["ms"] is None and "emulated" in row["note"]
    assert len([line for line in capsys.readouterr().out.splitlines() if "emulated" in line]) == 1


def test_emulation_shows_in_the_products():
    machine = measure.Machine("cpu", 1, 1, {torch.float32: 9e9, torch.bfloat16: 1e9}, 1)
    assert machine.emulates(torch.bfloat16) and not machine.emulates(torch.float32)


def test_no_table_is_begun_when_the_time_is_over(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "LIMITS", {"quick": (1, bench.LAST_TABLE)})
    rows = written_rows(tiny, "model", tmp_path / "rows.json")
    assert [row["note"] for row in rows] == ["not measured: the time is over"] * 2
    printed = capsys.readouterr().out
    assert printed.index("interleaved rounds") < printed.index("ceilings")
    assert "[table 1 of 2; at most 0:5" in printed and "[table 2 of 2; " in printed


def test_a_budget_bounds_the_rounds_of_each_contestant(machine):
    calls = []

    def slow(i):
        calls.append("slow")
        time.sleep(0.2)

    arms = {"dense": measure.Contestant(lambda i: calls.append("dense")),
            "slow": measure.Contestant(slow)}
    limited = machine._replace(budget=0.1, repeats=5)
    dense, late = measure.measure(limited, "moe", "s", torch.float32, "fwd", arms)
    # a first call, its memory, one round; the other has a warm-up and five
    assert calls.count("slow") == 3 and calls.count("dense") == 2 + 1 + 5
    assert late["ms"] > 150 and dense["note"] is late["note"] is None
    over = machine._replace(end=time.perf_counter() + 0.3)
    dense, late = measure.measure(over, "moe", "s", torch.float32, "fwd", arms)
    assert late["note"] == "one call, for the time is over" and late["ms"] > 150
    assert late["peak_mib"] is None
    rows = measure.measure(machine._replace(end=0), "moe", "s", torch.float32, "fwd", arms)
    assert [row["note"] for row in rows] == ["not measured: the time is over"] * 2
    measure.print_table(rows)


def test_time_left():
    assert bench.time_left(10, 0, 4, 180) == "at most 2:50 left"
    assert bench.time_left(10, 1, 4, 180) == "about 0:30 left"
    assert bench.time_left(100, 1, 4, 180) == "at most 1:20 left"
    assert bench.time_left(5, 0, 4, math.inf) == "time left unknown yet"


# ---- what the numbers mean ----

def test_flops_by_hand():
    shape = MoEShape(T=10, d=16, E=4, k=2, n=8)
    # 16 hidden units; gate, up, down
    assert shape.flops("fwd") == 2 * 10 * (2 * 8) * (16 + 16 + 16)
    assert shape.flops("fwd+bwd") == 3 * shape.flops("fwd")
    assert MoEShape(10, 16, 4, 2, 8, shared=1).flops("fwd") == 1.5 * shape.flops("fwd")
    layers = bench_moe.build_layers(shape, torch.float32, "cpu", bench_moe.paths_of("cpu"))
    x = torch.randn(1, 10, 16, requires_grad=True)
    ctx = Context(torch.zeros(1, 10, dtype=torch.long))
    with FlopCounterMode(display=False) as counter:
        layers["dense"](x, ctx)[0].sum().backward()
    assert counter.get_total_flops() == shape.flops("fwd+bwd")
    # and the router
    assert 10 * layers["loop"].flops_per_token() == shape.flops("fwd") + 2 * 10 * 16 * 4


def test_peer_floor_by_hand():
    # 128 u and v
    assert PEERShape(m=1024, d=512, h=8, k=16, T=1).chosen_bytes(torch.bfloat16) == 262_144


def test_ratio_is_the_median_of_paired_ratios(monkeypatch, machine):
    times = {"dense": [1.0, 2.0, 10.0], "a": [2.0, 3.0, 5.0],
             "dense compiled": [1.0] * 3, "a compiled": [3.0] * 3}
    monkeypatch.setattr(measure, "interleave", lambda *_: times)
    arms = {name: measure.Contestant(lambda i: None, 6e9, 0.5, 7.0) for name in times}
    rows = measure.measure(machine, "moe", "s", torch.float32, "fwd", arms)
    assert [row["ratio_to_dense"] for row in rows] == [1, 1.5, 1, 3]
    assert rows[1] == dict(zip(KEYS, ("moe", "cpu", "s", "a", "float32", "fwd", 3, 1.5, 2, 0.16667,
                                      0, 7, None)))


def test_contestants_take_turns_and_so_do_inputs():
    calls = []
    runs = {name: lambda i, name=name: calls.append((name, i)) for name in "ab"}
    times = measure.interleave("cpu", runs, 1, 3)
    assert calls == [(name, i) for i in (0, 1, 2, 0) for name in "ab"]
    assert [len(t) for t in times.values()] == [3, 3]


def test_a_contestant_without_memory_gets_a_row_without_a_time(machine):
    def too_much(i):
        raise torch.OutOfMemoryError

    arms = {"dense": measure.Contestant(lambda i: torch.ones(9)),
            "big": measure.Contestant(too_much, 1.0, 1.0)}
    dense, big = measure.measure(machine, "moe", "s", torch.float32, "fwd", arms)
    assert dense["ms"] > 0 and [big[key] for key in KEYS[6:-1]] == [None] * 6
    assert big["note"] == "does not fit into memory"
    measure.print_table([dense, big])


def test_peak_memory_of_known_allocations():
    def run():
        a = torch.ones(1024, 1024)                          # 4 MiB
        b = a + 1                                           # 8
        del a
        return b.sum() + (b * 2).sum()                      # 4, then 8 again

    kept = torch.ones(1024, 1024)
    assert measure.peak_mib("cpu", run) == pytest.approx(8, abs=0.01)
    assert measure.peak_mib("cpu", lambda: kept.mul_(2)) < 0.01


def test_saved_memory_of_known_graphs():
    x, w = torch.ones(256, 1024, requires_grad=True), torch.ones(1024, 1024, requires_grad=True)
    assert measure.saved_mib(lambda: (x @ w).exp(), [w]) == 2           # x and the result, not w
    assert measure.saved_mib(lambda: x.exp() + x.detach().view(-1)[:9].sum()) == 1
    assert measure.saved_mib(lambda: (x * 2 + 1)) == 0


def test_saved_memory_of_the_grouped_path():
    """Layer input and pre-activation, plus indices and gates, within 10 %."""
    shape = MoEShape(T=512, d=64, E=16, k=4, n=32)
    layers = bench_moe.build_layers(shape, torch.float32, "cpu", bench_moe.paths_of("cpu"))
    x = torch.randn(1, 512, 64, requires_grad=True)
    ctx = Context(torch.zeros(1, 512, dtype=torch.long))
    floor = 4 * (512 * 64 + 512 * 4 * 2 * 32) / 2 ** 20
    assert floor < bench_moe.saved_by(layers["grouped"], x, ctx) < 1.1 * floor
    assert bench_moe.saved_by(layers["loop"], x, ctx) > 2 * floor
    # compiled layers are no MoE
    assert bench_moe.saved_by(SimpleNamespace(), x, ctx) is None


def test_gpu_models_have_equal_active_flops():
    with torch.device("meta"):
        for title, configs in bench.model_sets("cuda").items():
            flops = {name: bench.GPT(config).flops_per_token() for name, config in configs.items()}
            other = next(f for name, f in flops.items() if name != "dense")
            assert abs(other / flops["dense"] - 1) < (0.05 if title == "E3" else 0.005), title


# ---- the command line ----

@pytest.mark.parametrize("arguments, words", [
    (["moe", "--device", "tpu"], "tpu"),
    (["speed"], "speed"),
    ([], "bench"),
    (["moe", "--shape", "quick"], "did you mean --shapes"),
    (["moe", "--json", "no/such/folder/rows.json"], "no/such/folder"),
    (["moe", "--json", "."], "must be a file"),
    pytest.param(["moe", "--device", "cuda"], "no CUDA device",
                 marks=pytest.mark.skipif(torch.cuda.is_available(),
                                          reason="needs a machine without CUDA")),
])
def test_mistakes_are_one_line_and_status_2(capsys, arguments, words):
    try:
        status = bench.main(arguments)
    except SystemExit as e:
        status = e.code
    error = capsys.readouterr().err
    assert status == 2 and words in error and error.count("\n") == 1 and error.startswith("error: ")


def test_help_lists_options_and_defaults(capsys):
    with pytest.raises(SystemExit) as e:
        bench.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert e.value.code == 0 and text.count("(default: ") == 3
    assert all(word in text for word in ("moe", "model", "peer", "--device", "--shapes", "--json",
                                         "quick"))
