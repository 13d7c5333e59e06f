"""The rival methods in experiments/methods: losses against float64 loops, and the scripts."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import TRAIN, build, call, one_loss, tiny, write_folder
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import build_teacher
import train_stage1
import train_stage2
from common import UserError
from experiments.cifar10 import report
from experiments.methods import method, repa, repa_features, sra, vae_repa
from train_stage1 import draw, make_batch, rows_in_range
from vae_latents import LatentFolder

METHODS = {
    "repa": (repa, repa.Repa),
    "sra": (sra, sra.Sra),
    "vae": (vae_repa, vae_repa.VaeRepa),
}
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


def settings(Loss, **more):
    args = Loss.Settings(model="SiT-Ti/8", batch_size=B, projector_dim=32, **more)
    method.complete(args, Loss)
    return args


def in_double(fields):
    known = {name: x for name, x in vars(fields).items() if x is not None}
    return {name: x.double() if x.is_floating_point() else x for name, x in known.items()}


def computed(loss, folder, ema=None):
    """(L_aux as the loop computes it, what it computed it from: batch, network, projector)."""
    folder = LatentFolder(folder)
    loss.prepare(folder, torch.device("cpu"))
    if ema is not None:
        loss.ema = ema
    model = filled(seed=1)
    projector = loss.projector(model).double()
    draws = draw(3, loss.args, folder, "cpu")
    draws = type(draws)(**in_double(draws))
    draws.drop = torch.arange(B) % 3 == 0  # so that true and y_input labels differ
    draws.u = torch.linspace(0.1, 0.9, B, dtype=torch.float64).flip(0)  # t' is clamped for some
    batch = make_batch(folder, draws)
    assert batch.x_t.dtype == torch.float64
    rows = rows_in_range(B, 1, loss.t_min, loss.t_max)
    assert rows == slice(0, B)  # at all t
    losses = one_loss(model, projector, loss, rows)
    _, aux = losses(batch.x_t, batch.t, batch.y_input, batch.velocity, loss.target(batch[rows]))
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
    args = settings(repa.Repa, features=str(features), depth=3)
    got, batch, model, projector = computed(repa.Repa(args), folder)
    table, wanted = np.load(features).astype(np.float64), 0.0
    for i in range(B):
        answer = projector(one(model, batch.x_t[i], batch.t[i], batch.y_input[i], 3)).numpy()
        for a, b in zip(answer, table[batch.indices[i]], strict=True):
            wanted -= (a @ b) / math.sqrt((a @ a) * (b @ b)) / T / B
    close(got, wanted)


@torch.no_grad()
def test_sra(folder):
    loss, ema = sra.Sra(settings(sra.Sra, depth=2)), filled(seed=2)
    for _ in range(2):  # the second time with an EMA that has moved
        got, batch, model, projector = computed(loss, folder, ema)
        wanted, clamped = 0.0, 0
        for i in range(B):
            answer = projector(one(model, batch.x_t[i], batch.t[i], batch.y_input[i], 2))
            t = batch.t[i] - 0.2 * batch.u[i]
            clamped += int(t < 0)
            t = max(t, torch.zeros_like(t))
            x = (1 - t) * batch.x0[i] + t * batch.eps[i]
            wanted += smooth_l1(answer, one(ema, x, t, batch.y_input[i], 5)) / B
        close(got, wanted)
        assert 0 < clamped < B and (batch.y_input != batch.y).any()
        assert len(ema.blocks) == ema.depth == 8 and ema.final_layer is not None  # left whole
        for p in ema.parameters():
            p.mul_(1.1)


@torch.no_grad()
def test_vae_repa(folder):
    """Each number of the answer is of the latent's place that the token's patch covers."""
    got, batch, model, projector = computed(
        vae_repa.VaeRepa(settings(vae_repa.VaeRepa, depth=3)), folder
    )
    wanted = 0.0
    for i in range(B):
        answers = projector.mlp(one(model, batch.x_t[i], batch.t[i], batch.y_input[i], 3))
        for token, answer in enumerate(answers):
            row, column = 8 * (token // 2), 8 * (token % 2)  # two patches of 8 in a row
            patch = batch.x0[i, :, row : row + 8, column : column + 8]
            wanted += smooth_l1(answer.view(8, 8, 4), patch.permute(1, 2, 0)) / T / B
    close(got, wanted)


def test_the_papers_blocks_and_weights(monkeypatch):
    wanted = {
        "repa": (0.5, {"B": [4], "L": [8], "XL": [8]}),
        "sra": (0.2, {"B": [3, 8], "L": [6, 16], "XL": [8, 20]}),
        "vae": (1.0, {"B": [2], "L": [8], "XL": [8]}),
    }
    seen = []
    monkeypatch.setattr(method, "train", lambda args, loss: seen.append((args, loss)))
    for name, (weight, sizes) in wanted.items():
        for size, blocks in sizes.items():
            call(METHODS[name][0], "--model", f"SiT-{size}/2")
            args, loss = seen.pop()
            assert [loss.depth, *([loss.ema_depth] if name == "sra" else [])] == blocks
            assert args.depth == loss.depth and args.out == f"out/{name}"
            assert (loss.weight, loss.t_min, loss.t_max) == (weight, 0, 1)
            assert loss.until > 4_000_000  # the whole run
        call(METHODS[name][0], "--model", "SiT-B/2", "--weight", 3, "--depth", 1, "--out", "x")
        args, loss = seen.pop()
        assert (loss.weight, loss.depth, args.out) == (3, 1, "x")


# ---- The scripts themselves


@pytest.mark.parametrize("name", METHODS)
def test_two_steps_and_two_more(name, folder, features, tmp_path):
    out = tmp_path / "run"
    more = ["--features", features] if name == "repa" else []
    for steps in (2, 4):
        call(METHODS[name][0], *TRAIN, *more, "--data", folder, "--out", out, "--steps", steps)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert math.isfinite(line[f"loss_{name}"]) and line[f"loss_{name}"] != 0, line


def test_features_of_a_cnn_feed_repa(folder, tmp_path):
    """Images of ten plain colours, in no order: each row of the features is its image's."""
    rng = np.random.default_rng(0)
    colours, kinds = rng.integers(0, 256, (10, 1, 1, 3)).astype(np.uint8), rng.integers(0, 10, N)
    write_images(folder, np.tile(colours[kinds], (1, 32, 32, 1)))
    call(repa_features, "--data", folder, "--model", "SiT-Ti/8", "--steps", 3)
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


def test_token_order_of_the_cnn():
    """A white patch changes its own token most: tokens are in the order of the network's."""
    images = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    images[1, 8:16, 24:32] = 255  # second row, last column of 4 x 4
    torch.manual_seed(0)
    blank, patch = repa_features.tokens(repa_features.CNN(10), images, 4)
    assert (patch - blank).abs().mean(dim=1).argmax() == 4 + 3


@pytest.mark.parametrize("shape", [(N, T + 5, 24), (N - 1, T, 24), (N, 24), None])
def test_features_that_do_not_fit(shape, folder, tmp_path):
    wrong, says = tmp_path / "wrong.npy", f"not .{N}, {T}. images, tokens; make it with"
    if shape:
        np.save(wrong, np.zeros(shape, np.float16))
    if not shape or len(shape) == 2:
        says = "wrong.npy: is no array .N, T, D_e.; make it with repa_features.py"
    flags = ["--data", folder, "--out", tmp_path / "run", "--features", wrong]
    with pytest.raises(UserError, match=says):
        call(repa, *TRAIN, *flags)


def test_other_features_do_not_continue_a_run(folder, features, tmp_path):
    flags = [*TRAIN, "--data", folder, "--out", tmp_path / "run", "--features", features]
    call(repa, *flags, "--steps", 2)
    np.save(features, np.load(features) + 1)
    with pytest.raises(UserError, match="another teacher"):
        call(repa, *flags, "--steps", 4)


def test_block_that_the_network_lacks(folder, tmp_path):
    with pytest.raises(UserError, match="--depth 9: SiT-Ti/8 has blocks 1 to 8"):
        call(sra, *TRAIN, "--data", folder, "--out", tmp_path / "run", "--depth", 9)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", METHODS)
def test_extra_cost_against_counted_flops(name, folder, features):
    """What torch counts in a step with the loss beyond one without it, backward pass included."""
    more = {"features": str(features)} if name == "repa" else {}
    Loss = METHODS[name][1]
    args, latents = settings(Loss, **more), LatentFolder(folder)
    loss = Loss(args)
    loss.prepare(latents, torch.device("cpu"))
    model = filled(1).float()
    loss.ema = filled(2).float().eval().requires_grad_(False)
    batch = make_batch(latents, draw(0, args, latents, "cpu"))

    def flops(projector):
        with FlopCounterMode(display=False) as counter:
            target = loss.target(batch) if projector else None
            losses = one_loss(model, projector, loss, slice(0, B))
            sum(losses(batch.x_t, batch.t, batch.y_input, batch.velocity, target)).backward()
        return counter.get_total_flops()

    vanilla = 3 * B * model.forward_flops()
    extra = (flops(loss.projector(model)) - flops(None)) / vanilla
    assert loss.extra_cost(model) == pytest.approx(extra, rel=0.03)


def test_report(folder, tmp_path, capsys):
    """The table's total compute is what torch counts in all steps of both stages."""
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
    compute = report.compute(runs / "descTi-seed1", 3, "SiT-Ti/2")
    assert compute == pytest.approx((teacher + student) / vanilla_step, rel=0.02)
    stage_1 = report.compute(runs / "Ti-seed2", 2, "SiT-Ti/2")
    assert stage_1 == pytest.approx(teacher / vanilla_step, rel=0.01)
    assert report.compute(runs / "vanilla-seed1", 2, "SiT-Ti/2") == pytest.approx(2)
    rival = counted(sra, "sra", "--steps", 2) / vanilla_step
    assert report.compute(runs / "sra", 2, "SiT-Ti/2") == pytest.approx(rival, 0.02)
    np.save(tmp_path / "cnn.npy", np.zeros((N, 64, 24), np.float16))
    step = 3 * 8 * build("SiT-Ti/2", 16, 4, 10).forward_flops()  # of TRAIN's batch, attention, too
    encoder = {"flops_training": 5 * step, "flops_encoding": 2 * step}
    (tmp_path / "cnn.json").write_text(json.dumps(encoder))
    rival = counted(repa, "repa", "--features", tmp_path / "cnn.npy", "--steps", 2) / vanilla_step
    assert report.compute(runs / "repa", 2, "SiT-Ti/2") == pytest.approx(rival + 7, 0.02)

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
    assert "| vanilla | 1 | 2 | 2 | 30.00 | 30.0 | 0.900 | 0.200 |" in lines
    both = f"1, 2 | 3 | {compute:.0f} | 21.50 ± 2.12 | 45.0 ± 7.1 | 0.900 ± 0.000 | 0.200 ± 0.000"
    assert f"| descTi | {both} |" in lines
    assert Image.open(tmp_path / "figure.png").size == (840, 400)
