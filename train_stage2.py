"""Stage 2: train a new SiT whose middle block regresses the teacher's guided features. Stage 1's loop, another loss.

    torchrun --nproc_per_node=8 train_stage2.py                   # out/teacher/teacher.pt -> out/stage2

L = L_diff + 0.5 L_guide for the first 100,000 steps, L_diff alone after them (Self-Transcendence, arXiv 2601.07773):
L_guide = mean over tokens and channels of (P2(h_ds) - f_g)^2 where 0.4 <= t <= 0.7, zero elsewhere, mean over the
batch. Data order, draws, the slice of the batch in that range, checkpoints and logs are train_stage1.py's.
"""
import hashlib
from pathlib import Path

from build_teacher import guided_features, load_teacher
from models import DEPTHS, Projector, UserError, run
from train_stage1 import checked, train, training_flags

def main():
    p = training_flags(__doc__, "out/stage2", 1, "L_guide")  # another seed than stage 1's: a new initialisation
    p.add_argument("--teacher", default="out/teacher/teacher.pt", help="from build_teacher.py (default: %(default)s)")
    p.add_argument("--guide-weight", type=float, default=0.5, help="of L_guide (default: 0.5, paper)")
    p.add_argument("--guide-depth", type=int, help="the student's block ds (default: by size: 14 for XL, 6 for B)")
    p.add_argument("--guide-scale", type=float, help="s in f_g (default: the teacher file's; paper: 30)")
    p.add_argument("--guide-steps", type=int, default=100000, help="guidance ends here (default: 100000, paper)")
    args = checked(p.parse_args())
    if args.guide_weight <= 0 or args.guide_steps < 0:
        raise UserError("--guide-weight must be positive (vanilla: stage 1, --align-weight 0), --guide-steps >= 0")
    if args.guide_scale is not None and args.guide_scale < 1:
        raise UserError(f"--guide-scale {args.guide_scale}: must be at least 1, where f_g is f_c")
    if args.guide_depth is None:
        args.guide_depth = DEPTHS.get(args.model, (1, 1, 1))[2]
    if Path(args.teacher).is_file():  # so that a run cannot be continued with another teacher
        args.teacher_sha256 = hashlib.sha256(Path(args.teacher).read_bytes()).hexdigest()

    def make_projector(model):  # P2: tokens of the student's block ds -> feature space
        return Projector(model.width, args.projector_dim)

    def make_target(model, device):
        teacher, file = load_teacher(args.teacher)
        scale = file["scale"] if args.guide_scale is None else args.guide_scale
        student = {"latent channels": model.in_channels, "latent side": model.input_size, "patch": model.patch,
                   "width": model.width, "classes": model.num_classes}
        for what, theirs in zip(student, (*teacher.shape, teacher.num_classes)):
            if theirs != student[what]:
                raise UserError(f"--teacher {args.teacher}: its {what} is {theirs}, the student's {student[what]} "
                                f"({args.model} on {args.data})")
        if args.guide_depth >= teacher.depth:
            raise UserError(f"--guide-depth {args.guide_depth}: not shallower than the teacher's block {teacher.depth}")
        teacher = teacher.to(device)
        if args.compile or (args.compile is None and device.type == "cuda"):
            teacher.compile(dynamic=False)
        # f_g for the slice of the batch with 0.4 <= t <= 0.7 alone; y is the true label, whatever the student was told
        return lambda x_t, t, y, x0, velocity: guided_features(teacher, x_t, t, y, scale)

    train(args, args.guide_depth, make_projector, make_target, args.guide_weight, args.guide_steps, "guide")

if __name__ == "__main__":
    run(main)
