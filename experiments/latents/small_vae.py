"""Train a small KL autoencoder on an image folder, for vae_latents.py --vae: minutes on a CPU.

    python -m experiments.latents.small_vae data/shapes-images --size 32 --factor 2 --out vae.pt

Loss: mean squared error + 1e-4 KL(posterior || N(0, I)) per latent number.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from common import UserError, progress, say, setting
from vae_latents import AutoencoderKL, Images, ResnetBlock, load_vae


def from_uint8(images) -> torch.Tensor:
    """Images (N, S, S, 3) uint8 -> (N, 3, S, S) float in [-1, 1]."""
    return torch.as_tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_small_vae(
    images, factor=4, steps=1000, seed=0, device="cpu", batch_size=16, lr=2e-3
) -> AutoencoderKL:
    """A VAE with 4 latent channels, trained on images (N, S, S, 3) uint8, in eval mode."""
    torch.manual_seed(seed)
    channels = {2: (16, 32), 4: (16, 32, 64), 8: (16, 32, 64, 64)}[factor]
    vae = AutoencoderKL(channels, layers=1).to(device, memory_format=torch.channels_last)
    for module in vae.modules():  # nearly linear at first: it learns fast
        if isinstance(module, ResnetBlock):
            nn.init.zeros_(module.conv2.weight)
    vae.quant_conv.bias.data[vae.latent_channels :] = -5.0  # a narrow posterior at first
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, weight_decay=0, fused=True)
    for step in progress("small VAE: step", range(1, steps + 1)):
        batch = from_uint8(images[torch.randint(len(images), (batch_size,)).numpy()]).to(device)
        mean, std = vae.encode(batch)
        error = F.mse_loss(vae.decode(mean + std * torch.randn_like(std)), batch)
        kl = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).mean()
        optimizer.zero_grad()
        (error + 1e-4 * kl).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        rise, fall = 10 * step / steps, 0.5 + 0.5 * np.cos(np.pi * step / (steps + 1))
        optimizer.param_groups[0]["lr"] = lr * min(rise, fall)  # warm-up, then half a cosine
        optimizer.step()
    with torch.no_grad():
        mean, std = vae.encode(from_uint8(images[:1024]).to(device))
        vae.scale = 1 / (mean.var() + (std**2).mean()).sqrt().item()  # latents of unit variance
    return vae.eval()


@dataclass
class Settings:
    images: str = setting("", positional=True)  # DIR/<class>/**/*.jpg
    out: str = "data/small-vae.pt"  # file to write
    size: int = setting(32, at_least=8)  # side in pixels after the crop
    factor: int = setting(4, choices=[2, 4, 8])  # downsampling of the latents
    steps: int = setting(1000, at_least=1)  # steps in all
    batch_size: int = setting(16, at_least=1)  # images in a step
    lr: float = setting(2e-3, above=0)  # AdamW's rate at its highest
    num: int = setting(10_000, at_least=1)  # images to learn from, at most
    seed: int = setting(0, at_least=0, at_most=2**63 - 1)  # seed of the training
    device: str = "auto"  # cpu, cuda or cuda:N; auto is cuda where there is one


def read_images(args) -> np.ndarray:
    """Up to --num of the images, (n, S, S, 3) uint8, drawn by the seed."""
    source, images = Images(args.images, args.size), []
    some = np.random.default_rng(args.seed).permutation(len(source.files))[: args.num]
    for index in progress("read", some):
        pixels, _ = source[index]
        images += [] if pixels is None else [pixels]  # vae_latents.py lists those that are None
    if not images:
        raise UserError(f"{args.images}: none of its images can be read")
    return np.stack(images)


def main():
    args = common.parse_settings(Settings, __doc__)
    if args.size % args.factor:
        raise UserError(f"--size {args.size}: must be a multiple of --factor {args.factor}")
    if Path(args.out).exists():
        load_vae(args.out)
        return say(f"{args.out}: is there already, nothing to do")
    device, images = common.setup(args.device)[0], read_images(args)
    how = args.factor, args.steps, args.seed, device, args.batch_size, args.lr
    vae = train_small_vae(images, *how)
    with torch.no_grad():  # peak signal-to-noise ratio of round trips, in dB
        pixels = from_uint8(images[:256]).to(device)
        error = F.mse_loss(vae.decode(vae.encode(pixels)[0]).clamp(-1, 1), pixels)
        psnr = (10 * torch.log10(4 / error)).item()
    state = {key: value.cpu() for key, value in vae.state_dict().items()}
    if not np.isfinite([vae.scale, psnr]).all():  # of weights that are not finite neither is
        raise UserError(f"--lr {args.lr:g}: the weights are not finite, nothing is saved; lower it")
    with common.atomic_write(args.out) as file:
        torch.save({"model": state, "scale": vae.scale}, file)
    say(f"{args.out}: round trips of {psnr:.1f} dB PSNR")


if __name__ == "__main__":
    common.run(main)
