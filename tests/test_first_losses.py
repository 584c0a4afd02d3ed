"""The first losses of every preset: what a change of structure must not change.

Each preset is shrunk, trained for three steps on fixed tokens, and compared with first_losses.json. Rounding differs
between processors and versions of torch, hence a tolerance: `python tests/test_first_losses.py` writes the file anew,
which is right only after a change that is meant to change numbers.
"""
import json
from pathlib import Path

import pytest
import torch

from model import GPT, load_config
from runtime.config import read_config
from train import build_optimizer

ROOT = Path(__file__).parent.parent
RECORD = Path(__file__).parent / "first_losses.json"
PRESETS = sorted(p.stem for p in (ROOT / "configs").glob("*.toml") if p.stem != "continue")
SMALL = {"model.n_layer": 2, "model.n_embd": 32, "model.n_head": 2, "model.n_kv_head": 0, "model.block_size": 32,
         "model.vocab_size": 64, "ffn.d_ff": 0, "ffn.d_dense": 0, "ffn.n_keys": 16, "ffn.d_key": 0}


def small_config(name):
    given = read_config(ROOT / "configs" / f"{name}.toml")
    small = {key: value for key, value in SMALL.items() if key in given.sources or key.startswith("model.")}
    if given.ffn.moe_layers:
        small["ffn.moe_layers"] = [1]
    if given.model.attention_every:
        small["model.attention_every"] = 2
    if given.ffn.d_expert:
        small["ffn.d_expert"] = 16
    return load_config(ROOT / "configs" / f"{name}.toml", small)


def first_losses(name):
    """[(loss, aux_loss, gradient norm)] of three steps."""
    torch.manual_seed(0)
    config = small_config(name)
    model = GPT(config)
    model.set_token_counts(torch.arange(64))
    optimizer = build_optimizer(model, config.train, torch.device("cpu"))
    text = torch.randint(64, (3, 4, 33), generator=torch.Generator().manual_seed(1))
    rows = []
    for step, batch in enumerate(text):
        torch.manual_seed(step)
        out = model(batch[:, :-1], batch[:, 1:], step=step)
        optimizer.zero_grad()
        (out.loss + out.aux_loss).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.after_step([s.load for s in out.stats])
        rows.append([out.loss.item(), float(out.aux_loss), norm.item()])
    return rows


@pytest.mark.parametrize("name", PRESETS)
def test_first_losses_are_those_recorded(name):
    recorded = json.loads(RECORD.read_text())[name]
    torch.testing.assert_close(torch.tensor(first_losses(name)), torch.tensor(recorded), rtol=2e-5, atol=2e-6)


if __name__ == "__main__":
    RECORD.write_text(json.dumps({name: first_losses(name) for name in PRESETS}, indent=0) + "\n")
