"""REPA-E without an external encoder, by us: f_g trains the VAE, too (after arXiv 2504.10483).

    python -m experiments.methods.repa_e train --teacher out/teacher/teacher.pt --out out/end
    python -m experiments.methods.repa_e export --out out/end --to out/end-plain

In each step, of the same images, t and noise:
1. The teacher sees x_t of the first VAE, which stays as it is (the latent folder's), and gives f_g.
2. z = the trained VAE's latent, normalised by BatchNorm; x_t of z goes through the student, whose
   weights are held, and P2. L_vae = L1 + 1e-6 KL + 1.5 L_guide makes a step of the VAE.
3. The student and P2 make a step on z from before, without gradient to it: L_diff + 0.5 L_guide.
So the diffusion loss never reaches the VAE. `export` folds the running statistics into the VAE and
writes an ordinary checkpoint beside it, for sample.py and for all judges.

From their code (End2End-Diffusion/REPA-E): the two losses and their weights, AdamW with 1e-4 and a
clip of 1 for the VAE, BatchNorm2d without weights, eps 1e-4, momentum 0.1, begun with the VAE's
statistics. Not done: LPIPS and the GAN, which need networks from outside. Guessed: KL as in latent
diffusion, a sum over an image's latent. It needs the images that the latent folder was made of.
"""

import copy
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

import common
import models
import train_stage1
import train_stage2
from common import UserError, say, setting
from experiments.cifar10.judge import source_images
from experiments.latents.convert_vae import fold
from experiments.latents.small_vae import from_uint8
from train_stage1 import TrainSettings, make_batch
from vae_latents import find_vae, load_vae


@dataclass
class Settings(TrainSettings):
    out: str = setting("out/end", change="free")  # folder of the run
    seed: int = setting(1, at_least=0, at_most=2**63 - 1)  # not stage 1's
    teacher: str = setting("out/teacher/teacher.pt", change="free")  # known by its content
    guide_weight: float = setting(0.5, above=0, change="printed")  # of L_guide, for the student
    guide_depth: int | None = None  # student's block ds (default: by size)
    guide_scale: float | None = setting(None, at_least=1, change="free")  # s (None: the teacher's)
    vae_weight: float = setting(1.5, at_least=0)  # of L_guide, for the VAE
    vae_lr: float = setting(1e-4, above=0)  # AdamW's rate for the VAE


class Carrier(nn.Module):
    """P2, with whose state the VAE, its optimizer and the statistics are saved and loaded."""

    def __init__(self, projector, parts):
        super().__init__()
        self.projector, self.parts = projector, parts  # a dict: its weights are not P2's

    def forward(self, tokens):
        return self.projector(tokens)

    def get_extra_state(self):
        return {name: part.state_dict() for name, part in self.parts.items()}

    def set_extra_state(self, state):
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


class EndToEnd(train_stage2.Guidance):
    """Stage 2's loss, to the end of the run, and the VAE's step in `batch_of`."""

    name = "end"

    def prepare(self, folder, device):
        super().prepare(folder, device)
        if dist.is_initialized() or self.args.accum > 1:
            raise UserError("repa_e.py: trains the VAE in one process, without --accum")
        self.images, self.vae = source_images(folder), find_vae(None, folder.meta).to(device)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self.vae.decode(self.vae.encode(from_uint8(self.images[:1]).to(device))[0])
        self.flops = counter.get_total_flops()  # of one image, there and back
        self.norm = nn.BatchNorm2d(folder.shape[0], eps=1e-4, momentum=0.1, affine=False)
        some = torch.from_numpy(folder.moments[:: 1 + len(folder) // 4096]).double()
        mean, std = (folder.meta["scale"] * some).chunk(2, dim=1)
        self.norm.running_mean.copy_(mean.mean(dim=(0, 2, 3)))
        variance = mean.var(dim=(0, 2, 3), unbiased=False) + std.square().mean(dim=(0, 2, 3))
        self.norm.running_var.copy_(variance)
        self.norm.to(device)
        options = {"lr": self.args.vae_lr, "weight_decay": 0.0}
        self.vae_optimizer = torch.optim.AdamW(self.vae.parameters(), **options)

    def projector(self, model):
        self.student = model
        own = model.forward_flops()
        more = (3 * self.flops + 2 * own * self.depth / model.depth) / (3 * own)
        say(f"cost: the VAE's step makes a step {more:.1f} vanilla steps dearer")
        parts = {"vae": self.vae, "norm": self.norm, "optimizer": self.vae_optimizer}
        return Carrier(super().projector(model), parts)

    def batch_of(self, folder, draws):
        """In place of make_batch: a batch of the trained VAE's latents, which makes its step."""
        frozen = make_batch(folder, draws)
        self.guided = super().target(frozen[self.rows])
        images = from_uint8(self.images[draws.indices]).to(draws.t.device)
        mean, std = self.vae.encode(images)
        z = mean + std * draws.posterior
        x0 = self.norm(self.vae.scale * z)
        noise_level = draws.t.view(-1, 1, 1, 1)
        batch = replace(frozen, x0=x0, x_t=(1 - noise_level) * x0 + noise_level * draws.eps)
        kl = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).flatten(1).sum(dim=1).mean()
        error = (self.vae.decode(z) - images).abs().mean()
        loss = error + 1e-6 * kl + self.args.vae_weight * self.guidance(batch)
        weights = list(self.vae.parameters())
        gradients = torch.autograd.grad(loss, weights)  # and none for the student
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        nn.utils.clip_grad_norm_(weights, 1.0)
        self.vae_optimizer.step()
        x0 = x0.detach()
        return replace(batch, x0=x0, x_t=batch.x_t.detach(), velocity=draws.eps - x0)

    def guidance(self, batch):
        """L_guide as LossNetwork has it, through the student's blocks up to ds."""
        cut = copy.copy(self.student)  # a view with the student's own weights
        cut._modules = dict(cut._modules)
        _, tokens = cut.cut(self.depth)(batch.x_t, batch.t, batch.y_input, taps=[self.depth])
        distance = self.distance(self.module(tokens[self.depth][self.rows]), self.guided)
        times = batch.t[self.rows]
        return (distance * ((times >= self.t_min) & (times <= self.t_max))).sum() / len(batch.t)

    def target(self, batch):
        return self.guided


# ---- An ordinary checkpoint of it


@dataclass
class ExportSettings:
    out: str = "out/end"  # folder of the run
    to: str = "out/end-plain"  # folder for vae.pt and the checkpoint


def export():
    """x0 = (scale z - mean) / deviation is folded into the VAE, whose scale is then 1."""
    args = common.parse_settings(ExportSettings, __doc__)
    path = next(iter(models.checkpoints(args.out)), Path(args.out) / "ckpt-*.pt")
    saved = copy.deepcopy(models.read_checkpoint(path))
    with common.reading(path, "is none of repa_e.py's"):
        trained = saved["projector"]["_extra_state"]
    vae, norm = find_vae(None, saved["meta"]), trained["norm"]
    deviation = (norm["running_var"] + 1e-4).sqrt()
    vae_path = Path(args.to).resolve() / "vae.pt"
    state = trained["vae"]
    shift, std = norm["running_mean"] / vae.scale, deviation / vae.scale
    fold(state, 1.0, shift.tolist(), std.tolist())
    with common.atomic_write(vae_path) as file:
        torch.save({"model": state, "scale": 1.0}, file)
    saved["meta"].update(scale=1.0, identity=None)
    saved["meta"]["vae"] = {"path": str(vae_path), "identity": load_vae(vae_path).identity()}
    with common.atomic_write(Path(args.to) / path.name) as file:
        torch.save(saved, file)
    say(f"{args.to}: step {saved['step']}, with a VAE of its own")


def main():
    verb = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if verb == "export":
        return export()
    if verb != "train":
        raise UserError("repa_e.py: give `train` or `export`, then its flags")
    args = common.parse_settings(Settings, __doc__)
    args.guide_depth = args.guide_depth or models.parse_name(args.model)[0].student_depth
    loss = EndToEnd(args, args.guide_depth, args.guide_weight)
    with mock.patch.object(train_stage1, "make_batch", loss.batch_of):
        train_stage1.train(args, loss)


if __name__ == "__main__":
    common.run(main)
