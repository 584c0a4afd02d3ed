"""What keeps the past while a trained model learns something new, called by train.py, set in [lifelong]:

  distill         T^2 KL(p_old || p_new) on the new text: go on predicting like the old model (1606.09282)
  l2              ||theta - theta_old||^2, for each weight that the old model has
  freeze          parameters, by name; ffn.n_frozen: rows of the expert tensors and of the router
  lora_rank       the old weights stay, and a product of two thin matrices is added to them (2106.09685)
  data.weights    replay: a share of old text in every batch, with nothing needed from this file

What is frozen stays the same to the last bit. Whole parameters are not given to the optimizer. Rows are,
since they share a tensor with rows that learn: their gradient is cleared before the norm is taken, and they
are put back after the step, because AdamW moves what has no gradient too, by weight decay and by momentum
from before the freezing.
"""
import contextlib
import fnmatch
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from model import load_model
from runtime import checkpoint
from runtime.config import nearest
from settings import show

ADAPTED = ("attention.qkv", "attention.out", ".w_in", ".w_out")     # linear layers that get low-rank adapters


class LoRA(nn.Linear):
    """x (W + alpha/r B A)^T for a linear layer of weight W (out, in), with A (r, in) and B (out, r) the only
    parameters that learn (Hu et al. 2106.09685 sec. 4.1). B starts at zero, so the layer starts as it was."""

    def __init__(self, linear, rank, alpha):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / rank
        device, width = linear.weight.device, linear.in_features
        self.lora_a = nn.Parameter(torch.randn(rank, width, device=device) * width ** -0.5)
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))

    def forward(self, x):
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)


def add_adapters(model, rank, alpha):
    """Makes the linear layers of attention and of dense feed-forward layers LoRA; nothing else learns."""
    model.requires_grad_(False)
    for name, module in list(model.blocks.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith(ADAPTED):
            parent, _, own = name.rpartition(".")
            setattr(model.blocks.get_submodule(parent), own, LoRA(module, rank, alpha))


def adapters(model):
    """The tensors of a model's adapters by name: what the weights of a plain model lack."""
    return {name: t for name, t in model.state_dict().items() if ".lora_" in name}


def freeze(model, config):
    """Takes the parameters that lifelong.freeze names out of training. Raises ConfigError for a pattern that
    names none."""
    named, patterns = dict(model.named_parameters(remove_duplicate=False)), config.lifelong.freeze
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        chosen = [p for name, p in named.items() if fnmatch.fnmatchcase(name, pattern)]
        if not chosen:
            config.fail("lifelong.freeze", f"names no parameter by {show(pattern)}{nearest(pattern, named)}")
        for p in chosen:
            p.requires_grad_(False)


def frozen_rows(model, ffn):
    """[(parameter, n)]: the tensors whose first n rows stay, because ffn.n_frozen experts do. Those that stay
    as a whole are taken out of training instead."""
    experts, routes = ("experts.w_in", "experts.w_out"), ("router.score.weight", "router.noise.weight")
    names = experts + routes * ffn.frozen_routes
    rows = [p for name, p in model.named_parameters() if ffn.n_frozen and name.endswith(names)]
    for p in rows:
        p.requires_grad_(p.requires_grad and len(p) > ffn.n_frozen)
    return [(p, ffn.n_frozen) for p in rows if p.requires_grad]


def kl_divergence(old_logits, logits, temperature=1.0):
    """Mean over tokens of KL(p_old || p_new), nats, each p a softmax(logits / T); logits (B, T, V)."""
    old, new = ((z.float() / temperature).log_softmax(-1).flatten(0, 1) for z in (old_logits, logits))
    return F.kl_div(new, old, log_target=True, reduction="batchmean")


def previous_run(config):
    """Folder of the old model: lifelong.teacher, else the run that train.init_from was expanded from, else
    train.init_from itself."""
    if config.lifelong.teacher:
        return Path(config.lifelong.teacher)
    header = checkpoint.load_plain(check_there(config.train.init_from)).header
    grown = header["ancestry"]["kind"] == "expand" and header["step"] == 0
    return Path(header["ancestry"]["parents"][0]["run"] if grown else config.train.init_from)


def check_there(folder):
    """The folder, if a run is in it; else raises CheckpointError."""
    if not checkpoint.has_run(folder):
        raise checkpoint.CheckpointError(f"{folder}: no run is there, and lifelong.distill and l2 need it for the "
                                 "old model; put it back, or say where that is with --lifelong.teacher")
    return folder


def load_old(folder, config, tokenizer, device):
    """The old model, in evaluation mode and without gradients. Raises CheckpointError if it is gone or cannot
    read what the new one reads."""
    m = config.model
    old, theirs, their_tokenizer, _ = load_model(check_there(folder), device)
    for same, what in ((their_tokenizer.fingerprint == tokenizer.fingerprint, "another tokenizer"),
                       (theirs.model.vocab_size == m.vocab_size, "another model.vocab_size"),
                       (theirs.model.block_size >= m.block_size, "a shorter model.block_size")):
        if not same:
            raise checkpoint.CheckpointError(f"{folder}: cannot be the old model of this run: it has {what}")
    return old.requires_grad_(False)


def pair_with_old(model, old):
    """[(parameter, old tensor)] of all that learns; of a grown parameter the old tensor is the first rows.
    Raises CheckpointError where the two models are not of one shape."""
    old, pairs = dict(old.named_parameters()), []
    for name, p in model.named_parameters():
        was = old.get(name)
        if was is None or was.shape[1:] != p.shape[1:] or len(was) > len(p):
            theirs = "has none" if was is None else f"has {tuple(was.shape)}"
            raise checkpoint.CheckpointError(f"lifelong.l2: {name} is {tuple(p.shape)}, the old model {theirs}")
        pairs += [(p, was)] * p.requires_grad
    return pairs


class Past:
    """What keeps the past in one training run: adapters, frozen parameters and rows, and the terms that the
    old model adds to the objective. Nothing in here is state: a resumed run reads the old model again."""

    def __init__(self, model, config, tokenizer, device):
        self.settings, ll = config.lifelong, config.lifelong
        if ll.lora_rank:
            add_adapters(model, ll.lora_rank, ll.lora_alpha)
        freeze(model, config)
        self.rows = frozen_rows(model, config.ffn)
        self.total = sum(p.numel() for p in model.parameters())
        self.trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.trained -= sum(p[:n].numel() for p, n in self.rows)
        if not self.trained:
            config.fail("lifelong.freeze", f"and ffn.n_frozen = {config.ffn.n_frozen} leave nothing to train")
        self.folder = previous_run(config) if ll.distill or ll.l2 else None
        self.teacher = load_old(self.folder, config, tokenizer, device) if self.folder else None
        self.forward = self.teacher                             # or the same, compiled
        self.pairs = pair_with_old(model, self.teacher) if ll.l2 else []

    def loss(self, x, domain, logits):
        """() what this adds to the objective of tokens x (B, T), for which the model gave logits (B, T, V):
        distill T^2 KL + l2 ||theta - theta_old||^2. T^2 keeps the gradient's size whatever T (1503.02531
        sec. 2)."""
        total, T = 0.0, self.settings.distill_temperature
        if self.settings.distill:
            with torch.no_grad():
                old_logits = self.forward(x, domain=domain).logits
            total = total + self.settings.distill * T * T * kl_divergence(old_logits, logits, T)
        for p, old in self.pairs:
            total = total + self.settings.l2 * (p[:len(old)] - old).square().sum()
        return total

    @contextlib.contextmanager
    def rows_kept(self):
        """Around clipping and the optimizer's step: frozen rows enter without gradient, so that the norm
        knows nothing of them, and leave as they were, to the last bit."""
        before = [p.detach()[:n].clone() for p, n in self.rows]
        for p, n in self.rows:
            p.grad[:n] = 0
        yield
        for (p, n), old in zip(self.rows, before):
            p.detach()[:n] = old

    def __str__(self):
        """What is done, for people; empty where everything learns and nothing is held."""
        ll, found = self.settings, []
        if self.trained < self.total:
            found.append(f"{self.trained:,} parameters learn")
        found += [f"adapters of rank {ll.lora_rank}"] * bool(ll.lora_rank)
        found += [f"{ll.distill:g} x KL to {self.folder}, T {ll.distill_temperature:g}"] * bool(ll.distill)
        return ", ".join(found + [f"{ll.l2:g} x squared distance to {self.folder}"] * bool(ll.l2))

    def compile(self, on=True):
        """The old model compiled, or, where that fails, as it is."""
        if self.teacher is not None:
            self.forward = torch.compile(self.teacher, dynamic=False) if on else self.teacher
