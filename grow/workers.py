"""The workers of grow/outer.py: replicas of one model, each trained by itself on its own data, and
how they meet."""
import torch

from data.batches import Batches
from runtime import checkpoint, parallel
from runtime.config import from_tables
from runtime.device import speed_up
from train import Trainer, detached, mean_stats

APART = 1_000_003       # between the seeds of two workers' draws; no experiment has as many seeds


# --- a worker ---


class Part:
    """The batches of worker `number` of `workers`, as Batches gives them.

    shards: its part of the batch that train.py would read in this step, cut in equal parts, as the
    processes of torchrun cut it. domains: one corpus, worker i of k has corpus i mod n of n; the
    k / n workers of one corpus share its batches in the same way.
    """

    def __init__(self, config, folders, split, number, workers):
        weights, n = config.data.weights, 1
        if split == "domains":
            n = len(folders)
            weights = [float(j == number % n) for j in range(n)]
        self.part, self.parts = number // n, workers // n
        self.whole = Batches(folders, weights, config.model.block_size,
                             config.train.batch_size // n, config.data.seed,
                             config.data.answers_only)

    def batch(self, step, micro, grad_accum, rank, world):
        return self.whole.batch(step, micro, grad_accum, self.part, self.parts)


class Worker(Trainer):
    """One replica: its weights, its inner optimizer and its batches. Between two meetings it is a
    run of its own, with 1 / k of the batch, whatever other processes there are."""

    def __init__(self, centre, folders, options, number):
        config = from_tables(centre.config.to_dict())
        t = config.train
        # noise and dropout differ by worker; the first draws what train.py would
        t.seed = (t.seed + number * APART) % 2**62
        t.batch_size //= options.workers
        # a graph would not see a rate that is a number
        if options.inner == "sgd":
            t.graph = "off"
        with parallel.alone():
            super().__init__(config, folders, centre.tokenizer, centre.device)
            if options.inner == "sgd":
                self.optimizer = plain_sgd(self.optimizer, t.lr, options.inner_momentum)
            speed_up(self, centre.say)
        self.batches = Part(centre.config, folders, options.split, number, options.workers)
        # it begins as the centre
        checkpoint.load_weights(self.model, centre.model.state_dict(), "the centre")
        self.done = centre.done

    def step(self):
        with parallel.alone():
            return super().step()

    def evaluate(self, valid):
        with parallel.alone():
            return super().evaluate(valid)

    @property
    def learned(self):
        """The parameters that training changes, in the order of every replica."""
        return learned(self.model)

    def memory(self, with_weights):
        """What a checkpoint needs of it beside the centre: for each of the learned parameters the
        inner optimizer's state, {name: tensor}, and its weight where that is not the centre's."""
        own = [dict(weight=p.detach()) if with_weights else {} for p in self.learned]
        return [kept | self.optimizer.state[p] for kept, p in zip(own, self.learned)]

    @torch.no_grad()
    def recall(self, place, name, tensor):
        """Takes back one tensor of its memory, that of learned parameter number `place`."""
        p = self.learned[place]
        if name == "weight":
            p.copy_(tensor)
        else:
            self.optimizer.state[p][name] = tensor


def learned(model):
    """The parameters that are not frozen."""
    return [p for p in model.parameters() if p.requires_grad]


def statistics(model):
    """Buffers that training changes, those of a checkpoint in floating point: the biases of
    loss-free balancing, prices, BatchNorm's mean, variance and count."""
    kept = model.state_dict().keys()
    return [b for name, b in model.named_buffers() if name in kept and b.is_floating_point()]


def plain_sgd(adamw, lr, momentum):
    """SGD for the parameters of an AdamW, with Nesterov's momentum; weight decay is added to the
    gradient."""
    groups = [dict(params=g["params"], weight_decay=g["weight_decay"]) for g in adamw.param_groups]
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0)


# --- a meeting, for one parameter ---


def outer_gradient(centre, workers, k, total=sum):
    """Delta = 1/k sum_i (theta - theta_i): it points from the new weights to the old ones, as a
    gradient does. workers: their tensors in this process; total: sums over all k."""
    return total([centre - x for x in workers]) / k


def elastic(centre, workers, alpha, total=sum):
    """x_i -= alpha (x_i - c), c += alpha sum_i (x_i - c), in place, all with the centre c of before
    (EASGD's update without its gradient; alpha = eta rho). The sum of all x_i and c stays."""
    moves = [alpha * (x - centre) for x in workers]
    for x, move in zip(workers, moves):
        x.sub_(move)
    centre.add_(total(moves))


# --- the workers together ---


class Team:
    """The centre, a Trainer that takes no steps of its own, and this process's workers."""

    def __init__(self, centre, folders, options):
        self.centre, self.options = centre, options
        # whose own gradients nobody needs to average
        centre.forward = centre.whole_forward = centre.model
        # worker i is in process i // count
        self.count = options.workers // parallel.world()
        self.first = parallel.rank() * self.count
        self.workers = [Worker(centre, folders, options, self.first + i) for i in range(self.count)]
        self.learned = learned(centre.model)
        self.bytes = 0                  # that a worker sent at the last meeting
        # average is the same optimizer, and elastic needs none
        lr, momentum = options.outer_lr, options.outer_momentum
        if options.outer != "nesterov":
            lr, momentum = 1.0, 0.0
        memory = centre.optimizer.state         # of a checkpoint, else empty
        centre.optimizer = torch.optim.SGD(self.learned, lr=lr, momentum=momentum,
                                           nesterov=momentum > 0)
        self.recall(memory)

    def step(self):
        """One inner step of every worker; returns a row of log.csv, means over the workers."""
        rows = [worker.step() for worker in self.workers]
        self.centre.done += 1
        mean = {name: sum(row[name] for row in rows) / len(rows)
                for name in ("loss", "aux_loss", "grad_norm")}
        # of a layer in all workers: loads are summed, numbers are averaged
        layers = []
        for same in zip(*(row["layers"] for row in rows)):
            seen = [detached(stats) for stats in same]
            sums = {name: sum(one[name] for one in seen) for name in seen[0]}
            layers.append(mean_stats(sums, len(seen)))
        return rows[0] | mean | dict(tokens=self.centre.tokens, layers=layers)

    def total(self, tensors):
        """The sum over all workers of a tensor that each of this process's has."""
        whole = parallel.summed(sum(tensors))
        self.bytes += whole.numel() * whole.element_size()
        return whole

    @torch.no_grad()
    def meet(self):
        """The workers meet, after --every steps."""
        k, self.bytes = self.options.workers, 0
        for p, *own in zip(self.learned, *(worker.learned for worker in self.workers)):
            if self.options.outer == "elastic":
                elastic(p, own, self.options.alpha, self.total)
            else:
                p.grad = outer_gradient(p, own, k, self.total)
        # the outer step, and all workers go on from the new centre
        if self.options.outer != "elastic":
            self.centre.optimizer.step()
            self.centre.optimizer.zero_grad()
            for p, *own in zip(self.learned, *(worker.learned for worker in self.workers)):
                for x in own:
                    x.copy_(p)
        # statistics have no optimizer: everybody gets their mean
        for b, *own in zip(*map(statistics, self.models)):
            b.copy_(self.total(own) / k)
            for x in own:
                x.copy_(b)

    @property
    def models(self):
        return [self.centre.model, *(worker.model for worker in self.workers)]

    @property
    def sent(self):
        """Bytes that a worker has sent since the run began: every meeting sends as many."""
        return self.bytes * (self.centre.done // self.options.every)

    def worker_loss(self, valid):
        """{worker_loss: nats a token}, the mean over workers and corpora, where they are not equal
        to the centre; else empty."""
        if self.options.outer != "elastic":
            return {}
        losses = [nats for worker in self.workers for nats, _ in worker.evaluate(valid).values()]
        nats, n = parallel.totals([sum(losses), len(losses)])
        return dict(worker_loss=nats / n)

    def __str__(self):
        """How the workers work together, for people."""
        o = self.options
        how = {"nesterov": f"nesterov, rate {o.outer_lr:g}, momentum {o.outer_momentum:g}",
               "average": "the mean", "elastic": f"elastic, alpha {o.alpha:.3g}"}[o.outer]
        inner = f"sgd, momentum {o.inner_momentum:g}" if o.inner == "sgd" else o.inner
        return (f"{o.workers}, {self.count} in each process, {inner}, each reads {o.split}; they "
                f"meet every {o.every} steps: {how}")

    # --- what a checkpoint holds: in the outer optimizer's state, as "worker3.exp_avg" beside
    #     "momentum_buffer", while it is written or read ---

    def save(self, out):
        """Writes ckpt_last.pt, of all processes together."""
        state = self.centre.optimizer.state
        apart = self.options.outer == "elastic"
        for i in range(self.options.workers):
            # other workers' tensors have the shapes of one's own
            owner, place = divmod(i, self.count)
            for p, kept in zip(self.learned, self.workers[place].memory(apart)):
                state[p] |= {f"worker{i}.{name}": parallel.shown(t, owner)
                             for name, t in kept.items()}
        checkpoint.save_run(out, self.centre)
        for kept in state.values():
            for name in [name for name in kept if "." in name]:
                del kept[name]

    def recall(self, memory):
        """Gives the outer optimizer and this process's workers what a checkpoint holds of them."""
        for place, p in enumerate(self.learned):
            for name, tensor in memory.get(p, {}).items():
                who, _, what = name.rpartition(".")
                i = int(who.removeprefix("worker")) - self.first if who else 0
                if not who:
                    self.centre.optimizer.state[p][name] = tensor
                elif 0 <= i < self.count:
                    self.workers[i].recall(place, what, tensor)
