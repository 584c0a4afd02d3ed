"""minimal.py is the GPT of model.py written a second time, without a shared line."""
import ast
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import minimal
from model import GPT, load_config

SOURCE = Path(minimal.__file__).read_text(encoding="utf-8")
TINY = dict(vocab_size=32, block_size=12, n_layer=2, n_head=2, n_embd=16,
            n_expert=4, top_k=2, d_expert=12)
# Settings of the same model in a config; minimal's constants carry the names of most of them.
CONFIG = {"model": ["vocab_size", "block_size", "n_layer", "n_head", "n_embd"],
          "ffn": ["n_expert", "top_k", "d_expert", "balance_loss"]}
FIXED = [("ffn.kind", "moe"), ("ffn.router", "topk"), ("ffn.gate_order", "topk_then_softmax"),
         ("ffn.balance", "switch"), ("ffn.activation", "swiglu"), ("ffn.dispatch", "loop")]


@pytest.fixture
def tiny(monkeypatch):
    """minimal's constants at the size of a test, on one thread: a second does not pay here."""
    for name, value in TINY.items():
        monkeypatch.setattr(minimal, name, value)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def naive_model(seed=0):
    """minimal's GPT. Router weights are drawn large, so that choices differ and do not tie.
    Norms are not 1."""
    torch.manual_seed(seed)
    model = minimal.GPT()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("router"):
                p.normal_(std=0.5)
            elif name.endswith("norm"):
                p.uniform_(0.5, 1.5)
    return model


def names_in_model():
    """{name in minimal's GPT: name in model.py's} of every parameter."""
    names = {"embedding": "embedding.weight", "norm": "norm.weight"}
    for i in range(minimal.n_layer):
        names |= {f"attention.{i}.norm": f"blocks.{i}.norm_attention.weight",
                  f"attention.{i}.qkv": f"blocks.{i}.attention.qkv.weight",
                  f"attention.{i}.out": f"blocks.{i}.attention.out.weight",
                  f"moe.{i}.norm": f"blocks.{i}.norm_ffn.weight",
                  f"moe.{i}.router": f"blocks.{i}.ffn.router.score.weight",
                  f"moe.{i}.w_in": f"blocks.{i}.ffn.experts.w_in",
                  f"moe.{i}.w_out": f"blocks.{i}.ffn.experts.w_out"}
    return names


def twin_of(naive):
    """model.py's GPT with the weights of minimal's."""
    settings = [(f"{section}.{name}", str(getattr(minimal, name)))
                for section, names in CONFIG.items() for name in names]
    twin = GPT(load_config(None, settings + FIXED))
    parameters, twins = dict(naive.named_parameters()), dict(twin.named_parameters())
    with torch.no_grad():
        for name, other in names_in_model().items():
            twins[other].copy_(parameters[name])
    return twin


def batch(B=3, T=12):
    generator = torch.Generator().manual_seed(1)
    idx = torch.randint(0, minimal.vocab_size, (B, T + 1), generator=generator)
    return idx[:, :-1], idx[:, 1:]


def test_the_names_cover_every_parameter_of_both_models(tiny):
    naive = naive_model()
    twin = twin_of(naive)
    assert sorted(names_in_model()) == sorted(name for name, _ in naive.named_parameters())
    assert sorted(names_in_model().values()) == sorted(name for name, _ in twin.named_parameters())


def test_logits_losses_and_every_gradient_equal_those_of_model_py(tiny):
    naive, (x, y) = naive_model(), batch()
    twin = twin_of(naive)
    logits, balance = naive(x)
    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    out = twin(x, y)
    torch.testing.assert_close(logits, out.logits)
    torch.testing.assert_close(loss, out.loss)
    torch.testing.assert_close(balance, sum(s.balance_loss for s in out.stats))
    torch.testing.assert_close(minimal.balance_loss * balance, out.aux_loss)
    (loss + minimal.balance_loss * balance).backward()
    (out.loss + out.aux_loss).backward()
    gradients = {name: p.grad for name, p in twin.named_parameters()}
    for name, p in naive.named_parameters():
        other = gradients[names_in_model()[name]]
        assert p.grad.abs().max() > 0, name
        torch.testing.assert_close(p.grad, other, msg=lambda text: f"{name}: {text}")


def test_initial_weights_have_the_spread_of_model_py(tiny, monkeypatch):
    monkeypatch.setattr(minimal, "n_embd", 64)          # enough numbers for a spread
    monkeypatch.setattr(minimal, "d_expert", 64)
    naive = minimal.GPT()
    twins = dict(twin_of(naive).named_parameters())
    fresh = dict(GPT(twin_of(naive).config).named_parameters())
    for name, other in names_in_model().items():
        assert dict(naive.named_parameters())[name].shape == twins[other].shape
        spread = dict(naive.named_parameters())[name].std().item()
        assert spread == pytest.approx(fresh[other].std().item(), rel=0.2, abs=1e-6), name


def test_a_later_byte_changes_no_earlier_logit(tiny):
    naive, (x, _) = naive_model(), batch()
    before = naive(x)[0]
    for t in range(1, x.shape[1]):
        changed = x.clone()
        changed[:, t:] = (changed[:, t:] + 1) % minimal.vocab_size
        torch.testing.assert_close(naive(changed)[0][:, :t], before[:, :t])


def test_a_few_steps_lower_the_loss_and_are_reported(tiny, monkeypatch, capsys):
    short = dict(vocab_size=256, max_steps=40, warmup_steps=5, lr=1e-2, report_every=20)
    for name, value in short.items():
        monkeypatch.setattr(minimal, name, value)
    torch.manual_seed(0)
    text = torch.tensor(list(b"the cat sat on the mat and the dog sat on the cat. " * 20))
    minimal.train(minimal.GPT(), text, text)
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[:5] == ["step", "nats/byte", "bits/byte", "balance", "tokens/s"]
    first, last = ([float(cell.replace(",", "")) for cell in row.split()] for row in rows)
    assert (first[0], last[0]) == (20, 40)
    assert last[1] < first[1] < 5.545                       # log 256: every byte is as likely
    assert last[2] == pytest.approx(last[1] / 0.6931, abs=2e-3)


def test_generate_returns_the_number_of_bytes_asked_for(tiny):
    torch.manual_seed(0)
    for n in (0, 1, 30):                                    # 30 is more than the model sees
        assert len(minimal.generate(minimal.GPT(), bytes([1, 2, 3]), n)) == n


def test_training_and_validation_text_come_from_different_files(tmp_path, monkeypatch):
    for i in range(20):
        (tmp_path / f"{i:02}.py").write_bytes(bytes([i]) * 5)
    monkeypatch.setattr(minimal.sysconfig, "get_path", lambda name: str(tmp_path))
    train, valid = minimal.read_corpus()
    assert sorted(set(valid.tolist())) == [0, 10]
    assert len(train) == 90 and not set(train.tolist()) & set(valid.tolist())


def test_the_target_of_a_byte_is_the_byte_after_it(tiny):
    x, y = minimal.windows(torch.arange(100), [0, 50])
    assert x.tolist() == [list(range(12)), list(range(50, 62))]
    assert torch.equal(y, x + 1)


def test_it_imports_nothing_of_this_repository():
    modules = set()
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules.add(node.module.split(".")[0])
    assert modules - sys.stdlib_module_names == {"torch"}


def test_it_fits_on_a_page_that_can_be_projected():
    lines = SOURCE.splitlines()
    assert len(lines) <= 200
    assert [line for line in lines if len(line) > 85] == []
