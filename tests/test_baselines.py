"""The rival methods in experiments/baselines: losses against float64 loops, and the scripts."""

import json
import math
import shutil
import sys

import models
from models import UserError

import numpy as np
import pytest
import torch
from conftest import TRAIN, call, tiny, write_folder
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import build_teacher
import train_stage1
import train_stage2
from experiments.baselines import cost, dispersive, repa, repa_features, sra, vae_repa
from train_stage1 import Losses, batch_indices, draw, make_batch, rows_in_range
from vae_latents import LatentFolder

METHODS = {"repa": repa, "sra": sra, "vae": vae_repa, "disp": dispersive}
B, N, T = 16, 48, 4  # images in a batch, in the folder; tokens of SiT-Ti/8 on latents of side 16


def filled(seed):
    """tiny() in float64, on which t has a strong effect, too."""
    model = tiny(seed=seed).double()
    with torch.no_grad():
        for p in model.t_embedder.parameters():
            p.mul_(2)
    return model


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "data", num=N)


@pytest.fixture
def features(tmp_path):
    path = tmp_path / "features.npy"
    np.save(path, np.random.default_rng(5).normal(size=(N, T, 24)).astype(np.float16))
    return path


def write_images(folder, images):
    """The PNG files that a latent folder was made from, in the order of its rows."""
    names = [f"{i}.png" for i in range(len(images))]
    for name, image in zip(names, images, strict=True):
        Image.fromarray(image).save(folder / name)
    (folder / "files.json").write_text(json.dumps(names))
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "source": str(folder)}))


def settings(module, **more):
    return module.Settings(model="SiT-Ti/8", batch_size=B, projector_dim=32, **more)


def computed(loss, folder, ema=None):
    """(L_aux as the loop computes it, what it computed it from: batch, network, projector)."""
    folder = LatentFolder(folder)
    loss.prepare(folder, torch.device("cpu"))
    if ema is not None:
        loss.ema = ema
    model = filled(seed=1)
    projector = loss.projector(model).double()
    draws = [x.double() if x.is_floating_point() else x for x in draw(3, B, (4, 16, 16), 0, "cpu")]
    draws[1] = torch.arange(B) % 3 == 0  # the label drop, so that true and told labels differ
    draws[4] = torch.linspace(0.1, 0.9, B, dtype=torch.float64).flip(0)  # t' is clamped for some
    indices = batch_indices(3, B, N, 0)
    moments = torch.from_numpy(folder.moments[indices]).double()
    indices = torch.from_numpy(indices)
    batch = make_batch(indices, moments, folder.labels[indices], draws, 1.0, null_label=10)
    double = {name: x.double() for name, x in vars(batch).items() if x.is_floating_point()}
    batch = type(batch)(**{**vars(batch), **double})
    mean, std = moments.chunk(2, dim=1)
    batch.x0 = mean + std * draws[2]  # make_batch rounds the moments to float32, once
    batch.velocity = batch.eps - batch.x0
    t = batch.t.view(-1, 1, 1, 1)
    batch.x_t = (1 - t) * batch.x0 + t * batch.eps
    rows = rows_in_range(B, 1, loss.t_min, loss.t_max)
    assert rows == slice(0, B)  # at all t
    losses = Losses(model, projector, loss, rows)
    _, aux = losses(batch.x_t, batch.t, batch.told, batch.velocity, loss.target(batch[rows]))
    return aux.item(), batch, model, projector


def one(model, x, t, y, depth):
    """The tokens of one image after one block, (T, D)."""
    return model(x[None], t[None], y[None], taps=[depth])[1][depth][0]


def smooth_l1(answer, target, beta=0.05):
    """The definition, number by number: a parabola within beta, straight lines outside."""
    total = 0.0
    for a, b in zip(answer.flatten().tolist(), target.flatten().tolist(), strict=True):
        d = abs(a - b)
        total += d * d / (2 * beta) if d < beta else d - beta / 2
    return total / answer.numel()


def close(got, wanted):
    assert got == pytest.approx(wanted, rel=1e-5), (got, wanted)


@torch.no_grad()
def test_repa(folder, features):
    args = settings(repa, features=str(features), repa_depth=3)
    got, batch, model, projector = computed(repa.Repa(args, 3, 0.5), folder)
    table, wanted = np.load(features).astype(np.float64), 0.0
    for i in range(B):
        answer = projector(one(model, batch.x_t[i], batch.t[i], batch.told[i], 3)).numpy()
        for a, b in zip(answer, table[batch.indices[i]], strict=True):
            wanted -= (a @ b) / math.sqrt((a @ a) * (b @ b)) / T / B
    close(got, wanted)


@torch.no_grad()
def test_sra(folder):
    args, ema = settings(sra, sra_depth=2, ema_depth=5), filled(seed=2)
    loss = sra.Sra(args, 2, 0.2)
    for _ in range(2):  # the second time with an EMA that has moved
        got, batch, model, projector = computed(loss, folder, ema)
        wanted, clamped = 0.0, 0
        for i in range(B):
            answer = projector(one(model, batch.x_t[i], batch.t[i], batch.told[i], 2))
            t = batch.t[i] - 0.2 * batch.u[i]
            clamped += int(t < 0)
            t = max(t, torch.zeros_like(t))
            x = (1 - t) * batch.x0[i] + t * batch.eps[i]
            wanted += smooth_l1(answer, one(ema, x, t, batch.told[i], 5)) / B
        close(got, wanted)
        assert 0 < clamped < B and (batch.told != batch.y).any()
        assert len(ema.blocks) == ema.depth == 8 and ema.final_layer is not None  # left whole
        for p in ema.parameters():
            p.mul_(1.1)


@torch.no_grad()
def test_vae_repa(folder):
    args = settings(vae_repa, vae_depth=2)
    got, batch, model, projector = computed(vae_repa.VaeRepa(args, 2, 1.0), folder)
    wanted = 0.0
    for i in range(B):
        answer = projector(one(model, batch.x_t[i], batch.t[i], batch.told[i], 2))
        latent = torch.empty(4, 16, 16, dtype=torch.float64)
        for token in range(T):  # rows of patches; within one: row, column, channel
            row, column = token // 2 * 8, token % 2 * 8
            patch = answer[token].view(8, 8, 4).permute(2, 0, 1)
            latent[:, row : row + 8, column : column + 8] = patch
        wanted += smooth_l1(latent, batch.x0[i]) / B
    close(got, wanted)
    layers = [m for m in projector if isinstance(m, torch.nn.Linear)]
    assert [m.out_features for m in layers] == [256, 256, 256, 256, 8 * 8 * 4]


@pytest.mark.parametrize("size,millions", [("B", 8), ("XL", 18)])
def test_vae_repa_has_the_reported_number_of_parameters(size, millions):
    with torch.device("meta"):
        model = models.build(f"SiT-{size}/2")
        projector = vae_repa.VaeRepa(settings(vae_repa), 2).projector(model)
    assert int(sum(p.numel() for p in projector.parameters()) / 1e6) == millions


@torch.no_grad()
@pytest.mark.parametrize("more", [{}, {"disp_tau": 2.0}])
def test_dispersive(more, folder):
    args, tau = settings(dispersive, disp_depth=2, **more), more.get("disp_tau", 0.5)
    got, batch, model, _ = computed(dispersive.Dispersive(args, 2, 0.5), folder)
    z = [one(model, batch.x_t[i], batch.t[i], batch.told[i], 2).flatten() for i in range(B)]
    total = 0.0
    for a in z:
        for b in z:
            total += math.exp(-((a - b) ** 2).sum().item() / len(a) / tau)
    assert total > B + 5  # pairs of different images matter
    close(got, math.log(total / B**2))


def test_dispersive_gradient(folder):
    """Analytic against numeric, at equal images, too, where a distance would have no slope."""
    loss = dispersive.Dispersive(settings(dispersive), 2)
    z = torch.randn(4, 3, 5, dtype=torch.float64)
    z[1] = z[0]
    z.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda z: loss.distance(z, None).mean(), [z])


def test_default_blocks(monkeypatch):
    """The papers' blocks for the papers' sizes."""
    wanted = {
        repa: {"B": [4], "L": [8], "XL": [8]},
        sra: {"B": [3, 8], "L": [6, 16], "XL": [8, 20]},
        vae_repa: {"B": [2], "L": [8], "XL": [8]},
        dispersive: {"B": [3], "L": [6], "XL": [7]},
    }
    for module, sizes in wanted.items():
        for size, blocks in sizes.items():
            seen = []
            monkeypatch.setattr(module, "train", lambda args, loss, seen=seen: seen.append(loss))
            monkeypatch.setattr(sys, "argv", ["x", "--model", f"SiT-{size}/2"])
            module.main()
            found = [seen[0].depth, *([seen[0].args.ema_depth] if module is sra else [])]
            assert found == blocks, (module.__name__, size)
            weight = {repa: 0.5, sra: 0.2, vae_repa: 1.0, dispersive: 0.5}[module]
            assert (seen[0].weight, seen[0].t_min, seen[0].t_max) == (weight, 0, 1)
            assert seen[0].until > 4_000_000  # the whole run


# ---- The scripts themselves


@pytest.mark.parametrize("name", METHODS)
def test_two_steps_and_two_more(name, folder, features, tmp_path):
    out = tmp_path / "run"
    more = ["--features", features] if name == "repa" else []
    for steps in (2, 4):
        call(METHODS[name], *TRAIN, *more, "--data", folder, "--out", out, "--steps", steps)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert math.isfinite(line[f"loss_{name}"]) and line[f"loss_{name}"] != 0, line


def test_features_of_a_cnn_feed_repa(folder, tmp_path):
    """Images of ten plain colours, in no order: each row of the features is its image's."""
    rng = np.random.default_rng(0)
    colours, kinds = rng.integers(0, 256, (10, 1, 1, 3)).astype(np.uint8), rng.integers(0, 10, N)
    write_images(folder, np.tile(colours[kinds], (1, 32, 32, 1)))
    flags = ["--data", folder, "--model", "SiT-Ti/8", "--device", "cpu"]
    call(repa_features, *flags, "--encoder", "cnn", "--steps", 3)
    features = np.load(folder / "cnn.npy").astype(np.float64)
    info = json.loads((folder / "cnn.json").read_text())
    assert features.shape == (N, T, 96) and 0 <= info["accuracy"] <= 1
    assert info["flops_training"] == 3 * 128 * 3 / N * info["flops_encoding"] > 0
    same = np.array([[np.allclose(a, b, atol=1e-2) for b in features] for a in features])
    assert (same == (kinds[:, None] == kinds)).all()
    run = tmp_path / "run"
    more = ["--features", folder / "cnn.npy", "--data", folder, "--out", run, "--steps", 2]
    call(repa, *TRAIN, *more)
    assert math.isfinite(json.loads((run / "log.jsonl").read_text())["loss_repa"])


def test_token_order_of_the_cnn(folder):
    """A white patch changes its own token most: tokens are in the order of the network's."""
    images = np.zeros((N, 32, 32, 3), np.uint8)
    images[1, 8:16, 24:32] = 255  # second row, last column of 4 x 4
    write_images(folder, images)
    args = repa_features.Settings(data=str(folder), steps=1)
    tokens, _ = repa_features.train_cnn(args, LatentFolder(folder), 4, torch.device("cpu"))
    with torch.no_grad():
        blank, patch = tokens(np.arange(2))
    assert (patch - blank).abs().mean(dim=1).argmax() == 4 + 3


@pytest.mark.parametrize("shape", [(N, T + 5, 24), (N - 1, T, 24), (N, 24)])
def test_features_that_do_not_fit(shape, folder, tmp_path):
    np.save(tmp_path / "wrong.npy", np.zeros(shape, np.float16))
    flags = ["--data", folder, "--out", tmp_path / "run", "--features", tmp_path / "wrong.npy"]
    with pytest.raises(UserError, match=rf"not \({N} images, {T} tokens, D_e\); make it"):
        call(repa, *TRAIN, *flags)
    with pytest.raises(UserError, match="absent.npy: cannot be read"):
        call(repa, *TRAIN, *flags[:-1], tmp_path / "absent.npy")


def test_other_features_do_not_continue_a_run(folder, features, tmp_path):
    flags = [*TRAIN, "--data", folder, "--out", tmp_path / "run", "--features", features]
    call(repa, *flags, "--steps", 2)
    np.save(features, np.load(features) + 1)
    with pytest.raises(UserError, match="another teacher"):
        call(repa, *flags, "--steps", 4)


def test_block_that_the_ema_lacks(folder, tmp_path):
    with pytest.raises(UserError, match="--ema-depth 9: SiT-Ti/8 has blocks 1 to 8"):
        call(sra, *TRAIN, "--data", folder, "--out", tmp_path / "run", "--ema-depth", 9)


@pytest.mark.parametrize("name", METHODS)
def test_extra_cost_against_counted_flops(name, folder, features):
    """What torch counts in a step with the loss beyond one without it, backward pass included."""
    more = {"repa": {"features": str(features)}, "sra": {"ema_depth": 5}}.get(name, {})
    args = settings(METHODS[name], **more)
    classes = {"repa": repa.Repa, "sra": sra.Sra, "vae": vae_repa.VaeRepa}
    loss = classes.get(name, dispersive.Dispersive)(args, 2)
    loss.prepare(LatentFolder(folder), torch.device("cpu"))
    model = filled(1).float()
    loss.ema = filled(2).float().eval().requires_grad_(False)
    draws = draw(0, B, (4, 16, 16), 0, "cpu")
    indices = torch.arange(B)
    batch = make_batch(indices, torch.randn(B, 8, 16, 16).abs(), indices % 10, draws, 1.0, 10)

    def flops(projector):
        with FlopCounterMode(display=False) as counter:
            target = loss.target(batch) if projector else None
            losses = Losses(model, projector, loss, slice(0, B))
            sum(losses(batch.x_t, batch.t, batch.told, batch.velocity, target)).backward()
        return counter.get_total_flops()

    vanilla = 3 * B * model.forward_flops()
    extra = (flops(loss.projector(model)) - flops(None)) / vanilla
    assert METHODS[name].extra_cost(model, args) == pytest.approx(extra, rel=0.03)
    assert cost.vanilla_steps(5 * vanilla, model, args) == pytest.approx(5)


def test_report(folder, tmp_path, capsys, monkeypatch):
    """The table's total compute is what torch counts in all steps of both stages."""
    monkeypatch.setattr(models, "SIZES", dict(models.SIZES))  # to which the report adds its own
    from experiments import report

    runs = tmp_path / "runs"

    def counted(script, name, *flags):
        train = [*TRAIN, "--model", "SiT-Ti/2", "--projector-dim", 256, "--data", folder]
        with FlopCounterMode(display=False) as counter:
            call(script, *train, "--out", runs / name, *flags)
        return counter.get_total_flops()

    vanilla_step = counted(train_stage1, "vanilla-seed1", "--align-weight", 0, "--steps", 2) / 2
    teacher = counted(train_stage1, "Ti-seed2", "--steps", 2)
    call(build_teacher, "--ckpt", runs / "Ti-seed2", "--out", runs / "Ti-seed2/teacher")
    guided = ["--teacher", runs / "Ti-seed2/teacher/teacher.pt", "--guide-steps", 2, "--steps", 3]
    student = counted(train_stage2, "descTi-seed1", *guided, "--t-min", 0, "--t-max", 1)
    compute = report.compute(runs / "descTi-seed1", 3)
    assert compute == pytest.approx((teacher + student) / vanilla_step, rel=0.02)
    stage_1 = report.compute(runs / "Ti-seed2", 2)
    assert stage_1 == pytest.approx(teacher / vanilla_step, rel=0.01)
    assert report.compute(runs / "vanilla-seed1", 2) == pytest.approx(2)

    shutil.copytree(runs / "descTi-seed1", runs / "descTi-seed2")
    judged = {
        ("vanilla", 1, 2): (30, 0.3),
        ("descTi", 1, 3): (20, 0.4),
        ("descTi", 2, 3): (23, 0.5),
    }
    for (row, seed, step), (distance, share) in judged.items():
        figures = {"FD-CNN": distance, "agreement": share, "precision": 0.9, "recall": 0.2}
        path = runs / f"{row}-seed{seed}/samples-{step}/judged.json"
        path.parent.mkdir()
        path.write_text(json.dumps(figures))
    call(report, "--runs", runs, "--figure", tmp_path / "figure.png")
    lines = capsys.readouterr().out.splitlines()
    assert "| vanilla SiT | 1 | 2 | 2 | 30.00 | 30.0 | 0.900 | 0.200 |" in lines
    both = f"1, 2 | 3 | {compute:.0f} | 21.50 ± 2.12 | 45.0 ± 7.1 | 0.900 ± 0.000 | 0.200 ± 0.000"
    assert f"| as described, Ti teacher | {both} |" in lines
    assert Image.open(tmp_path / "figure.png").size == (900, 420)
