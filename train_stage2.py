"""Stage 2: train a new SiT whose middle block regresses the teacher's guided features.

    torchrun --nproc_per_node=8 train_stage2.py         # out/teacher/teacher.pt -> out/stage2

L = L_diff + 0.5 L_guide in the first 100,000 steps, then L_diff (arXiv 2601.07773). L_guide =
mean over tokens, channels and the batch of (P2(h_ds) - f_g)^2, zero outside 0.4 <= t <= 0.7.
"""

from dataclasses import dataclass

import common
import models
from build_teacher import guided_features, load_teacher
from common import UserError, fingerprint, setting, warn
from train_stage1 import Auxiliary, Projector, TrainSettings, train


@dataclass
class Settings(TrainSettings):
    out: str = setting("out/stage2", change="free")  # folder of the run: checkpoints and log.jsonl
    seed: int = setting(1, at_least=0, at_most=2**63 - 1)  # not stage 1's: a new initialisation
    teacher: str = setting("out/teacher/teacher.pt", change="free")  # known by its content
    guide_weight: float = setting(0.5, above=0, change="printed")  # of L_guide (as released: 0.15)
    guide_depth: int | None = None  # student's block ds (default: by size)
    guide_scale: float | None = setting(None, at_least=1, change="free")  # s (None: the teacher's)
    guide_steps: int = setting(100_000, at_least=0)  # guidance ends after this step


class Guidance(Auxiliary):
    """P2 regresses f_g, from h_ds. The teacher always gets the true label."""

    name = "guide"

    def prepare(self, folder, device):
        teacher, saved = load_teacher(self.args.teacher)
        args, ours, theirs = self.args, folder.meta, saved["meta"]
        if theirs["identity"] is None:  # converted from another project's checkpoint
            warn(f"{args.teacher}: does not say which latents it has seen")
        models.check_classes(args.teacher, theirs["classes"], ours["classes"])
        facts = {key: (theirs[key], ours[key]) for key in ("channels", "height", "scale")}
        facts["patch"] = teacher.patch, models.parse_name(args.model)[1]
        facts["VAE"] = theirs["vae"].get("identity"), ours["vae"].get("identity")
        facts["latents"] = theirs["identity"], ours["identity"]
        for what, (its, needed) in facts.items():
            if its not in (None, needed):  # None: it does not say
                raise UserError(f"{args.teacher}: has {what} {its}, not {needed}; build another")
        self.s = args.guide_scale or saved["scale"]  # of f_g = f_u + s (f_c - f_u)
        self.identity = fingerprint(self.s, *teacher.state_dict().values())
        self.teacher = teacher.to(device)
        self.teacher.compile(dynamic=False, disable=not args.compile)

    def projector(self, model):
        return Projector(model.width, out=self.teacher.width, hidden=self.args.projector_dim)

    def target(self, batch):
        return guided_features(self.teacher, batch.x_t, batch.t, batch.y, self.s)  # f_g


def main():
    args = common.parse_settings(Settings, __doc__)
    args.guide_depth = args.guide_depth or models.parse_name(args.model)[0].student_depth
    train(args, Guidance(args, args.guide_depth, args.guide_weight, args.guide_steps))


if __name__ == "__main__":
    common.run(main)
