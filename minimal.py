"""A language model made of mixtures of experts, on one page.

`python minimal.py` trains a small GPT on the source code of Python's own standard
library, byte by byte, and prints a sample: about two minutes on two CPU cores. It
imports no other file of this repository, and model.py computes the same function.

Letters in the shapes: B sequences, T positions, d width, V vocabulary; N = B T
tokens; E experts, k of them for each token, w hidden width of an expert; h heads.
"""
import math
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

vocab_size = 256                # V: a token is a byte
block_size = 128                # T: how many bytes the model sees at once
n_layer = 4
n_head = 4                      # h
n_embd = 128                    # d
n_expert = 8                    # E
top_k = 2                       # k
d_expert = 256                  # w
balance_loss = 0.01             # weight of the balance loss in the objective
batch_size = 12                 # B
max_steps = 800
warmup_steps = 50
lr = 3e-3                       # the highest learning rate
report_every = 100


# ---- 1. Data: Python's standard library, as bytes ----
def read_corpus():
    """The bytes of the training and of the validation files, two 1-D tensors."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    # Every tenth file is for validation, whole, so that nothing in it is trained on.
    train = b"".join(f.read_bytes() for i, f in enumerate(files) if i % 10 > 0)
    valid = b"".join(f.read_bytes() for i, f in enumerate(files) if i % 10 == 0)
    return torch.tensor(list(train)), torch.tensor(list(valid))


def windows(data, starts):
    """Inputs and targets, (B, T) each: the target of a byte is the byte after it."""
    rows = torch.stack([data[s:s + block_size + 1] for s in starts])
    return rows[:, :-1], rows[:, 1:]


# ---- 2. Model: attention and experts in turn, each on a normalised input ----
def matrix(*shape, scale=1.0):
    """A parameter (..., fan_out, fan_in) drawn from N(0, scale^2 / (2 fan_in))."""
    return nn.Parameter(torch.randn(shape) * scale * (2 * shape[-1]) ** -0.5)


def rms_norm(x, weight):
    """Divides each token by its root mean square (Zhang & Sennrich 2019, eq. 4)."""
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def rotate(x):
    """Turns pairs of features by the position (RoFormer, eq. 34): (B, h, T, d/h)."""
    T, width = x.shape[-2:]
    # At position t, pair i turns by the angle t 10000^(-2i / width).
    frequency = 10000 ** (-torch.arange(0, width, 2) / width)
    angle = torch.outer(torch.arange(T), frequency)
    cos, sin = angle.cos(), angle.sin()
    # Pair i is feature i of the first half with feature i of the second half.
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Attention(nn.Module):
    """Each position reads from itself and from the positions before it."""
    def __init__(self):
        super().__init__()
        self.norm = nn.Parameter(torch.ones(n_embd))
        self.qkv = matrix(3 * n_embd, n_embd)
        self.out = matrix(n_embd, n_embd, scale=(2 * n_layer) ** -0.5)

    def forward(self, x):
        B, T, d = x.shape
        # Queries, keys and values, each cut into h heads: (B, h, T, d/h).
        qkv = rms_norm(x, self.norm) @ self.qkv.T                      # (B, T, 3d)
        q, k, v = qkv.view(B, T, 3, n_head, d // n_head).permute(2, 0, 3, 1, 4)
        # After the rotation a score knows how far apart its two positions are.
        scores = rotate(q) @ rotate(k).transpose(-1, -2)               # (B, h, T, T)
        # No position reads from a later one.
        scores = scores.masked_fill(torch.ones(T, T).triu(1) == 1, -math.inf)
        # Vaswani et al. 2017, eq. 1: softmax(Q K^T / sqrt(d/h)) V.
        y = (scores / math.sqrt(d // n_head)).softmax(-1) @ v
        # The heads are put side by side and mixed; the result is added to x.
        return x + y.transpose(1, 2).reshape(B, T, d) @ self.out.T


class MoE(nn.Module):
    """Mixture of experts: E feed-forward layers, of which each token visits k."""
    def __init__(self):
        super().__init__()
        self.norm = nn.Parameter(torch.ones(n_embd))
        self.router = nn.Parameter(torch.randn(n_expert, n_embd) * 0.02)
        self.w_in = matrix(n_expert, 2 * d_expert, n_embd)             # [gate | up]
        self.w_out = matrix(n_expert, n_embd, d_expert, scale=(2 * n_layer) ** -0.5)

    def forward(self, x):
        tokens = rms_norm(x, self.norm).flatten(0, 1)                  # (N, d)
        # The router gives every token a score for every expert: z = W_r x.
        z = tokens @ self.router.T                                     # (N, E)
        # A token goes to the k experts with its highest scores.
        score, chosen = z.topk(top_k, -1)                              # (N, k)
        # Mixtral, sec. 2.1: the gates are the softmax over these k scores.
        gates = score.softmax(-1)                                      # (N, k)
        # Mixtral, sec. 2.1: y = sum over the chosen e of gate_e SwiGLU_e(x).
        y = torch.zeros_like(tokens)
        for e, (w_in, w_out) in enumerate(zip(self.w_in, self.w_out)):
            # The tokens that chose expert e, and which of their k choices it was.
            n, choice = (chosen == e).nonzero(as_tuple=True)
            # SwiGLU (Shazeer 2020, eq. 6): W_out (silu(W_gate x) * W_up x).
            gate, up = (tokens[n] @ w_in.T).chunk(2, -1)
            out = (F.silu(gate) * up) @ w_out.T
            # The weighted outputs go back to the rows of their tokens.
            y = y.index_add(0, n, gates[n, choice].unsqueeze(1) * out)
        # Switch, eq. 4-6: the balance loss E sum_e f_e P_e. f_e is the share of all
        # choices that fell on e, P_e its mean probability. Even use gives 1.
        f = chosen.flatten().bincount(minlength=n_expert) / chosen.numel()
        P = z.softmax(-1).mean(0)
        return x + y.view_as(x), n_expert * (f * P).sum()


class GPT(nn.Module):
    """Bytes (B, T) -> logits of the next byte (B, T, V), summed balance loss."""
    def __init__(self):
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(vocab_size, n_embd) * 0.02)
        self.attention = nn.ModuleList(Attention() for _ in range(n_layer))
        self.moe = nn.ModuleList(MoE() for _ in range(n_layer))
        self.norm = nn.Parameter(torch.ones(n_embd))

    def forward(self, idx):
        x = F.embedding(idx, self.embedding)                           # (B, T, d)
        total = 0
        for attention, moe in zip(self.attention, self.moe):
            x, balance = moe(attention(x))
            total = total + balance
        # The output matrix is the embedding table once more (tied).
        return rms_norm(x, self.norm) @ self.embedding.T, total


# ---- 3. Training: the next byte, and an even use of the experts ----
def train(model, data, valid):
    """max_steps optimizer steps on random windows of data, with reports on valid."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    # A window of the unseen files every 2,500 bytes, the same ones at every report.
    valid_x, valid_y = windows(valid, range(0, len(valid) - block_size, 2500))
    print(" step  nats/byte  bits/byte  balance  tokens/s  (on unseen files)")
    clock = time.time()
    for step in range(1, max_steps + 1):
        x, y = windows(data, torch.randint(len(data) - block_size, (batch_size,)))
        logits, balance = model(x)
        # The mean of -log p(next byte), and a little of the balance loss.
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        (loss + balance_loss * balance).backward()
        # The gradient of all parameters together is cut to length 1.
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        # The rate rises linearly at first, then follows a cosine down to a tenth.
        cosine = 0.55 + 0.45 * math.cos(math.pi * step / max_steps)
        optimizer.param_groups[0]["lr"] = lr * min(step / warmup_steps, cosine)
        optimizer.step()
        if step % report_every == 0:
            speed = report_every * x.numel() / (time.time() - clock)
            with torch.no_grad():
                logits, balance = model(valid_x)
            nats = F.cross_entropy(logits.flatten(0, 1), valid_y.flatten()).item()
            print(f"{step:5}{nats:11.3f}{nats / math.log(2):11.3f}"
                  f"{balance / n_layer:9.3f}{speed:10,.0f}")
            clock = time.time()


# ---- 4. Sample: one byte at a time ----
@torch.no_grad()
def generate(model, prompt, n, temperature=0.8):
    """n bytes to follow the prompt. A temperature below 1 favours likely bytes."""
    text = list(prompt)
    for _ in range(n):
        logits, _ = model(torch.tensor([text[-block_size:]]))
        p = (logits[0, -1] / temperature).softmax(-1)
        text.append(torch.multinomial(p, 1).item())
    return bytes(text[len(prompt):])


if __name__ == "__main__":
    torch.manual_seed(0)
    data, valid = read_corpus()
    model = GPT()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    train(model, data, valid)
    print("\ndef " + generate(model, b"def ", 500).decode(errors="replace"))
