"""The teacher: stage 1's network, frozen and cut at block dt, its features extrapolated.

    python build_teacher.py                       # out/stage1 -> out/teacher/teacher.pt

    f_c = h_dt(x_t, t, label)    f_u = h_dt(x_t, t, null label)    f_g = f_u + s (f_c - f_u)

f_g is structurally clean, as stage 1 made it, and says the class, as s makes it (arXiv
2601.07773). To choose dt and s: python -m experiments.checkpoints.probe out/stage1
"""

from dataclasses import dataclass
from pathlib import Path

import torch

import common
import models
from common import UserError, say, setting


@torch.no_grad()
def guided_features(teacher: models.SiT, x_t, t, y, s) -> torch.Tensor:
    """f_g (N, T, D) float32, of x_t (N, C, H, W), t (N,) and true labels y (N,). s multiplies
    rounding errors: at s = 30 f_g is 0.3 to 0.5 % off in float16, 2.6 to 3.8 % in bfloat16."""
    null_label = torch.full_like(y, teacher.num_classes)
    x_twice, t_twice = torch.cat([x_t, x_t]), torch.cat([t, t])  # both labels in one pass
    with torch.autocast(x_t.device.type, torch.float16, enabled=x_t.is_cuda):
        _, tokens = teacher(x_twice, t_twice, torch.cat([y, null_label]), taps=[teacher.depth])
    f_cond, f_uncond = tokens[teacher.depth].float().chunk(2)
    return f_uncond + s * (f_cond - f_uncond)


def load_teacher(path) -> tuple[models.SiT, dict]:
    """(The cut and frozen network, the file) of a teacher.pt; UserError for anything else."""
    with common.reading(path, "is no teacher; make one with build_teacher.py"):
        saved = common.load_file(path, models.FORMAT)
        teacher = models.build_for(saved["args"], saved["meta"]).cut(saved["depth"])
        teacher.load_state_dict(saved["teacher"])
    return teacher.eval().requires_grad_(False), saved


@dataclass
class Settings:
    ckpt: str = "out/stage1"  # stage 1's folder, or one of its checkpoints
    out: str = "out/teacher"  # folder for teacher.pt
    teacher_depth: int | None = None  # block dt (default: by size)
    guide_scale: float = setting(30.0, at_least=1)  # s; at 1 f_g is f_c
    student: str | None = None  # the cost is printed in steps of this network (default: its own)


def main():
    args = common.parse_settings(Settings, __doc__)
    out = Path(args.out) / "teacher.pt"
    if out.exists():
        raise UserError(f"{out}: exists already; remove it, or choose another --out")
    model, saved = models.load_checkpoint(args.ckpt, "raw", null_label_for="f_u")
    name, step = saved["args"]["model"], saved["step"]
    if "model" not in saved:  # the raw weights, with which the paper teaches
        say(f"{args.ckpt}: holds an average alone, which teaches in place of the raw weights")
    depth = args.teacher_depth or models.parse_name(name)[0].teacher_depth
    if depth > model.depth:
        raise UserError(f"--teacher-depth {depth}: {name} has blocks 1 to {model.depth}")
    student = {**saved["args"], "model": args.student or name}
    ratio = model.forward_flops() / models.build_for(student, saved["meta"]).forward_flops()
    more = 2 / 3 * ratio * depth / model.depth  # f_c and f_u; a training step is three passes
    dearer = f"{(models.q_of(0.7) - models.q_of(0.4)) * more:.1%} dearer (all t: {more:.1%})"
    took = f"as much as {ratio * step:.0f} steps of {student['model']} (P1 not counted)"
    say(f"cost: training it took {took}; it makes a guided step {dearer}")
    content = {key: saved[key] for key in ("format", "args", "meta", "step")}
    content.update(depth=depth, scale=args.guide_scale, teacher=model.cut(depth).state_dict())
    with common.atomic_write(out) as file:
        torch.save(content, file)
    run = f"{name}, step {step}, --align-weight {saved['args'].get('align_weight', 'unknown')}"
    say(f"{out}: blocks 1 to {depth} of {run}; s = {args.guide_scale:g}")


if __name__ == "__main__":
    common.run(main)
