"""What goes wrong slowly, noticed while a run trains: gradients that explode, experts without tokens, a
router that sends all tokens to the same few. Each is said once, with a remedy; training goes on.

It looks at the numbers that a row of the log has anyway, and asks the device for nothing.
"""
import math
import statistics
from collections import deque

import torch

# gradients explode: SPIKES of the last MEMORY norms were more than SPIKE times the median
SPIKE, SPIKES, MEMORY = 10.0, 3, 100
EARLY = 20              # norms before there is a median to speak of
# an expert is idle: IDLE steps without a token, in which an even share would have been MISSED pairs
IDLE, MISSED = 100, 1000
# a router is stuck: for STUCK steps it was nearly as uneven as it can be. As the number of experts that do the
# work, n exp(-unevenness), it was not more than COLLAPSED of the way from k to n (at most to 2 k); or the
# busiest expert got BUSY of the tokens. After a resume KNOWN steps suffice: those before may have been so, too.
COLLAPSED, BUSY, STUCK, KNOWN = 0.25, 0.9, 50, 5
# or its probabilities are flat: the busiest expert has FLAT times the mean load, and the balance loss is at the
# minimum of most of them, 1, within EVEN
FLAT, EVEN = 3.0, 0.005


def usage(load):
    """(share of experts used, unevenness) of accumulated router weights (E,): log E + sum z log z with z the
    normalised load, 0 when even, log E when one expert gets all (2407.04153 sec. 3.3). Sum the loads of a
    whole validation set first: a few tokens cannot reach a million experts."""
    z = load.double() / load.sum(dtype=torch.float64)
    uneven = math.log(load.numel()) - torch.special.entr(z).sum()
    return (load > 0).double().mean().item(), uneven.item()


class Watch:
    """Notices, and says once each by say(text). model: a GPT, whose layers say what to expect of them. Rows
    come in the order of their steps."""

    def __init__(self, model, say):
        self.layers, self.say, self.said = {i: model.blocks[i].ffn for i in model.sparse}, say, set()
        self.norms, self.spikes = deque(maxlen=MEMORY), deque(maxlen=SPIKES)
        self.missed = {}                            # layer -> steps (E,) and pairs (E,) since the last token
        self.stuck = {}                             # (what, layer) -> steps

    def warn(self, about, step, what, remedy):
        if about not in self.said:
            self.said.add(about)
            self.say(f"warning: step {step}: {what}. {remedy}")

    def gradients(self, step, norm):
        """norm: that of the whole gradient, before clipping."""
        if len(self.norms) >= EARLY and norm > SPIKE * (usual := statistics.median(self.norms)):
            self.spikes.append(step)
            if len(self.spikes) == SPIKES and step - self.spikes[0] < MEMORY:
                self.warn("gradients", step, f"the gradients explode: {SPIKES} times in {MEMORY} steps their "
                          f"norm was more than {SPIKE:g} times its median, now {norm:.3g} of {usual:.3g}",
                          "If the loss does not recover: a lower train.lr, a longer train.warmup_steps, a "
                          "smaller train.grad_clip")
        self.norms.append(norm)

    def experts(self, step, loads, unevenness, losses=()):
        """loads: (E,) of each sparse layer; unevenness: log E minus the entropy of each, nats; losses: balance
        loss of each before its coefficient, 0 without one."""
        losses = [float(loss) for loss in losses] or [0.0] * len(loads)
        for (layer, ffn), load, uneven, loss in zip(self.layers.items(), loads, unevenness, losses):
            if not ffn.many and len(load) > 1 and "idle" not in self.said:
                self.idle_experts(step, layer, ffn, load)
            if ffn.steerable:
                self.collapse(step, layer, ffn, load, uneven, loss)

    def for_long(self, what, layer, step, true):
        """Whether something was true of a layer in the last STUCK steps."""
        # a first look at a later step is that of a resumed run
        before = self.stuck.get((what, layer), max(0, min(step - 1, STUCK - KNOWN)))
        self.stuck[what, layer] = before + 1 if true else 0
        return self.stuck[what, layer] >= STUCK

    def idle_experts(self, step, layer, ffn, load):
        """An expert without a token is dead once an even share would have been MISSED pairs. A frozen one is
        as it should be: the new text has no use for it."""
        idle = load == 0
        if not idle.any():
            self.missed.pop(layer, None)
            return
        # steps and pairs that each idle expert has missed; 0 for one that got a token
        steps, pairs = self.missed.get(layer, (0, 0.0))
        self.missed[layer] = steps, pairs = (steps + 1) * idle, (pairs + load.sum()) * idle
        dead = ((steps >= IDLE) & (pairs >= MISSED * len(load))).nonzero().flatten().tolist()
        dead = [e for e in dead if e >= ffn.n_frozen]
        if dead:
            some = ", ".join(map(str, dead[:5])) + (" ..." if len(dead) > 5 else "")
            self.warn("idle", step, f"{len(dead)} of {len(load)} experts of layer {layer} got no token in "
                      f"{IDLE} steps and learn nothing: {some}", ffn.remedy())

    def collapse(self, step, layer, ffn, load, uneven, loss):
        """Few experts for nearly all tokens, by entropy and by share; or a loss that does not see it."""
        n, k = len(load), ffn.n_active
        share = (load.max() / load.sum()).item()
        # n exp(-uneven) is the number of experts that do the work: k if all tokens go to the same ones
        room = min(k, n - k)
        few = n > k and n * math.exp(-uneven) < k + COLLAPSED * room
        if self.for_long("few", layer, step, few):
            self.warn("collapse", step, f"the router of layer {layer} collapsed: for {STUCK} steps nearly all "
                      f"tokens went to the same {k} of {n} experts", ffn.remedy())
        # one of a token's k choices can be this expert: share k of the tokens go there, k / n of an even load
        busy = n >= 2 * k and not ffn.many and share * k > BUSY + (1 - BUSY) * k / n
        if self.for_long("busy", layer, step, busy):
            self.warn("collapse", step, f"the router of layer {layer} collapsed: for {STUCK} steps one of {n} "
                      f"experts got nearly all tokens, now {min(1.0, share * k):.0%}", ffn.remedy())
        flat = share * n > FLAT and abs(loss - 1) < EVEN
        if self.for_long("flat", layer, step, flat):
            self.warn("collapse", step, f"the balance loss of layer {layer} is {loss:.2f}, as of an even load, "
                      f"but the busiest of {n} experts has {share * n:.1f} times the mean: the router's "
                      "probabilities are nearly equal, so that the loss does not see it", ffn.remedy())
