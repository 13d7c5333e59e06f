"""experiments/methods/repa_e.py: the VAE's gradient and latents by formulas, runs, the export."""

import json

import pytest
import torch
from conftest import TRAIN, call, tiny

import common
import models
import sample
from common import UserError
from experiments.cifar10.judge import source_images
from experiments.methods import repa_e
from train_stage1 import draw, make_batch
from vae_latents import LatentFolder, find_vae, load_vae

CPU = torch.device("cpu")
B = 8


def call_with(verb, *flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["repa_e.py", verb, *map(str, flags)])
        repa_e.main()


def test_the_step_of_the_vae(latents, runs):
    """Latents, L1, KL and L_guide by their definitions; the student and P2 get no gradient."""
    args = repa_e.Settings(model="SiT-Ti/8", batch_size=B, t_min=0.3, projector_dim=16)
    args.teacher, args.vae_lr = str(runs / "teacher/teacher.pt"), 0.1
    folder, loss = LatentFolder(latents), repa_e.EndToEnd(args, 3)
    loss.prepare(folder, CPU)
    model = tiny(num_classes=8)
    loss.module, loss.rows = loss.projector(model), slice(2, 7)
    before = {"mean": loss.norm.running_mean.clone(), "var": loss.norm.running_var.clone()}
    draws = draw(1, args, folder, "cpu")
    batch = loss.batch_of(folder, draws)

    vae, frozen = find_vae(None, folder.meta), make_batch(folder, draws)
    images = source_images(folder)[draws.indices].permute(0, 3, 1, 2) / 127.5 - 1
    mean, std = vae.encode(images)
    z = mean + std * draws.posterior
    scaled = vae.scale * z
    centre, spread = scaled.mean(dim=(0, 2, 3)), scaled.var(dim=(0, 2, 3), unbiased=False)
    x0 = (scaled - centre.view(1, 4, 1, 1)) / (spread + 1e-4).sqrt().view(1, 4, 1, 1)
    torch.testing.assert_close(batch.x0, x0.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(batch.velocity, (draws.eps - x0).detach(), atol=1e-5, rtol=1e-4)
    count = scaled[:, 0].numel()
    moved = {"mean": centre, "var": spread * count / (count - 1)}
    for name, got in (("mean", loss.norm.running_mean), ("var", loss.norm.running_var)):
        torch.testing.assert_close(got, 0.9 * before[name] + 0.1 * moved[name].detach())
    moments = torch.from_numpy(folder.moments).float() * vae.scale
    total = moments[:, :4].var(dim=(0, 2, 3), unbiased=False) + (moments[:, 4:] ** 2).mean(
        (0, 2, 3)
    )
    torch.testing.assert_close(before["var"], total, rtol=1e-3, atol=1e-4)

    posterior = torch.distributions.Normal(mean, std)
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0, 1)).sum() / B
    guide = 0.0
    for i in range(B):
        if not 0.3 <= draws.t[i] <= 0.7:
            continue
        x_t = (1 - draws.t[i]) * x0[i] + draws.t[i] * draws.eps[i]
        _, tokens = model(x_t[None], draws.t[i : i + 1], batch.y_input[i : i + 1], taps=[3])
        features = []
        for y in (batch.y[i : i + 1], torch.tensor([8])):
            seen = frozen.x_t[i : i + 1], draws.t[i : i + 1]
            features.append(
                loss.teacher(*seen, y, taps=[loss.teacher.depth])[1][loss.teacher.depth]
            )
        f_guided = features[1] + loss.s * (features[0] - features[1])
        guide = guide + (loss.module(tokens[3]) - f_guided).square().mean() / B
    error = (vae.decode(z) - images).abs().mean()
    weights = list(vae.parameters())
    wanted = torch.autograd.grad(error + 1e-6 * kl + 1.5 * guide, weights)
    length = torch.stack([g.norm() for g in wanted]).norm()
    assert guide > 0
    for own, gradient in zip(loss.vae.parameters(), wanted, strict=True):
        torch.testing.assert_close(own.grad, gradient / max(1, length), atol=1e-4, rtol=1e-2)
    changed = [not torch.equal(a, b) for a, b in zip(loss.vae.parameters(), weights, strict=True)]
    assert all(changed)
    assert all(p.grad is None for p in [*model.parameters(), *loss.module.parameters()])
    torch.testing.assert_close(loss.target(None)[0], loss.guided[0])


def test_it_continues_bit_for_bit_and_is_exported(latents, runs, tmp_path):
    flags = [*TRAIN, "--data", latents, "--teacher", runs / "teacher/teacher.pt"]
    flags += ["--vae-lr", 0.01]
    whole, cut, plain = (tmp_path / name for name in ("whole", "cut", "plain"))
    call_with("train", *flags, "--steps", 4, "--out", whole)
    for steps in (2, 4):
        call_with("train", *flags, "--steps", steps, "--out", cut)
    logs = [(run / "log.jsonl").read_text() for run in (whole, cut)]
    assert logs[0] == logs[1] and json.loads(logs[0].splitlines()[0])["loss_end"] > 0
    saved = [common.load_file(run / "ckpt-0000004.pt") for run in (whole, cut)]
    parts = [content["projector"]["_extra_state"] for content in saved]
    for name in ("vae", "norm"):
        assert all(torch.equal(parts[0][name][key], parts[1][name][key]) for key in parts[0][name])
    assert all(
        torch.equal(saved[0]["model"][key], saved[1]["model"][key]) for key in saved[0]["model"]
    )

    call_with("export", "--out", whole, "--to", plain)
    exported, norm = load_vae(plain / "vae.pt"), parts[0]["norm"]
    trained = find_vae(None, saved[0]["meta"])
    trained.load_state_dict(parts[0]["vae"])
    mean, deviation = norm["running_mean"].view(1, 4, 1, 1), (norm["running_var"] + 1e-4).sqrt()
    deviation = deviation.view(1, 4, 1, 1)
    x0 = torch.randn(2, 4, 16, 16)
    with torch.no_grad():
        z = (x0 * deviation + mean) / trained.scale
        torch.testing.assert_close(exported.decode(x0), trained.decode(z), atol=1e-4, rtol=1e-3)
        images = torch.rand(2, 3, 32, 32) * 2 - 1
        own, theirs = exported.encode(images), trained.encode(images)
        wanted = (trained.scale * theirs[0] - mean) / deviation
        torch.testing.assert_close(own[0], wanted, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(own[1], trained.scale * theirs[1] / deviation)
    model, again = models.load_checkpoint(plain)
    assert find_vae(None, again["meta"]).scale == 1.0
    draw_some = ["--ckpt", plain, "--num-images", 8, "--mode", "euler", "--steps", 1]
    call(sample, *draw_some, "--device", "cpu", "--out", tmp_path / "samples")


def test_mistakes(latents, runs, tmp_path):
    flags = [*TRAIN, "--data", latents, "--teacher", runs / "teacher/teacher.pt", "--steps", 2]
    with pytest.raises(UserError, match="without --accum"):
        call_with("train", *flags, "--accum", 2, "--out", tmp_path / "out")
    with pytest.raises(UserError, match="give `train` or `export`"):
        call_with("sample")
    with pytest.raises(UserError, match="none of repa_e.py's"):
        call_with("export", "--out", runs / "stage2", "--to", tmp_path / "to")
