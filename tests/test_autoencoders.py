"""Autoencoders of other projects: convert_vae, diffusers_vae, and their latents in the chain."""

import json
import re
import shlex

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import call
from PIL import Image

import models
import sample
import train_stage1
import vae_latents
from common import UserError
from experiments.latents import convert_vae, diffusers_vae
from vae_latents import LatentFolder, find_vae, load_vae, open_image

diffusers = pytest.importorskip("diffusers")
load_file = pytest.importorskip("safetensors.torch").load_file
save_file = pytest.importorskip("safetensors.torch").save_file

BLOCKS = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": (16, 32),
    "norm_num_groups": 4,  # as this project has with a first width of 16
}
FLUX = {**BLOCKS, "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}
FLUX.update(use_quant_conv=False, use_post_quant_conv=False)
SD3 = {**FLUX, "scaling_factor": 1.5305, "shift_factor": 0.0609}
STATISTICS = {"latents_mean": [0.1, -2.0, 0.3, 1.5], "latents_std": [0.5, 2.0, 8.0, 1.1]}
SDXL = {**BLOCKS, "scaling_factor": 0.5, **STATISTICS}
SD = {**BLOCKS, "scaling_factor": 0.18215}
QWEN = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1}
QWEN.update(temperal_downsample=[False], **STATISTICS)
DC = {"latent_channels": 8, "attention_head_dim": 8, "scaling_factor": 0.41}
for half in ("encoder", "decoder"):
    DC.update({f"{half}_block_types": ("ResBlock",) * 2, f"{half}_qkv_multiscales": ((), ())})
    DC.update({f"{half}_block_out_channels": (8, 16), f"{half}_layers_per_block": (1, 1)})
KINDS = {  # class and settings; (C, h, w) of a latent at 32 px
    "flux": ("AutoencoderKL", FLUX, (16, 16, 16)),
    "sdxl": ("AutoencoderKL", SDXL, (4, 16, 16)),
    "flux2": ("AutoencoderKLFlux2", {**BLOCKS, "latent_channels": 4}, (16, 8, 8)),
    "dc": ("AutoencoderDC", DC, (8, 16, 16)),
    "qwen": ("AutoencoderKLQwenImage", QWEN, (4, 16, 16)),
}


def build(kind, config, seed=0):
    """An untrained autoencoder of diffusers whose biases, norms and statistics matter."""
    torch.manual_seed(seed)
    net = getattr(diffusers, kind)(**config).eval().requires_grad_(False)
    for p in net.parameters():
        if p.dim() == 1:
            nn.init.normal_(p, mean=p.mean().item(), std=0.1)
    if hasattr(net, "bn"):
        nn.init.normal_(net.bn.running_mean)
        nn.init.uniform_(net.bn.running_var, 0.5, 2.0)
    return net


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two classes of five noisy pictures of 32 px."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir()
        for i in range(5):
            pixels = rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def saved(kind, folder):
    name, config, _ = KINDS[kind]
    net = build(name, config)
    net.save_pretrained(folder)
    return net


def refused(module, *flags, says=(), never=()):
    """The one line, with a verb in it, that a script says of a mistake."""
    with pytest.raises((UserError, OSError)) as caught:
        call(module, *flags)
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in map(str, says)), text
    assert not any(word in text for word in never), text
    return text


# ---- convert_vae: AutoencoderKL as it is published


def compvis(state):
    """CompVis' names, from the module tree of latent-diffusion, for two stages."""
    renamed = {}
    pairs = [("mid_block.resnets.0", "mid.block_1"), ("mid_block.resnets.1", "mid.block_2")]
    pairs += [("mid_block.attentions.0", "mid.attn_1"), ("conv_norm_out", "norm_out")]
    pairs += [("conv_shortcut", "nin_shortcut"), ("group_norm", "norm"), ("to_out.0", "proj_out")]
    pairs += [("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("samplers.0", "sample")]
    for key, value in state.items():
        for theirs, old in pairs:
            key = key.replace(theirs, old)
        key = re.sub(r"down_blocks\.(\d)\.(resnets)?", r"down.\1.\2", key)
        key = re.sub(
            r"up_blocks\.(\d)\.(resnets)?", lambda m: f"up.{1 - int(m[1])}.{m[2] or ''}", key
        )
        key = key.replace("resnets", "block")
        value = value[:, :, None, None] if "attn_1" in key and value.dim() == 2 else value
        renamed[key] = value.contiguous()
    return renamed


def published(form, net, path):
    """(What to convert, flags) of an AutoencoderKL in one of the forms in which they come."""
    config = net.config
    flags = ["--scale", config.scaling_factor]
    flags += ["--shift", config.shift_factor] if config.shift_factor else []
    if form == "folder":
        net.save_pretrained(path)
        return path, []
    if form == "pipeline":
        net.save_pretrained(path / "vae")
        return path, []
    state = compvis(net.state_dict())
    assert "encoder.down.1.block.0.norm1.weight" in state
    assert "decoder.up.1.upsample.conv.weight" in state
    path.mkdir()
    file = path / "ae.safetensors"
    if form in ("first_stage_model.", "vae."):
        state = {form + key: value for key, value in state.items()}
        state["model.diffusion_model.x_embedder.proj.bias"] = torch.zeros(4)
    save_file(state, file)
    return file, flags


FORMS = ["folder", "pipeline", "compvis", "first_stage_model.", "vae."]
CONVERTED = {"flux": FLUX, "sd3": SD3, "sdxl": SDXL, "sd": SD}


def wanted(net, images):
    """diffusers' normalised mean and std, and its pixels of them, by the pipelines' formulas."""
    config = net.config
    posterior, scale = net.encode(images).latent_dist, config.scaling_factor
    shift = config.shift_factor or 0.0
    if config.latents_mean:
        shift = torch.tensor(config.latents_mean).view(1, -1, 1, 1)
        scale = scale / torch.tensor(config.latents_std).view(1, -1, 1, 1)
    z = (posterior.mean - shift) * scale
    return z, posterior.std * scale, net.decode(z / scale + shift).sample


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", CONVERTED)
def test_a_converted_vae_equals_diffusers(kind, form, images, tmp_path):
    if kind == "sdxl" and form not in ("folder", "pipeline"):
        pytest.skip("a file has no place for a mean and a std of each channel")
    net = build("AutoencoderKL", CONVERTED[kind])
    source, flags = published(form, net, tmp_path / "vae")
    call(convert_vae, source, tmp_path / "vae.pt", *flags)
    ours = load_vae(tmp_path / "vae.pt")
    with torch.no_grad():
        mean, std = (ours.scale * moment for moment in ours.encode(images))
        pairs = zip((mean, std, ours.decode(mean / ours.scale)), wanted(net, images), strict=True)
    differences = [(got - want).abs().max().item() for got, want in pairs]
    assert max(differences) < 1e-5
    assert ours.scale == (0.18215 if kind == "sd" else 1.0)


def test_a_scale_alone_changes_no_tensor(tmp_path):
    """Stable Diffusion's files stay what they were: the scale is beside the weights."""
    net = build("AutoencoderKL", SD)
    net.save_pretrained(tmp_path / "vae")
    call(convert_vae, tmp_path / "vae", tmp_path / "vae.pt")
    state = load_vae(tmp_path / "vae.pt").state_dict()
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


def test_shift_and_scale_are_never_assumed_or_contradicted(tmp_path, capsys):
    net = build("AutoencoderKL", FLUX)
    bare, flags = published("compvis", net, tmp_path / "bare")
    out = tmp_path / "vae.pt"
    refused(convert_vae, bare, out, says=["--scale 0.3611 --shift 0.1159", "--scale 0.18215"])
    call(convert_vae, bare, tmp_path / "noshift.pt", *flags[:2])
    assert "whose latents have a shift" in capsys.readouterr().err
    folder, _ = published("folder", net, tmp_path / "folder")
    refused(convert_vae, folder, out, "--shift", 0.2, says=["--shift 0.2", 0.1159])
    assert not out.exists()


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"latents_std": None}, "latents_std None"),
        ({"latents_mean": [1.0]}, "4 numbers"),
        ({"latents_std": [1.0, 0.0, 1.0, 1.0]}, "above 0"),
        ({"norm_num_groups": 8}, "norm_num_groups of 8"),
        ({"act_fn": "relu"}, "act_fn of relu"),
        ({"use_quant_conv": True}, "quant_conv.weight"),
    ],
)
def test_a_config_that_contradicts_its_weights_is_refused(changes, says, tmp_path):
    folder, out = tmp_path / "vae", tmp_path / "vae.pt"
    build("AutoencoderKL", FLUX if "use_quant_conv" in changes else SDXL).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    refused(convert_vae, folder, out, says=[folder, says])
    assert not out.exists()


DOWN = {**SD, "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]}
UNFIT = {  # settings that this project's AutoencoderKL has no place for, and what is said
    "attention below": (DOWN, ["attention in encoder.down_blocks.1", "Unexpected key(s)"]),
    "attentionless": (
        {**SD, "mid_block_add_attention": False},
        ["no attention in its middle", "Missing key(s)", "mid_block.attentions.0"],
    ),
}


def command_in(text, **words):
    """(Module, its arguments) of the command that a message names, with `words` put in."""
    name, rest = re.search(r"python -m ([\w.]+) ([^;()]*)", text).groups()
    found = {"experiments.latents.diffusers_vae": diffusers_vae}[name]
    return found, *(str(words.get(word, word)) for word in shlex.split(rest))


@pytest.mark.parametrize("unfit", UNFIT)
def test_a_vae_that_does_not_fit_goes_the_way_that_the_message_names(unfit, pictures, tmp_path):
    config, says = UNFIT[unfit]
    build("AutoencoderKL", config).save_pretrained(tmp_path / "vae")
    text = refused(convert_vae, tmp_path / "vae", tmp_path / "o", says=says, never=["convert_vae"])
    call(*command_in(text, DIR=pictures, N=32, LATENTS=tmp_path / "latents"))
    assert LatentFolder(tmp_path / "latents").shape == (4, 16, 16)


def test_other_classes_are_sent_to_diffusers(tmp_path):
    saved("dc", tmp_path / "vae")
    says = ["AutoencoderDC", f"diffusers_vae encode --vae {tmp_path / 'vae'}"]
    refused(convert_vae, tmp_path / "vae", tmp_path / "o", says=says, never=["convert_vae"])


def test_attention_below_in_compvis_names_is_named(tmp_path):
    state = compvis(build("AutoencoderKL", SD).state_dict())
    below = {k.replace("mid.attn_1", "down.1.attn.0"): v.clone() for k, v in state.items()}
    torch.save({"state_dict": {**below, **state}}, tmp_path / "f16.ckpt")
    says = ["attention in", "encoder.down.1", "diffusers_vae encode --vae FOLDER"]
    refused(convert_vae, tmp_path / "f16.ckpt", tmp_path / "o", says=says, never=["convert_vae"])


@pytest.mark.parametrize("module", [convert_vae, diffusers_vae])
def test_a_name_on_the_hub_is_no_path(module, pictures, tmp_path):
    name = "stabilityai/sd-vae-ft-ema"
    encode = ["encode", "--vae", name, "--images", pictures]
    flags = encode if module is diffusers_vae else [name, tmp_path / "o"]
    refused(module, *flags, says=["is no path", f"hf download {name}"], never=["pip install"])
    flags = [flag if flag != name else "data/vae.pt" for flag in flags]
    refused(module, *flags, says=["data/vae.pt: is no path"], never=["hf download"])


# ---- diffusers_vae


def encode(folder, pictures, out, *more):
    flags = ["--image-size", 32, "--batch-size", 4, "--device", "cpu"]
    call(
        diffusers_vae, "encode", "--vae", folder, "--images", pictures, "--out", out, *flags, *more
    )
    return LatentFolder(out)


def pixels_of(folder):
    """The pictures of a latent folder, in its order, in [-1, 1]."""
    files = json.loads((folder.path / "files.json").read_text())
    source = folder.meta["source"]
    images = np.stack([open_image(f"{source}/{name}", 32) for name in files])
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1


def by_hand(kind, net, images):
    """Normalised mean and std by the formulas of diffusers' pipelines, and the way back."""
    x = images.unsqueeze(2) if kind == "qwen" else images
    found = net.encode(x)
    if kind == "dc":
        mean, std = found.latent * 0.41, torch.zeros_like(found.latent)
        return mean, std, lambda z: net.decode(z / 0.41).sample
    mean, std = found.latent_dist.mean, found.latent_dist.std
    if kind == "flux":
        back = lambda z: net.decode(z / 0.3611 + 0.1159).sample  # noqa: E731
        return (mean - 0.1159) * 0.3611, std * 0.3611, back
    if kind == "flux2":
        pack = torch.nn.PixelUnshuffle(2)  # channel, then row, then column of the patch
        shift = net.bn.running_mean.view(1, -1, 1, 1)
        scale = (net.bn.running_var + 1e-4).sqrt().view(1, -1, 1, 1)
        back = lambda z: net.decode(nn.PixelShuffle(2)(z * scale + shift)).sample  # noqa: E731
        return (pack(mean) - shift) / scale, pack(std) / scale, back
    shape = (1, 4, 1, 1, 1) if kind == "qwen" else (1, 4, 1, 1)
    shift, scale = (
        torch.tensor(STATISTICS[f"latents_{key}"]).view(shape) for key in ("mean", "std")
    )
    if kind == "sdxl":
        back = lambda z: net.decode(z * scale / 0.5 + shift).sample  # noqa: E731
        return (mean - shift) * 0.5 / scale, std * 0.5 / scale, back
    back = lambda z: net.decode(z.unsqueeze(2) * scale + shift).sample[:, :, 0]  # noqa: E731
    return ((mean - shift) / scale)[:, :, 0], (std / scale)[:, :, 0], back


@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_diffusers_own_normalised_as_its_pipelines_do(kind, pictures, tmp_path):
    net = saved(kind, tmp_path / "vae")
    folder = encode(tmp_path / "vae", pictures, tmp_path / "data")
    assert folder.shape == KINDS[kind][2] and folder.meta["scale"] == 1.0
    images = pixels_of(folder)
    mean, std, back = by_hand(kind, net, images)
    got = torch.from_numpy(np.array(folder.moments)).float()
    torch.testing.assert_close(got, torch.cat([mean, std], dim=1), rtol=2e-3, atol=1e-3)
    vae = diffusers_vae.find_vae(None, folder.meta)
    z, spread = vae.encode(images)
    torch.testing.assert_close(z.float(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(spread.float(), std, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(vae.decode(mean), back(mean), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_round_trip_is_diffusers_own_bit_for_bit(kind, images, tmp_path):
    net = saved(kind, tmp_path / "vae")
    vae = diffusers_vae.load(tmp_path / "vae")
    channels, _ = diffusers_vae.prepare(vae, 32)
    vae.normalise_by(*diffusers_vae.said_statistics(vae, channels))
    if kind == "qwen":
        want = net(images.unsqueeze(2)).sample[:, :, 0]
    elif kind == "flux2":  # its own call hands on a permuted latent: other kernels, other rounding
        want = net.decode(net.encode(images).latent_dist.mode().contiguous()).sample
    else:
        want = net(images).sample
    assert torch.equal(vae.decode(vae.encode(images)[0]), want)


def test_weights_in_half_precision_and_with_old_names_are_read(images, tmp_path):
    """A folder of a variant alone, with the attention's names of before 2023."""
    net = build("AutoencoderKL", SD)
    net.half().save_pretrained(tmp_path / "vae", variant="fp16")
    file = tmp_path / "vae/diffusion_pytorch_model.fp16.safetensors"
    state = load_file(file)
    swap = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    for new, old in swap.items():
        new, old = f"attentions.0.{new}", f"attentions.0.{old}"
        state = {key.replace(new, old): value for key, value in state.items()}
    save_file(state, file)
    vae = diffusers_vae.load(tmp_path / "vae")
    want = net.float().encode(images).latent_dist.mean
    assert torch.equal(vae.raw_encode(images)[0], want)


def test_pictures_go_one_by_one_where_a_batch_fails(images):
    """The attention of this class has a mask for a batch of one."""
    config = {"block_out_channels": (32, 32), "layers_per_block": 1, "latent_channels": 4}
    config.update(spatial_compression_ratio=2, temporal_compression_ratio=1)
    net = build("AutoencoderKLHunyuanVideo15", config)
    vae = diffusers_vae.DiffusersVAE(net)
    want = torch.cat([net(image.unsqueeze(2)).sample[:, :, 0] for image in images.split(1)])
    assert torch.equal(vae.raw_decode(vae.raw_encode(images)[0]), want)


def test_tiling_and_slicing_are_off(images, tmp_path):
    net = build("AutoencoderKL", {**SD, "sample_size": 16})
    want = net(images).sample
    net.enable_tiling()
    net.enable_slicing()
    assert not torch.equal(net(images).sample, want)
    vae = diffusers_vae.DiffusersVAE(net)
    assert torch.equal(vae.raw_decode(vae.raw_encode(images)[0]), want)


@pytest.mark.parametrize("kind", ["dc", "flux2"])
def test_normalise_data_gives_every_channel_mean_0_and_std_1(kind, pictures, tmp_path, monkeypatch):
    saved(kind, tmp_path / "vae")
    folder = encode(tmp_path / "vae", pictures, tmp_path / "data", "--normalise", "data")
    mean, std = np.split(folder.moments.astype(float), 2, axis=1)
    axes = (0, 2, 3)
    assert np.abs(mean.mean(axis=axes)).max() < 1e-3
    spread = np.sqrt(mean.var(axis=axes) + (std**2).mean(axis=axes))
    assert np.abs(spread - 1).max() < 1e-3
    numbers = folder.meta["normalise"]
    assert len(numbers["mean"]) == len(numbers["std"]) == folder.shape[0]
    assert "first 10 pictures" in numbers["by"]
    monkeypatch.setattr(diffusers_vae, "STATISTICS_FROM", 4)  # the first ones alone
    first = encode(tmp_path / "vae", pictures, tmp_path / "first", "--normalise", "data")
    vae = diffusers_vae.find_vae(None, first.meta)
    mean, std = vae.encode(pixels_of(first)[:4])
    assert mean.mean(dim=(0, 2, 3)).abs().max() < 1e-5


def test_what_says_no_scale_asks_for_normalise_data(pictures, tmp_path):
    net = build("AutoencoderKL", SD)
    net.register_to_config(scaling_factor=None)
    net.save_pretrained(tmp_path / "vae")
    flags = ["encode", "--vae", tmp_path / "vae", "--images", pictures, "--image-size", 32]
    out = ["--out", tmp_path / "data"]
    refused(diffusers_vae, *flags, *out, says=["neither a scale", "--normalise data"])
    assert not (tmp_path / "data").exists()


def test_a_scale_that_diffusers_fills_in_is_said(pictures, tmp_path, capsys):
    saved("flux", tmp_path / "vae")
    config = json.loads((tmp_path / "vae/config.json").read_text())
    del config["scaling_factor"]
    (tmp_path / "vae/config.json").write_text(json.dumps(config))
    encode(tmp_path / "vae", pictures, tmp_path / "data")
    assert "scaling_factor and shift_factor (diffusers' default)" in capsys.readouterr().err


class Killed(BaseException):
    pass


def killed(*args):
    raise Killed


@pytest.mark.parametrize("normalise", ["config", "data"])
def test_a_killed_encoding_goes_on(normalise, pictures, tmp_path, monkeypatch):
    saved("flux", tmp_path / "vae")
    whole = encode(tmp_path / "vae", pictures, tmp_path / "whole", "--normalise", normalise)
    own, calls = diffusers_vae.DiffusersVAE.encode, []

    def until_the_third_batch(self, images):
        calls.append(len(images))
        if len(calls) == 3:
            raise Killed
        return own(self, images)

    monkeypatch.setattr(diffusers_vae.DiffusersVAE, "encode", until_the_third_batch)
    with pytest.raises(Killed):
        encode(tmp_path / "vae", pictures, tmp_path / "data", "--normalise", normalise)
    assert not (tmp_path / "data/meta.json").exists()

    def measured(*args):
        raise AssertionError("the statistics are measured a second time")

    monkeypatch.setattr(diffusers_vae, "measure", measured)
    data = encode(tmp_path / "vae", pictures, tmp_path / "data", "--normalise", normalise)
    assert calls[3:] == [2]  # the last batch alone is left
    assert np.array_equal(data.moments, whole.moments) and data.meta["identity"]
    assert {path.name for path in data.path.iterdir()} == {
        path.name for path in whole.path.iterdir()
    }
    assert not list(data.path.glob("*.part.npy"))
    encode(tmp_path / "vae", pictures, tmp_path / "data", "--normalise", normalise)  # complete
    assert len(calls) == 4


def test_unfinished_latents_of_another_vae_are_kept(pictures, tmp_path, monkeypatch):
    saved("flux", tmp_path / "vae")
    with monkeypatch.context() as patch:
        patch.setattr(diffusers_vae, "finish", killed)
        with pytest.raises(Killed):
            encode(tmp_path / "vae", pictures, tmp_path / "data")
    before = {path.name: path.stat().st_size for path in (tmp_path / "data").iterdir()}
    saved("sdxl", tmp_path / "other")
    with pytest.raises(UserError, match="unfinished latents of other images or another VAE"):
        encode(tmp_path / "other", pictures, tmp_path / "data")
    assert {path.name: path.stat().st_size for path in (tmp_path / "data").iterdir()} == before


def test_bad_folders_and_sizes_get_one_line(pictures, tmp_path):
    saved("dc", tmp_path / "vae")
    out = ["--images", pictures, "--out", tmp_path / "data", "--device", "cpu"]
    flags = ["encode", "--vae", tmp_path / "vae", *out]
    refused(diffusers_vae, *flags, "--image-size", 33, says=["AutoencoderDC: does not encode"])
    weights = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    config = tmp_path / "vae/config.json"
    state = load_file(weights)
    save_file({k: v for k, v in state.items() if "decoder.conv_in" not in k}, weights)
    says = ["tensors are missing", "decoder.conv_in"]
    refused(diffusers_vae, *flags, "--image-size", 32, says=says)
    weights.unlink()
    says = ["holds no diffusion_pytorch_model"]
    refused(diffusers_vae, *flags, "--image-size", 32, says=says)
    config.write_text(json.dumps({"_class_name": "AutoencoderOfTomorrow"}))
    refused(diffusers_vae, *flags, "--image-size", 32, says=["no class AutoencoderOfTomorrow"])
    config.write_text(json.dumps({"_class_name": "UNet2DModel"}))
    refused(diffusers_vae, *flags, "--image-size", 32, says=["does not encode"])
    config.unlink()
    refused(diffusers_vae, *flags, "--image-size", 32, says=["config.json", "save_pretrained"])
    refused(diffusers_vae, "encode", "--vae", tmp_path / "vae", says=["--images DIR"])
    assert not (tmp_path / "data").exists()


def test_an_image_size_that_the_vae_does_not_give_back_is_refused(pictures, tmp_path):
    saved("flux", tmp_path / "vae")
    flags = ["encode", "--vae", tmp_path / "vae", "--images", pictures, "--out", tmp_path / "data"]
    says = ["--image-size 33", "16 x 16", "32 px", "multiple"]
    refused(diffusers_vae, *flags, "--image-size", 33, says=says)


def test_a_class_that_takes_four_channels_says_so(pictures, tmp_path):
    if not hasattr(diffusers, "AutoencoderKLQwenImage21"):
        pytest.skip("this diffusers is older")
    small = {"base_dim": 8, "decoder_base_dim": 8, "z_dim": 4, "dim_mult": [1, 1], **STATISTICS}
    small.update(temperal_downsample=[False], num_res_blocks=1)
    diffusers.AutoencoderKLQwenImage21(**small).save_pretrained(tmp_path / "vae")
    flags = ["encode", "--vae", tmp_path / "vae", "--images", pictures, "--image-size", 32]
    says = ["AutoencoderKLQwenImage21: does not encode", "in_channels is 4"]
    refused(diffusers_vae, *flags, "--out", tmp_path / "data", says=says)


def test_cosmos_statistics_of_the_first_frame(tmp_path):
    """256 numbers for 16 channels: one for each channel and frame."""
    config = {"encoder_block_out_channels": (8, 16, 16, 16), "num_layers": 1}
    config.update(decode_block_out_channels=(8, 16, 16, 16), attention_resolutions=())
    torch.manual_seed(0)
    vae = diffusers_vae.DiffusersVAE(diffusers.AutoencoderKLCosmos(**config))
    mean, std, _ = diffusers_vae.said_statistics(vae, 16)
    for got, all_frames in ((mean, vae.config.latents_mean), (std, vae.config.latents_std)):
        want = torch.tensor(all_frames, dtype=torch.float64).view(1, 16, -1, 1, 1)[0, :, 0, 0, 0]
        assert len(all_frames) == 256 and torch.equal(got, want)


def test_rae_is_normalised_once_and_sees_pixels_from_0_to_1(images):
    pytest.importorskip("transformers")
    config = {"encoder_hidden_size": 64, "encoder_num_hidden_layers": 1, "encoder_input_size": 28}
    config.update(
        decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2
    )
    config.update(decoder_intermediate_size=16, scaling_factor=0.5, patch_size=16)
    config.update(latents_mean=torch.full((64, 1, 1), 0.3), latents_std=torch.full((64, 1, 1), 2.0))
    config.update(encoder_patch_size=14)
    net = build("AutoencoderRAE", config)
    vae = diffusers_vae.DiffusersVAE(net)
    vae.normalise_by(*diffusers_vae.said_statistics(vae, 64))
    z, _ = vae.encode(images)
    assert torch.equal(z.float(), net.encode(images * 0.5 + 0.5).latent)
    assert torch.equal(vae.decode(z), net(images * 0.5 + 0.5).sample * 2 - 1)


# ---- From pictures to samples

TRAIN = "--model SiT-N/4 --batch-size 4 --steps 3 --log-every 1 --projector-dim 16 --device cpu"
TRAIN = f"{TRAIN} --ema-ramp --lr 1e-3".split()


def sampled(run, path):
    """What `sample.py --latents` writes: z = x0 / scale, not decoded."""
    model, checkpoint = models.load_checkpoint(run)
    shape = model.in_channels, model.input_size, model.input_size
    noise, _ = sample.initial_noise(0, range(6), shape)
    y = torch.arange(6) % 2
    x0 = sample.sample(model, noise, y, 2, steps=2, mode="euler")
    settings = json.dumps({"ckpt": str(run), "steps": 2})
    path.mkdir()
    z = (x0 / checkpoint["meta"]["scale"]).float().numpy()
    np.savez(path / "latents.npz", latents=z, labels=y.numpy(), tag="abc", settings=settings)
    return torch.from_numpy(z)


@pytest.mark.parametrize("kind, normalise", [("flux2", "config"), ("dc", "data"), ("qwen", "data")])
def test_from_pictures_to_samples(kind, normalise, pictures, tmp_path, monkeypatch):
    saved(kind, tmp_path / "vae")
    folder = encode(tmp_path / "vae", pictures, tmp_path / "data", "--normalise", normalise)
    run = tmp_path / "run"
    call(train_stage1, "--data", folder.path, "--out", run, *TRAIN)
    from experiments.checkpoints import probe

    call(probe, run, "--out", tmp_path / "probe", "--device", "cpu")
    assert (tmp_path / "probe/features.png").is_file()
    flags = ["--ckpt", run, "--num-images", 6, "--steps", 2, "--mode", "euler", "--device", "cpu"]
    text = refused(sample, *flags, "--out", tmp_path / "out", says=["--latents", tmp_path / "vae"])
    assert not (tmp_path / "out").exists()
    z = sampled(run, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    module, *command = command_in(text)
    call(module, *[word.replace("OUT/", f"{tmp_path}/out/") for word in command], "--device", "cpu")
    with np.load(tmp_path / "out/samples.npz") as content:
        assert content["labels"].tolist() == [0, 1] * 3
        assert json.loads(content["settings"].item())["steps"] == 2 and content["tag"].item()
        got = content["arr_0"]
    vae = diffusers_vae.find_vae(None, folder.meta)
    want = (vae.decode(z).permute(0, 2, 3, 1) * 127.5 + 127.5).round().clamp(0, 255)
    assert got.dtype == np.uint8 and np.array_equal(got, want.numpy().astype(np.uint8))
    assert Image.open(tmp_path / "out/grid.png").size[0] > 0


@pytest.mark.parametrize("kind", ["flux", "sdxl"])
def test_from_pictures_to_samples_with_a_converted_vae(kind, pictures, tmp_path):
    """Stable Diffusion's successors need nothing but convert_vae: diffusers decodes the same."""
    net = saved(kind, tmp_path / "vae")
    call(convert_vae, tmp_path / "vae", tmp_path / "vae.pt")
    flags = [
        "--images",
        pictures,
        "--image-size",
        32,
        "--device",
        "cpu",
        "--out",
        tmp_path / "data",
    ]
    call(vae_latents, "--vae", tmp_path / "vae.pt", *flags)
    folder, run = LatentFolder(tmp_path / "data"), tmp_path / "run"
    mean, std, _ = by_hand(kind, net, pixels_of(folder))
    got = torch.from_numpy(np.array(folder.moments)).float()
    torch.testing.assert_close(got, torch.cat([mean, std], dim=1), rtol=2e-3, atol=1e-3)
    call(train_stage1, "--data", tmp_path / "data", "--out", run, *TRAIN)
    flags = ["--ckpt", run, "--num-images", 6, "--steps", 2, "--mode", "euler", "--device", "cpu"]
    call(sample, *flags, "--out", tmp_path / "out")
    z = sampled(run, tmp_path / "latents")
    want = by_hand(kind, net, pixels_of(folder))[2](z).permute(0, 2, 3, 1) * 127.5 + 127.5
    got = np.load(tmp_path / "out/samples.npz")["arr_0"]
    assert np.abs(got - want.round().clamp(0, 255).numpy()).max() <= 1


def test_decoding_normalises_back_by_the_trainings_numbers(pictures, tmp_path, capsys):
    """The numbers of --normalise data are the latent folder's; without them a line says so."""
    saved("dc", tmp_path / "vae")
    folder = encode(tmp_path / "vae", pictures, tmp_path / "data", "--normalise", "data")
    z = np.random.default_rng(0).normal(size=(2, *folder.shape)).astype(np.float32)

    def decoded(name, *more):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "latents.npz"
        np.savez(path, latents=z, labels=[0, 1], tag="t", settings=json.dumps({"ckpt": "gone"}))
        call(diffusers_vae, "decode", path, "--vae", tmp_path / "vae", "--device", "cpu", *more)
        return np.load(tmp_path / name / "samples.npz")["arr_0"]

    by_data = decoded("one", "--data", folder.path)
    assert "nothing says" not in capsys.readouterr().err
    by_config = decoded("two")
    assert "nothing says how latents were normalised" in capsys.readouterr().err
    assert not np.array_equal(by_data, by_config)
    vae = diffusers_vae.find_vae(None, folder.meta)
    want = vae.decode(torch.from_numpy(z)).permute(0, 2, 3, 1) * 127.5 + 127.5
    assert np.array_equal(by_data, want.round().clamp(0, 255).numpy().astype(np.uint8))


def test_a_killed_decoding_goes_on(pictures, tmp_path, monkeypatch):
    saved("flux", tmp_path / "vae")
    folder = encode(tmp_path / "vae", pictures, tmp_path / "data")
    z = np.random.default_rng(0).normal(size=(6, *folder.shape)).astype(np.float32)
    np.savez(tmp_path / "latents.npz", latents=z, labels=np.arange(6), tag="t", settings="{}")
    flags = ["decode", tmp_path, "--vae", tmp_path / "vae", "--data", folder.path]
    flags += ["--batch-size", 2, "--device", "cpu"]
    own, calls = diffusers_vae.to_images, []

    def until_the_third_batch(vae, x0):
        calls.append(len(x0))
        if len(calls) == 4:  # the first call finds out how large pictures are
            raise Killed
        return own(vae, x0)

    monkeypatch.setattr(diffusers_vae, "to_images", until_the_third_batch)
    with pytest.raises(Killed):
        call(diffusers_vae, *flags)
    assert not (tmp_path / "samples.npz").exists()
    call(diffusers_vae, *flags)
    assert calls[4:] == [1, 2]
    vae = diffusers_vae.find_vae(None, folder.meta)
    content = np.load(tmp_path / "samples.npz")
    want = np.concatenate([own(vae, part) for part in torch.from_numpy(z).split(2)])
    assert np.array_equal(content["arr_0"], want)
    call(diffusers_vae, *flags)  # complete
    np.savez(tmp_path / "latents.npz", latents=z, labels=np.arange(6), tag="other", settings="{}")
    refused(diffusers_vae, *flags, says=["samples.npz", "holds other samples"])
    assert np.array_equal(np.load(tmp_path / "samples.npz")["arr_0"], content["arr_0"])


def test_a_decoder_that_did_not_make_the_latents_is_refused(pictures, tmp_path):
    saved("flux", tmp_path / "vae")
    folder = encode(tmp_path / "vae", pictures, tmp_path / "data")
    build("AutoencoderKL", FLUX, seed=1).save_pretrained(tmp_path / "other")
    np.savez(tmp_path / "latents.npz", latents=np.zeros((1, 16, 16, 16), np.float32), labels=[0])
    flags = ["decode", tmp_path / "latents.npz", "--data", folder.path, "--vae", tmp_path / "other"]
    refused(diffusers_vae, *flags, says=[tmp_path / "other", "is not the VAE that made"])
    np.savez(tmp_path / "latents.npz", latents=np.zeros((1, 16, 16, 16)), labels=[0])
    refused(diffusers_vae, *flags, says=["latents.npz", "float64", "--latents"])
    with pytest.raises(UserError, match="diffusers_vae decode OUT/latents.npz --vae"):
        find_vae(None, folder.meta)
