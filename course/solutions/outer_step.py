"""The outer step of DiLoCo.

lecture 5 · difficulty 2 of 5 · importance 3 of 5 · 25 minutes · 4 points

k workers train copies of one model and seldom meet (Douillard 2023, 2311.08105, algorithm 1). In
each round every worker starts from the centre theta and takes H steps of its own on its own data.
Then they meet:

    Delta = 1/k sum over i of (theta - theta_i)                         the outer gradient
    v = momentum v + Delta,  theta = theta - lr (Delta + momentum v)    SGD with Nesterov's momentum

with v = 0 before the first round; this is what torch.optim.SGD(nesterov=True) does with Delta as
the gradient. With lr = 1 and no momentum the new centre is the mean of the workers. The paper
takes lr 0.7 and momentum 0.9.

It matters because machines that are far apart can exchange weights every 500 steps but not
gradients at every one, and because with one wrong sign each round undoes what the workers have
learned.
"""
import torch


def outer_gradient(theta, workers):
    """Delta, a new tensor of theta's shape. theta: the centre that the workers started from;
    workers: the list of their tensors after H steps."""
    # old minus new: descent subtracts a gradient, so that minus Delta must lead to the workers
    return theta - torch.stack(workers).mean(0)


def outer_step(theta, workers, velocity, lr, momentum):
    """(new theta, new velocity), new tensors; the arguments stay as they are."""
    delta = outer_gradient(theta, workers)
    # the velocity sums old outer gradients; the learning rate is not in it
    velocity = momentum * velocity + delta
    # Nesterov looks ahead: this Delta, and the momentum that holds it already
    return theta - lr * (delta + momentum * velocity), velocity


def diloco(theta, train, k, rounds, lr, momentum):
    """The centre after some rounds, a new tensor. train(i, theta): the weights of worker i, 0 to
    k - 1, after its H steps from theta, which it does not change; its data and its optimizer
    belong to it."""
    # the outer optimizer's memory lasts over all rounds
    velocity = torch.zeros_like(theta)
    for _ in range(rounds):
        # all workers start from the centre, not from where they were
        workers = [train(i, theta) for i in range(k)]
        theta, velocity = outer_step(theta, workers, velocity, lr, momentum)
    return theta


# ---- the check ----
from course.check import ask, close, shape  # noqa: E402
from grow.workers import outer_gradient as gradient_here  # noqa: E402


def check(mine):
    for k, size in ((3, (5,)), (4, (2, 3)), (1, (4,))):
        check_gradient(mine, k, size)
        for lr, momentum in ((1.0, 0.0), (0.7, 0.9), (0.5, 0.0)):
            check_step(mine, k, size, lr, momentum)
    check_rounds(mine)


def meeting(k, size):
    theta = torch.randn(size, dtype=torch.float64)
    return theta, [theta + torch.randn(size, dtype=torch.float64) for _ in range(k)]


def check_gradient(mine, k, size):
    theta, workers = meeting(k, size)
    before = theta.clone(), [w.clone() for w in workers]
    found, want = mine.outer_gradient(theta, workers), gradient_here(theta, workers, k)
    shape("outer_gradient", found, theta.shape)
    unchanged(theta, workers, before, "outer_gradient")
    for value, sentence in [
            (-want, "has the other sign: it is old minus new, theta - theta_i: a gradient is subtracted"),
            (want * k, f"is the sum over the {k} workers, not their mean: it would grow with their number"),
            (torch.stack(workers).mean(0), "is the mean of the workers: take it from theta")]:
        ask(torch.allclose(value, want) or not torch.allclose(found, value), f"outer_gradient {sentence}")
    close("outer_gradient", found, want)


def unchanged(theta, workers, before, name):
    ask(torch.equal(theta, before[0]), f"{name} changed theta, which is not its own: make a new tensor")
    ask(all(map(torch.equal, workers, before[1])), f"{name} changed a worker's tensor: make a new one")


def step_here(theta, workers, velocity, lr, momentum):
    """PyTorch's SGD on this repository's outer gradient, as at a meeting in grow/workers.py."""
    p = torch.nn.Parameter(theta.clone())
    optimizer = torch.optim.SGD([p], lr=lr, momentum=momentum, nesterov=momentum > 0)
    if momentum:
        optimizer.state[p]["momentum_buffer"] = velocity.clone()
    p.grad = gradient_here(theta, workers, len(workers))
    optimizer.step()
    return p.detach(), optimizer.state[p].get("momentum_buffer", p.grad)


def check_step(mine, k, size, lr, momentum):
    theta, workers = meeting(k, size)
    velocity = torch.randn(size, dtype=torch.float64)
    before, old = (theta.clone(), [w.clone() for w in workers]), velocity.clone()
    given = f"outer_step (k = {k}, lr = {lr}, momentum = {momentum})"
    found = mine.outer_step(theta, workers, velocity, lr, momentum)
    ask(isinstance(found, tuple) and len(found) == 2, f"{given} does not return (new theta, new velocity)")
    shape(f"theta of {given}", found[0], size)
    shape(f"velocity of {given}", found[1], size)
    unchanged(theta, workers, before, given)
    ask(torch.equal(velocity, old), f"{given} changed the old velocity: make a new tensor")
    want, v = step_here(theta, workers, velocity, lr, momentum)
    delta = gradient_here(theta, workers, k)
    for value, sentence in [
            (momentum * velocity + (1 - momentum) * delta, "weighs Delta by 1 - momentum: v is a sum, not an "
                                                           "average"),
            (momentum * velocity + lr * delta, "holds the learning rate: v = momentum v + Delta"),
            (momentum * (velocity + delta), "weighs Delta by the momentum, too"),
            (velocity, "is the old one")]:
        ask(torch.allclose(value, v) or not torch.allclose(found[1], value),
            f"the velocity of {given} {sentence}")
    close(f"velocity of {given}", found[1], v)
    for value, sentence in [
            (theta + lr * (delta + momentum * v), "moves away from the workers: a gradient is subtracted"),
            (theta - lr * v, "moves by lr v, plain momentum: Nesterov's moves by lr (Delta + momentum v)"),
            (theta - lr * (v + momentum * v), "moves by lr (v + momentum v), not lr (Delta + momentum v)"),
            (theta - lr * (delta + momentum * velocity), "moves by the old velocity: it is updated first"),
            (theta - lr * delta, "forgets the velocity"),
            (torch.stack(workers).mean(0), "is the workers' mean, whatever lr and momentum are")]:
        ask(torch.allclose(value, want) or not torch.allclose(found[0], value),
            f"theta of {given} {sentence}")
    close(f"theta of {given}", found[0], want)


def check_rounds(mine, k=3, rounds=4, lr=0.7, momentum=0.9):
    """Rounds with workers that go a part of the way to a point of their own, and write down from where."""
    theta, calls = torch.randn(5, dtype=torch.float64), []
    points = torch.randn(k, 5, dtype=torch.float64)

    def train(i, start):
        calls.append((i, start.clone(), start + 0.3 * (points[i] - start)))
        return calls[-1][2].clone()

    original, want, v = theta.clone(), theta.clone(), torch.zeros_like(theta)
    found = mine.diloco(theta, train, k, rounds, lr, momentum)
    ask(torch.equal(theta, original), "diloco changed the tensor theta that it was given")
    shape("the centre of diloco", found, (5,))
    called = [i for i, _, _ in calls]
    ask(called == [*range(k)] * rounds,
        f"train is called for workers {called}, not for 0 to {k - 1} in each of {rounds} rounds")
    for n in range(rounds):
        for j in range(n * k, n * k + k):
            check_start(calls, j, k, want)
        want, v = step_here(want, [stop for _, _, stop in calls[n * k:n * k + k]], v, lr, momentum)
    close("the centre of diloco", found, want, 1e-5, 1e-8)


def check_start(calls, j, k, centre):
    """Whether call j starts from the centre."""
    (i, start, _), n = calls[j], j // k
    ask(j < k or not torch.allclose(start, calls[j - k][2]), f"worker {i} starts round {n} where it stopped "
        "itself: after a meeting all go on from the new centre")
    ask(j == 0 or not torch.allclose(start, calls[j - 1][2]), f"worker {i} starts round {n} where worker "
        f"{calls[j - 1][0]} stopped: all start from the same centre")
    ask(torch.allclose(start, centre),
        f"worker {i} starts round {n} from another centre than outer_step makes "
        "of the round before: does the velocity last, and is each round's step from its own centre?")


WRONG = [
    ("return theta - torch.stack(workers).mean(0)", "return torch.stack(workers).mean(0) - theta",
     "has the other sign"),
    ("return theta - torch.stack(workers).mean(0)", "return sum(theta - w for w in workers)", "the sum over"),
    ("return theta - torch.stack(workers).mean(0)", "return torch.stack(workers).mean(0)",
     "is the mean of the workers"),
    ("return theta - lr * (delta", "return theta + lr * (delta", "moves away"),
    ("lr * (delta + momentum * velocity), velocity", "lr * velocity, velocity", "plain momentum"),
    ("velocity = momentum * velocity + delta", "velocity = momentum * velocity + (1 - momentum) * delta",
     "v is a sum, not an average"),
    ("velocity = momentum * velocity + delta", "velocity = momentum * velocity + lr * delta",
     "holds the learning rate"),
    ("velocity = momentum * velocity + delta", "velocity.mul_(momentum).add_(delta)",
     "changed the old velocity"),
    ("return theta - lr * (delta + momentum * velocity), velocity",
     "theta -= lr * (delta + momentum * velocity)\n    return theta, velocity", "changed theta"),
    ("        workers = [train(i, theta)",
     "        velocity = torch.zeros_like(theta)\n        workers = [train(i, theta)",
     "does the velocity last"),
    ("workers = [train(i, theta) for i in range(k)]",
     "workers = [train(i, w) for i, w in enumerate(workers if _ else [theta] * k)]",
     "where it stopped itself"),
    ("workers = [train(i, theta) for i in range(k)]",
     "workers = [theta]\n        for i in range(k):\n            workers.append(train(i, workers[-1]))\n"
     "        workers = workers[1:]", "where worker 0 stopped"),
]
