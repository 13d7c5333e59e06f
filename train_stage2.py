"""Stage 2: train a new SiT whose middle block regresses the teacher's guided features.

    torchrun --nproc_per_node=8 train_stage2.py               # out/teacher/teacher.pt -> out/stage2

L = L_diff + 0.5 L_guide for the first 100,000 steps, then L_diff (Self-Transcendence, arXiv
2601.07773). L_guide = mean over tokens and channels of (P2(h_ds) - f_g)^2 where 0.4 <= t <= 0.7,
zero elsewhere, mean over the batch. Everything else is train_stage1.py's loop.
"""

from dataclasses import dataclass

import models
from models import Projector, UserError, say, setting

from build_teacher import guided_features, load_teacher
from train_stage1 import Auxiliary, TrainSettings, train


@dataclass
class Settings(TrainSettings):
    out: str = setting("out/stage2", "folder of the run: checkpoints and log.jsonl")
    seed: int = setting(1, "not stage 1's: a new initialisation", at_least=0, at_most=2**63 - 1)
    teacher: str = setting("out/teacher/teacher.pt", "from build_teacher.py")
    guide_weight: float = setting(0.5, "weight of L_guide (as released: 0.15)", above=0)
    guide_depth: int | None = setting(None, "the student's block ds (default: by size)", at_least=1)
    guide_scale: float | None = setting(None, "s in f_g (default: the teacher file's)", at_least=1)
    guide_steps: int = setting(100_000, "guidance ends after this step", at_least=0)
    other_names: bool = setting(False, "take a teacher whose classes have other names all the same")


class Guidance(Auxiliary):
    """Stage 2: P2 regresses f_g. The teacher hears the true label, whatever the student is told."""

    name = "guide"

    def prepare(self, folder, device):
        args = self.args
        teacher, file = load_teacher(args.teacher)
        self.s = file["scale"] if args.guide_scale is None else args.guide_scale
        (size, patch), data, meta = models.parse_name(args.model), file.get("data", {}), folder.meta
        theirs = {"vae": data.get("vae", {}).get("identity"), "classes": teacher.num_classes}
        theirs.update(patch=teacher.patch, channels=teacher.in_channels, side=teacher.input_size)
        ours = {"vae": meta["vae"].get("identity"), "classes": len(meta["classes"]), "patch": patch}
        ours.update(channels=meta["channels"], side=meta["height"])
        for what in theirs:
            if theirs[what] != ours[what] and None not in (theirs[what], ours[what]):
                problem = f"its {what}: {theirs[what]}, the student's: {ours[what]}"
                raise UserError(f"--teacher {args.teacher}: {problem}")
        if data.get("classes", meta["classes"]) != meta["classes"] and not args.other_names:
            raise UserError(f"--teacher {args.teacher}: its classes are others; see --other-names")
        source_depth = file["source"].get("depth", teacher.depth)  # before it was cut
        if self.depth / size.depth >= teacher.depth / source_depth:
            ours, theirs = f"{self.depth} of {size.depth}", f"{teacher.depth} of {source_depth}"
            say(f"warning: --guide-depth: {ours} is no shallower than the teacher's {theirs}")
        self.identity = models.fingerprint(self.s, *teacher.state_dict().values())
        self.teacher = teacher.to(device)
        if args.compile or (args.compile is None and device.type == "cuda"):
            self.teacher.compile(dynamic=False)

    def projector(self, model):
        return Projector(model.width, out=self.teacher.width, hidden=self.args.projector_dim)

    def target(self, batch):
        return guided_features(self.teacher, batch.x_t, batch.t, batch.y, self.s)  # f_g


def main():
    args = models.parse_settings(Settings, __doc__)
    args.guide_depth = args.guide_depth or models.parse_name(args.model)[0].student_depth
    train(args, Guidance(args, args.guide_depth, args.guide_weight, args.guide_steps))


if __name__ == "__main__":
    models.run(main)
