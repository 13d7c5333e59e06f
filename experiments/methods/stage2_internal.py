"""Stage 2 with Internal Guidance's head added (arXiv 2512.24176): two auxiliary losses in one run.

python -m experiments.methods.stage2_internal --teacher out/teacher/teacher.pt --out out/both
"""

import common
import models
from experiments.methods.internal_guidance import Internal
from train_stage1 import train
from train_stage2 import Guidance, Settings


def main():
    args = common.parse_settings(Settings, __doc__)
    size, _ = models.parse_name(args.model)
    args.guide_depth = args.guide_depth or size.student_depth
    args.weight, args.depth = 0.5, Internal.blocks(size)["depth"]  # of the head
    head = Internal(args)
    head.t_min, head.t_max = 0.0, 1.0  # it counts at all t
    train(args, Guidance(args, args.guide_depth, args.guide_weight, args.guide_steps), head)


if __name__ == "__main__":
    common.run(main)
