"""What torchrun runs for test_parallel.py: gradients through global statistics, then training runs one after
the other, in one group of processes. `torchrun ... tests/parallel_job.py FOLDER`, which holds jobs.json."""
import contextlib
import io
import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import train
from balance import btx_loss, importance_loss, switch_loss
from peer import BatchNorm
from routers import pairs
from runtime import parallel

E, K, N, WIDTH = 4, 2, 24, 6            # experts, choices, tokens of the whole batch, width of the batch norm


def objective(part, world):
    """Gradients of a loss of each statistic, for one part of a batch of N tokens: dict of tensors. The loss
    is a mean over tokens, as in training, and its gradients are divided by `world`, as averaging them
    would."""
    generator = torch.Generator().manual_seed(0)
    logits, x, target = (
        torch.randn(N, width, generator=generator).chunk(world)[part].clone().requires_grad_()
        for width in (E, WIDTH, WIDTH))
    found = {}
    for loss in (switch_loss, importance_loss, btx_loss):
        probs = logits.softmax(-1)
        weight, expert = probs.topk(K)
        routing = pairs(expert, weight, logits=logits, probs=probs)
        load = torch.zeros(E).index_add(0, routing.expert, torch.ones(routing.expert.numel()))
        found[loss.__name__], = torch.autograd.grad(loss(routing, load, None, None), logits)
    norm = BatchNorm(WIDTH).train()
    for _ in range(2):
        y = norm(x * 3 + 1)
    loss = ((y * norm.weight - target) ** 2).mean()
    found["x"], found["weight"], found["bias"] = torch.autograd.grad(loss, (x, norm.weight, norm.bias))
    found = {name: g / world for name, g in found.items()}
    return found | dict(mean=norm.mean.clone(), var=norm.var.clone())


def run(arguments):
    """Exit status of train.py, and what it printed on stdout and stderr."""
    if parallel.rank() == 0:                        # the next run may have an error of its own to tell
        torch.distributed.distributed_c10d._get_default_store().set("first", "0")
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            status = train.main(arguments)
        except SystemExit as e:
            status = e.code
    return status, out.getvalue()


def main(folder):
    torch.set_num_threads(1)
    with parallel.processes():
        torch.save(objective(parallel.rank(), parallel.world()), folder / f"gradients{parallel.rank()}.pt")
        results = [run(arguments) for arguments in json.loads((folder / "jobs.json").read_text())]
        (folder / f"results{parallel.rank()}.json").write_text(json.dumps(results))
        # The engines of all these runs lie in this one process, and gloo's threads sometimes abort while they are
        # taken down. All is written by now, so both processes end here.
        torch.distributed.barrier()
        os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
