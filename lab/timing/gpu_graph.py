"""Captured steps and tokens against uncaptured ones, for part check of lab/gpu.py.

Two eager runs say how far equal steps may differ: not at all, unless a kernel adds with atomics.
"""
from functools import partial

import torch

import sample
from data.prepare import prepare, prepared
from lab.timing.gpu_models import names, settings_of
from lab.timing.gpu_unit import CUDA, DEVICE, Unit
from model import GPT, KINDS, load_config
from routers import ROUTERS
from runtime.device import speed_up
from train import Trainer

STEPS, TOKENS = 20, 100
COMMON = {"train.batch_size": 8, "train.grad_accum": 2, "train.warmup_steps": 4,
          "train.max_steps": STEPS, "train.compile": "off", "train.device": DEVICE,
          "train.dtype": "bfloat16", "model.vocab_size": 256}


def trained(name, folder, graph):
    """{quantity: tensor} after STEPS steps of a small model of a kind or router."""
    texts = [folder / f"{letter}.txt" for letter in "abcd"]
    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(texts):
        text.write_text(f"{i} plus one is {i + 1}, " * 400)
    data = {"data.name": ",".join(map(str, texts)), "data.dir": str(folder / "prepared")}
    prepare([str(text) for text in texts], out=folder / "prepared", quiet=True)
    config = load_config(None, settings_of(name) | COMMON | data | {"train.graph": graph})
    folders, tokenizer = prepared(config.data)
    trainer = Trainer(config, folders, tokenizer, torch.device(DEVICE))

    def failed(text):
        raise RuntimeError(text)

    speed_up(trainer, failed)
    losses = [trainer.step()["loss"].clone() for _ in range(STEPS)]
    if graph == "on" and not trainer.graphs.recorded:
        raise RuntimeError("nothing was captured")
    state = trainer.model.state_dict()
    return {"losses": torch.stack(losses)} | {key: x.clone() for key, x in state.items()}


def differences(a, b):
    return {key: (a[key].double() - x.double()).abs().max().item() for key, x in b.items()}


def check_steps(name, folder, end):
    """Captured steps against eager ones."""
    eager, again = (trained(name, folder, "off") for _ in range(2))
    captured = trained(name, folder, "on")
    noise = differences(eager, again)
    # what atomics do grows from step to step: ten times as much is still no other step
    return [dict(case=name, dtype="bfloat16", quantity=key, error=error, limit=10 * noise[key],
                 held=error <= 10 * noise[key])
            for key, error in differences(eager, captured).items()]


def check_tokens(name, end):
    """Greedy and drawn texts of captured steps against those of eager ones, past the block too."""
    torch.manual_seed(0)
    model = GPT(load_config(None, settings_of(name))).to(DEVICE).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)                   # large weights: a varied text
    rows, prompt = [], torch.arange(10, device=DEVICE).view(2, 5)
    captures = sample.captures
    for temperature in (0.0, 1.0):
        texts = []
        for use in (captures, lambda model: False):
            sample.captures = use
            try:
                steps = sample.generate(model, prompt, TOKENS, temperature,
                                        generator=sample.seeded(0, 2))
                texts.append(torch.stack([step.ids for step in steps]))
            finally:
                sample.captures = captures
        other = (texts[0] != texts[1]).sum().item()
        rows.append(dict(case=name, dtype="float32", quantity=f"tokens at temperature {temperature}",
                         error=other, limit=0, held=other == 0))
    return rows


def units(place):
    """One for each kind and router that can be captured; none without a card."""
    fit = [name for name in names() if name in KINDS or ROUTERS[name].traits.compiles]
    if not CUDA:
        return []
    return ([Unit(f"captured steps {name}", partial(check_steps, name, place.scratch / "graph" / name))
             for name in fit]
            + [Unit(f"captured tokens {name}", partial(check_tokens, name)) for name in fit])
