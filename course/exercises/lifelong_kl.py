"""Learning without forgetting: a KL term to the model before.

lecture 5 · difficulty 3 of 5 · importance 3 of 5 · 30 minutes · 4 points

A trained model is to learn new text and keep what it knows. Learning without forgetting (Li and
Hoiem 2016, 1606.09282; in Lifelong-MoE, Chen 2023, 2305.12281) holds its predictions to those of
the model before, the teacher. That needs no old text: both read the new one.

    objective = loss of the new text + the model's aux_loss + weight temperature^2 KL
    KL = mean over all B T tokens of sum over v of p_v log(p_v / q_v)           nats a token

Here p = softmax(teacher's logits / temperature) and q = softmax(logits / temperature). KL(p || q)
is large where the model gives little to what the teacher held likely; the other direction is large
where it gives much to what the teacher held unlikely. A high temperature makes the gradient
smaller by about its square, which the factor makes good (Hinton 2015, 1503.02531, sec. 2).

The teacher is a constant: no gradient, no dropout, no noise of a router. All positions count, for
the teacher has a prediction at each, also where a target is -100 and the loss has none.

It matters because a KL that is divided by the wrong count still falls in training. Divided by B
alone it is too strong by a factor of T, by all B T V numbers too weak by a factor of V, and no
curve shows it.
"""
import torch
import torch.nn.functional as F


def divergence(teacher_logits, logits, temperature=1.0):
    """Mean over tokens of KL(p_teacher || p), nats, a float32 tensor (), of logits (B, T, V)."""
    raise NotImplementedError("yours")


def objective(model, teacher, idx, targets, weight, temperature=1.0):
    """What a training step minimises, a tensor (). model and teacher: GPTs of this repository;
    model(idx, targets) gives logits, loss and aux_loss. idx and targets (B, T). Afterwards both
    models are in the same mode as before."""
    raise NotImplementedError("yours")
