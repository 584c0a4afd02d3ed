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
# a router is stuck: for STUCK steps, fewer than COLLAPSED * k experts did all the work
COLLAPSED, STUCK = 1.25, 50


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
        self.stuck = dict.fromkeys(self.layers, 0)  # layer -> steps

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

    def experts(self, step, loads, unevenness):
        """loads: (E,) of each sparse layer; unevenness: log E minus the entropy of each, nats."""
        for (layer, ffn), load, uneven in zip(self.layers.items(), loads, unevenness):
            if not ffn.many and len(load) > 1 and "idle" not in self.said:
                self.idle_experts(step, layer, ffn, load)
            if ffn.steerable:
                self.collapse(step, layer, ffn, len(load), uneven)

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

    def collapse(self, step, layer, ffn, n, uneven):
        """n exp(-uneven) is the number of experts that do the work: k if all tokens go to the same ones."""
        k = ffn.n_active
        few = n >= 2 * k and n * math.exp(-uneven) < COLLAPSED * k
        self.stuck[layer] = self.stuck[layer] + 1 if few else 0
        if self.stuck[layer] >= STUCK:
            self.warn("collapse", step, f"the router of layer {layer} collapsed: for {STUCK} steps nearly "
                      f"all tokens went to the same {k} of {n} experts", ffn.remedy())
