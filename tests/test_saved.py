"""lab/timing/saved.py: what its rows must be, by hand."""
import json
from pathlib import Path

import pytest

from kernels.common import INTERPRETED
from lab.timing import saved

FILE = Path(__file__).parent.parent / "results/saved-bytes.json"
D = saved.D


@pytest.fixture
def rows(monkeypatch):
    """rows(name): {(path, dtype): bytes}, from few tokens."""
    def of(name):
        return {(row["path"], row["dtype"]): row["bytes"] for row in saved.rows_of(name, T=3)}
    return of


def test_dense_by_hand(rows):
    # its input, gate and up, silu(gate) and the product, float32
    assert rows("dense, d_ff 2048") == {("-", "float32"): 4 * (D + 4 * 2048),
                                        ("-", "bfloat16"): 2 * (D + 4 * 2048)}


@pytest.mark.skipif(not INTERPRETED, reason="counts what the interpreter runs")
def test_mixture_by_hand(rows):
    """Input and pre-activation of the grouped paths, and small things of pairs and experts."""
    E, k, w = 8, 2, 1024
    found = rows("mixture, E 8, k 2, w 1024")
    small = k * 60 + E * 12
    floor = D + k * 2 * w
    for path in "grouped", "fused":
        assert 4 * floor < found[path, "float32"] < 4 * floor + small
    # the fused path multiplies the router's weights by parts and keeps no float32 copy of x; of a pair it
    # keeps 8 bytes less, its numbers being int32
    assert 2 * floor < found["fused", "bfloat16"] < 2 * floor + small
    assert found["grouped", "bfloat16"] - found["fused", "bfloat16"] == 4 * D + 8 * k
    assert found["loop", "float32"] > 2 * found["grouped", "float32"]


def test_the_recorded_rows_are_of_the_layers_that_there_are():
    recorded = json.loads(FILE.read_text("utf-8"))
    places = {(row["layer"], row["path"]) for row in recorded["rows"]}
    assert places == {(name, path) for name, (_, key) in saved.LAYERS.items()
                      for path in saved.PATHS[key]}


def test_a_mistake_is_one_line(capsys):
    assert saved.main(["--jsn", "x"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--json" in error
