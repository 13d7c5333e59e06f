"""Stage 2 that ends its guidance when a measurement says so, after RARE (2026; its title is "What
Visual Generators Need From Teachers").

    python -m experiments.methods.measured_release --release-over 3000 --out out/measured

eta = mean of (1 - cos(P2(h_ds), f_g)) / 2 over the tokens in range is how far the student is from
its teacher. Two moving averages follow it, of which `slow` lags behind; after a warm-up, as soon as
(slow - fast) / slow < 2 %, the student has stopped coming closer, and L_guide's weight falls to 0
by half a cosine. Then neither teacher nor projector is needed, and they are dropped.

From the paper: eta, the two decays 0.999 and 0.99995 at 400,000 steps, a warm-up and a fall of an
eighth of the run each, and the 2 %. Theirs is measured on features of an external encoder. By us:
other lengths are in proportion, so that the averages reach back 1 / 400 and 1 / 20 of
--release-over. Guessed: that both begin with the first eta, and that the test is made in every
step. eta has the few images at the borders of the range that the slice has, too. It waits for the
device once a step. On several processes, a continued run has one eta of the first process alone.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

import common
import models
import train_stage2
from common import setting
from train_stage1 import train


@dataclass
class Settings(train_stage2.Settings):
    out: str = setting("out/measured", change="free")  # folder of the run
    release_over: int = setting(400_000, at_least=20)  # steps that all below is measured by
    release_below: float = setting(0.02, above=0)  # release at a smaller (slow - fast) / slow


class Release(train_stage2.Guidance):
    """Stage 2's loss, with a weight that falls to 0 when the student stops coming closer."""

    name = "measured"
    calls = 0  # of `target`: one for each share of a step

    def projector(self, model):
        """P2, which carries what has been measured, so that it is in the checkpoint."""
        module = super().projector(model)
        # Steps done; fast; slow; the step of the release, or -1; sum and number of the last etas
        module.register_buffer("release", torch.tensor([0, 0, 0, -1, 0, 0], dtype=torch.float64))
        module.register_load_state_dict_post_hook(lambda module, _: self.schedule(module))
        return module

    def schedule(self, module):
        """The last step, once it is known. The loop drops the teacher there."""
        released = module.release[3].item()
        if released >= 0:
            self.until = min(self.until, int(released) + self.args.release_over // 8)

    def target(self, batch):
        if self.calls % self.args.accum == 0:
            self.measure()
        self.calls += 1
        return super().target(batch)

    @torch.no_grad()
    def measure(self):
        """Follow the last step's eta, and set the weight of this step."""
        over, measured = self.args.release_over, self.module.release
        if dist.is_initialized():
            dist.all_reduce(measured[4:])
        step, fast, slow, released, total, count = measured.tolist()
        if count:
            eta = total / count
            fast = eta if step == 1 else fast + min(1, 400 / over) * (eta - fast)
            slow = eta if step == 1 else slow + 20 / over * (eta - slow)
        if released < 0 and step >= over // 8 and slow - fast < self.args.release_below * slow:
            released = step
        far = 0 if released < 0 else (step - released) / (over // 8)
        self.weight = self.args.guide_weight * (1 + math.cos(math.pi * min(far, 1))) / 2
        new = [step + 1, fast, slow, released, 0, 0]
        measured.copy_(torch.tensor(new, dtype=measured.dtype))
        self.schedule(self.module)

    def distance(self, prediction, target):
        """The mean square, and eta beside it."""
        with torch.no_grad():
            eta = (1 - F.cosine_similarity(prediction, target, dim=2).mean(dim=1)) / 2
            seen = torch.stack([eta.double().sum(), torch.full_like(eta[0], len(eta)).double()])
            self.module.release[4:] += seen
        return super().distance(prediction, target)


def main():
    args = common.parse_settings(Settings, __doc__)
    args.guide_depth = args.guide_depth or models.parse_name(args.model)[0].student_depth
    loss = Release(args, args.guide_depth, args.guide_weight, args.guide_steps)
    newest = next(iter(models.checkpoints(args.out)), None)
    if newest and models.read_checkpoint(newest).get("projector", 1) is None:
        loss.until = 0  # it had ended before
    train(args, loss)


if __name__ == "__main__":
    common.run(main)
