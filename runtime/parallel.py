"""Several processes: `torchrun --standalone --nproc_per_node=N train.py CONFIG` trains the model that one
process would train with the same global batch; each process (rank) has its part of every micro-batch.

The engines are torch.distributed's: DistributedDataParallel averages gradients (train.parallel = "ddp");
fully_shard also cuts parameters, gradients and optimizer state over the ranks ("fsdp"), for models that
outgrow one GPU. "expert" is ddp in which each rank holds a share of every layer's experts, and tokens travel
to theirs. What the engines do not know is here: statistics of the whole batch, rows that travel, one process
that prepares, speaks and writes for all, a common last step, and checkpoints of whole tensors, with which any
number of processes goes on. With one process every function is the identity. Most are collective: all ranks
call them in the same order, so nothing that ranks see differently may decide whether they are called.
"""
import contextlib
import datetime
import os
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from settings import ConfigError

PATIENCE = datetime.timedelta(hours=2)          # how long the others wait while rank 0 prepares data


class Lost(RuntimeError):
    """Another process of this run is gone."""
    status = 1


apart = False                                   # see alone


def world():
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() and not apart else 1


def rank():
    """Number of this process, from 0."""
    return dist.get_rank() if world() > 1 else 0


@contextlib.contextmanager
def alone():
    """In it this process is a run of its own, whatever others there are: what a worker of grow/outer.py does
    between two meetings concerns nobody else."""
    global apart
    before, apart = apart, True
    try:
        yield
    finally:
        apart = before


def told(name):
    """A whole number that torchrun puts into the environment. Raises ConfigError if it is none."""
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise ConfigError(f"the environment variable {name} = {text!r} is no whole number; torchrun sets it")
    return int(text)


@contextlib.contextmanager
def processes():
    """Joins the processes that torchrun started, if the caller has not. gloo carries settings and flags, on
    the CPU, which waits for no GPU; nccl what is on GPUs. Raises Lost for all the ways in which the end of
    another process shows."""
    # without torchrun these variables mean nothing, whoever left them there
    joins = dist.is_torchelastic_launched() and world() == 1 and told("WORLD_SIZE") > 1
    if joins:
        number, local = told("RANK"), told("LOCAL_RANK")
        if number >= told("WORLD_SIZE"):
            raise ConfigError(f"the environment variable RANK = {number} is not below WORLD_SIZE")
        if torch.cuda.is_available():
            torch.cuda.set_device(local % torch.cuda.device_count())
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                                timeout=PATIENCE)
    try:
        yield
    except RuntimeError as e:
        broken = type(e) is RuntimeError and ("gloo" in str(e) or "NCCL" in str(e))
        if world() == 1 or not (broken or isinstance(e, dist.DistError)):
            raise
        raise Lost("another process of this run ended; --resume goes on from the last checkpoint, with any "
                   f"number of processes ({str(e).splitlines()[0].split('. ')[0]})") from None
    if joins:
        dist.destroy_process_group()


def own(device):
    """The device of this process: of several, each has the GPU of its number."""
    gpu = world() > 1 and device.type == "cuda"
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else device


def check(config, device):
    """Raises ConfigError for what this many processes cannot run."""
    t = config.train
    here = told("LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in os.environ and world() > 1 else 1
    if t.batch_size % (t.grad_accum * world()):
        config.fail("train.batch_size", f"cannot be cut into train.grad_accum = {t.grad_accum} x {world()} "
                    "processes")
    if world() > 1 and device.type == "cuda" and here > torch.cuda.device_count():
        config.fail("train.device", f"has {torch.cuda.device_count()} GPUs here, for {here} processes")
    if sharded(config) and (config.ffn.n_frozen or config.lifelong.l2):
        config.fail("train.parallel", "cuts tensors whose rows ffn.n_frozen and lifelong.l2 need: use ddp")
    if world() > 1 and t.parallel == "expert":
        if config.ffn.kind != "moe":
            config.fail("train.parallel", "needs ffn.kind = \"moe\": use ddp")
        if config.ffn.experts % world():
            config.fail("train.parallel", f"cannot share {config.ffn.experts} experts equally among "
                        f"{world()} processes: start a number of them that divides it, or use ddp")


def sharded(config):
    """Whether some parameters lie in parts on the ranks."""
    return world() > 1 and config.train.parallel != "ddp"


# ---- statistics of the whole batch


class GlobalSum(torch.autograd.Function):
    """x summed over ranks, and so is its gradient: that of the sum of all ranks' losses."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x.clone()        # torch 2.11's compiler loses the gradient of a result written in place

    backward = forward


def sums():
    """Whether statistics are global: in training. Evaluation has other batches on each rank."""
    return world() > 1 and torch.is_grad_enabled()


def global_sum(x):
    """Sum of x over ranks. Gradients are averaged over ranks, so a loss of it has the gradient that it has in
    one process."""
    return GlobalSum.apply(x) if sums() else x


def global_mean(x):
    """The same for a mean: all parts of a batch are of one size."""
    return GlobalSum.apply(x) / world() if sums() else x


def over_processes(loss, aux_loss, layers, names):
    """(loss, aux_loss, [Stats]) of a step over all ranks: loads are summed, and averaged are the losses and
    those of a layer's numbers called `names` that it has."""
    if world() == 1:
        return loss, aux_loss, layers
    # all numbers in one collective, all loads in another
    had = [[name for name in names if getattr(s, name) is not None] for s in layers]
    numbers = [loss, aux_loss, *(getattr(s, name) for s, own in zip(layers, had) for name in own)]
    numbers = iter(global_mean(torch.stack(numbers)))
    loads = global_sum(torch.cat([s.load for s in layers])).split([len(s.load) for s in layers])
    loss, aux_loss = next(numbers), next(numbers)
    return loss, aux_loss, [s._replace(load=load, **{name: next(numbers) for name in own})
                            for s, own, load in zip(layers, had, loads)]


def share(batches):
    """Yields (batch, whether it counts): every rank gets equally many, since with fsdp a forward pass takes
    all of them; a repeat at the end does not count."""
    for i in range(rank(), -(-len(batches) // world()) * world(), world()):
        yield batches[min(i, len(batches) - 1)], i < len(batches)


def totals(numbers):
    """A list of Python numbers summed over ranks."""
    if world() == 1:
        return numbers
    sums = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()


def summed(tensor):
    """A tensor summed over ranks, in place."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def shown(tensor, owner):
    """A tensor of rank `owner`, for all; the other ranks give one of its shape and dtype."""
    if world() == 1:
        return tensor
    copy = tensor.detach().clone()
    dist.broadcast(copy, owner)
    return copy


def largest(number):
    """The largest of a whole number that each rank has."""
    tensor = torch.tensor(number)
    if world() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


# ---- rows that travel to the ranks that hold their experts


class Exchange(torch.autograd.Function):
    """See exchange; the gradient of each row takes its way back."""

    @staticmethod
    def forward(ctx, rows, sent, came):
        ctx.back = came, sent
        here = rows.new_empty(sum(came), *rows.shape[1:])
        dist.all_to_all_single(here, rows.contiguous(), came, sent)
        return here

    @staticmethod
    def backward(ctx, grad):
        return Exchange.apply(grad, *ctx.back), None, None


def exchange(rows, sent, came):
    """All-to-all, rows (sum of sent, ...) -> (sum of came, ...): the first sent[0] go to rank 0, the next
    sent[1] to rank 1, ...; came[0] rows come from rank 0, then came[1] from rank 1, ..., in their order.

        2 ranks          rank 0                       rank 1
        rows             a0 a1 | a2      (2, 1)       b0 | b1 b2 b3    (1, 3)       sent
        result           a0 a1 | b0      (2, 1)       a2 | b1 b2 b3    (1, 3)       came

    Any number may be 0. exchange(result, came, sent) brings everything home."""
    return Exchange.apply(rows, sent, came)


def announce(expert, n_expert):
    """For rows that will travel in the order of their experts, numbers (P,), E for a row that stays: (how many
    go to each rank, how many come from each, the expert of each that comes, as numbered here)."""
    # (E,) rows for each expert, in E / ranks numbers for each rank -> (ranks, E / ranks) rows from each rank
    # for each expert that is held here: of known size, so that these travel first
    going = torch.bincount(expert, minlength=n_expert)[:n_expert].view(world(), -1)
    coming = torch.empty_like(going)
    dist.all_to_all_single(coming, going.contiguous())
    here = torch.arange(coming.shape[1], device=expert.device).repeat(world())
    return going.sum(1).tolist(), coming.sum(1).tolist(), here.repeat_interleave(coming.flatten())


# ---- one process leads


def from_rank0(make):
    """make() of rank 0, for all; its tensors are bare shapes (device meta) elsewhere, for `spread` to fill.
    What it raises is raised on rank 0, and the others end."""
    if world() == 1:
        return make()
    result = error = None
    try:
        result = make() if rank() == 0 else None
    except BaseException as e:
        error = e
    shapes = tree_map_only(torch.Tensor, lambda t: t.to("meta"), result)
    told = [dict(result=shapes, failed=error is not None, status=getattr(error, "code", 1))]
    dist.broadcast_object_list(told, 0, device=torch.device("cpu"))
    if told[0]["failed"]:
        raise error or SystemExit(told[0]["status"])
    return result if rank() == 0 else told[0]["result"]


def first():
    """True in the first process that asks: an error that ends all of them is told once."""
    with contextlib.suppress(RuntimeError):                     # the store may be gone, too
        return world() == 1 or dist.distributed_c10d._get_default_store().add("first", 1) == 1
    return True


# ---- models and checkpoints


def wrap(model, config, device):
    """What training calls in place of the model. What is sharded is on the CPU before, and moves in parts:
    for fsdp block by block."""
    if world() == 1:
        return model
    if config.train.parallel == "expert":
        share_experts(model, device)
    if config.train.parallel != "fsdp":
        ddp = DistributedDataParallel(model, [device] if device.type == "cuda" else None)
        ddp.broadcast_buffers = False           # before each forward: global statistics keep them equal
        return ddp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh(device.type, (world(),))
    for part in (*model.blocks, model):             # whole for its forward and its backward, then let go
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    return model


def share_experts(model, device):
    """Moves a model to `device`, of the experts only the share of this rank: of each parameter (E, ...) of a
    module that can be `spread`, rows rank * E / ranks and on, as a DTensor that knows the whole shape."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    mesh, parts = init_device_mesh(device.type, (world(),)), []
    for path, experts in model.named_modules():
        if hasattr(experts, "spread"):
            experts.spread = True
            for name, p in list(experts.named_parameters()):
                # all ranks drew the same numbers (src_data_rank: nothing is sent)
                part = distribute_tensor(p.detach(), mesh, [Shard(0)], src_data_rank=None)
                setattr(experts, name, nn.Parameter(part, p.requires_grad))
                parts.append(f"{path}.{name}")
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, parts)
    model.to(device)


def held(module):
    """What stands for a module whose parameters lie in parts: its attributes, and the parts that lie here."""
    parts = {name: p.to_local() for name, p in module.named_parameters()}
    # The tokens that come here bring the gradient of their own rank's mean loss, and it is summed over them.
    # The loss is the mean over ranks: elsewhere ddp divides by their number, here this does.
    for part in parts.values():
        if part.requires_grad:
            part.register_hook(lambda grad: grad / world())
    return SimpleNamespace(**vars(module) | parts)


def alike(parameters):
    """A list of parameters as lists of the whole ones and of those in parts: torch's updates take no
    mixture."""
    found = {}
    for p in parameters:
        found.setdefault(hasattr(p, "full_tensor"), []).append(p)
    return list(found.values()) or [parameters]


def clip(parameters, largest):
    """clip_grad_norm_ of torch, for whole parameters and those in parts together."""
    lists = alike(list(parameters))
    if len(lists) == 1:
        return nn.utils.clip_grad_norm_(lists[0], largest)
    norms = [nn.utils.get_total_norm([p.grad for p in some if p.grad is not None]) for some in lists]
    norm = torch.stack([whole(n) for n in norms]).norm()
    for some in lists:
        nn.utils.clip_grads_with_norm_(some, largest, norm)
    return norm


def accumulating(forward, last):
    """Context of a micro-step: ddp averages gradients in the last one only."""
    return contextlib.nullcontext() if last or not hasattr(forward, "no_sync") else forward.no_sync()


def whole(tensor):
    """A tensor that lies in parts on the ranks, put together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gather(tensors):
    """Tensors by name as a checkpoint has them, whole; of several ranks the first alone gets them, on its
    CPU. One by one, a tied one once."""
    done = {}
    for t in tensors.values():
        if id(t) not in done:
            full = whole(t.detach())
            done[id(t)] = full if world() == 1 else full.cpu() if rank() == 0 else None
    return {name: done[id(t)] for name, t in tensors.items()}


def spread(tensors, model):
    """A checkpoint's tensors, from rank 0 to all: whole, or in parts like the model's tensor of that name (in
    an optimizer's state: of the name before the "/")."""
    if world() == 1:
        return tensors
    from torch.distributed.tensor import distribute_tensor
    own, placed = model.state_dict(), dict(tensors)
    for name, t in tensors.items():
        like = own.get(name.rpartition("/")[0] or name)
        if like is not None:                        # unknown names are left to who loads them
            t = t.to(like.device) if rank() == 0 else torch.empty_like(t, device=like.device)
            if hasattr(like, "placements") and like.shape == t.shape:
                placed[name] = distribute_tensor(t, like.device_mesh, like.placements)
            else:
                dist.broadcast(t, 0)
                placed[name] = t
    return placed
