"""Equality with public counterparts: diffusers' VAE, timm's blocks, torch-fidelity's and pytorch-fid's Inception, formulas."""
import argparse
import json
import math
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn as nn

import fid
from conftest import ok, script
from models import SIZES, UserError, build, load_checkpoint
from sample import sample
from test_method import tiny
from vae_latents import AutoencoderKL, load_vae

# ---- the VAE against diffusers


@pytest.fixture(scope="module")
def sd_vae():
    """diffusers' AutoencoderKL at Stable Diffusion's size, random weights, and what it gives for one image of 64 px."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, norm_num_groups=32).eval()
    for p in theirs.parameters():
        if p.dim() == 1:
            nn.init.normal_(p, mean=p.detach().mean().item(), std=0.1)  # biases and norms that matter
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        posterior = theirs.encode(image).latent_dist
        return theirs.state_dict(), image, posterior.mean, posterior.std, theirs.decode(posterior.mean).sample


def old_names(state):
    """diffusers' names before 2023."""
    swap = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    for new, old in swap.items():
        state = {k.replace("attentions.0." + new, "attentions.0." + old): v for k, v in state.items()}
    return state


def compvis_names(state):
    """CompVis' names, written down from latent-diffusion's module tree, not by inverting our table."""
    out = {}
    for key, value in state.items():
        side, *rest = key.split(".")
        if side not in ("encoder", "decoder"):
            out[key] = value
            continue
        if rest[0] == "mid_block" and rest[1] == "resnets":
            new = ["mid", f"block_{int(rest[2]) + 1}", *rest[3:]]
        elif rest[0] == "mid_block":
            names = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
            new = ["mid", "attn_1", names[rest[3]], rest[-1]]
            value = value[:, :, None, None] if rest[3] != "group_norm" and rest[-1] == "weight" else value
        elif rest[0] in ("down_blocks", "up_blocks"):
            level = int(rest[1]) if side == "encoder" else 3 - int(rest[1])
            way = "down" if side == "encoder" else "up"
            tail = ["block", *rest[3:]] if rest[2] == "resnets" else [way + "sample", *rest[4:]]
            new = [way, str(level), *tail]
        else:
            new = [{"conv_norm_out": "norm_out"}.get(rest[0], rest[0]), *rest[1:]]
        out[".".join([side, *new]).replace("conv_shortcut", "nin_shortcut")] = value
    return out


@pytest.mark.parametrize("layout", ["new.safetensors", "new.bin", "old.bin", "compvis.ckpt", "compvis.pt"])
def test_vae_equals_diffusers(sd_vae, layout, tmp_path):
    state, image, mean, std, decoded = sd_vae
    path = tmp_path / layout
    if layout.startswith("old"):
        state = old_names(state)
        assert any(".query." in key for key in state)
    if layout.startswith("compvis"):
        state = compvis_names(state)
        assert "encoder.down.0.block.0.norm1.weight" in state and "decoder.up.3.upsample.conv.weight" in state
        if layout.endswith("ckpt"):  # a whole Stable Diffusion checkpoint: wrapper, prefix, and a U-Net beside it
            state = {"first_stage_model." + key: value for key, value in state.items()}
            state = {"state_dict": {**state, "model.diffusion_model.out.2.bias": torch.zeros(4)}, "global_step": 3}
        else:
            state["loss.logvar"] = torch.zeros(())
    if layout.endswith("safetensors"):
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        torch.save(state, path)
    ours = load_vae(path)
    with torch.no_grad():
        m, s = ours.encode(image)
        d = ours.decode(mean)
    for got, want in ((m, mean), (s, std), (d, decoded)):
        assert (got - want).abs().max() < 1e-4
    assert ours.scale == 0.18215
    print("VAE", layout, *(f"{(a - b).abs().max():.1e}" for a, b in ((m, mean), (s, std), (d, decoded))))


def test_vae_clamps_the_log_variance():
    vae = AutoencoderKL((8, 8), layers=1)
    nn.init.zeros_(vae.quant_conv.weight)
    for bias, wanted in ((100.0, math.exp(10)), (-100.0, math.exp(-15))):
        nn.init.constant_(vae.quant_conv.bias, bias)
        assert vae.encode(torch.zeros(1, 3, 8, 8))[1].mean().item() == pytest.approx(wanted, rel=1e-5)


def test_vae_with_missing_or_unknown_tensors_is_refused_by_name(tmp_path):
    state = AutoencoderKL((16, 32), layers=1).state_dict()
    torch.save({key: value for key, value in state.items() if "decoder.conv_in" not in key}, tmp_path / "missing.pt")
    torch.save({**state, "decoder.surprise.weight": torch.zeros(1)}, tmp_path / "unknown.pt")
    with pytest.raises(UserError, match=r"missing.pt.*2 missing: decoder.conv_in.bias, decoder.conv_in.weight"):
        load_vae(tmp_path / "missing.pt")
    with pytest.raises(UserError, match=r"unknown.pt.*1 unknown: decoder.surprise.weight"):
        load_vae(tmp_path / "unknown.pt")


# ---- SiT against a model put together from timm's parts, as REPA's is

class TimmSiT(nn.Module):
    """REPA's recipe: timm's PatchEmbed, Attention and Mlp inside adaLN-Zero blocks. In the test only."""

    def __init__(self, depth, width, heads, patch, size, channels, classes, qk_norm):
        super().__init__()
        vit = pytest.importorskip("timm.models.vision_transformer")
        self.x_embedder = vit.PatchEmbed(size, patch, channels, width)
        self.t_embedder, self.y_embedder = nn.Module(), nn.Module()
        self.t_embedder.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.y_embedder.embedding_table = nn.Embedding(classes + 1, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.x_embedder.num_patches, width), requires_grad=False)
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            block = nn.Module()
            block.norm1, block.norm2 = (nn.LayerNorm(width, elementwise_affine=False, eps=1e-6) for _ in range(2))
            block.attn = vit.Attention(width, num_heads=heads, qkv_bias=True, qk_norm=qk_norm, norm_layer=nn.LayerNorm)
            block.mlp = vit.Mlp(width, 4 * width, act_layer=lambda: nn.GELU(approximate="tanh"))
            block.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
            self.blocks.append(block)
        self.final_layer = nn.Module()
        self.final_layer.linear = nn.Linear(width, patch * patch * channels)
        self.final_layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.patch, self.channels = patch, channels

    def forward(self, x, t, y, tap):
        freqs = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
        angles = t[:, None].float() * freqs
        c = self.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(x.dtype)) + self.y_embedder.embedding_table(y)
        h, tapped = self.x_embedder(x) + self.pos_embed, None
        for depth, b in enumerate(self.blocks, 1):
            s1, k1, g1, s2, k2, g2 = (z[:, None] for z in b.adaLN_modulation(c).chunk(6, -1))
            h = h + g1 * b.attn(b.norm1(h) * (1 + k1) + s1)
            h = h + g2 * b.mlp(b.norm2(h) * (1 + k2) + s2)
            tapped = h if depth == tap else tapped
        shift, scale = (z[:, None] for z in self.final_layer.adaLN_modulation(c).chunk(2, -1))
        h = self.final_layer.linear(nn.functional.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift)
        n, side, p = len(x), x.shape[2] // self.patch, self.patch
        return torch.einsum("nhwpqc->nchpwq", h.reshape(n, side, side, p, p, self.channels)).reshape(x.shape), tapped


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("name", ["SiT-S/2", "SiT-Ti/4"])
def test_sit_equals_one_made_of_timm(name, qk_norm):
    torch.manual_seed(0)
    ours = build(name, 16, 4, 1000, qk_norm).double()
    for p in ours.parameters():
        nn.init.normal_(p, mean=float(p.dim() == 1 and p.numel() == ours.width // SIZES[name][2]), std=0.05)
    theirs = TimmSiT(*SIZES[name], 16, 4, 1000, qk_norm).double()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(ours.state_dict())
    x, t, y = torch.randn(3, 4, 16, 16).double(), torch.rand(3).double(), torch.tensor([0, 999, 1000])
    with torch.no_grad():
        (v1, h1), (v2, h2) = ours(x, t, y, tap=5), theirs(x, t, y, tap=5)
    assert (v1 - v2).abs().max() < 1e-9 and (h1 - h2).abs().max() < 1e-9
    print("SiT", name, qk_norm, f"{(v1 - v2).abs().max():.1e} {(h1 - h2).abs().max():.1e}")


def test_position_table_is_mae_and_dits():
    """DiT's pos_embed, from its definition in NumPy: w varies fastest, the first half of the channels encodes it."""
    table = build("SiT-S/2", 8, 4, 10).pos_embed[0].double().numpy()
    omega = 1 / 10000 ** (np.arange(96) / 96)
    for token, (row, column) in enumerate((r, c) for r in range(4) for c in range(4)):
        want = np.concatenate([np.sin(column * omega), np.cos(column * omega), np.sin(row * omega), np.cos(row * omega)])
        assert np.abs(table[token] - want).max() < 1e-6


# ---- checkpoints as REPA and the authors publish them

@pytest.fixture(scope="module")
def foreign():
    model = tiny(num_classes=7)
    return model, {**model.state_dict(), "projectors.0.0.weight": torch.zeros(3, 3)}


@pytest.mark.parametrize("layout", ["repa", "bare", "module", "compiled"])
def test_foreign_checkpoints_load(foreign, layout, tmp_path):
    model, state = foreign
    path = tmp_path / "their.pt"
    torch.save({"repa": {"model": {k: v + 1 for k, v in state.items()}, "ema": state, "opt": {"state": {}},
                         "args": argparse.Namespace(model="SiT-Ti/8", lr=1e-4), "steps": 400000},
                "bare": state,
                "module": {"ema": {"module." + k: v for k, v in state.items()}},
                "compiled": {"ema": {"module._orig_mod." + k: v for k, v in state.items()}}}[layout], path)
    loaded, _ = load_checkpoint(path, "SiT-Ti/8")
    assert loaded.num_classes == 7
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))
    with pytest.raises(UserError, match="holds SiT-Ti/8, not --model SiT-XL/2"):
        load_checkpoint(path, "SiT-XL/2")


def test_foreign_checkpoint_with_a_stranger_is_refused_by_name(foreign, tmp_path):
    torch.save({"ema": {**foreign[1], "blocks.0.extra": torch.zeros(1)}}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="1 unknown: blocks.0.extra"):
        load_checkpoint(tmp_path / "a.pt")
    torch.save({"ema": {k: v for k, v in foreign[1].items() if k != "final_layer.linear.bias"}}, tmp_path / "b.pt")
    with pytest.raises(UserError, match="1 missing: final_layer.linear.bias"):
        load_checkpoint(tmp_path / "b.pt")


def test_a_foreign_checkpoint_samples(foreign, tmp_path):
    """python sample.py --ckpt their.pt --model ... --vae ..., the command of the README, at a size that runs here."""
    torch.save({"ema": foreign[1], "args": argparse.Namespace(), "steps": 1}, tmp_path / "their.pt")
    torch.save(AutoencoderKL((8, 16), layers=1).state_dict(), tmp_path / "vae.bin")
    ok("sample.py", "--ckpt", tmp_path / "their.pt", "--model", "SiT-Ti/8", "--vae", tmp_path / "vae.bin", "--num", 3, "--steps", 2,
       "--out", tmp_path / "out", "--device", "cpu")
    assert np.load(tmp_path / "out/samples.npz")["arr_0"].shape == (3, 32, 32, 3)
    result = script("sample.py", "--ckpt", tmp_path / "their.pt", "--num", 3, "--out", tmp_path / "out2")
    assert result.returncode == 2 and "--vae" in result.stderr


# ---- the samplers against their equations in float64

def transcription(model, x, y, null, steps, mode, cfg, low, high, noises):
    """Sampling as the papers word it, one branch at a time."""
    def velocity(x, t, labels):
        return model(x, torch.full((len(x),), t, dtype=torch.float64), labels)[0]

    def guided(f, t):
        return f(null) + cfg * (f(y) - f(null)) if cfg != 1 and low <= t <= high else f(y)

    if mode == "sde":
        times = [1 + (0.04 - 1) * i / (steps - 1) for i in range(steps)] + [0.0]
        for i in range(steps):
            t, dt = times[i], times[i + 1] - times[i]
            w = 2 * t

            def drift(labels):
                v = velocity(x, t, labels)
                return v - w / 2 * (-((1 - t) * v + x) / t)

            x = x + guided(drift, t) * dt
            if i < steps - 1:
                x = x + math.sqrt(w * abs(dt)) * noises[i]
        return x
    for i in range(steps):
        t, t_next = 1 - i / steps, 1 - (i + 1) / steps
        k1 = guided(lambda labels: velocity(x, t, labels), t)
        ahead = x + (t_next - t) * k1
        if mode == "heun" and i < steps - 1:
            k2 = guided(lambda labels: velocity(ahead, t_next, labels), t_next)
            ahead = x + (t_next - t) * (k1 + k2) / 2
        x = ahead
    return x


@pytest.mark.parametrize("mode", ["euler", "heun", "sde"])
@pytest.mark.parametrize("cfg,low,high", [(1.0, 0.0, 1.0), (2.5, 0.0, 1.0), (1.9, 0.2, 0.65)])
def test_samplers_against_a_transcription(mode, cfg, low, high):
    model = tiny().double().eval()
    y, null = torch.tensor([1, 4]), torch.tensor([10, 10])
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    generators = [torch.Generator().manual_seed(8 + i) for i in range(2)]  # sample() seeds image i with seed + i + 1
    noises = [torch.stack([torch.randn(4, 16, 16, generator=g, dtype=torch.float64) for g in generators]) for _ in range(11)]
    with torch.no_grad():
        want = transcription(model, noise, y, null, 12, mode, cfg, low, high, noises)
    got = sample(model, noise, y, 10, 12, mode, cfg, low, high, seed=7)
    assert (got - want).abs().max() < 1e-6 and (got - noise).abs().max() > 0.1
    print("sampler", mode, cfg, high, f"{(got - want).abs().max():.1e}")


# ---- Inception against torch-fidelity and pytorch-fid

@pytest.fixture(scope="module")
def inception():
    network = fid.load_inception("random")
    generator = torch.Generator().manual_seed(1)
    for layer in network.modules():  # statistics and biases that matter
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1, generator=generator)
            layer.running_var.uniform_(0.8, 1.2, generator=generator)
    network.fc.bias.data.normal_(generator=generator)
    network.fc.weight.data.mul_(0.05)
    return network


@pytest.fixture(scope="module")
def pictures():
    return torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_inception_equals_torch_fidelity(inception, pictures, tmp_path):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.save(inception.state_dict(), tmp_path / "weights.pth")
    theirs = module.FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(tmp_path / "weights.pth"))
    blocks = []
    theirs.Mixed_6d.register_forward_hook(lambda m, i, out: blocks.append(out))
    with torch.no_grad():
        features, logits = theirs(pictures)
        f, s, p = inception(pictures)
    assert blocks[0].shape[1:] == (768, 17, 17)
    differences = [(f - features).abs().max(), (s - blocks[0][:, :7].flatten(1)).abs().max(), (p - logits.softmax(1)).abs().max()]
    print("torch-fidelity", *(f"{d:.1e}" for d in differences), f"of features up to {features.abs().max():.1f}")
    assert max(differences) < 1e-4
    assert f.std() > 0.01 and p.std() > 1e-5


def test_inception_equals_pytorch_fid(inception, pictures, monkeypatch):
    module = pytest.importorskip("pytorch_fid.inception")
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *a, **k: inception.state_dict())
    theirs = module.InceptionV3([2, 3], resize_input=False, normalize_input=False).eval()
    with torch.no_grad():
        block, features = theirs((fid.resize_tf1(pictures.float()) - 128) / 128)
        f, _, _ = inception(pictures)
    print("pytorch-fid", f"{(f - features[:, :, 0, 0]).abs().max():.1e}")
    assert (f - features[:, :, 0, 0]).abs().max() < 1e-4


@pytest.mark.parametrize("size", [32, 64, 256, 512])
def test_resize_is_tensorflow_1s(size):
    module = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    x = torch.randint(0, 256, (1, 3, size, size), generator=torch.Generator().manual_seed(0)).float()
    want = module.interpolate_bilinear_2d_like_tensorflow1x(x, size=(299, 299), align_corners=False)
    assert (fid.resize_tf1(x) - want).abs().max() < 1e-4
    print("resize", size, f"{(fid.resize_tf1(x) - want).abs().max():.1e}")


# ---- the metrics against independent formulas

def features(n, d, seed):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) / math.sqrt(d) + rng.normal(size=d)


def test_frechet_distance_against_sqrtm_and_closed_form():
    a, b = features(500, 64, 0), features(400, 64, 1)
    args = a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(args[1] @ args[3]).real
    want = ((args[0] - args[2]) ** 2).sum() + np.trace(args[1] + args[3] - 2 * root)
    assert fid.frechet_distance(*args) == pytest.approx(want, rel=1e-9)
    # two Gaussians with diagonal covariances: |m1 - m2|^2 + sum (s1 - s2)^2
    s1, s2 = np.array([1.0, 2.0, 0.5]), np.array([3.0, 0.1, 0.5])
    assert fid.frechet_distance(np.zeros(3), np.diag(s1 ** 2), np.ones(3), np.diag(s2 ** 2)) == pytest.approx(3 + ((s1 - s2) ** 2).sum())
    assert abs(fid.frechet_distance(args[0], args[1], args[0], args[1])) < 1e-9


def test_frechet_distance_with_fewer_samples_than_features():
    a, b = features(20, 64, 0), features(30, 64, 1)
    args = a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False)
    centred = [(x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (a, b)]  # tr (S1 S2)^(1/2) = nuclear norm of A B^T
    want = ((args[0] - args[2]) ** 2).sum() + np.trace(args[1]) + np.trace(args[3]) - 2 * np.linalg.svd(centred[0] @ centred[1].T)[1].sum()
    assert fid.frechet_distance(*args) == pytest.approx(want, rel=1e-6)


def test_streaming_statistics_do_not_cancel():
    """Features far from zero, in uneven batches of float32: the two-pass float64 formula to 1e-9."""
    x = (np.random.default_rng(0).normal(size=(1000, 8)) * 1e-2 + 1e4).astype(np.float32)
    statistics = fid.Statistics()
    for part in np.split(x, [1, 7, 500, 501]):
        statistics.update(torch.from_numpy(part))
    mu, sigma = statistics.finish()
    assert np.abs(mu - x.astype(np.float64).mean(0)).max() < 1e-9 * 1e4
    np.testing.assert_allclose(sigma, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-15)


def test_inception_score_against_a_loop():
    probs = torch.softmax(torch.randn(700, 50, generator=torch.Generator().manual_seed(0)).double() * 2, 1).numpy()

    def one(part):
        marginal = part.mean(0)
        return math.exp(np.mean([sum(p * (math.log(p) - math.log(q)) for p, q in zip(row, marginal)) for row in part]))

    assert fid.inception_score(probs) == pytest.approx(one(probs), rel=1e-9)
    assert fid.inception_score(probs, split_size=300) == pytest.approx(np.mean([one(probs[:300]), one(probs[300:600]), one(probs[600:])]), rel=1e-9)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_recall_against_loops(k):
    real, fake = features(60, 5, 0), features(50, 5, 3) * 0.7

    def inside(points, manifold):
        count = 0
        for p in points:
            for i, centre in enumerate(manifold):
                others = sorted(np.linalg.norm(centre - q) for j, q in enumerate(manifold) if j != i)
                if np.linalg.norm(p - centre) <= others[k - 1]:
                    count += 1
                    break
        return count / len(points)

    got = fid.precision_recall(real, fake, k)
    assert got == pytest.approx((inside(fake, real), inside(real, fake)), abs=1e-12)
    assert 0.05 < got[0] < 0.999 and 0.05 < got[1] < 0.999
    assert fid.precision_recall(real, real.copy()) == (1.0, 1.0)


# ---- ADM's file formats, by the command line

def test_fid_command_on_every_kind_of_input(tmp_path, monkeypatch, capsys):
    """Folder, npz, statistics and ADM's reference batch give the same numbers; ADM's statistics are taken, not recomputed."""
    from PIL import Image
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8) for n in (9, 11))
    np.savez(tmp_path / "a.npz", arr_0=a)
    np.savez(tmp_path / "b.npz", b)  # numpy's default name is arr_0
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(b):
        Image.fromarray(image).save(tmp_path / "folder" / f"{i:03d}.png")
    small = nn.Module()  # a stand-in network: the plumbing is tested here, the network above
    small.p = nn.Parameter(torch.zeros(1))
    small.forward = lambda x: (x.float().flatten(1)[:, ::400], x.float().flatten(1)[:, ::500], x.float().flatten(1)[:, :5].softmax(1))
    monkeypatch.setattr(fid, "load_inception", lambda weights: small)

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["fid.py", *map(str, args), "--device", "cpu"])
        fid.main()
        return json.loads(capsys.readouterr().out.strip().split("\n")[-1])

    base = call(tmp_path / "a.npz", tmp_path / "b.npz")
    assert {"FID", "sFID", "IS", "precision", "recall"} <= base.keys() and base["num"] == 9
    again = call(tmp_path / "a.npz", tmp_path / "folder")
    assert again["FID"] == pytest.approx(base["FID"]) and again["precision"] == base["precision"]
    call(tmp_path / "b.npz", "--save-stats", tmp_path / "stats.npz")
    read = call(tmp_path / "a.npz", tmp_path / "stats.npz")
    assert read["FID"] == pytest.approx(base["FID"]) and read["sFID"] == pytest.approx(base["sFID"]) and "precision" not in read
    with np.load(tmp_path / "stats.npz") as s:
        np.savez(tmp_path / "adm.npz", arr_0=b, **{**s, "mu": s["mu"] + 1.0})  # published statistics that differ are believed
    adm = call(tmp_path / "a.npz", tmp_path / "adm.npz")
    assert adm["FID"] != pytest.approx(base["FID"]) and adm["recall"] == base["recall"]
    random = call(tmp_path / "a.npz", tmp_path / "b.npz", "--weights", "random")
    assert {"FD-random", "sFD-random", "IS-random"} <= random.keys() and not any(key in random for key in ("FID", "sFID", "IS"))


def test_samples_are_what_adms_evaluator_reads(runs, tmp_path):
    ok("sample.py", "--ckpt", runs / "stage2/ckpt.pt", "--num", 5, "--steps", 2, "--out", tmp_path, "--device", "cpu")
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as file:
        assert file["arr_0"].dtype == np.uint8 and file["arr_0"].shape == (5, 32, 32, 3) and file["labels"].tolist() == [0, 1, 2, 3, 4]
