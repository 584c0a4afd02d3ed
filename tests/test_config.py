"""Settings: every default is documented, every mistake ends in one line that names the key and the remedy."""
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import load_config
from runtime import config as c
from runtime.config import from_tables, to_toml
from settings import Config, ConfigError

ROOT = Path(__file__).parent.parent


def message(*overrides, text=None, tmp_path=None):
    """The one line that a bad setting ends in."""
    path = None
    if text is not None:
        path = tmp_path / "bad.toml"
        path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_field_has_a_meaning_and_a_default_within_its_own_bounds():
    for key, spec in c.all_fields():
        assert len(spec.metadata["help"]) > 3, key
        default = spec.default if spec.default is not dataclasses.MISSING else spec.default_factory()
        assert c.check_value(default, spec, key, "default") == default


def test_help_lists_every_field_with_its_default():
    text = subprocess.run([sys.executable, ROOT / "train.py", "--help"],
                          capture_output=True, text=True).stdout
    flat = " ".join(text.split())
    for key, spec in c.all_fields():
        assert f"--{key} " in flat
    assert "(default: \"python\")" in flat and "(default: 0.001)" in flat


@pytest.mark.parametrize("key, value, wanted", [
    ("model.n_layers", "3", "did you mean model.n_layer?"),
    ("fnn.kind", "moe", "did you mean ffn.kind?"),
    ("train.top_k", "3", "did you mean ffn.top_k?"),
    ("model.n_layer", "three", "model.n_layer = three is not a whole number"),
    ("model.n_layer", "0", "model.n_layer = 0 must be at least 1"),
    ("model.qkv_bias", "yes", "model.qkv_bias = yes is not true or false"),
    ("ffn.router", "topkk", "did you mean topk?"),
    ("train.lr", "nan", "not finite"),
    ("train.lr", "-1", "train.lr = -1.0 must be at least 0"),
    ("ffn.top_k", "9", "ffn.top_k = 9 is more than ffn.n_expert = 8"),
    ("model.n_head", "3", "model.n_embd = 128 cannot be divided by model.n_head = 3"),
    ("model.n_kv_head", "3", "must divide model.n_head = 4"),
    ("ffn.moe_layers", "1,9", "ffn.moe_layers = [1, 9] names a layer outside 0..3"),
    ("train.grad_accum", "5", "train.batch_size = 32 cannot be cut into train.grad_accum = 5"),
    ("data.weights", "1,2", "needs one number for each corpus"),
    ("ffn.router", "switch", "ffn.top_k = 2"),
    ("ffn.granularity", "7", "ffn.granularity = 7 does not divide"),
])
def test_a_bad_value_is_named_with_its_remedy(key, value, wanted):
    text = message((key, value))
    assert wanted in text
    if "did you mean" not in wanted:
        assert "--" in text or "default" in text           # where it came from


def test_a_bad_file_is_named(tmp_path):
    assert "bad.toml: ffn.top_k = 3 is more than" in message(
        text="[ffn]\nn_expert = 2\ntop_k = 3", tmp_path=tmp_path)
    assert "bad.toml: not valid TOML" in message(text="[ffn\n", tmp_path=tmp_path)
    assert "bad.toml: [optimizer] is no section" in message(text="[optimizer]\nlr = 1", tmp_path=tmp_path)
    assert "bad.toml: unknown setting model.n_layers (did you mean model.n_layer?)" in message(
        text="[model]\nn_layers = 3", tmp_path=tmp_path)
    assert "model.n_layer = 3.5 is not a whole number" in message(
        text="[model]\nn_layer = 3.5", tmp_path=tmp_path)
    assert "model.n_layer = true is not a whole number" in message(
        text="[model]\nn_layer = true", tmp_path=tmp_path)
    with pytest.raises(ConfigError, match=r"did you mean .*quick\.toml"):
        load_config(ROOT / "configs" / "quik.toml")


def test_widths_given_twice_and_gates_that_cannot_learn_are_refused():
    assert "ffn.d_expert" in message(("ffn.d_expert", "64"), ("ffn.granularity", "2"))
    assert "ffn.gate_order" in message(("ffn.top_k", "1"))
    assert "ffn.gate_order" in message(("ffn.top_k", "1"), ("ffn.gate_order", "softmax_then_topk_renorm"))
    load_config(None, [("ffn.top_k", "1"), ("ffn.gate_order", "softmax_then_topk")])


@pytest.mark.parametrize("argv", [["--model.n_layer=0"], ["--modle.n_layer", "2"],
                                  ["--resume", "--overwrite"], ["no_such.toml"], ["--ffn.top_k", "99"]])
def test_the_program_ends_with_status_2_and_one_line(argv, tmp_path):
    done = subprocess.run([sys.executable, ROOT / "train.py", *argv, "--out", tmp_path / "run"],
                          capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_overrides_win_over_the_file_and_come_in_both_spellings(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('[model]\nn_layer = 2\n[data]\nname = ["python", "docs"]\nweights = [1, 3]\n')
    _, overrides = c.parse(parser(), ["--model.n_layer", "6", "--train.lr=0.5", "--ffn.moe_layers", "0,2"])
    config = load_config(path, overrides)
    assert (config.model.n_layer, config.train.lr, config.ffn.moe_layers) == (6, 0.5, [0, 2])
    assert config.data.name == ["python", "docs"] and config.data.weights == [1.0, 3.0]


def parser():
    p = c.Parser(allow_abbrev=False)
    c.add_settings(p)
    return p


def test_a_config_survives_toml_and_dict():
    config = load_config(None, [("data.name", 'a "quoted" path/ü.txt'), ("ffn.kind", "peer"),
                                ("train.lr", "1e-4")])
    import tomllib
    for again in (from_tables(tomllib.loads(to_toml(config))), from_tables(config.to_dict())):
        assert again == config


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_validation_refuses_is_refused_by_key_and_what_it_accepts_is_resolved(data):
    """Random values for random keys: either a config whose derived values are filled in, or one line naming a
    key."""
    keys = dict(c.all_fields())
    chosen = data.draw(st.lists(st.sampled_from(sorted(keys)), max_size=5, unique=True))
    overrides = [(key, c.show(data.draw(value_of(keys[key]))).strip('"')) for key in chosen]
    try:
        config = load_config(None, overrides)
    except ConfigError as e:
        assert any(key in str(e) for key in keys) and "\n" not in str(e)
    else:
        assert config.model.n_kv_head and config.ffn.d_ff and config.ffn.balance != "auto"
        assert load_config(None, []) == load_config(None, [])


def value_of(spec):
    kind, meta = spec.type, spec.metadata
    if meta["choices"]:
        return st.sampled_from(meta["choices"])
    return {int: st.integers(-1, 12), float: st.floats(-1, 2), bool: st.booleans(),
            list[int]: st.lists(st.integers(-1, 5), max_size=3),
            list[float]: st.lists(st.floats(0, 2), max_size=3)
            }.get(kind, st.sampled_from(["python", "docs", "byte"]))


def test_every_config_in_the_repository_is_valid():
    found = [*ROOT.glob("configs/*.toml"), *ROOT.glob("configs/published/*.toml")]
    assert found
    for path in found:
        load_config(path)
