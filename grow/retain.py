"""What keeps the past while a trained model learns something new, as set in [lifelong]; train.py
calls it:

  distill         T^2 KL(p_teacher || p) on the new text, which keeps the predictions (1606.09282)
  l2              ||theta - theta_teacher||^2, over each weight that the teacher has
  freeze          parameters, by name; ffn.n_frozen: rows of the expert tensors and of the router
  lora_rank       the weights stay, and a product of two thin matrices is added to them (2106.09685)
  data.weights    replay: a share of old text in every batch, with nothing needed from this file

The teacher is the model before: the run that was expanded, or the one that training starts from.

What is frozen stays the same to the last bit. Whole parameters are not given to the optimizer. Rows
are, since they share a tensor with rows that learn. Their gradient is cleared before the norm is
taken, and they are put back after the step: AdamW also moves what has no gradient, by weight decay
and by the momentum from before the freezing.
"""
import contextlib
import fnmatch
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from model import load_model
from runtime import checkpoint
from runtime.checkpoint import CheckpointError
from runtime.config import nearest
from settings import show

# linear layers that get low-rank adapters, by the end of their names
ADAPTED = ("attention.qkv", "attention.out", ".w_in", ".w_out")


class LoRA(nn.Linear):
    """x (W + alpha/r B A)^T for a linear layer of weight W (out, in). Only A (r, in) and B (out, r)
    learn (Hu et al. 2106.09685 sec. 4.1)."""

    def __init__(self, linear, rank, alpha):
        # on the meta device: W and the bias are those of `linear`, nothing is drawn for them
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None,
                         device="meta")
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / rank
        device, width = linear.weight.device, linear.in_features
        # B starts at zero, so that the layer starts as it was
        self.lora_a = nn.Parameter(torch.randn(rank, width, device=device) * width ** -0.5)
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))

    def forward(self, x):
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)


def add_adapters(model, rank, alpha):
    """Makes the linear layers of attention and of dense feed-forward layers LoRA; nothing else
    learns."""
    model.requires_grad_(False)
    for name, module in list(model.blocks.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith(ADAPTED):
            parent, _, own = name.rpartition(".")
            setattr(model.blocks.get_submodule(parent), own, LoRA(module, rank, alpha))


def adapters(model):
    """The tensors of a model's adapters by name: what the weights of a plain model lack."""
    return {name: t for name, t in model.state_dict().items() if ".lora_" in name}


def freeze(model, config):
    """Takes the parameters that lifelong.freeze names out of training. Raises ConfigError for a
    pattern that names none."""
    # a head that is tied to the embedding can be named either way
    named, patterns = dict(model.named_parameters(remove_duplicate=False)), config.lifelong.freeze
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        chosen = [p for name, p in named.items() if fnmatch.fnmatchcase(name, pattern)]
        if not chosen:
            config.fail("lifelong.freeze", f"names no parameter by {show(pattern)}"
                        f"{nearest(pattern, named)}")
        for p in chosen:
            p.requires_grad_(False)


def frozen_rows(model, ffn):
    """[(parameter, n)]: the tensors whose first n = ffn.n_frozen rows stay. Those of which no row
    learns are taken out of training instead."""
    if not ffn.n_frozen:
        return []
    names = ["experts.w_in", "experts.w_out"]
    if ffn.frozen_routes:
        names += ["router.score.weight", "router.noise.weight"]
    rows = [p for name, p in model.named_parameters() if name.endswith(tuple(names))]
    for p in rows:
        p.requires_grad_(p.requires_grad and len(p) > ffn.n_frozen)
    return [(p, ffn.n_frozen) for p in rows if p.requires_grad]


def kl_divergence(teacher_logits, logits, temperature=1.0):
    """Mean over tokens of KL(p_teacher || p), nats, each p a softmax(logits / T); logits
    (B, T, V)."""
    teacher, mine = ((z.float() / temperature).log_softmax(-1).flatten(0, 1)
                     for z in (teacher_logits, logits))
    return F.kl_div(mine, teacher, log_target=True, reduction="batchmean")


# --- the teacher ---


def teacher_folder(config):
    """Run folder of the teacher: lifelong.teacher, else the run that train.init_from was expanded
    from, else train.init_from itself. Raises CheckpointError if that is gone."""
    if config.lifelong.teacher:
        return Path(config.lifelong.teacher)
    check_there(config.train.init_from)
    header = checkpoint.load_plain(config.train.init_from).header
    # an expanded run that has not been trained predicts with experts that know nothing yet
    if header["ancestry"]["kind"] == "expand" and header["step"] == 0:
        return Path(header["ancestry"]["parents"][0]["run"])
    return Path(config.train.init_from)


def check_there(folder):
    """Raises CheckpointError unless a run is in the folder."""
    if not checkpoint.has_run(folder):
        raise CheckpointError(f"{folder}: no run is there, and lifelong.distill and lifelong.l2 "
                              "need it as the teacher; put it back, or name its folder with "
                              "--lifelong.teacher")


def load_teacher(folder, config, tokenizer, device):
    """The teacher, in evaluation mode and without gradients. Raises CheckpointError if it is gone
    or cannot read what the model of this Config reads."""
    check_there(folder)
    teacher, theirs, their_tokenizer, _ = load_model(folder, device)
    mine, theirs = config.model, theirs.model
    for same, what in (
            (their_tokenizer.fingerprint == tokenizer.fingerprint, "another tokenizer"),
            (theirs.vocab_size == mine.vocab_size, "another model.vocab_size"),
            (theirs.block_size >= mine.block_size, "a shorter model.block_size")):
        if not same:
            raise CheckpointError(f"{folder}: cannot be the teacher of this run: it has {what}")
    return teacher.requires_grad_(False)


def pair_with_teacher(model, teacher):
    """[(parameter, teacher's tensor)] of all that learns; of a grown parameter the teacher's tensor
    is the first rows. Raises CheckpointError where the two models are not of one shape."""
    theirs, pairs = dict(teacher.named_parameters()), []
    for name, p in model.named_parameters():
        its = theirs.get(name)
        if its is None or its.shape[1:] != p.shape[1:] or len(its) > len(p):
            found = "none" if its is None else tuple(its.shape)
            raise CheckpointError(f"lifelong.l2: {name} is {tuple(p.shape)}, the teacher has "
                                  f"{found}")
        if p.requires_grad:
            pairs.append((p, its))
    return pairs


class Past:
    """What keeps the past in one training run: adapters, frozen parameters and rows, and the terms
    that the teacher adds to the objective. Nothing in here is state: a resumed run reads the
    teacher again."""

    def __init__(self, model, config, tokenizer, device):
        self.settings = settings = config.lifelong
        # what of the model learns: adapters alone, or all but what is named and the frozen rows
        if settings.lora_rank:
            add_adapters(model, settings.lora_rank, settings.lora_alpha)
        freeze(model, config)
        self.rows = frozen_rows(model, config.ffn)
        # how many numbers that is
        self.total = sum(p.numel() for p in model.parameters())
        self.trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.trained -= sum(p[:n].numel() for p, n in self.rows)
        if not self.trained:
            config.fail("lifelong.freeze",
                        f"and ffn.n_frozen = {config.ffn.n_frozen} leave nothing to train")
        # the teacher, if a term needs it; self.forward is the same model, or compiled
        self.folder = self.teacher = None
        self.pairs = []
        if settings.distill or settings.l2:
            self.folder = teacher_folder(config)
            self.teacher = load_teacher(self.folder, config, tokenizer, device)
        if settings.l2:
            self.pairs = pair_with_teacher(model, self.teacher)
        self.forward = self.teacher

    def loss(self, x, domain, logits):
        """() what this adds to the objective of tokens x (B, T), for which the model gave logits
        (B, T, V): distill T^2 KL + l2 ||theta - theta_teacher||^2."""
        total, T = 0.0, self.settings.distill_temperature
        if self.settings.distill:
            with torch.no_grad():
                teacher_logits = self.forward(x, domain=domain).logits
            # T^2 keeps the gradient's size whatever T (1503.02531 sec. 2)
            kl = kl_divergence(teacher_logits, logits, T)
            total = total + self.settings.distill * T * T * kl
        # new experts are the last rows, which the teacher lacks: they are free
        for p, its in self.pairs:
            total = total + self.settings.l2 * (p[:len(its)] - its).square().sum()
        return total

    @contextlib.contextmanager
    def rows_kept(self):
        """Around clipping and the optimizer's step: frozen rows are not in the norm, and are the
        same after the step, to the last bit."""
        before = [p.detach()[:n].clone() for p, n in self.rows]
        for p, n in self.rows:
            p.grad[:n] = 0
        yield
        for (p, n), kept in zip(self.rows, before):
            p.detach()[:n] = kept

    def __str__(self):
        """What is done, for people; empty where everything learns and nothing is held."""
        settings, found = self.settings, []
        if self.trained < self.total:
            found.append(f"{self.trained:,} parameters learn")
        if settings.lora_rank:
            found.append(f"adapters of rank {settings.lora_rank}")
        if settings.distill:
            found.append(f"{settings.distill:g} x KL to {self.folder}, "
                         f"T {settings.distill_temperature:g}")
        if settings.l2:
            found.append(f"{settings.l2:g} x squared distance to {self.folder}")
        return ", ".join(found)

    def compile(self, on=True):
        """The teacher compiled, or, where that fails, as it is."""
        if self.teacher is not None:
            self.forward = torch.compile(self.teacher, dynamic=False) if on else self.teacher
