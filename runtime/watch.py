"""What goes wrong slowly, noticed while a run trains: gradients that explode, experts without tokens, a
router that sends all tokens to the same few. Each is said once, with a remedy; training goes on.

It looks at the numbers that a row of the log has anyway, and asks the device for nothing.
"""
import math
import statistics
from collections import deque

from runtime.config import sparse_layers
from settings import NO_CHOICE

SPIKE, SPIKES, MEMORY = 10.0, 3, 100    # so many times the median, so often among so many norms
EARLY = 20                              # norms before there is a median to speak of
IDLE, MISSED = 100, 1000                # steps without a token in which an even share would have been so many
COLLAPSED, STUCK = 1.25, 50             # so many times k experts do all the work, for so many steps


class Watch:
    """Notices, and says once each by say(text). Rows come in the order of their steps."""

    def __init__(self, config, say):
        self.ffn, self.layers, self.say, self.said = config.ffn, sparse_layers(config), say, set()
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
        for layer, load, uneven in zip(self.layers, loads, unevenness):
            if self.ffn.kind == "moe" and "idle" not in self.said:
                self.idle_experts(step, layer, load)
            if self.ffn.kind != "moe" or self.ffn.router not in NO_CHOICE:
                self.collapse(step, layer, len(load), uneven)

    def idle_experts(self, step, layer, load):
        """An expert without a token is dead once an even share would have been MISSED pairs. A frozen one is
        as it should be: the new text has no use for it."""
        idle = load == 0
        if not idle.any():
            self.missed.pop(layer, None)
            return
        steps, pairs = self.missed.get(layer, (0, 0.0))
        self.missed[layer] = steps, pairs = (steps + 1) * idle, (pairs + load.sum()) * idle
        dead = ((steps >= IDLE) & (pairs >= MISSED * len(load))).nonzero().flatten().tolist()
        if dead := [e for e in dead if e >= self.ffn.n_frozen]:
            some = ", ".join(map(str, dead[:5])) + " ..." * (len(dead) > 5)
            self.warn("idle", step, f"{len(dead)} of {len(load)} experts of layer {layer} got no token in "
                      f"{IDLE} steps and learn nothing: {some}", self.remedy())

    def collapse(self, step, layer, n, uneven):
        """n exp(-uneven) is the number of experts that do the work: k if all tokens go to the same ones."""
        f = self.ffn
        k = f.active if f.kind == "moe" else f.peer_heads * f.peer_top_k
        few = n >= 2 * k and n * math.exp(-uneven) < COLLAPSED * k
        self.stuck[layer] = self.stuck[layer] + 1 if few else 0
        if self.stuck[layer] >= STUCK:
            self.warn("collapse", step, f"the router of layer {layer} collapsed: for {STUCK} steps nearly "
                      f"all tokens went to the same {k} of {n} experts", self.remedy())

    def remedy(self):
        """What evens out the use of these experts."""
        f = self.ffn
        if f.kind != "moe":
            return "ffn.query_norm = \"batchnorm\", or a lower train.lr"
        if f.router in NO_CHOICE:
            return {"hash": "ffn.hash_table = \"balanced\" counts how often a token occurs",
                    "domain": "Their corpora give no text: see data.weights"}.get(f.router, "")
        if f.balance == "none":
            return "ffn.balance = \"none\" lets them: set it to \"auto\" or \"switch\""
        if f.balance == "loss_free":
            return "A larger ffn.bias_rate, or a lower train.lr"
        return "A larger ffn.balance_loss, a lower train.lr, or a router that draws noise (noisy_topk)"
