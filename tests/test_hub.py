"""Models of the world in and out: the same numbers as transformers computes, the same files, and nothing that a
damaged or hostile folder can do. All skips where safetensors is missing, parity where transformers is."""
import copy
import itertools
import json
import os
import shutil
import struct
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from data import bytelevel
from data.tokenizers import Tokenizer
from grow import hub
from grow.hub_families import FAMILIES, factors, flat
from model import GPT, load_config, load_model, resolve
from runtime import checkpoint
from runtime.files import load
from runtime.terminal import lineage

safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors: requirements-hub.txt")


# ---- the same numbers as transformers

SMALL = dict(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=24, max_position_embeddings=64, pad_token_id=None)
SCALED = dict(embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.2, logits_scaling=4.0)
LLAMA3 = dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
THEIRS = {
    "mixtral": ("Mixtral", dict(num_local_experts=4, num_experts_per_tok=2)),
    "mixtral window": ("Mixtral", dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=5, head_dim=16)),
    "qwen2_moe": ("Qwen2Moe", dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
                                   shared_expert_intermediate_size=40, mlp_only_layers=[0])),
    "qwen3_moe": ("Qwen3Moe", dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=16,
                                   norm_topk_prob=True, tie_word_embeddings=True)),
    "olmoe": ("Olmoe", dict(num_experts=4, num_experts_per_tok=3)),
    "granitemoe": ("GraniteMoe", dict(num_local_experts=4, num_experts_per_tok=2, **SCALED)),
    "granitemoe tied": ("GraniteMoe", dict(num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=True,
                                           attention_bias=True, **SCALED)),
    "llama": ("Llama", dict(attention_bias=True, rope_parameters=LLAMA3)),
    "llama linear": ("Llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=100.0, factor=4.0))),
    "mistral": ("Mistral", dict(sliding_window=7)),
    "deepseek": ("Llama", dict(intermediate_size=40)),
}


class DeepseekMoE(torch.nn.Module):
    """DeepSeekMoE (2401.06066 eq. 3-5) as a loop over tokens, which transformers lacks."""

    def __init__(self, d, w, E, k, shared, mlp):
        super().__init__()
        self.k, self.gate = k, torch.nn.Linear(d, E, bias=False)
        self.experts = torch.nn.ModuleList(mlp(w) for _ in range(E))
        self.shared_experts = mlp(shared * w)

    def forward(self, x):
        rows = []
        for u in x.flatten(0, 1):
            s = self.gate(u).softmax(-1)
            rows.append(self.shared_experts(u) + sum(s[i] * self.experts[i](u) for i in s.topk(self.k).indices.tolist()))
        return torch.stack(rows).view_as(x)


def their_model(name, **extra):
    """A small model of transformers with random weights, norms and biases too. extra: more of its config."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(1)
    kind, more = THEIRS[name]
    config = getattr(transformers, kind + "Config")(**copy.deepcopy(SMALL | more | extra))
    if "num_local_experts" in more or "num_experts" in more:
        config._experts_implementation = "eager"
    model = getattr(transformers, kind + "ForCausalLM")(config)
    if name == "deepseek":
        from transformers.models.llama.modeling_llama import LlamaMLP
        moe = DeepseekMoE(32, 16, 4, 2, 2, lambda w: LlamaMLP(transformers.LlamaConfig(**SMALL | dict(
            intermediate_size=w))))
        model.model.layers[1].mlp = moe
    with torch.no_grad():
        for p in model.parameters():
            p.uniform_(0.5, 1.5) if p.dim() == 1 else p.normal_(std=0.2)
    return model.eval()


def save_theirs(model, folder, name):
    """The folder that its users download."""
    if name != "deepseek":
        model.save_pretrained(folder)
        return
    folder.mkdir()
    c = dict(SMALL, model_type="deepseek", intermediate_size=40, moe_intermediate_size=16, n_routed_experts=4,
             n_shared_experts=2, num_experts_per_tok=2, first_k_dense_replace=1, moe_layer_freq=1, norm_topk_prob=False,
             scoring_func="softmax", rms_norm_eps=1e-6, rope_theta=10000, rope_scaling=None, hidden_act="silu")
    (folder / "config.json").write_text(json.dumps(c))
    safetensors.save_file(model.state_dict(), folder / "model.safetensors")


IDS = torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name, more, said", [
    ("mixtral", dict(rope_theta=77.0, num_key_value_heads=4, rms_norm_eps=1e-2), None),
    ("mixtral", dict(router_jitter_noise=0.1), "are not read: ['router_jitter_noise']"),
    ("mixtral", dict(layer_types=["sliding_attention"] * 2, sliding_window=3), "error: layer_types"),
    ("qwen2_moe", dict(sliding_window=3, layer_types=["sliding_attention", "full_attention"]), "error: layer_types"),
    ("qwen2_moe", dict(sliding_window=3, use_sliding_window=True, max_window_layers=1), "error: "),
    ("qwen2_moe", dict(sliding_window=3), None), ("qwen2_moe", dict(head_dim=16), "error: (64, 32), not (32, 32)"),
    ("qwen2_moe", dict(decoder_sparse_step=2, mlp_only_layers=[]), None),
    ("qwen2_moe", dict(norm_topk_prob=True, qkv_bias=False), None),
    ("qwen2_moe", dict(mlp_only_layers=[0, 1]), "error: ffn.moe_every"),
    ("qwen3_moe", dict(norm_topk_prob=False, num_hidden_layers=4, decoder_sparse_step=2, mlp_only_layers=[1]), None),
    ("qwen3_moe", dict(sliding_window=3, use_sliding_window=True), "error: use_sliding_window"),
    ("qwen3_moe", dict(attention_bias=True), None), ("olmoe", dict(clip_qkv=0.1), "error: clip_qkv"),
    ("olmoe", dict(norm_topk_prob=True, attention_bias=True), None), ("olmoe", dict(num_experts_per_tok=1), None),
    ("olmoe", dict(hidden_act="gelu"), "error: hidden_act"), ("granitemoe", dict(position_embedding_type="none"), "are not read"),
    ("granitemoe", dict(attention_multiplier=0.0), "config.json: attention_multiplier"),
    ("granitemoe", dict(attention_multiplier=1.0, rms_norm_eps=1e-2), None), ("llama", dict(mlp_bias=True), "error: mlp_bias"),
    ("llama", dict(pretraining_tp=2, head_dim=16), None), ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
    ("llama linear", dict(rope_parameters=dict(rope_type="dynamic", rope_theta=9.0, factor=2.0)), "error: rope.rope_type"),
    ("llama linear", dict(rope_parameters=dict(rope_type="default", rope_theta=9.0)), None),
    ("mistral", dict(sliding_window=None, head_dim=16), None), ("deepseek", dict(routed_scaling_factor=2.5), "error: routed_"),
    ("deepseek", dict(n_group=2, topk_group=1), "error: n_group"), ("deepseek", dict(scoring_func="sigmoid"), "error: scoring"),
    ("deepseek", dict(topk_method="group_limited_greedy"), "error: topk_method"),
    ("deepseek", dict(moe_layer_freq=[0, 1]), "error: moe_layer_freq")])
def test_what_changes_the_numbers_is_read_or_refused(name, more, said, tmp_path, capsys):
    deepseek = name == "deepseek"                               # its config is no class of transformers
    model = their_model(name, **{} if deepseek else more)
    save_theirs(model, tmp_path / "theirs", name)
    if deepseek:
        config(**more)(tmp_path / "theirs")
    status, out = program("import", tmp_path / "theirs", "--out", tmp_path / "run"), capsys.readouterr()
    if status:
        assert said and said.removeprefix("error: ") in out.err and out.err.count("\n") == 1, out.err
        return
    assert said in out.out if said else "are not read" not in out.out
    torch.testing.assert_close(load_model(tmp_path / "run")[0](IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rope", [
    dict(rope_scaling=dict(type="linear", factor=4.0), rope_theta=100.0), dict(rope_scaling=None, rope_theta=100.0), {},
    dict(rope_scaling=dict(rope_type="linear", factor=4.0), rope_parameters=dict(rope_type="default", rope_theta=9.0)),
    dict(rope_parameters=LLAMA3), dict(rope_parameters={k: v for k, v in LLAMA3.items() if "original" not in k})])
@pytest.mark.parametrize("name", ["llama linear", "mixtral"])
def test_rotary_positions_of_old_and_new_files(name, rope, tmp_path):
    save_theirs(their_model(name), tmp_path / "theirs", name)
    config(**dict(rope_parameters=...) | rope)(tmp_path / "theirs")
    import transformers
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    assert program("import", tmp_path / "theirs", "--out", tmp_path / "run") == 0
    torch.testing.assert_close(load_model(tmp_path / "run")[0](IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-5)


def test_rotary_tables_of_their_own_for_layers_are_refused(whole, tmp_path, capsys):
    shutil.copytree(whole / "one", tmp_path / "theirs")
    config(rope_scaling=None, rope_parameters=dict(full_attention=dict(rope_theta=9.0)))(tmp_path / "theirs")
    assert program("import", tmp_path / "theirs", "--out", tmp_path / "run") == 2
    assert "not one table for all layers" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "deepseek"])
def test_a_missing_key_means_what_it_means_to_transformers(name):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    kind, known = FAMILIES[name].architecture.replace("ForCausalLM", "Config"), []
    theirs = flat(getattr(transformers, kind)().to_dict())
    for spellings, (_, *default) in FAMILIES[name].keys.items():
        key = next((key for key in spellings.split() if key in theirs), None)
        # heads and widths are seen from the shapes of tensors
        if default and key and key not in ("num_key_value_heads", "head_dim", "intermediate_size"):
            assert (theirs[key] or type(default[0])()) == default[0], key
            known.append(key)
    assert {"rms_norm_eps", "rope_theta", "tie_word_embeddings"} <= {*known}


def loss_of(logits, ids):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def program(*words):
    return hub.main([str(word) for word in words])


def by_their_names(config, family, tensors):
    """Our tensors as pieces by their names."""
    found = {}
    for ours, (stacked, rows) in hub.layout(FAMILIES[family], config, tensors).items():
        for t, some in zip(tensors[ours] if stacked else [tensors[ours]], rows):
            found |= dict(zip((n for n, _ in some), t.split([shape[0] for _, shape in some])))
    return found


@pytest.mark.parametrize("name", THEIRS)
def test_numbers_are_those_of_transformers_both_ways(name, tmp_path, capsys):
    model, family = their_model(name), name.split()[0]
    save_theirs(model, tmp_path / "theirs", name)
    assert program("import", tmp_path / "theirs", "--out", tmp_path / "run") == 0
    assert f"{family}, " in capsys.readouterr().out
    ours, config, _, header = load_model(tmp_path / "run")
    ids = torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(0))
    # logits
    theirs, mine = model(ids).logits, ours(ids).logits
    assert theirs.std() > 0.1
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    # the gradient of one training step, by their names; a folded weight c W has 1 / c of W's
    loss_of(theirs, ids).backward()
    loss_of(mine, ids).backward()
    with torch.no_grad():
        for p in model.parameters():
            p.data = p.grad
    save_theirs(model, tmp_path / "slopes", name)
    slopes = safetensors.load_file(tmp_path / "slopes" / "model.safetensors")
    plain = json.loads((tmp_path / "theirs" / "config.json").read_text())
    factor = factors(plain, FAMILIES[family], config.model.head_width, config.model.tie_embeddings)
    for n, g in by_their_names(config, family, {n: p.grad for n, p in ours.named_parameters()}).items():
        by = next((f for end, f in factor.items() if n.endswith(end)), 1.0)
        torch.testing.assert_close(g * by, slopes[n], atol=2e-6, rtol=1e-4, msg=lambda m: f"{n}: {m}")
    # out again: the same bits where nothing was folded, and a model that transformers reads
    assert program("export", tmp_path / "run", "--out", tmp_path / "back") == 0
    before = safetensors.load_file(tmp_path / "theirs" / "model.safetensors")
    after = safetensors.load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert bool(factor) or all(torch.equal(before[n], after[n]) for n in before)
    if name != "deepseek":
        import transformers
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
        assert type(again) is type(model)
        torch.testing.assert_close(again(ids).logits, mine, atol=1e-5, rtol=1e-5)
    # and in: to the last bit
    assert program("import", tmp_path / "back", "--out", tmp_path / "again") == 0
    one, two = load(tmp_path / "run" / "ckpt_last.pt"), load(tmp_path / "again" / "ckpt_last.pt")
    assert all(torch.equal(t, two.model[n]) for n, t in one.model.items())
    assert one.header["config"]["model"] == two.header["config"]["model"]
    assert header["ancestry"]["family"] == family


# ---- runs of our own

def our_run(folder, tokenizer=None, dtype=torch.float32, **more):
    """A run folder of a small model."""
    words = {"model.n_layer": 2, "model.n_embd": 32, "model.block_size": 32, "model.vocab_size": 256,
             "model.n_head": 4, "model.n_kv_head": 2, "model.tie_embeddings": False, "ffn.d_expert": 16, "ffn.n_expert": 4}
    config = load_config(None, [(k, str(v)) for k, v in (words | more).items()])
    torch.manual_seed(0)
    state = GPT(config).state_dict()
    folder.mkdir(parents=True)
    checkpoint.save_made(folder, resolve(config), {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()},
                         tokenizer or Tokenizer.byte())
    return folder


@pytest.mark.parametrize("more, family", [
    ({}, "mixtral"), ({"ffn.granularity": 2, "ffn.d_expert": 0, "ffn.d_ff": 32}, "mixtral"),
    ({"ffn.n_shared": 2, "ffn.n_dense_first": 1}, "deepseek"), ({"ffn.n_shared": 1, "ffn.shared_gate": True, "model.qkv_bias": True,
     "ffn.moe_every": 2, "ffn.gate_order": "softmax_then_topk"}, "qwen2_moe"),
    ({"model.qk_norm": "head", "model.head_dim": 16}, "qwen3_moe"), ({"model.qk_norm": "all"}, "olmoe"),
    ({"ffn.kind": "dense", "ffn.d_expert": 0, "ffn.n_expert": 8}, "llama"),
    ({"ffn.kind": "dense", "ffn.d_expert": 0, "ffn.n_expert": 8, "model.window": 9}, "mistral")])
def test_a_run_is_exported_to_a_family_that_has_its_layers(tmp_path, capsys, more, family):
    run = our_run(tmp_path / "run", **more)
    assert program("export", run, "--out", tmp_path / "out") == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'out'}: {family}, ")
    assert program("import", tmp_path / "out", "--out", tmp_path / "again") == 0
    ids = torch.arange(20).view(1, 20)
    # a softmax over the chosen may have become one over all, renormalised
    torch.testing.assert_close(load_model(run)[0](ids).logits, load_model(tmp_path / "again")[0](ids).logits)


@pytest.mark.parametrize("setting, value", [
    ("ffn.router", "hash"), ("ffn.router", "expert_choice"), ("ffn.router", "sigmoid"), ("ffn.kind", "peer"),
    ("model.mixer", "mamba"), ("model.rope", False), ("ffn.activation", "gelu"), ("ffn.output_norm", True),
    ("ffn.route_scale", 2.5), ("ffn.eval_capacity_factor", 1.0), ("ffn.inserted", True)])
def test_what_no_family_has_is_named(tmp_path, capsys, setting, value):
    more = {"hash": {"ffn.top_k": 1}, "peer": {"ffn.d_expert": 0, "ffn.n_expert": 8, "ffn.d_key": 16}}.get(value, {})
    run = our_run(tmp_path / "run", **{setting: value}, **more)
    assert program("export", run, "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert f"{setting} = {json.dumps(value)}: no family has it" in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_combination_that_no_family_has_is_named(tmp_path, capsys):
    run = our_run(tmp_path / "run", **{"model.qk_norm": "head", "model.window": 8})
    assert program("export", run, "--out", tmp_path / "out") == 2
    assert 'model.qk_norm = "head": mixtral, which comes nearest, never has it' in capsys.readouterr().err
    assert program("export", run, "--out", tmp_path / "out", "--family", "mixtral") == 2
    assert 'model.qk_norm = "head"' in capsys.readouterr().err


def test_bfloat16_stays_and_is_trained_in_float32(tmp_path, monkeypatch, capsys):
    import sample
    import train
    run = our_run(tmp_path / "run", dtype=torch.bfloat16)
    monkeypatch.setattr(hub, "SHARD", 20_000)
    assert program("export", run, "--out", tmp_path / "out") == 0
    files = sorted(path.name for path in tmp_path.glob("out/*"))
    assert files[0] == "config.json" and len(files) > 4 and files[-1] == "model.safetensors.index.json"
    assert program("import", tmp_path / "out", "--out", tmp_path / "in") == 0
    assert "bfloat16" in capsys.readouterr().out
    # the same bits in the checkpoint, mapped; float32 for all who do not ask
    first, second = load(run / "ckpt_last.pt"), load(tmp_path / "in" / "ckpt_last.pt")
    assert all(torch.equal(t, second.model[n]) and t.dtype == torch.bfloat16 for n, t in first.model.items())
    kept, wide = load_model(tmp_path / "in", dtype=None)[0], load_model(tmp_path / "in")[0]
    assert kept.embedding.weight.dtype == torch.bfloat16 and kept.blocks[0].ffn.router.score.weight.dtype == torch.float32
    assert all(torch.equal(p.float(), dict(wide.named_parameters())[n]) for n, p in kept.named_parameters())
    ids = torch.arange(20).view(1, 20)
    torch.testing.assert_close(kept(ids).logits.float(), wide(ids).logits, atol=0.1, rtol=0.1)
    # sampled and trained on
    words = [str(tmp_path / "in"), "--tokens", "5", "--prompt", "1 2 3"]
    assert sample.main(words) == 0 and sample.main([*words, "--dtype", "float32", "--show_experts"]) == 0
    assert "tokens/s" in capsys.readouterr().err
    text = tmp_path / "text.txt"
    text.write_text(" ".join(str(i % 256) for i in range(3000)))
    assert train.main(["configs/continue.toml", "--train.init_from", str(tmp_path / "in"), "--out", str(tmp_path / "more"), "--data.name", str(text),
                       "--data.dir", str(tmp_path / "data"), "--train.max_steps", "2", "--train.batch_size", "2",
                       "--train.eval_batches", "1", "--train.device", "cpu", "--train.compile", "off",
                       "--train.sample_tokens", "0", "--quiet"]) == 0
    assert load(tmp_path / "more" / "ckpt_last.pt").model["norm.weight"].dtype == torch.float32


PEER = {"ffn.kind": "peer", "ffn.d_expert": 0, "ffn.n_expert": 8, "ffn.d_key": 16, "ffn.n_keys": 8}


@pytest.mark.parametrize("more", [
    {"model.mixer": "mamba"}, {"model.mixer": "mamba", "model.attention_every": 2}, PEER, PEER | {"ffn.peer_path": "lean"},
    PEER | {"ffn.kind": "pkm"}, {"ffn.router": "sigmoid"}, {"ffn.router": "expert_choice"}, {"ffn.kind": "dense", "ffn.d_expert": 0,
                                                                                      "ffn.n_expert": 8}])
@pytest.mark.filterwarnings("error")
def test_every_kind_samples_in_bfloat16(tmp_path, capsys, more):
    import sample
    run, ids = our_run(tmp_path / "run", **more), torch.arange(20).view(1, 20)
    assert sample.main([str(run), "--tokens", "5", "--prompt", "ab", "--dtype", "bfloat16"]) == 0
    assert sample.main([str(run), "--tokens", "2", "--prompt", "ab", "--dtype", "bfloat16", "--no_cache"]) == 0
    with torch.no_grad():
        narrow, wide = load_model(run, dtype=torch.bfloat16)[0](ids).logits, load_model(run)[0](ids).logits
    assert narrow.dtype == torch.bfloat16
    # a token that chooses another expert, by a tie, is far off
    assert (narrow - wide).abs().mean() < 0.05 * wide.std()


def test_a_checkpoint_written_a_tensor_at_a_time_is_as_if_written_at_once(tmp_path):
    from runtime.files import Outline, save, save_each
    run = our_run(tmp_path / "run", **{"model.tie_embeddings": True})
    whole = load(run / "ckpt_last.pt")
    keys = {n: "embedding.weight" if n == "head.weight" else n for n in whole.model}
    outlines = {n: Outline(keys[n], t.dtype, tuple(t.shape)) for n, t in whole.model.items()}
    save(tmp_path / "once.pt", whole.header, whole.model)
    save_each(tmp_path / "each.pt", whole.header, outlines, (whole.model[key] for key in dict.fromkeys(keys.values())))
    once = load(tmp_path / "once.pt")
    for mapped in False, True:
        each = load(tmp_path / "each.pt", mapped=mapped)
        assert each.header == once.header and list(each.model) == list(once.model)
        assert all(torch.equal(t, once.model[n]) and t.stride() == once.model[n].stride() for n, t in each.model.items())
        assert each.model["head.weight"].data_ptr() == each.model["embedding.weight"].data_ptr()


def test_what_programs_say_of_an_imported_run(whole, tmp_path, capsys):
    import sample
    from lab import plots
    run = tmp_path / "run"
    assert program("import", whole / "one", "--out", run) == 0
    assert capsys.readouterr().out.endswith(f"Next:\n  python sample.py {run} --show_experts\n")
    assert plots.main([str(run)]) == 0 and "nothing to draw" in capsys.readouterr().out
    assert sample.main([str(run), "--tokens", "3", "--show_experts"]) == 0
    assert lineage(load(run / "ckpt_last.pt").header["ancestry"]).startswith(f"hub family=mixtral source={whole}")
    assert "hidden_size" not in lineage(load(run / "ckpt_last.pt").header["ancestry"])


def test_sampling_with_mapped_weights_is_as_before(tmp_path):
    run = our_run(tmp_path / "run", **{"model.tie_embeddings": True})
    mapped, copied = load_model(run, dtype=None)[0], load_model(run)[0]
    ids = torch.arange(20).view(1, 20)
    assert torch.equal(mapped(ids).logits, copied(ids).logits) and mapped.num_params() == copied.num_params()
    assert mapped.head.weight is mapped.embedding.weight


def test_without_the_package_one_line_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert program("import", tmp_path, "--out", tmp_path / "run") == 2
    assert "requirements-hub.txt" in capsys.readouterr().err


# ---- damaged and hostile folders

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folders of a small model: in one file, and in shards."""
    root = tmp_path_factory.mktemp("whole")
    run = our_run(root / "run")
    old, hub.SHARD = hub.SHARD, 10**9
    assert program("export", run, "--out", root / "one") == 0
    hub.SHARD = 60_000
    assert program("export", run, "--out", root / "many") == 0
    hub.SHARD = old
    return root


def config(**more):
    def change(folder):
        path = folder / "config.json"
        plain = json.loads(path.read_text()) | more
        path.write_text(json.dumps({k: v for k, v in plain.items() if v is not ...}))
    return change


def raw(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def text(name, old, new):
    def change(folder):
        content = (folder / name).read_bytes()
        assert old in content
        (folder / name).write_bytes(content.replace(old, new, 1))
    return change


def header(change, pad=b""):
    """Changes the header of model.safetensors, a dict or bytes."""
    def damage(folder):
        path = folder / "model.safetensors"
        content = path.read_bytes()
        n = struct.unpack("<Q", content[:8])[0]
        found = change(json.loads(content[8:8 + n]))
        found = found if isinstance(found, bytes) else json.dumps(found).encode()
        path.write_bytes(struct.pack("<Q", len(found)) + found + content[8 + n:] + pad)
    return damage


def entry(**more):
    return header(lambda h: h | {"model.norm.weight": h["model.norm.weight"] | more})


def tensors(change):
    def damage(folder):
        found = safetensors.load_file(folder / "model.safetensors")
        change(found)
        safetensors.save_file(found, folder / "model.safetensors")
    return damage


def index(change):
    def damage(folder):
        path = folder / "model.safetensors.index.json"
        plain = json.loads(path.read_text())
        path.write_text(json.dumps(change(plain) or plain))
    damage.sharded = True
    return damage


def place(file):
    return index(lambda plain: plain["weight_map"].update({"model.norm.weight": file}))


def replaced(name, make):
    def damage(folder):
        (folder / name).unlink()
        make(folder / name)
    return damage


def outside(path):
    """A link that leads out of the folder, to a good file."""
    shutil.copy(path.parent.parent / "good" / path.name, path.parent.parent / "stolen")
    path.symlink_to(path.parent.parent / "stolen")


def other_dtype(found):
    found["model.norm.weight"] = found["model.norm.weight"].to(torch.int32)


DAMAGE = {
    "config missing": lambda f: (f / "config.json").unlink(), "config empty": raw("config.json", b""),
    "config a folder": replaced("config.json", lambda p: p.mkdir()), "config not UTF-8": raw("config.json", b"{\"a\": \"\xff\"}"),
    "config a pipe": replaced("config.json", os.mkfifo), "config cut": raw("config.json", b"{\"model_type\": "),
    "config a list": raw("config.json", b"[]"), "config deep": raw("config.json", b"[" * 100_000),
    "config elsewhere": replaced("config.json", outside), "config a circle": replaced("config.json", lambda p: p.symlink_to(p)),
    "key twice": text("config.json", b"{", b"{\"hidden_size\": 32,"), "NaN": config(rms_norm_eps=float("nan")),
    "Infinity": config(rope_theta=float("inf")), "1e999": text("config.json", b"{", b"{\"rms_norm_eps\": 1e999, \"x\": "
                                                               b"1}#"), "overflow": config(rms_norm_eps=10**400),
    "digits": text("config.json", b"\"hidden_size\": 32", b"\"hidden_size\": " + b"9" * 5000),
    "no family": config(model_type=...), "other family": config(model_type="gpt2"), "family a list": config(model_type=["a"]),
    "no width": config(hidden_size=...), "width null": config(hidden_size=None), "width a text": config(hidden_size="32"),
    "width true": config(hidden_size=True), "width 0": config(hidden_size=0), "width -1": config(hidden_size=-1),
    "width 1.5": config(hidden_size=1.5), "width 2^62": config(hidden_size=2**62), "width 2^70": config(hidden_size=2**70),
    "width other": config(hidden_size=64), "layers 9999": config(num_hidden_layers=9999),
    "layers 10^12": config(num_hidden_layers=10**12), "layers 1": config(num_hidden_layers=1),
    "vocabulary 2^61": config(vocab_size=2**61), "experts 2^40": config(num_local_experts=2**40),
    "experts 5": config(num_local_experts=5), "choices 5": config(num_experts_per_tok=5), "heads 3": config(num_attention_heads=3),
    "heads of odd width": config(head_dim=7), "positions 10^15": config(max_position_embeddings=10**15),
    "window -1": config(sliding_window=-1), "activation": config(hidden_act="gelu"), "activation a list": config(hidden_act=[]),
    "yarn": config(rope_parameters=dict(rope_type="yarn", factor=2.0)), "rope a list": config(rope_parameters=[1]),
    "rope type a list": config(rope_parameters=dict(rope_type=[1])), "quantized": config(quantization_config=dict(bits=4)),
    "tied a text": config(tie_word_embeddings="yes"), "weights missing": lambda f: (f / "model.safetensors").unlink(),
    "pickle": replaced("model.safetensors", lambda p: torch.save({}, p.with_name("pytorch_model.bin"))),
    "weights empty": raw("model.safetensors", b""), "weights 7 bytes": raw("model.safetensors", b"1234567"),
    "weights a folder": replaced("model.safetensors", lambda p: p.mkdir()), "weights elsewhere": replaced("model.safetensors", outside),
    "header of 2^63 bytes": raw("model.safetensors", struct.pack("<Q", 2**63) + b"{}"),
    "header too long": raw("model.safetensors", struct.pack("<Q", 100) + b"{}"),
    "header no JSON": header(lambda h: b"\x80\x04K\x01."), "header a list": header(lambda h: b"[]"),
    "header twice": header(lambda h: json.dumps(h).encode().replace(b"model.norm.weight", b"lm_head.weight")),
    "entry a list": header(lambda h: h | {"model.norm.weight": []}), "no shape": entry(shape=None), "shape true": entry(shape=[True]),
    "shape -1": entry(shape=[-32]), "shape 2^60": entry(shape=[2**60]), "shape other": entry(shape=[31]),
    "shape deep": entry(shape=[32] * 400), "no offsets": entry(data_offsets=[0]), "offsets back": entry(data_offsets=[128, 0]),
    "offsets over others": entry(data_offsets=[0, 128]), "offsets beyond": entry(data_offsets=[10**9, 10**9 + 128]),
    "dtype unknown": entry(dtype="F8_E4M3"), "dtype a list": entry(dtype=[1]), "dtype integers": tensors(other_dtype),
    "cut": lambda f: os.truncate(f / "model.safetensors", 40_000), "longer": header(lambda h: h, b"\0"),
    "tensor missing": tensors(lambda t: t.pop("model.layers.1.block_sparse_moe.experts.3.w2.weight")),
    "tensor more": tensors(lambda t: t.update({"model.layers.0.bias": torch.zeros(1)})),
    "tensor turned": tensors(lambda t: t.update({"lm_head.weight": torch.zeros(32, 256)})),
    "shard absolute": place("/etc/passwd"), "shard above": place("../model.safetensors"), "shard below": place("a/b.safetensors"),
    "shard missing": place("none.safetensors"), "shard pickled": place("pytorch_model.bin"), "shard a number": place(3),
    "shard NUL": place("a\0.safetensors"), "shard empty": place(""), "shard back\\slash": place("..\\x.safetensors"),
    "shard wrong": place("model-00001-of-00002.safetensors"), "no map": index(lambda p: {"a": 1}), "map empty": index(
        lambda p: {"weight_map": {}}), "map a list": index(lambda p: {"weight_map": []}),
    "map lacks one": index(lambda p: p["weight_map"].pop("model.norm.weight") and p),
    "map has one more": index(lambda p: p["weight_map"].update({"x": "model-00001-of-00002.safetensors"})),
    "tokenizer cut": raw("tokenizer.json", b"{"), "tokenizer a list": raw("tokenizer.json", b"[]"),
    "tokenizer without model": raw("tokenizer.json", b"{}"), "tokenizer odd": raw("tokenizer.json", b'{"pre_tokenizer": 3, "model": {}}'),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_refused_in_one_line(name, whole, tmp_path, capsys):
    damage = DAMAGE[name]
    good = whole / ("many" if getattr(damage, "sharded", False) else "one")
    shutil.copytree(good, tmp_path / "good")
    shutil.copytree(good, tmp_path / "bad")
    damage(tmp_path / "bad")
    assert program("import", tmp_path / "bad", "--out", tmp_path / "run") == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and said.out == "" and len(said.err) < 700
    assert not (tmp_path / "run").exists()


def test_the_folders_themselves_are_fine(whole, tmp_path, capsys):
    for name in "one", "many":
        assert program("import", whole / name, "--out", tmp_path / name) == 0
    assert program("import", whole / "none", "--out", tmp_path / "run") == 2
    assert program("import", whole / "one", "--out", tmp_path / "one") == 2
    assert "already holds a run" in capsys.readouterr().err
    assert program("import", whole / "one", "--out", tmp_path / "one", "--overwrite", "--block_size", 8) == 0
    assert load_model(tmp_path / "one")[1].model.block_size == 8
    assert program("import", whole / "one", "--out", tmp_path / "run", "--block_size", -1) == 2
    assert "model.block_size = -1" in capsys.readouterr().err


def test_missing_and_extra_tensors_are_named(whole, tmp_path, capsys):
    for name, word in (("tensor missing", "experts.3.w2.weight"), ("tensor more", "model.layers.0.bias"),
                       ("dtype integers", "I32"), ("tensor turned", "(256, 32)")):
        shutil.copytree(whole / "one", tmp_path / name)
        DAMAGE[name](tmp_path / name)
        assert program("import", tmp_path / name, "--out", tmp_path / "run") == 2 and word in capsys.readouterr().err


# ---- tokenizers

TEXTS = ["", "Hello world", "a\r\nb\r\n\r\n  c", "x" + " " * 37 + "y \n   \n", "12345 678, 3.14", "naïve Ünï 漢字 かな",
         "👩‍👩‍👧 🇩🇪 e\u0301", "don't DON'T we'll\t\ttabs", "if x:\n        return  [1,2]  # ok", "\u2028\x85\xa0\u3000end", "<|end|> a"]
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def their_tokenizer(kind):
    """(a tokenizer of the package tokenizers, trained on some text; its file as JSON)."""
    tk = pytest.importorskip("tokenizers", reason="needs tokenizers, which transformers brings")
    t = tk.Tokenizer(tk.models.BPE())
    if kind == "gpt2":
        t.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        pattern = QWEN if kind == "qwen" else r"\p{L}+|[0-9]"                   # which leaves something out
        t.pre_tokenizer = tk.pre_tokenizers.Sequence([
            tk.pre_tokenizers.Split(tk.Regex(pattern), "isolated"),
            tk.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = tk.trainers.BpeTrainer(vocab_size=420, special_tokens=["<|pad|>"], show_progress=False,
                                     initial_alphabet=tk.pre_tokenizers.ByteLevel.alphabet())
    t.train_from_iterator([*TEXTS * 3, "the thing thinks; the then them\n    return the\n" * 9], trainer)
    t.add_special_tokens(["<|end|>"])
    if kind == "spaces":
        t.add_tokens([" " * n for n in range(24, 1, -1)])
    return t, json.loads(t.to_str())


def plain_ids(t, text):
    """What its own library makes of a text in which nothing special is seen."""
    return t.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", ["gpt2", "qwen", "gaps", "spaces"])
def test_a_byte_level_tokenizer_gives_the_ids_of_its_own_library(kind):
    t, plain = their_tokenizer(kind)
    ours, notes = bytelevel.convert(plain, 500)
    assert "special tokens are not interpreted" in notes[0]
    again = Tokenizer.from_dict(json.loads(json.dumps(ours.to_dict())))

    def check(text):
        ids = ours.encode(text)
        assert ids == again.encode(text) and ours.decode(ids) == text
        assert ids == plain_ids(t, text), text

    for one in TEXTS[:-1]:
        check(one)
    for one, two in itertools.product(TEXTS[1:-1], repeat=2):
        check(one + two)

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.sampled_from(["the ", "  ", "\n", "\r\n", "7", "é", "'re", "漢", "!", "\t", "x" * 9]) | st.text(max_size=5)))
    def any_text(parts):
        check("".join(parts))

    any_text()
    # a special token in a text is text
    assert ours.decode(ours.encode(TEXTS[-1])) == TEXTS[-1] and t.token_to_id("<|end|>") not in ours.encode(TEXTS[-1])


def swapped(plain):
    vocab = plain["model"]["vocab"]
    a, b = list(vocab)[-2:]
    vocab[a], vocab[b] = vocab[b], vocab[a]


def unreachable(plain):
    """A token whose two parts another merge, which comes first, tears apart."""
    vocab, n = plain["model"]["vocab"], len(plain["model"]["vocab"]) + 1
    plain["model"]["merges"] += [["Q", "Z"], ["Z", "J"], ["Q", "ZJ"]]
    vocab |= {"QZ": n, "ZJ": n + 1, "QZJ": n + 2}


@pytest.mark.parametrize("change, why", [
    (lambda p: p["model"].update(byte_fallback=True), "byte_fallback"), (lambda p: p["model"].update(type="Unigram"), "Unigram"),
    (lambda p: p.update(normalizer=dict(type="Lowercase")), "Lowercase"), (lambda p: p.update(pre_tokenizer=dict(type="Metaspace")), "Metaspace"),
    (lambda p: p.update(pre_tokenizer=None), "None"), (lambda p: p["pre_tokenizer"].update(add_prefix_space=True), "space before"),
    (swapped, "order of its merges"), (unreachable, "do not lead to the token b'QZJ'"),
    (lambda p: p["model"]["vocab"].pop("!"), "not every byte"), (lambda p: p["model"].update(dropout=0.1), "dropout"),
    (lambda p: p["added_tokens"].append(dict(id=450, content="x", special=False, lstrip=True)), "lstrip"),
    (lambda p: p["added_tokens"].append(dict(id=9999, content="x", special=True)), "beyond"),
    (lambda p: p["model"]["merges"].append(["a", "q"]), "makes no token"),
    (lambda p: p.update(pre_tokenizer=dict(type="Sequence", pretokenizers=[dict(type="Digits"), dict(type="ByteLevel")])), "Digits")])
def test_a_tokenizer_of_other_rules_leaves_the_ids(tmp_path, change, why):
    plain = their_tokenizer("gpt2")[1]
    change(plain)
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain))
    ours, (note,) = bytelevel.tokenizer_of(tmp_path, 500)
    assert ours.kind == "ids" and why in note and "\n" not in note
    assert ours.encode(" 3 499\n") == [3, 499] and ours.decode([3, 499]) == "3 499 "
    assert Tokenizer.from_dict(ours.to_dict()).fingerprint == ours.fingerprint


def test_the_tokenizer_stays_with_the_run(whole, tmp_path, capsys):
    import sample
    t, plain = their_tokenizer("qwen")
    shutil.copytree(our_run_exported(tmp_path, 460), tmp_path / "theirs")
    plain["normalizer"] = dict(type="NFC")
    (tmp_path / "theirs" / "tokenizer.json").write_text(json.dumps(plain))
    assert program("import", tmp_path / "theirs", "--out", tmp_path / "in") == 0
    assert "NFC" in capsys.readouterr().out
    tokenizer = load_model(tmp_path / "in")[2]
    assert tokenizer.encode(TEXTS[3]) == plain_ids(t, TEXTS[3]) == Tokenizer.load(tmp_path / "in" / "tokenizer.json").encode(TEXTS[3])
    assert sample.main([str(tmp_path / "in"), "--prompt", "the 漢", "--tokens", "9"]) == 0
    assert capsys.readouterr().out.startswith("the 漢")


def our_run_exported(tmp_path, vocab_size):
    assert program("export", our_run(tmp_path / "mine", **{"model.vocab_size": vocab_size}), "--out", tmp_path / "out") == 0
    return tmp_path / "out"
