"""Text from a trained model, token by token: python sample.py RUN_DIR.

Before the text it says (on stderr) which models this one was made from, if any, and what its router looks at
beside a token's own past. --show_experts marks every token with the expert that one layer sent it to.

Decisions:
- The window is what the model reads to draw the next token, at first the prompt. When it is longer than
  block_size, its last block_size // 2 tokens stay and are read again from position 0. The rule looks at
  lengths alone, so that the same tokens are drawn with the cache and without, past the block too.
- Generation has a cache, and so no capacity limit; expert choice takes every token's own best scores.
- Tokens are drawn on the CPU in float64, each sequence from a generator seeded with seed + index: a text
  depends neither on the device nor on --num, except where logits that differ in their last bits tip a draw.
"""
import sys

if __name__ == "__main__":                                      # the other imports take seconds
    sys.path.insert(0, __file__.rpartition("sample.py")[0])     # python -P and -I leave this folder out
    import runtime.first

import os
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data.binfile import DataError
from ffn import Stats
from model import GPT, load_model
from runtime import memory
from runtime.checkpoint import CheckpointError
from runtime.config import parse
from runtime.device import choose_threads, own_threads, pick_device
from runtime.ending import Ending, tell
from runtime.graph import Decoding
from runtime.start import check_sample, sample_parser
from runtime.terminal import PLAIN, Marker, lineage, pick_layer, plain_pieces


class Step(NamedTuple):
    """One new token for each sequence."""
    ids: Tensor                 # (B,)
    stats: list[Stats]          # per layer, of the tokens read to draw `ids`, up to the one before them


@torch.no_grad()
def generate(model, prompt_ids, tokens, temperature=1.0, top_k=0, top_p=1.0, generator=None, cache=True,
             vocab_size=None):
    """Yields `tokens` Steps. model: a GPT in evaluation mode; prompt_ids (B, T) on its device, T at least 1.

    A Step's stats are those of its moment: the next one may overwrite them.
    generator: a list of B CPU torch.Generators, or one for all (None: torch's own). cache=False reads the
    window anew for every token: slow, the same tokens. vocab_size: draw smaller ids only, where the tokenizer
    has fewer than the model's table. Raises CheckpointError when the logits are not finite.
    """
    block = model.config.model.block_size
    window, kv, decoding = prompt_ids, None, None
    if captures(model) and cache:
        decoding = Decoding(model, len(prompt_ids))
    for _ in range(tokens):
        # a window that has become too long keeps its last half, and is read anew
        if window.shape[1] > block:
            window, kv = window[:, -max(block // 2, 1):], None
        # read what the cache lacks, and draw one token for each sequence
        if decoding:
            out = decoding.read(window[:, -1:]) if kv else decoding.begin(window)
            kv = decoding.cache
        else:
            kv = kv if kv and cache else model.new_cache(window.shape[0])
            out = model(window[:, kv.length:], cache=kv)
        probs = next_probs(out.logits[:, -1, :vocab_size], temperature, top_k, top_p)   # (B, V)
        ids = draw(probs, generator).to(window.device)                                  # (B,)
        yield Step(ids, out.stats)
        window = torch.cat([window, ids.unsqueeze(1)], 1)


def captures(model):
    """Whether the steps after the prompt are CUDA graphs: on a card the launches of a step take most of it."""
    return isinstance(model, GPT) and model.embedding.weight.is_cuda and not model.not_compiled()


def next_probs(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The distribution to draw from: logits (B, V) -> (B, V) float64 on the CPU, rows sum to 1. Temperature
    0: the likeliest token; top_k 0: among all."""
    logits = logits.cpu().double()                          # in this order: not every device has float64
    if not logits.isfinite().all():
        raise CheckpointError("the model's logits are not finite: training diverged or the weights are bad; "
                              "take an earlier checkpoint, or train with a lower train.lr")
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    # softmax(logits / temperature), of logits at most 0, of which no temperature makes infinity
    logits = logits - logits.max(-1, keepdim=True).values
    probs = (logits / temperature).softmax(-1)
    if not top_k and top_p == 1:
        return probs
    # the top_k likeliest tokens; of equal ones the lower id first
    p, ids = probs.sort(dim=-1, descending=True, stable=True)
    if top_k:
        p[:, top_k:] = 0
        p = p / p.sum(-1, keepdim=True)
    # of these the fewest that hold top_p of the rest (nucleus, Holtzman 1904.09751 sec. 3.1): a token goes if
    # those before it hold that much already, so that the first always stays
    if top_p < 1:
        likelier = p.cumsum(-1) - p
        p[likelier >= top_p] = 0
    return torch.zeros_like(p).scatter(-1, ids, p / p.sum(-1, keepdim=True))


def draw(probs, generator=None):
    """One id per row, (B, V) -> (B,)."""
    # row by row: a row's draws must not move with the number of rows
    generators = generator if isinstance(generator, list) else [generator] * len(probs)
    return torch.cat([torch.multinomial(p, 1, generator=g) for p, g in zip(probs, generators, strict=True)])


def seeded(seed, num=1):
    """The generators of `num` sequences: sequence i of seed s draws like sequence 0 of seed s + i."""
    return [torch.Generator().manual_seed(seed + i) for i in range(num)]


def encode_prompt(tokenizer, prompt):
    """Ids of a prompt, never none: the empty one is a line's end, or id 0 where the tokenizer has none. Raises
    DataError for characters that the tokenizer has never seen."""
    try:
        return tokenizer.encode(prompt or "\n") or [0]
    except DataError:
        if prompt:
            raise
        return [0]


def sample_text(model, tokenizer, prompt="", tokens=200, temperature=0.8, seed=0, top_k=0, top_p=1.0):
    """The prompt and its continuation as one text. Leaves the model's mode and torch's own generators as they
    were: a sample in the middle of training changes nothing."""
    # in evaluation mode, which is put back afterwards
    training, device = model.training, next(model.parameters()).device
    ids = torch.tensor([encode_prompt(tokenizer, prompt)], device=device)
    model.eval()
    try:
        steps = generate(model, ids, tokens, temperature, top_k, top_p, seeded(seed),
                         vocab_size=tokenizer.vocab_size)
        return prompt + tokenizer.decode([int(step.ids) for step in steps])
    finally:
        model.train(training)


def remarks(model, header):
    """Lines about the model that a reader of its text should know: what it was made from, how it routes."""
    ancestry, found = header.get("ancestry"), []
    if ancestry and not (isinstance(ancestry, dict) and not ancestry.get("parents")):
        found.append(f"made by: {lineage(ancestry)}")
    return list(dict.fromkeys(found + [text for block in model.blocks for text in block.ffn.remarks()]))


@own_threads
def run(o):
    """Loads, generates, prints."""
    check_sample(o)
    device, terminal = pick_device(o.device), sys.stdout.isatty()
    dtype = None if o.dtype == "auto" else getattr(torch, o.dtype)
    model, config, tokenizer, header = load_model(o.run_dir, device, dtype=dtype)
    colour = terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    marker = None if o.show_experts is None else Marker(pick_layer(o.show_experts, model.sparse), colour)
    ids, block = encode_prompt(tokenizer, o.prompt), config.model.block_size
    # what a reader should know first
    for remark in remarks(model, header):
        tell(remark)
    if len(ids) > block:
        tell(f"the prompt has {len(ids)} tokens, model.block_size is {block}: its last {max(block // 2, 1)} "
             "are read")
    memory.check_texts(model, o.num, device)
    threads = choose_threads(o.threads, o.num * model.flops_per_token(), device)
    prompt_ids = torch.tensor([ids] * o.num, device=device)
    start, extra = time.perf_counter(), 1 if marker else 0          # the last token is read by one step more
    # the tokens as they come, and what the terminal shows of them
    steps = generate(model, prompt_ids, o.tokens + extra, o.temperature, o.top_k, o.top_p,
                     seeded(o.seed, o.num), not o.no_cache, tokenizer.vocab_size)
    pieces = (marker.pieces(steps, tokenizer, prompt_ids) if marker else
              plain_pieces(steps, tokenizer, o.prompt, o.num, PLAIN if terminal else {}))
    if o.num == 1:                                                  # as it comes
        for (piece,) in pieces:
            print(piece, end="", flush=True)
        print()
    else:                                                           # each whole, under its number
        for i, text in enumerate(map("".join, zip(*pieces))):
            print(f"--- {i} ---\n{text}")
    if marker:
        print(marker.legend())
    sys.stdout.flush()
    # how fast it was
    n, seconds = o.tokens * o.num, time.perf_counter() - start
    tell(f"{n} tokens in {seconds:.2f} s, {n / seconds:,.0f} tokens/s, "
         f"{'a CUDA graph a token' if captures(model) and not o.no_cache else threads}")


def main(argv=None):
    """The program; returns its exit status."""
    with Ending() as end:
        run(parse(sample_parser((__doc__ or "").split("\n\nDecisions")[0]), argv)[0])
    return end.status


if __name__ == "__main__":
    sys.exit(main())
