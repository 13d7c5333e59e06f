"""Distance against class of Internal Guidance sampled by its own guidance, which evaluates once.

    python -m experiments.methods.internal_sampled internal-1=out/internal --scales 1,2

Flags, samples and figures are those of experiments.cifar10.frontier, which guides by CFG: same
noise, same labels, same judges. w is that of head + w (v - head), and at w = 1 both are the same.
"""

from unittest import mock

import common
import models
from experiments.cifar10 import frontier
from experiments.cifar10.frontier import make_samples
from experiments.methods.internal_guidance import InternalGuidance
from models import load_checkpoint


def load(path, **options):
    """As models.load_checkpoint: (the network that guides itself, the checkpoint)."""
    model, saved = load_checkpoint(path, **options)
    network = InternalGuidance(model, saved).eval()
    network.patch, network.in_channels = model.patch, model.in_channels
    network.input_size, network.num_classes = model.input_size, model.num_classes
    network.compile = model.compile  # the head is told t and label from outside
    return network, saved


def guided_samples(network, vae, y, w, args, device):
    """As frontier.make_samples, without CFG."""
    network.w = w
    return make_samples(network, vae, y, 1.0, args, device)


def main():
    with mock.patch.object(models, "load_checkpoint", load):
        with mock.patch.object(frontier, "make_samples", guided_samples):
            frontier.main()


if __name__ == "__main__":
    common.run(main)
