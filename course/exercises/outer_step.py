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
    raise NotImplementedError("yours")


def outer_step(theta, workers, velocity, lr, momentum):
    """(new theta, new velocity), new tensors; the arguments stay as they are."""
    raise NotImplementedError("yours")


def diloco(theta, train, k, rounds, lr, momentum):
    """The centre after some rounds, a new tensor. train(i, theta): the weights of worker i, 0 to
    k - 1, after its H steps from theta, which it does not change; its data and its optimizer
    belong to it."""
    raise NotImplementedError("yours")
