"""Settings: every default is documented, every mistake ends in one line that names the key and the remedy."""
import dataclasses
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from model import GPT, check, load_config, load_model
from runtime import config as c
from runtime import memory
from runtime.checkpoint import CheckpointError
from runtime.config import from_tables, to_toml
from runtime.ending import Ending
from runtime.start import build_parser, open_run
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
    flat = " ".join(build_parser().format_help().split())
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
    ("train.decay_share", "0.5", 'has no effect: it is read with train.schedule = "wsd"'),
    ("ffn.device_loss", "0.1", "has no effect"), ("ffn.frozen_routes", "false", "it is read with ffn.n_frozen"),
    ("lifelong.lora_alpha", "8", "has no effect: it is read with lifelong.lora_rank"),
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


@pytest.mark.parametrize("argv, words", [
    (["--model.n_layer=0"], "n_layer"), (["--modle.n_layer", "2"], "did you mean"),
    (["--resume", "--overwrite"], "--overwrite"), (["no_such.toml"], "no_such.toml"), (["--ffn.top_k", "99"], "top_k"),
    (["--train.lr", "-1e-3"], "train.lr = -0.001 must be at least 0"), ([""], "cannot be read"),
    (["--out", ""], "--out is empty"), (["--out", "a\0b"], "null byte"), (["--out", "x" * 300], "name too long"),
    (["--train.init_from", "x" * 300], "name too long"), (["--train.init_from", "a\0b"], "NUL byte"),
    (["--lifelong.teacher", "a\0b"], "NUL byte"), (["--data.dir", "a\0b"], "NUL byte"),
    (["--data.dir", "x" * 300], "name too long"), (["--data.name", "a\0b"], "NUL byte"), (["a\0b.toml"], "null byte"),
    (["x" * 300 + ".toml"], "name too long"), (["no\x1b[2J.toml"], r"no\x1b[2J.toml"),
    (["--train.init_from", "no\x1b[2J\nrun"], r"no\x1b[2J\nrun: no such run folder"),
    (["--data.name", "~/no-such-text.txt"], str(Path.home()))])
def test_a_mistake_on_the_command_line_is_one_line(argv, words, tmp_path, capsys):
    out = [] if "--out" in argv else ["--out", str(tmp_path / "run")]
    try:
        status = train.main([*argv, *out])
    except SystemExit as e:                             # argparse
        status = e.code
    said = capsys.readouterr().err
    assert status in (1, 2)                             # 1: of a folder that cannot be used
    assert said.startswith("error: ") and said.count("\n") == 1 and "\x1b" not in said and words in said, said


def test_a_mistake_ends_the_process_with_status_2(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "train.py", "--ffn.top_k", "99", "--out", tmp_path / "run"],
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


MANY = "9" * 5000


@pytest.mark.parametrize("key, value, wanted", [
    ("model.n_layer", MANY, "not a whole number"), ("model.n_layer", "9" * 400, "below 2^63"),
    ("train.max_steps", "1e30", "not a whole number"), ("train.lr", "1e400", "not finite"),
    ("data.weights", f"[{'9' * 400}, 1]", "not finite"), ("data.weights", "1e308,1e308", "data.weights"),
    ("ffn.moe_layers", f"[{'9' * 400}]", "below 2^63"), ("ffn.moe_layers", "[2020-01-01]", "list of whole numbers"),
    ("model.n_layer", "1\x1b[2J", "not a whole number")])
def test_values_that_nobody_thought_of_are_one_line(key, value, wanted):
    more = [("data.name", "python,docs")] if key == "data.weights" else []
    text = message((key, value), *more)
    assert wanted in text and key in text and len(text) < 400


@pytest.mark.parametrize("line, wanted", [
    ("n_layer = 2020-01-01", "n_layer = \"2020-01-01\" is not a whole number"),
    ("n_layer = 07:32:00", "is not a whole number"), ("n_layer = 1979-05-27T07:32:00Z", "is not a whole number"),
    ("n_layer = {a = 1}", "is not a whole number"), (f"n_layer = {MANY}", "not valid TOML"),
    (f"n_layer = 0x{'f' * 5000}", "thousands of digits"), ("n_layer = " + "[" * 5000, "not valid TOML"),
    ("rope_base = 1e400", "not finite"), (f"rope_base = 0x{'f' * 5000}", "not finite"),
    ("mixer = \"a\\u0000b\"", "NUL byte")])
def test_values_of_a_file_that_nobody_thought_of_are_one_line(line, wanted, tmp_path):
    text = message(text=f"[model]\n{line}\n", tmp_path=tmp_path)
    assert "bad.toml" in text and wanted in text and len(text) < 600


def test_a_mark_at_the_begin_of_a_file_and_spaces_in_a_list_are_no_harm(tmp_path):
    path = tmp_path / "a.toml"
    path.write_bytes(b"\xef\xbb\xbf[model]\r\nn_layer = 2\r\n")
    config = load_config(path, [("data.name", "python , docs"), ("data.weights", " 1 , 3 "), ("ffn.moe_layers", "0, 1")])
    assert (config.model.n_layer, config.data.name) == (2, ["python", "docs"])
    assert (config.data.weights, config.ffn.moe_layers) == ([1.0, 3.0], [0, 1])


def test_the_users_folder_is_understood_wherever_a_path_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.toml").write_text('[train]\ninit_from = "~/x"\n[data]\ndir = "~/d"\n')
    config = load_config("~/a.toml", [("lifelong.teacher", "~/t")])
    assert (config.train.init_from, config.lifelong.teacher, config.data.dir) == tuple(
        str(tmp_path / name) for name in "xtd")
    with ExitStack() as held, pytest.raises(CheckpointError, match=f"{tmp_path}/run/ckpt_last.pt: no such"):
        open_run(["--out=~/run", "--resume"], held, load_config, check, None)
    with pytest.raises(CheckpointError, match=f"{tmp_path}/run/ckpt_last.pt: no such"):
        load_model("~/run")


@pytest.mark.parametrize("settings", [
    {"model.n_embd": 2**40}, {"model.vocab_size": 2**50}, {"ffn.n_expert": 2**44}, {"ffn.d_ff": 2**50},
    {"ffn.kind": "peer", "ffn.n_keys": 2**30}, {"ffn.kind": "peer", "ffn.n_keys": 2**21}, {"model.n_embd": 2**62},
    {"model.block_size": 2**40}, {"train.batch_size": 2**50}, {"train.batch_size": 2**62, "train.grad_accum": 2**62}],
    ids=str)
def test_sizes_that_no_memory_holds_are_refused_with_what_there_is(settings):
    config = load_config(None, {"model.vocab_size": 256} | settings)
    with pytest.raises(ConfigError, match="memory") as error:
        memory.check(config, torch.device("cpu"), GPT)
    said = str(error.value)
    assert "\n" not in said and ("larger than any" in said or re.search(r"at least [\d.e+]+ [TPE]B .* there are", said))


def test_memory_is_no_hindrance_for_what_fits_and_nothing_is_drawn():
    config = load_config(ROOT / "configs" / "quick.toml", {"model.vocab_size": 256})
    state = torch.get_rng_state()
    memory.check(config, torch.device("cpu"), GPT)
    assert torch.equal(state, torch.get_rng_state())


def test_memory_that_runs_out_later_is_one_line_too(capsys):
    for allocate in (lambda: torch.empty(2**55), lambda: np.empty(2**55)):
        with Ending() as end:
            allocate()
        said = capsys.readouterr().err
        assert end.status == 1 and "not enough memory" in said and "this machine has" in said and said.count("\n") == 1


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
