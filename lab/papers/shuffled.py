"""train.py with shuffled labels: the control of an experiment on routing by the corpus.

    python -m lab.papers.shuffled CONFIG.toml ...       (the options of train.py)

Every step reads the text that train.py would read, in the same order. The labels that tell the
router "domain" which corpus a sequence is from change places at random within the step, so that an
expert belongs to no corpus.
"""
import sys
from unittest.mock import patch

import numpy as np
import torch

import train
from data.batches import Batches, keyed_generator

LABELS = 3              # what this random stream is for, beside those of data/batches.py


class Shuffled(Batches):
    """Batches with the labels of each step in an order that depends on (data.seed, step) alone."""

    def batch(self, step, micro=0, grad_accum=1, rank=0, world=1):
        x, y, domain = super().batch(step, micro, grad_accum, rank, world)
        # the labels of the whole step in their new order, and this micro-batch's part of them
        order = keyed_generator(LABELS, self.seed, step).permutation(self.batch_size)
        labels, _ = self.assign(step * self.batch_size + np.arange(self.batch_size))
        begin = (micro * world + rank) * len(domain)
        return x, y, torch.from_numpy(labels[order][begin:begin + len(domain)])


def main(argv=None):
    """train.main with these batches; returns its exit status."""
    with patch.object(train, "Batches", Shuffled):
        return train.main(argv)


if __name__ == "__main__":
    sys.exit(main())
