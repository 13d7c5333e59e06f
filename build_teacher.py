"""The teacher: stage 1's network, frozen and cut at block dt, its features extrapolated.

    python build_teacher.py                       # out/stage1 -> out/teacher/teacher.pt

    f_c = h_dt(x_t, t, label)    f_u = h_dt(x_t, t, null label)    f_g = f_u + s (f_c - f_u)

Self-Transcendence (arXiv 2601.07773): f_g is structurally clean, as stage 1 made it, and says the
class, as s makes it. To choose dt and s, look first: python experiments/probe.py out/stage1
"""

from dataclasses import dataclass
from pathlib import Path

import models
from models import SiT, UserError, say, setting

import torch

FORMAT = 1  # of teacher.pt


def extrapolate(f_cond, f_uncond, s):
    """f_g = f_u + s (f_c - f_u): classifier-free guidance, of features."""
    return f_uncond + s * (f_cond - f_uncond)


@torch.no_grad()
def guided_features(teacher: SiT, x_t, t, y, s) -> torch.Tensor:
    """f_g (N, T, D) float32, for x_t (N, C, H, W), t (N,) and true labels y (N,).
    f_c - f_u is a small difference of large numbers, and s multiplies its rounding error: at s = 30
    f_g is off by 0.3 to 0.5 % in float16, by 2.6 to 3.8 % in bfloat16 (docs/differences.md)."""
    null = torch.full_like(y, teacher.num_classes)
    with torch.autocast(x_t.device.type, torch.float16, enabled=x_t.is_cuda):
        both = torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([y, null])
        _, tokens = teacher(*both, taps=[teacher.depth])
    f_cond, f_uncond = tokens[teacher.depth].float().chunk(2)
    return extrapolate(f_cond, f_uncond, s)


def load_teacher(path) -> tuple[SiT, dict]:
    """(The cut and frozen network, the file) of a teacher.pt; UserError for anything else."""
    if not Path(path).exists():
        raise UserError(f"{path}: no teacher there; make it with build_teacher.py")
    file = models.load_file(path)
    with models.reading(f"{path}, as a teacher of format {FORMAT},"):
        if file["format"] != FORMAT:
            raise ValueError(f"it has format {file['format']}")
        teacher = SiT(**file["config"]).cut(file["config"]["depth"])
        teacher.load_state_dict(file["model"])
        float(file["scale"])
    return teacher.eval().requires_grad_(False), file


@dataclass
class Settings:
    ckpt: str = setting("out/stage1", "stage 1's folder, or one of its checkpoints")
    out: str = setting("out/teacher", "folder for teacher.pt")
    teacher_depth: int | None = setting(None, "block dt (default: by size)", at_least=1)
    guide_scale: float = setting(30.0, "s; at 1 f_g is f_c", at_least=1)
    weights: str = setting("model", "raw weights (paper) or their EMA", choices=["model", "ema"])
    student: str | None = setting(None, "size whose steps the cost is given in (default: its own)")
    overwrite: bool = setting(False, "replace a teacher.pt that is there")


def main():
    args = models.parse_settings(Settings, __doc__)
    out = Path(args.out) / "teacher.pt"
    if out.exists() and not args.overwrite:
        raise UserError(f"{out}: is there already, perhaps in use; --overwrite, or another --out")
    if not Path(args.ckpt).exists():
        raise UserError(f"{args.ckpt}: no such run; train stage 1 first: python train_stage1.py")
    model, file = models.load_checkpoint(args.ckpt, args.weights)
    depth = args.teacher_depth or models.parse_name(model.name)[0].teacher_depth
    if depth > model.depth:
        raise UserError(f"--teacher-depth {depth}: {model.name} has blocks 1 to {model.depth}")
    made_by, meta, step = file.get("args"), file.get("meta"), file.get("step")
    if isinstance(made_by, dict) and made_by.get("align_weight") == 0:
        say(f"warning: {args.ckpt} is a vanilla run (--align-weight 0); the paper's is aligned")
    # What it costs, in vanilla steps of the student: the backward pass is two forward passes
    shape = (model.input_size, model.in_channels, model.num_classes)
    student = models.build(args.student or model.name, *shape).forward_flops()
    trained = model.forward_flops() / student * (step or 0)
    share = 2 / 3 * model.forward_flops() * depth / model.depth / student  # two forward passes
    per_step = f"a guided step {0.3 * share:.3f} more where 0.4 <= t <= 0.7, {share:.3f} at all t"
    say(f"in steps of {args.student or model.name}: training {trained:.0f} without P1; {per_step}")
    source = {"ckpt": str(args.ckpt), "weights": args.weights, "step": step}
    source.update(model=model.name, depth=model.depth)
    names = "width heads patch input_size in_channels num_classes qk_norm"
    config = {"depth": depth, **{name: getattr(model, name) for name in names.split()}}
    content = {"format": FORMAT, "config": config, "scale": args.guide_scale, "source": source}
    content["data"] = {key: meta[key] for key in ("classes", "vae")} if meta else {}
    content["model"] = model.cut(depth).state_dict()
    with models.atomic_write(out) as f:
        torch.save(content, f)
    blocks = f"blocks 1 to {depth} of {source['depth']}"
    say(f"{out}: {source['model']} after step {step}, {blocks}, s = {args.guide_scale:g}")


if __name__ == "__main__":
    models.run(main)
