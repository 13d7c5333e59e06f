"""Makes docs/autoencoders.md: what diffusers' autoencoder classes make of single RGB pictures.

    python -m experiments.latents.survey docs/autoencoders.md

Every class of the installed diffusers is built with random weights and runs through
experiments/latents/diffusers_vae.py on two pictures of noise, on the CPU. Most are narrower than
by default, which changes neither the shape of the latent nor where the statistics are.
"""

import inspect
import time
from dataclasses import dataclass

import torch

import common
from common import UserError, say, setting
from experiments.latents import diffusers_vae

FOUR = (32, 32, 32, 32)
TWO_D = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
NARROW = {  # settings that differ from a class's defaults
    "AsymmetricAutoencoderKL": {
        **TWO_D,
        "down_block_out_channels": FOUR,
        "up_block_out_channels": FOUR,
    },
    "AutoencoderDC": {
        "encoder_block_out_channels": (32, 32, 32, 32, 64, 64),
        "decoder_block_out_channels": (32, 32, 32, 32, 64, 64),
        "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        "encoder_layers_per_block": (1,) * 6,
        "decoder_layers_per_block": (1,) * 6,
    },
    "AutoencoderKL": {**TWO_D, "block_out_channels": FOUR},
    "AutoencoderKLAllegro": {"block_out_channels": FOUR},
    "AutoencoderKLCogVideoX": {"block_out_channels": FOUR, "layers_per_block": 1},
    "AutoencoderKLCosmos": {
        "encoder_block_out_channels": FOUR,
        "decode_block_out_channels": FOUR,
    },
    "AutoencoderKLFlux2": {"block_out_channels": FOUR},
    "AutoencoderKLHunyuanImage": {  # it has no defaults: those of HunyuanImage 2.1, narrower
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 64,
        "block_out_channels": (32, 32, 64, 64, 128, 128),
        "layers_per_block": 1,
        "spatial_compression_ratio": 32,
        "sample_size": 384,
        "scaling_factor": 0.75289,
    },
    "AutoencoderKLHunyuanImageRefiner": {
        "block_out_channels": (32, 32, 64, 64, 64),
        "layers_per_block": 1,
    },
    "AutoencoderKLHunyuanVideo": {"block_out_channels": FOUR, "layers_per_block": 1},
    "AutoencoderKLHunyuanVideo15": {
        "block_out_channels": (32, 32, 64, 64, 64),
        "layers_per_block": 1,
    },
    "AutoencoderKLKVAE": {"channels": 32, "ch_mult": (1, 1, 1, 1)},
    "AutoencoderKLKVAEVideo": {"ch": 32, "ch_mult": (1, 1, 1, 1), "num_res_blocks": 1},
    "AutoencoderKLLTXVideo": {
        "block_out_channels": FOUR,
        "decoder_block_out_channels": FOUR,
        "layers_per_block": (1,) * 5,
        "decoder_layers_per_block": (1,) * 5,
    },
    "AutoencoderKLLTX2Video": {
        "block_out_channels": (32, 64, 128, 256),
        "decoder_block_out_channels": (32, 64, 128),
        "layers_per_block": (1,) * 5,
        "decoder_layers_per_block": (1,) * 4,
    },
    "AutoencoderKLMagvit": {"block_out_channels": FOUR, "layers_per_block": 1},
    "AutoencoderKLMiniMaxH3": {
        "block_out_channels": (32,) * 6,
        "layers_per_block": 1,
        "decoder_num_layers": 2,
        "decoder_num_attention_heads": 2,
    },
    "AutoencoderKLMochi": {
        "encoder_block_out_channels": (32, 32, 32, 32),
        "decoder_block_out_channels": (32, 32, 32, 32),
        "layers_per_block": (1,) * 5,
    },
    "AutoencoderKLQwenImage": {"base_dim": 16, "num_res_blocks": 1},
    "AutoencoderKLQwenImage21": {"base_dim": 16, "decoder_base_dim": 16, "num_res_blocks": 1},
    "AutoencoderKLTemporalDecoder": {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "block_out_channels": FOUR,
    },
    "AutoencoderKLWan": {"base_dim": 16, "num_res_blocks": 1},
    "AutoencoderTiny": {},
    "AutoencoderVidTok": {"ch": 32, "num_res_blocks": 1},
    "ConsistencyDecoderVAE": {
        "encoder_block_out_channels": FOUR,
        "decoder_block_out_channels": FOUR,
        "decoder_layers_per_block": 1,
    },
    "Kandinsky6SRVAE": {
        "encoder_block_out_channels": (16, 32, 32, 32, 32),
        "decoder_block_out_channels": (16, 32, 32, 32, 32),
        "layers_per_block": 1,
    },
    "VQModel": {**TWO_D, "block_out_channels": FOUR},
}
SOUND = "works on sound"
NO_PICTURES = {  # whose default is not built: sound, molecules, decoders alone
    "AutoencoderKLKVAEAudio": SOUND,
    "AutoencoderKLLTX2Audio": SOUND,
    "AutoencoderKLMiniMaxH3Audio": SOUND,
    "AutoencoderOobleck": SOUND,
    "AutoencoderSAME": SOUND,
    "Cosmos3AVAEAudioTokenizer": SOUND,
    "LongCatAudioDiTVae": SOUND,
    "MMAudioVAE": SOUND,
    "RFD4ProteinaAutoencoder": "works on the atoms of proteins",
}


def own_call(vae, images) -> torch.Tensor:
    """Pixels of diffusers' own round trip, in [-1, 1], without this project's arithmetic."""
    net, x = vae.net, images.unsqueeze(2) if vae.frames else images
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if vae.kind == "AutoencoderTiny":  # its forward() rounds the latent to 8 bits
            pixels = net.decode(net.encode(x).latents).sample
        elif vae.patch:  # as the pipeline's unpacking leaves it: in the order of its indices
            pixels = net.decode(net.encode(x).latent_dist.mode().contiguous()).sample
        elif vae.one_by_one:
            pixels = torch.cat([net(image).sample for image in x.split(1)])
        elif vae.kind == "AutoencoderRAE":
            pixels = net(x * 0.5 + 0.5).sample * 2 - 1
        elif vae.kind == "AutoencoderVidTok":
            pixels = net(x, sample_posterior=False).sample
        else:
            pixels = net(x).sample
    return pixels[:, :, 0] if vae.frames else pixels


@torch.no_grad()
def row(kind, side, images) -> list[str]:
    """The table's cells of one class; UserError if it does not take single RGB pictures."""
    name = kind.__name__
    if name in NO_PICTURES:
        raise UserError(NO_PICTURES[name])
    if not hasattr(kind, "encode"):
        raise UserError("does not encode")
    if name == "AutoencoderRAE" and not diffusers_vae.library().utils.is_transformers_available():
        raise UserError("needs the package transformers, which was not installed")
    torch.manual_seed(0)
    vae = diffusers_vae.DiffusersVAE(
        kind(**NARROW.get(name, {})), inspect.signature(kind).parameters
    )
    channels, latent = diffusers_vae.prepare(vae, side)
    said = diffusers_vae.said_statistics(vae, channels)
    mean, std = vae.raw_encode(images)
    is_distribution = bool((std > 0).any())
    mean, std, where = said or (torch.zeros(channels), torch.ones(channels), "nowhere (config)")
    vae.normalise_by(mean, std, where)
    mean, std = vae.encode(images)
    spread = (mean.var() + (std**2).mean()).sqrt().item()
    difference = (vae.decode(mean) - own_call(vae, images)).abs().max().item()
    shape = f"{channels} x {latent} x {latent}" + (" (packed 2 x 2)" if vae.patch else "")
    where = where.replace(" (config)", "") if said else "nowhere: `--normalise data`"
    kinds = "one frame" if vae.frames else "picture", "yes" if is_distribution else "no"
    normalised = f"{spread:.2g}" if said else f"({spread:.2g}, not normalised)"
    width = "narrow" if NARROW.get(name) else "default"
    return [
        name,
        *kinds,
        shape,
        where,
        normalised,
        f"{difference:.0e}" if difference else "0",
        width,
    ]


HEAD = """# The autoencoders of diffusers

Made by `python -m experiments.latents.survey docs/autoencoders.md`, with diffusers {version} and
PyTorch {torch}, on a CPU. These classes take single RGB pictures in
`python -m experiments.latents.diffusers_vae encode` (AutoencoderKL also in `convert_vae`). Shapes
are at {side} px. All weights are random, so the std of the normalised latents says only what the
statistics do to untrained weights: with a published VAE it should be about 1. "Statistics" are
where the class keeps them; a published config.json overrides the class's defaults. The last column
but one is the largest difference of the pixels to diffusers' own round trip: encode, normalise,
undo that and decode, against the class's own call. "Narrow" ones are built with fewer and thinner
layers than the default, with the same strides and latent channels.

| class | takes | distribution | latent | statistics | std | difference | layers |
|---|---|---|---|---|--:|--:|---|
"""
NOTES = """
## What to know

- Tiling and slicing are turned off: AutoencoderKLMiniMaxH3 tiles by default, and an AutoencoderKL
  of the default `sample_size` 32 on which `enable_tiling()` is called tiles every picture above
  32 px, which changes it.
- Six classes have latents_mean and latents_std by default: Cosmos, MiniMaxH3, Mochi, QwenImage,
  QwenImage21 and Wan. LTX and LTX2 keep them as tensors of the state.
- AutoencoderRAE needs the package transformers. It takes pixels in [0, 1], resizes every picture to
  its encoder's size, and normalises inside encode and decode: nothing is done twice. Its latent has
  one size whatever the picture's.
- AutoencoderKLCosmos has 256 numbers for 16 channels: one for each channel and frame. A picture is
  the first frame.
- AutoencoderKLFlux2 keeps its statistics in a batch norm over 2 x 2 packed latents; the latents are
  packed here, too, so its factor is 16. Compared is decode of encode of a contiguous latent, as in
  its pipeline: its own call hands on a permuted one, and other kernels differ by 1e-5.
- AutoencoderKLQwenImage21 has four channels by default.
- AutoencoderTiny's own call rounds the latent to 8 bits between its halves; compared is decode of
  encode. ConsistencyDecoderVAE draws noise when it decodes: here always the same.
- A VidTok that is causal gets its own padding of repeated frames in front, as in its own call.
- An LTX that is conditioned on the time of the decoder's noise gets time 0, and no noise.
- AutoencoderKLHunyuanVideo15 cannot encode two pictures at once (its attention's mask is made for
  a batch of one), so its pictures go one by one.
- AutoencoderKLMiniMaxH3 encodes a single frame; its own decode does not take that frame's latent.
- What neither config nor state says is not assumed: `--normalise data`.
"""


@dataclass
class Settings:
    out: str = setting("", positional=True)  # Markdown file to write
    image_size: int = setting(256, at_least=32)  # side of the pictures
    only: str | None = None  # class to try alone, printed and not written


def main():
    args = common.parse_settings(Settings, __doc__)
    diffusers = diffusers_vae.library()
    from diffusers.models import autoencoders

    found = vars(autoencoders).items()
    kinds = [kind for name, kind in sorted(found) if inspect.isclass(kind)]
    images = torch.rand(2, 3, args.image_size, args.image_size) * 2 - 1
    lines, others = [], []
    for kind in kinds:
        if args.only not in (None, kind.__name__):
            continue
        start = time.time()
        try:
            lines.append("| " + " | ".join(row(kind, args.image_size, images)) + " |\n")
            say(f"{lines[-1].strip()}  {time.time() - start:.0f} s")
        except UserError as error:
            reason = str(error).removeprefix(f"{kind.__name__}: ").split("; choose another")[0]
            reason = reason.replace("|", "/")
            others.append(f"| {kind.__name__} | {reason} |\n")
            say(f"{others[-1].strip()}  {time.time() - start:.0f} s")
    if args.only:
        return
    versions = {"version": diffusers.__version__, "torch": torch.__version__}
    text = HEAD.format(side=args.image_size, **versions) + "".join(lines)
    text += "\n## Classes that do not take single RGB pictures\n\n| class | why |\n|---|---|\n"
    with common.atomic_write(args.out) as file:
        file.write((text + "".join(others) + NOTES).encode())
    say(f"{args.out}: {len(lines)} classes take pictures, {len(others)} do not")


if __name__ == "__main__":
    common.run(main)
