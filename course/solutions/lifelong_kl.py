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
    # the temperature divides both models' logits; float32, since it is a difference of near equals
    p, q = ((z.float() / temperature).log_softmax(-1).flatten(0, 1)
            for z in (teacher_logits, logits))
    # kl_div(log q, log p) is KL(p || q); batchmean divides by the first axis, so that has to be B T
    return F.kl_div(q, p, log_target=True, reduction="batchmean")


def objective(model, teacher, idx, targets, weight, temperature=1.0):
    """What a training step minimises, a tensor (). model and teacher: GPTs of this repository;
    model(idx, targets) gives logits, loss and aux_loss. idx and targets (B, T). Afterwards both
    models are in the same mode as before."""
    # evaluation: without dropout or noise in the teacher; its mode is put back
    was = teacher.training
    teacher.eval()
    # a constant: nothing to differentiate, and no memory for it
    with torch.no_grad():
        before = teacher(idx).logits
    teacher.train(was)
    out = model(idx, targets)
    # its square: the gradient keeps its size at any temperature
    kl = divergence(before, out.logits, temperature)
    return out.loss + out.aux_loss + weight * temperature ** 2 * kl


# ---- the check ----
import math  # noqa: E402

from course.check import ask, close, grads, shape  # noqa: E402
from grow.retain import kl_divergence  # noqa: E402
from model import GPT  # noqa: E402
from settings import Config, FFNConfig, ModelConfig  # noqa: E402


def check(mine):
    for B, T, V, temperature in ((2, 3, 5, 1.0), (4, 1, 7, 2.5), (1, 6, 3, 0.5)):
        check_divergence(mine, torch.randn(B, T, V) * 2, torch.randn(B, T, V) * 2, temperature)
    for temperature in (1.0, 2.0):
        check_objective(mine, temperature)


def check_divergence(mine, teacher, logits, tau):
    name, (B, n, V) = f"divergence at temperature {tau} of logits {tuple(logits.shape)}", logits.shape
    found, want = mine.divergence(teacher.clone(), logits.clone(), tau), kl_divergence(teacher, logits, tau)
    shape(name, found, ())
    entropy = torch.special.entr((teacher / tau).softmax(-1)).sum(-1).mean()
    for value, sentence in [
            (kl_divergence(logits, teacher, tau), "it is KL(p || p_teacher), the other direction"),
            (-want, "it has the other sign"),
            (want * n, "it is divided by B alone: \"batchmean\" divides by the length of the first axis, "
             "which is not B T here"),
            (want * B * n, "it is the sum over the tokens, not their mean"),
            (want / V, "it is divided by V, too: a mean over all numbers, where a sum over V belongs"),
            (want / math.log(2), "it is in bits, not nats"),
            (want * tau * tau, "it holds the factor temperature^2, which belongs to the objective"),
            (kl_divergence(teacher, logits), "it does not depend on the temperature"),
            (kl_divergence(teacher * tau, logits, tau), "the temperature divides the model's logits alone"),
            (kl_divergence(teacher, logits * tau, tau), "the temperature divides the teacher's logits alone"),
            (kl_divergence(teacher * tau, logits * tau), "the temperature multiplies the logits"),
            (want + entropy, "it is the cross-entropy, from which the teacher's entropy is to be taken off"),
            (kl_divergence(teacher[:, :-1], logits[:, 1:], tau), "the model's position t + 1 is compared "
             "with the teacher's t: both predict the same token at the same position"),
            (kl_divergence(teacher[:, :-1], logits[:, :-1], tau), "the last position is missing")]:
        ask(torch.isclose(value, want, rtol=1e-4) or not torch.isclose(found, value, rtol=1e-4),
            f"{name} is {found:.4f}, not {want:.4f}: {sentence}")
    close(name, found, want, 1e-4, 1e-6)
    ask(mine.divergence(logits, logits, tau).abs() < 1e-6, f"{name} is not 0 where both models are the same")
    one, two = (grads(lambda z: f(teacher, z, tau), logits)[0] for f in (mine.divergence, kl_divergence))
    ask(one.abs().max() > 0,
        "the divergence has no gradient to the model's logits: the teacher is the constant")
    close("the gradient of the divergence to the model's logits", one, two, 1e-3, 1e-7)
    huge = mine.divergence(teacher * 200, logits * 200, tau)
    ask(huge.isfinite(), f"with logits of some hundreds {name} is {huge}: take log_softmax, not log(softmax)")


def model_of():
    """A sparse model with dropout and a router that draws noise in training."""
    model = ModelConfig(n_layer=1, n_embd=16, n_head=2, block_size=8, vocab_size=11, dropout=0.2)
    return GPT(Config(model, FFNConfig(n_expert=4, d_ff=16, router="noisy_topk", balance_loss=0.1)))


def logits_of(model, idx, training=False):
    """What a model predicts in this mode, always with the same noise; its own mode is put back."""
    was = model.training
    torch.manual_seed(11)
    with torch.no_grad():
        found = model.train(training)(idx).logits
    model.train(was)
    return found


def check_objective(mine, temperature, weight=0.3):
    model, teacher = model_of(), model_of()
    with torch.no_grad():
        for p in (*model.parameters(), *teacher.parameters()):
            p.add_(torch.randn_like(p) * 0.2)
    idx, targets = torch.randint(11, (2, 2, 8)).unbind(0)
    targets[0, :4] = -100
    # the model without noise, so that the numbers can be compared whatever runs first
    model.eval()
    for training in (False, True):
        teacher.train(training)
        torch.manual_seed(11)
        found = mine.objective(model, teacher, idx, targets, weight, temperature)
        check_value(found, model, teacher, idx, targets, weight, temperature)
        ask(teacher.training == training, "the teacher is in another mode afterwards: put it back")
        check_gradients(found, model, teacher, idx, targets, weight, temperature)
    mine.objective(model.train(), teacher, idx, targets, weight, temperature)
    ask(model.training, "the model is in evaluation mode afterwards: only the teacher is to be evaluated")


def check_value(found, model, teacher, idx, targets, weight, tau):
    shape("objective", found, ())
    with torch.no_grad():
        out, kept, factor = model(idx, targets), targets != -100, weight * tau * tau
    before, noisy = logits_of(teacher, idx), logits_of(teacher, idx, True)
    plain, kl = out.loss + out.aux_loss, kl_divergence(before, out.logits, tau)
    want = plain + factor * kl
    for value, sentence in [
            (want - out.aux_loss, "the model's aux_loss is missing, by which its routers are balanced"),
            (want - out.loss, "the loss of the new text is missing"),
            (plain + weight * kl, "the factor temperature^2 is missing"),
            (plain + weight * tau * kl, "the factor is the temperature, not its square"),
            (plain, "the KL is missing"),
            (plain + tau * tau * kl, "the weight is missing"),
            (plain + factor * kl_divergence(before[kept][None], out.logits[kept][None], tau),
             "positions with target -100 are left out of the KL: the teacher has a prediction there as well"),
            (plain + factor * kl_divergence(noisy, out.logits, tau),
             "the teacher is in training mode, with dropout and router noise: evaluate it in eval mode")]:
        ask(torch.isclose(value, want, rtol=1e-5) or not torch.isclose(found, value, rtol=1e-5),
            f"objective is {found:.4f}, not {want:.4f}: {sentence}")
    close("objective", found, want, 1e-4, 1e-6)


def check_gradients(found, model, teacher, idx, targets, weight, tau):
    ask(found.requires_grad, "objective has no gradient: only the teacher is a constant")
    # in both models, 0 where nothing depends on a parameter
    parameters = [model.embedding.weight, *teacher.parameters()]
    got, *of_teacher = torch.autograd.grad(found, parameters, allow_unused=True, materialize_grads=True)
    ask(not any(g.any() for g in of_teacher), "the teacher gets a gradient: run it under torch.no_grad()")
    out = model(idx, targets)
    kl = kl_divergence(logits_of(teacher, idx), out.logits, tau)
    want, = torch.autograd.grad(out.loss + out.aux_loss + weight * tau * tau * kl, [model.embedding.weight])
    close("the gradient of objective to the embedding", got, want, 1e-3, 1e-5, "does the KL move the model?")


WRONG = [
    ("F.kl_div(q, p, log", "F.kl_div(p, q, log", "the other direction"),
    (".log_softmax(-1).flatten(0, 1)\n", ".log_softmax(-1)\n", "it is divided by B alone"),
    ("reduction=\"batchmean\"", "reduction=\"mean\"", "it is divided by V, too"),
    ("reduction=\"batchmean\"", "reduction=\"sum\"", "the sum over the tokens"),
    ("(z.float() / temperature)", "(z.float() / (temperature if z is logits else 1))",
     "divides the model's logits alone"),
    ("(z.float() / temperature)", "z.float()", "does not depend on the temperature"),
    ("log_softmax(-1).flatten(0, 1)", "softmax(-1).log().flatten(0, 1)", "not log(softmax)"),
    ("(teacher_logits, logits))\n", "(teacher_logits[:, :-1], logits[:, 1:]))\n", "at the same position"),
    ("weight * temperature ** 2 * kl", "weight * kl", "the factor temperature^2 is missing"),
    ("out.loss + out.aux_loss +", "out.loss +", "aux_loss is missing"),
    ("    with torch.no_grad():\n        before", "    if True:\n        before",
     "the teacher gets a gradient"),
    ("    teacher.eval()\n", "", "the teacher is in training mode"),
    ("    teacher.train(was)\n", "", "put it back"),
    ("divergence(before, out.logits, temperature)", "divergence(before, out.logits.detach(), temperature)",
     "does the KL move the model"),
    ("divergence(before, out.logits, temperature)",
     "divergence(*(z[targets != -100][None] for z in (before, out.logits)), temperature)",
     "positions with target -100"),
]
