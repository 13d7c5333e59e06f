"""Equality with public counterparts.

diffusers' VAE, REPA's checkpoints, torch-fidelity's and pytorch-fid's Inception, formulas.
"""

import argparse
import functools
import json
import math

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn as nn
from conftest import call, largest, ok, script, tiny, write_checkpoint

import fid
from common import UserError
from experiments.checkpoints import convert_sit
from experiments.latents import convert_vae
from models import SIZES, load_checkpoint
from vae_latents import AutoencoderKL, load_vae

# ---- the VAE against diffusers


@functools.cache
def random_vae(widths):
    """diffusers' AutoencoderKL of these widths, random, and its results for an image."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=widths,
        layers_per_block=2,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        norm_num_groups=min(32, widths[0] // 4),
        scaling_factor=0.13025,
    ).eval()
    for p in theirs.parameters():
        if p.dim() == 1:  # biases and norms that matter
            nn.init.normal_(p, mean=p.detach().mean().item(), std=0.1)
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        posterior = theirs.encode(image).latent_dist
        decoded = theirs.decode(posterior.mean).sample
    return theirs, image, posterior.mean, posterior.std, decoded


def old_names(state):
    """diffusers' names before 2023."""
    swap = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    where = "attentions.0."
    for new, old in swap.items():
        state = {key.replace(where + new, where + old): value for key, value in state.items()}
    return state


def compvis_names(state):
    """CompVis' names, from latent-diffusion's module tree, not by inverting the tested table."""
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
    out = {}
    for key, value in state.items():
        side, *rest = key.split(".")
        if side not in ("encoder", "decoder"):
            out[key] = value
            continue
        if rest[0] == "mid_block" and rest[1] == "resnets":
            new = ["mid", f"block_{int(rest[2]) + 1}", *rest[3:]]
        elif rest[0] == "mid_block":
            new = ["mid", "attn_1", attention[rest[3]], rest[-1]]
            if rest[3] != "group_norm" and rest[-1] == "weight":
                value = value[:, :, None, None]
        elif rest[0] in ("down_blocks", "up_blocks"):
            level = int(rest[1]) if side == "encoder" else 3 - int(rest[1])
            way = "down" if side == "encoder" else "up"
            tail = ["block", *rest[3:]] if rest[2] == "resnets" else [way + "sample", *rest[4:]]
            new = [way, str(level), *tail]
        else:
            new = [{"conv_norm_out": "norm_out"}.get(rest[0], rest[0]), *rest[1:]]
        out[".".join([side, *new]).replace("conv_shortcut", "nin_shortcut")] = value
    return out


STABLE_DIFFUSION, SMALLER = (128, 256, 512, 512), (32, 64, 128, 128)


LAYOUTS = ["folder", "new.safetensors", "new.bin", "old.bin", "compvis.ckpt", "compvis.pt"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_vae_equals_diffusers(layout, tmp_path):
    """As diffusers saves it, at Stable Diffusion's size, and as it was published otherwise, with
    fewer channels; converted; the scale is theirs."""
    widths = STABLE_DIFFUSION if layout == "folder" else SMALLER
    theirs, image, mean, std, decoded = random_vae(widths)
    state, path, scale = theirs.state_dict(), tmp_path / layout, ["--scale", 0.18215]
    if layout.startswith("old"):
        state = old_names(state)
        assert any(".query." in key for key in state)
    if layout.startswith("compvis"):
        state = compvis_names(state)
        assert "encoder.down.0.block.0.norm1.weight" in state
        assert "decoder.up.3.upsample.conv.weight" in state
        if layout.endswith("ckpt"):  # a whole Stable Diffusion: wrapper, prefix, a U-Net beside it
            state = {"first_stage_model." + key: value for key, value in state.items()}
            state["model.diffusion_model.out.2.bias"] = torch.zeros(4)
            state = {"state_dict": state, "global_step": 3}
        else:
            state["loss.logvar"] = torch.zeros(())
    if layout == "folder":
        theirs.save_pretrained(path)
        scale = []  # it is in their config.json
    elif layout.endswith("safetensors"):
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        torch.save(state, path)
    with pytest.raises(UserError, match=path.name + ("" if path.is_dir() else ".*convert_")):
        load_vae(path)  # takes a conversion
    call(convert_vae, path, tmp_path / "converted.pt", *scale)
    ours = load_vae(tmp_path / "converted.pt")
    with torch.no_grad():
        pairs = [*zip(ours.encode(image), (mean, std), strict=True), (ours.decode(mean), decoded)]
    differences = [largest(got, want) for got, want in pairs]
    print("VAE", layout, *(f"{d:.1e}" for d in differences))
    assert max(differences) < 1e-4
    assert ours.scale == (0.13025 if layout == "folder" else 0.18215)


def test_vae_clamps_the_log_variance():
    vae = AutoencoderKL((8, 8), layers=1)
    nn.init.zeros_(vae.quant_conv.weight)
    for bias, wanted in ((100.0, math.exp(10)), (-100.0, math.exp(-15))):
        nn.init.constant_(vae.quant_conv.bias, bias)
        std = vae.encode(torch.zeros(1, 3, 8, 8))[1]
        assert std.mean().item() == pytest.approx(wanted, rel=1e-5)


def refused(load, path, kind, *tensors):
    """`load(path)` is refused in one line that names the file, torch's verdict, just `tensors`."""
    with pytest.raises(UserError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message and path.name in message
    heads = {"missing": "Missing key(s)", "unknown": "Unexpected key(s)"}
    names = ", ".join(f'"{tensor}"' for tensor in tensors)
    assert f"{heads.pop(kind)} in state_dict: {names}." in message
    assert next(iter(heads.values())) not in message


@pytest.mark.parametrize("converted", [False, True])
def test_vae_with_missing_or_unknown_tensors_is_refused_by_name(converted, tmp_path):
    state, out = AutoencoderKL((16, 32), layers=1).state_dict(), tmp_path / "out.pt"
    missing, unknown = tmp_path / "missing.pt", tmp_path / "unknown.pt"
    lacking = {k: v for k, v in state.items() if "decoder.conv_in" not in k}
    more = {**state, "decoder.surprise.weight": torch.zeros(1)}
    for path, tensors in ((missing, lacking), (unknown, more)):
        torch.save(tensors if converted else {"model": tensors, "scale": 0.5}, path)

    def load(path):
        call(convert_vae, path, out, "--scale", 0.5) if converted else load_vae(path)

    gone = ("decoder.conv_in.weight", "decoder.conv_in.bias")
    refused(load, missing, "missing", *gone)
    refused(load, unknown, "unknown", "decoder.surprise.weight")
    assert not out.exists()


# ---- checkpoints as REPA and the authors publish them


# REPA's projectors, and the two heads of the authors' stage 1
PROJECTORS = {
    "projectors.0.0.weight": torch.zeros(3, 3),
    "projectors.0.0.bias": torch.zeros(3),
    "projectors_final.linear.weight": torch.zeros(3, 3),
    "projectors_final.linear.bias": torch.zeros(3),
}


# What REPA's own checkpoints say in their args, and what a user says of one that says nothing
SAYS = {"path_type": "linear", "prediction": "v", "cfg_prob": 0.1, "num_classes": 7, "lr": 1e-4}


SAID = ["--classes", 7, "--path", "linear", "--prediction", "v"]


@pytest.fixture(scope="module")
def foreign():
    model = tiny(num_classes=7)
    return model, {**model.state_dict(), **PROJECTORS}


@pytest.fixture(scope="module")
def vae_file(tmp_path_factory):
    vae = AutoencoderKL((8, 16), layers=1)
    path = tmp_path_factory.mktemp("vae") / "vae.pt"
    torch.save({"model": vae.state_dict(), "scale": 0.5}, path)
    return path


def converted(source, vae, *flags):
    """The checkpoint that convert_sit.py makes of `source`."""
    out = source.with_name(f"ours-{source.name}")
    call(convert_sit, source, out, "--vae", vae, *flags)
    return out


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("layout", ["repa", "bare", "module", "compiled"])
def test_foreign_checkpoints_load(foreign, vae_file, layout, tmp_path):
    model, state = foreign
    path, flags = tmp_path / "their.pt", [] if layout == "repa" else SAID
    repa = {"model": {k: v + 1 for k, v in state.items()}, "ema": state, "opt": {"state": {}}}
    repa.update(args=argparse.Namespace(model="SiT-Ti/8", **SAYS), steps=400000)
    layouts = {
        "repa": repa,
        "bare": state,
        "module": {"ema": {"module." + k: v for k, v in state.items()}},
        "compiled": {"ema": {"module._orig_mod." + k: v for k, v in state.items()}},
    }
    torch.save(layouts[layout], path)
    with pytest.raises(UserError, match="their.pt.*convert_"):
        load_checkpoint(path)
    ours = converted(path, vae_file, *flags)
    loaded, saved = load_checkpoint(ours)
    assert (loaded.num_classes, saved["args"]["model"], loaded.training) == (7, "SiT-Ti/8", False)
    assert saved["args"]["label_drop"] == 0.1 and saved["args"]["qk_norm"]
    meta = saved["meta"]
    assert (meta["channels"], meta["height"], meta["scale"]) == (4, 16, 0.5)
    assert meta["vae"] == {"path": str(vae_file), "identity": load_vae(vae_file).identity()}
    assert same_weights(loaded, model)
    if layout == "repa":  # --weights model takes the others
        assert saved["step"] == 400000
        raw = load_checkpoint(ours, weights="model")[0]
        shifted = {key: value + 1 for key, value in model.state_dict().items()}
        assert all(torch.equal(value, shifted[key]) for key, value in raw.state_dict().items())


@pytest.mark.parametrize("prefix", ["projectors.", "projectors_final."])
@pytest.mark.parametrize("wrapper", ["", "module."])
def test_projectors_of_either_name_are_ignored(foreign, vae_file, prefix, wrapper, tmp_path):
    state = foreign[0].state_dict()
    heads = {key: value for key, value in PROJECTORS.items() if key.startswith(prefix)}
    assert len(heads) == 2
    whole = {wrapper + key: value for key, value in {**state, **heads}.items()}
    torch.save({"ema": whole}, tmp_path / "a.pt")
    assert same_weights(
        load_checkpoint(converted(tmp_path / "a.pt", vae_file, *SAID))[0], foreign[0]
    )


def test_a_runs_folder_stands_for_its_newest_checkpoint(tmp_path):
    """Numbers are compared, not names; other files are the user's."""
    older, newest = tiny(num_classes=7, seed=1), tiny(num_classes=7)
    for name, step, model in (
        ("ckpt-9999999.pt", 9_999_999, older),
        ("ckpt-10000000.pt", 10_000_000, newest),
        ("ckpt-0000012.pt", 12, older),
        ("ckpt-best.pt", 5, older),
        ("ckpt-99999999-copy.pt", 6, older),
    ):
        write_checkpoint(tmp_path / name, model, step=step)
    loaded, saved = load_checkpoint(tmp_path)
    assert saved["step"] == 10_000_000 and same_weights(loaded, newest)
    assert load_checkpoint(tmp_path / "ckpt-best.pt")[1]["step"] == 5
    with pytest.raises(UserError, match="empty"):
        (tmp_path / "empty").mkdir()
        load_checkpoint(tmp_path / "empty")


def test_foreign_checkpoint_with_a_stranger_is_refused_by_name(foreign, vae_file, tmp_path):
    _, state = foreign
    torch.save({"ema": {**state, "blocks.0.extra": torch.zeros(1)}}, tmp_path / "a.pt")
    lacking = {k: v for k, v in state.items() if k != "final_layer.linear.weight"}
    torch.save({"ema": lacking}, tmp_path / "b.pt")

    def load(path):
        converted(path, vae_file, *SAID)

    refused(load, tmp_path / "a.pt", "unknown", "blocks.0.extra")
    refused(load, tmp_path / "b.pt", "missing", "final_layer.linear.weight")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "b.pt"]


def test_a_foreign_checkpoint_of_no_known_size_is_refused(foreign, vae_file, tmp_path):
    shallow = {k: v for k, v in foreign[1].items() if not k.startswith("blocks.7.")}
    torch.save({"ema": shallow}, tmp_path / "seven.pt")
    assert not any(size[:2] == (7, 128) for size in SIZES.values())
    with pytest.raises(UserError, match="seven.pt") as caught:
        converted(tmp_path / "seven.pt", vae_file, *SAID)
    assert "7" in str(caught.value) and "128" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_foreign_checkpoint_samples(foreign, vae_file, tmp_path):
    """convert_sit.py SOURCE OUT --vae ..., then sample.py --ckpt OUT: the same as at full size."""
    says = argparse.Namespace(**SAYS)
    torch.save({"ema": foreign[1], "args": says, "steps": 10**5}, tmp_path / "their.pt")
    vae = tmp_path / "vae.pt"
    vae.write_bytes(vae_file.read_bytes())
    ok(
        "experiments.checkpoints.convert_sit",
        tmp_path / "their.pt",
        tmp_path / "ours.pt",
        "--vae",
        vae,
    )
    args = ["--ckpt", tmp_path / "ours.pt", "--num-images", 3, "--steps", 2, "--device", "cpu"]
    ok("sample.py", *args, "--out", tmp_path / "out")
    with np.load(tmp_path / "out/samples.npz") as samples:
        assert samples["arr_0"].shape == (3, 32, 32, 3)
    vae.rename(tmp_path / "moved.pt")
    result = script("sample.py", *args, "--out", tmp_path / "out2")
    assert result.returncode == 2 and "--vae" in result.stderr
    ok("sample.py", *args, "--out", tmp_path / "out2", "--vae", tmp_path / "moved.pt")


# ---- Inception against torch-fidelity and pytorch-fid


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights, like that of the public ones."""
    network = fid.InceptionV3()
    generator = torch.Generator().manual_seed(1)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
        if isinstance(layer, nn.BatchNorm2d):  # statistics and biases that matter
            layer.running_mean.normal_(0, 0.1, generator=generator)
            layer.running_var.uniform_(0.8, 1.2, generator=generator)
            layer.bias.data.normal_(0, 0.1, generator=generator)
    network.fc.bias.data.normal_(generator=generator)
    nn.init.normal_(network.fc.weight, std=0.05 * math.sqrt(2 / 2048), generator=generator)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def inception(weights):
    """As fid.py runs it on a CPU."""
    loaded = fid.load_inception(weights).to(memory_format=torch.channels_last)
    assert not loaded.training
    return loaded


@pytest.fixture(scope="module")
def pictures():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=generator)


@pytest.mark.slow
def test_inception_equals_torch_fidelity(weights, inception, pictures):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    wanted = ["2048", "logits_unbiased"]
    theirs = module.FeatureExtractorInceptionV3(
        "x", wanted, feature_extractor_weights_path=str(weights)
    )
    blocks = []
    theirs.Mixed_6d.register_forward_hook(lambda m, i, out: blocks.append(out))
    with torch.no_grad():
        features, logits = theirs(pictures)
        f, s, p = inception(pictures)
    assert blocks[0].shape[1:] == (768, 17, 17)
    pairs = (
        (f, features),
        (s, blocks[0][:, :7].permute(0, 2, 3, 1).flatten(1)),
        (p, logits.softmax(1)),
    )
    differences = [largest(ours, their) for ours, their in pairs]
    top = f"of features up to {features.abs().max():.1f}"
    print("torch-fidelity", *(f"{d:.1e}" for d in differences), top)
    assert max(differences) < 1e-4
    assert f.std() > 0.01 and p.std() > 1e-5


@pytest.mark.slow
def test_inception_equals_pytorch_fid(weights, inception, pictures, monkeypatch):
    module = pytest.importorskip("pytorch_fid.inception")
    state = torch.load(weights, weights_only=True)
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *a, **k: state)
    theirs = module.InceptionV3([2, 3], resize_input=False, normalize_input=False).eval()
    with torch.no_grad():
        _, features = theirs((fid.resize_tf1(pictures.float()) - 128) / 128)
        f, _, _ = inception(pictures)
    print("pytorch-fid", f"{largest(f, features[:, :, 0, 0]):.1e}")
    assert largest(f, features[:, :, 0, 0]) < 1e-4


@pytest.mark.parametrize("size", [32, 64, 256, 512])
def test_resize_is_tensorflow_1s(size):
    module = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (1, 3, size, size), generator=generator).float()
    how = {"size": (299, 299), "align_corners": False}
    want = module.interpolate_bilinear_2d_like_tensorflow1x(x, **how)
    print("resize", size, f"{largest(fid.resize_tf1(x), want):.1e}")
    assert largest(fid.resize_tf1(x), want) < 1e-4


# ---- the metrics against independent formulas


def features(n, d, seed):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) / math.sqrt(d) + rng.normal(size=d)


def moments(*sets):
    """mu1, sigma1, mu2, sigma2."""
    return [z for x in sets for z in (x.mean(0), np.cov(x, rowvar=False))]


def test_frechet_distance_against_sqrtm_and_closed_form():
    mu1, sigma1, mu2, sigma2 = moments(features(500, 64, 0), features(400, 64, 1))
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
    want = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root)
    assert fid.frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(want, rel=1e-9)
    # two Gaussians with diagonal covariances: |m1 - m2|^2 + sum (s1 - s2)^2
    s1, s2 = np.array([1.0, 2.0, 0.5]), np.array([3.0, 0.1, 0.5])
    got = fid.frechet_distance(np.zeros(3), np.diag(s1**2), np.ones(3), np.diag(s2**2))
    assert got == pytest.approx(3 + ((s1 - s2) ** 2).sum())
    assert abs(fid.frechet_distance(mu1, sigma1, mu1, sigma1)) < 1e-9


def test_frechet_distance_with_fewer_samples_than_features():
    a, b = features(20, 64, 0), features(30, 64, 1)
    mu1, sigma1, mu2, sigma2 = moments(a, b)
    # tr (S1 S2)^(1/2) is the nuclear norm of A B^T
    a, b = ((x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (a, b))
    nuclear = np.linalg.svd(a @ b.T)[1].sum()
    want = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * nuclear
    assert fid.frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(want, rel=1e-6)


def test_statistics_do_not_cancel():
    """Features far from zero, in float32: the two-pass float64 formula to 1e-9."""
    x = (np.random.default_rng(0).normal(size=(1000, 8)) * 1e-2 + 1e4).astype(np.float32)
    mu, sigma = fid.statistics(torch.from_numpy(x))
    assert mu.dtype == sigma.dtype == np.float64
    x = x.astype(np.float64)
    mean = x.sum(axis=0) / 1000
    assert np.abs(mu - mean).max() < 1e-9 * 1e4
    want = sum(np.outer(row - mean, row - mean) for row in x) / 999
    np.testing.assert_allclose(sigma, want, rtol=1e-9, atol=1e-15)


def test_inception_score_against_a_loop():
    logits = torch.randn(700, 50, generator=torch.Generator().manual_seed(0)).double()
    probs = torch.softmax(logits * 2, 1).numpy()

    def one(part):
        marginal, divergences = part.mean(0), []
        for row in part:
            terms = zip(row, marginal, strict=True)
            divergences.append(sum(p * (math.log(p) - math.log(q)) for p, q in terms))
        return math.exp(np.mean(divergences))

    assert fid.inception_score(probs) == pytest.approx(one(probs), rel=1e-9)
    want = np.mean([one(probs[:300]), one(probs[300:600]), one(probs[600:])])
    assert fid.inception_score(probs, split_size=300) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_recall_against_loops(k):
    real, fake = features(60, 5, 0), features(50, 5, 3) * 0.7

    def inside(points, manifold):
        radii, count = [], 0
        for i, centre in enumerate(manifold):
            others = (q for j, q in enumerate(manifold) if j != i)
            radii.append(sorted(np.linalg.norm(centre - q) for q in others)[k - 1])
        for p in points:
            near = (np.linalg.norm(p - c) <= r for c, r in zip(manifold, radii, strict=True))
            count += any(near)
        return count / len(points)

    real, fake = torch.from_numpy(real), torch.from_numpy(fake)
    got = fid.precision_recall(real, fake, k)
    assert got == pytest.approx((inside(fake, real), inside(real, fake)), abs=1e-12)
    assert 0.05 < got[0] < 0.999 and 0.05 < got[1] < 0.999
    assert fid.precision_recall(real, real.clone()) == (1.0, 1.0)


# ---- ADM's file formats, by the command line


def test_fid_command_on_every_kind_of_input(tmp_path, monkeypatch, capsys):
    """Folder, npz, statistics and ADM's reference batch, whose statistics are believed, agree."""
    from PIL import Image

    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8) for n in (9, 11))
    np.savez(tmp_path / "a.npz", arr_0=a)
    np.savez(tmp_path / "b.npz", b)  # numpy's default name is arr_0
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(b):
        Image.fromarray(image).save(tmp_path / "folder" / f"{i:03d}.png")

    class Small(nn.Module):  # a stand-in: the plumbing is tested here, the network above
        def forward(self, x):
            x = x.float().flatten(1)
            return x[:, ::400], x[:, ::500], x[:, :5].softmax(1)

    small = Small()
    small.register_parameter("p", nn.Parameter(torch.zeros(1)))
    monkeypatch.setattr(fid, "load_inception", lambda weights: small)

    def measured(*args):
        call(fid, *args, "--device", "cpu")
        return json.loads(capsys.readouterr().out.strip().split("\n")[-1])

    base = measured(tmp_path / "a.npz", tmp_path / "b.npz")
    assert {"FID", "sFID", "IS", "precision", "recall"} <= base.keys() and base["num"] == 9
    assert measured(tmp_path / "a.npz", tmp_path / "b.npz", "--batch-size", 4) == base  # uneven
    again = measured(tmp_path / "a.npz", tmp_path / "folder")
    assert again["FID"] == pytest.approx(base["FID"]) and again["precision"] == base["precision"]
    with torch.no_grad():
        outputs = small(torch.from_numpy(b).permute(0, 3, 1, 2))
    (mu, sigma), (mu_s, sigma_s) = (fid.statistics(x) for x in outputs[:2])
    np.savez(tmp_path / "stats.npz", mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    read = measured(tmp_path / "a.npz", tmp_path / "stats.npz")
    assert read["FID"] == pytest.approx(base["FID"]) and "precision" not in read
    assert read["sFID"] == pytest.approx(base["sFID"])
    with np.load(tmp_path / "stats.npz") as s:  # published statistics that differ are believed
        np.savez(tmp_path / "adm.npz", arr_0=b, **{**s, "mu": s["mu"] + 1.0})
    adm = measured(tmp_path / "a.npz", tmp_path / "adm.npz")
    assert adm["FID"] != pytest.approx(base["FID"]) and adm["recall"] == base["recall"]


def test_sfids_features_lie_as_tensorflow_flattens_them():
    """ADM's published mu_s and sigma_s: rows, columns, then the 7 channels of mixed_6/conv."""
    torch.manual_seed(0)
    network, maps = fid.InceptionV3(), []
    network.Mixed_6d.register_forward_hook(lambda layer, inputs, output: maps.append(output))
    with torch.no_grad():
        _, spatial, _ = network(torch.randint(0, 256, (1, 3, 32, 32)))
    assert spatial.shape == (1, 17 * 17 * 7)
    for place in (0, 1, 6, 7, 118, 119, 1000, 2022):
        row, rest = divmod(place, 17 * 7)
        column, channel = divmod(rest, 7)
        assert spatial[0, place] == maps[0][0, channel, row, column]
