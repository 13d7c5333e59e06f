"""More sizes of SiT, for the experiment. It runs another script with them:

    python experiments/sizes.py train_stage1.py --model SiT-P/2 --data data/cifar10-latents

P is a teacher smaller than N, M one between N and Ti; W is a larger student, six times Ti.
"""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import models
from models import Size

models.SIZES.update(
    P=Size(depth=4, width=48, heads=2, align_depth=1, teacher_depth=3, student_depth=2),
    M=Size(depth=6, width=96, heads=3, align_depth=1, teacher_depth=4, student_depth=3),
    W=Size(depth=12, width=256, heads=8, align_depth=2, teacher_depth=8, student_depth=6),
)

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    if not sys.argv or not Path(sys.argv[0]).is_file():
        sys.exit(__doc__)
    runpy.run_path(sys.argv[0], run_name="__main__")
