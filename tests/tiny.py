"""Small models for the tests: one of every kind of feed-forward layer, and of every router."""
import torch

from model import GPT, load_config
from routers import ROUTERS

BASE = {"model.n_layer": 2, "model.n_embd": 16, "model.n_head": 2, "model.block_size": 12,
        "model.vocab_size": 32, "ffn.n_expert": 4, "ffn.d_ff": 16}
PEER = {"ffn.n_keys": 4, "ffn.peer_heads": 2, "ffn.peer_top_k": 2, "ffn.peer_path": "lean",
        "ffn.moe_every": 1}
KINDS = {"dense": {"ffn.kind": "dense"},
         "peer": {"ffn.kind": "peer"} | PEER, "pkm": {"ffn.kind": "pkm"} | PEER}
ONE_EXPERT = [name for name, router in ROUTERS.items() if router.traits.k == 1]
for _router in ROUTERS:
    KINDS[_router] = {"ffn.router": _router, "ffn.top_k": 1 if _router in ONE_EXPERT else 2}
KINDS["domain"]["data.name"] = "a,b,c,d"
LEARNED = [name for name, router in ROUTERS.items() if router.traits.logits]       # with parameters


def config_of(kind, more=()):
    """Config of a kind or router, with further settings by their dotted names."""
    settings = BASE | KINDS[kind] | dict(more)
    return load_config(None, settings)


def model_of(kind, more=(), seed=0):
    """The model in training mode. Router weights are drawn large, so that choices differ and do not tie."""
    torch.manual_seed(seed)
    model = GPT(config_of(kind, more))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".router." in name and name.endswith("weight"):
                p.normal_(std=0.5)
    return model


def batch_of(B=3, T=8, vocab=32, seed=1):
    """Tokens, targets and domain labels."""
    generator = torch.Generator().manual_seed(seed)
    idx = torch.randint(0, vocab, (B, T + 1), generator=generator)
    return idx[:, :-1], idx[:, 1:], torch.arange(B) % 4


def run(model, idx, targets=None, seed=7, **more):
    """A forward pass after seeding, so that two passes draw the same noise."""
    torch.manual_seed(seed)
    return model(idx, targets, **more)
