"""The method against the paper's equations: losses by float64 loops, the stratified slice, the teacher, the samplers' statistics."""
import math

import numpy as np
import pytest
import torch

import train_stage1
import train_stage2
from build_teacher import Teacher, guided_features
from conftest import TRAIN, write_folder
from models import SIZES, Projector, build
from sample import initial_noise, sample
from train_stage1 import TwoLosses, batch_indices, draw, guided_rows


def tiny(num_classes=10, seed=0, patch=8, size=16):
    """A SiT-Ti whose zero-initialised layers are filled, so that every path carries signal."""
    torch.manual_seed(seed)
    model = build(f"SiT-Ti/{patch}", size, 4, num_classes)
    for p in model.parameters():
        if p.abs().sum() == 0:
            torch.nn.init.normal_(p, std=0.05)
    return model


# ---- the draws

@pytest.mark.parametrize("batch,ways", [(1, 1), (7, 1), (16, 1), (16, 2), (16, 4), (256, 1), (256, 2), (256, 4)])
def test_slice_holds_every_masked_sample_and_is_tight(batch, ways):
    t_min, t_max = 0.4, 0.7
    rows = guided_rows(batch, ways, t_min, t_max)
    for step in range(50):
        t = draw(step, batch, (1, 1, 1), 3, "cpu")[0]
        assert ((t * batch).floor() - torch.arange(batch)).abs().max() <= 1  # one in each stratum (float32 may round up)
        covered = torch.zeros(batch, dtype=torch.bool)
        lengths = set()
        for way in range(ways):
            share = torch.arange(batch)[way::ways][rows]
            covered[share] = True
            lengths.add(len(share))
        assert len(lengths) == 1  # static shapes, the same on every process
        inside = (t >= t_min) & (t <= t_max)
        assert not (inside & ~covered).any()
    wanted = math.ceil(0.3 * batch) + 2 + 2 * (ways - 1)  # the range, its two boundary strata, rounding to whole rows of ways
    assert covered.sum() <= wanted


def test_slice_on_exact_edges():
    """t-min and t-max on stratum borders: a sample exactly on either border is counted."""
    rows = guided_rows(10, 1, 0.4, 0.7)
    assert rows.start <= 4 and rows.stop >= 8
    assert guided_rows(256, 1, 0.0, 1.0) == slice(0, 256)


def test_stratified_t_is_uniform():
    t = torch.stack([draw(step, 16, (1, 1, 1), 0, "cpu")[0] for step in range(4000)]).double()
    assert abs(t.mean() - 0.5) < 3 * 0.2887 / 16 / math.sqrt(16 * 4000)  # its spread is that of one stratum
    counts = ((t >= 0.4) & (t <= 0.7)).sum(1)
    assert counts.min() >= 4 and counts.max() <= 6 and abs(counts.double().mean() - 4.8) < 0.05
    assert ((t >= 0) & (t <= 1)).all()


def test_drop_share_and_independence_of_noise():
    drops, noises = zip(*[(d, n) for _, d, _, n in (draw(s, 64, (2, 2, 2), 5, "cpu") for s in range(500))])
    assert abs(torch.stack(drops).double().mean() - 0.1) < 0.01
    assert len({n.sum().item() for n in noises}) == 500  # another step, other noise
    again = draw(17, 64, (2, 2, 2), 5, "cpu")[3]
    assert torch.equal(again, noises[17])
    assert not torch.equal(draw(17, 64, (2, 2, 2), 6, "cpu")[3], again)


def test_every_epoch_visits_every_image_once():
    seen = np.concatenate([batch_indices(step, 8, 20, 1) for step in range(5)])  # 40 = two epochs of 20
    assert sorted(seen[:20]) == sorted(seen[20:]) == list(range(20))
    assert list(seen[:20]) != list(seen[20:])
    assert len(batch_indices(0, 50, 20, 1)) == 50  # a batch larger than the data


# ---- the losses, against loops in float64

def reference_losses(model, projector, depth, x0, eps, t, y, target_of, t_min, t_max):
    """The losses, read aloud: one image at a time, the mask by an `if`, the mean over the whole batch."""
    diff, aux = 0.0, 0.0
    for i in range(len(t)):
        x_t = (1 - t[i]) * x0[i] + t[i] * eps[i]
        v, tokens = model(x_t[None], t[i][None], y[i][None], tap=depth)
        diff += ((v[0] - (eps[i] - x0[i])) ** 2).sum() / x0[i].numel()
        if t_min <= t[i] <= t_max:
            answer, target = projector(tokens)[0], target_of(i, x_t)
            aux += ((answer - target) ** 2).sum() / target.numel()
    return diff / len(t), aux / len(t)


@pytest.mark.parametrize("batch,ways", [(7, 1), (16, 2), (16, 4)])
@pytest.mark.parametrize("stage", ["velocity", "latent", "guide"])
def test_losses_against_float64_loops(batch, ways, stage, tmp_path):
    """The loop's own forward (draws, interpolant, slice, mask, mean), seen through a recording network, against plain loops."""
    folder = train_stage1.LatentFolder(write_folder(tmp_path / "data"))
    model, depth = tiny().double(), 2
    torch.manual_seed(1)
    if stage == "guide":
        projector, teacher = Projector(model.width, 32).double(), Teacher(tiny(seed=9).double(), 5)
        target = lambda x_t, t, y, x0, v: guided_features(teacher, x_t, t, y, 30.0).double()
    else:
        projector = Projector(model.width, 32, to_latent=(model.patch, 4)).double()
        target = lambda x_t, t, y, x0, v: v if stage == "velocity" else x0
    rows = guided_rows(batch, ways, 0.4, 0.7)
    losses = TwoLosses(model, projector, depth, rows)
    t, drop, posterior, noise = (z.double() if z.is_floating_point() else z for z in draw(3, batch, (4, 16, 16), 0, "cpu"))
    indices = batch_indices(3, batch, len(folder), 0)
    mean, std = torch.from_numpy(folder.moments[indices]).double().chunk(2, dim=1)
    x0, y_true = mean + std * posterior, folder.labels[indices]
    y = torch.where(drop, 10, y_true)
    got_diff = got_aux = 0.0
    for way in range(ways):
        s = slice(way, None, ways)
        x_t = (1 - t[s].view(-1, 1, 1, 1)) * x0[s] + t[s].view(-1, 1, 1, 1) * noise[s]
        v = noise[s] - x0[s]
        diff, aux = losses(x_t, t[s], y[s], v, target(x_t[rows], t[s][rows], y_true[s][rows], x0[s][rows], v[rows]))
        mask = ((t[s][rows] >= 0.4) & (t[s][rows] <= 0.7)).double()
        got_diff, got_aux = got_diff + diff.mean() / ways, got_aux + (aux * mask).sum() / (batch // ways) / ways
    of = {"velocity": lambda i, x_t: noise[i] - x0[i], "latent": lambda i, x_t: x0[i],
          "guide": lambda i, x_t: (lambda c, u: u + 30.0 * (c - u))(*(teacher(x_t[None], t[i][None], label[None])[0]
                                                                     for label in (y_true[i], torch.tensor(10))))}[stage]
    want_diff, want_aux = reference_losses(model, projector, depth, x0, noise, t, y, of, 0.4, 0.7)
    assert want_aux > 0
    torch.testing.assert_close(got_diff, want_diff, rtol=1e-6, atol=0)  # the networks' losses are reduced in float32
    torch.testing.assert_close(got_aux, want_aux, rtol=2e-5, atol=0)


@pytest.mark.parametrize("stage", [1, 2])
def test_what_the_loop_logs_is_the_formula(stage, tmp_path, monkeypatch):
    """One real step of train(): the logged losses are the paper's, for a network that is known (the freshly built one)."""
    data, out = write_folder(tmp_path / "data"), tmp_path / "out"
    flags = [*TRAIN, "--data", data, "--out", out, "--steps", 1, "--log-every", 1, "--seed", 5]
    folder = train_stage1.LatentFolder(data)
    torch.manual_seed(5)
    model = build("SiT-Ti/8", 16, 4, 10)
    projector = Projector(model.width, 32, to_latent=(8, 4) if stage == 1 else None)
    if stage == 2:
        teacher = Teacher(tiny(seed=2), 5)
        monkeypatch.setattr(train_stage2, "load_teacher", lambda path: (teacher, {"scale": 30.0}))
    module = train_stage1 if stage == 1 else train_stage2
    monkeypatch.setattr("sys.argv", ["x", *map(str, flags)])
    module.main()
    import json
    record = json.loads((out / "log.jsonl").read_text())
    t, drop, posterior, noise = draw(0, 8, (4, 16, 16), 5, "cpu")
    assert [0.4 <= x <= 0.7 for x in t[3:6].tolist()] == [False, True, False]  # both ends of the slice are to be masked
    indices = batch_indices(0, 8, len(folder), 5)
    mean, std = torch.from_numpy(folder.moments[indices]).float().chunk(2, dim=1)
    x0, y_true = mean + std * posterior, folder.labels[indices]
    of = (lambda i, x_t: noise[i] - x0[i]) if stage == 1 else (
        lambda i, x_t: guided_features(teacher, x_t[None], t[i][None], y_true[i][None], 30.0)[0])
    depth = {1: 2, 2: 4}[stage]
    with torch.no_grad():
        diff, aux = reference_losses(model, projector, depth, x0, noise, t, torch.where(drop, 10, y_true), of, 0.4, 0.7)
    assert record["loss_diff"] == pytest.approx(diff.item(), rel=1e-5)
    assert record["loss_align" if stage == 1 else "loss_guide"] == pytest.approx(aux.item(), rel=1e-4)


# ---- the teacher and the student

def test_teacher_is_the_full_networks_tap():
    model = tiny()
    x, t, y = torch.randn(3, 4, 16, 16), torch.rand(3), torch.tensor([0, 5, 10])
    tapped = model(x, t, y, tap=5)[1]
    full = len(list(model.parameters()))
    teacher = Teacher(model, 5)
    assert torch.equal(teacher(x, t, y), tapped)
    assert len(teacher.model.blocks) == 5 and len(list(teacher.parameters())) < full
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("classes", [10, 1000])
def test_guided_features(classes):
    """s = 1 gives f_c, s = 0 gives f_u, s = 30 the extrapolation; the null label is num_classes, whatever it is."""
    teacher = Teacher(tiny(num_classes=classes), 5)
    x, t, y = torch.randn(3, 4, 16, 16), torch.rand(3), torch.tensor([0, 5, 9])
    f_c, f_u = teacher(x, t, y), teacher(x, t, torch.full((3,), classes))
    assert (f_c - f_u).abs().max() > 1e-3
    torch.testing.assert_close(guided_features(teacher, x, t, y, 1.0), f_c, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(guided_features(teacher, x, t, y, 0.0), f_u, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(guided_features(teacher, x, t, y, 30.0), f_u + 30 * (f_c - f_u), rtol=1e-4, atol=1e-4)


def test_gradients_reach_only_the_student():
    teacher, student, projector = Teacher(tiny(seed=1), 5), tiny(), Projector(128, 32)
    x, t, y = torch.randn(4, 4, 16, 16), torch.rand(4), torch.tensor([1, 2, 3, 10])
    _, aux = TwoLosses(student, projector, 4, slice(1, 3))(x, t, y, x, guided_features(teacher, x[1:3], t[1:3], y[1:3], 30.0))
    aux.sum().backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in projector.parameters())
    touched = [i for i, block in enumerate(student.blocks, 1) if block.mlp.fc1.weight.grad is not None]
    assert touched == [1, 2, 3, 4]  # blocks up to ds, and none above


def test_the_average_has_no_graph(tmp_path, monkeypatch):
    """The EMA's update must not be recorded by autograd: its graph would grow by a node a tensor and step, all run long."""
    averages, lerp = [], torch._foreach_lerp_
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda a, b, w: (lerp(a, b, w), averages.extend(a)))
    monkeypatch.setattr("sys.argv", ["x", *TRAIN, "--data", str(write_folder(tmp_path / "d")), "--out", str(tmp_path / "o"), "--steps", "2"])
    train_stage1.main()
    assert averages and not any(a.requires_grad or a.grad_fn for a in averages)


@pytest.mark.parametrize("guide_steps,calls", [(3, 3), (0, 0), (9, 5)])
def test_teacher_and_projector_rest_after_guide_steps(guide_steps, calls, tmp_path, monkeypatch):
    counted = {"teacher": 0, "projector": 0, "images": set()}
    teacher = Teacher(tiny(), 5)
    real = train_stage2.guided_features

    def counting(teacher, x_t, t, y, scale):
        counted["teacher"] += 1
        counted["images"].add(len(x_t))
        return real(teacher, x_t, t, y, scale)

    forward = Projector.forward
    monkeypatch.setattr(Projector, "forward", lambda self, x: (counted.update(projector=counted["projector"] + 1), forward(self, x))[1])
    monkeypatch.setattr(train_stage2, "guided_features", counting)
    monkeypatch.setattr(train_stage2, "load_teacher", lambda path: (teacher, {"scale": 30.0}))
    monkeypatch.setattr("sys.argv", ["x", *TRAIN, "--data", str(write_folder(tmp_path / "d")), "--out", str(tmp_path / "o"), "--steps", "5",
                                     "--guide-steps", str(guide_steps)])
    train_stage2.main()
    assert counted["teacher"] == counted["projector"] == calls
    if calls:
        rows = guided_rows(8, 1, 0.4, 0.7)
        assert counted["images"] == {rows.stop - rows.start} and rows.stop - rows.start < 8  # the slice alone


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6])
def test_the_network_is_told_the_null_label_where_one_was_dropped(share, tmp_path, monkeypatch):
    told, forward = [], train_stage1.TwoLosses.forward
    monkeypatch.setattr(train_stage1.TwoLosses, "forward", lambda self, x, t, y, *rest: (told.append(y), forward(self, x, t, y, *rest))[1])
    flags = ["--data", write_folder(tmp_path / "d"), "--out", tmp_path / "o", "--steps", 5, "--label-drop", share, "--seed", 3]
    monkeypatch.setattr("sys.argv", ["x", *map(str, [*TRAIN, *flags])])
    train_stage1.main()
    folder = train_stage1.LatentFolder(tmp_path / "d")
    labels = [folder.labels[batch_indices(step, 8, len(folder), 3)] for step in range(5)]
    dropped = [draw(step, 8, (4, 16, 16), 3, "cpu", share)[1] for step in range(5)]
    assert torch.equal(torch.stack(told), torch.where(torch.stack(dropped), 10, torch.stack(labels)))
    assert (torch.stack(dropped).double().mean() - share).abs() < 0.2


def test_weight_zero_is_vanilla(tmp_path, monkeypatch):
    monkeypatch.setattr(Projector, "forward", lambda self, x: pytest.fail("the projector ran"))
    monkeypatch.setattr("sys.argv", ["x", *TRAIN, "--data", str(write_folder(tmp_path / "d")), "--out", str(tmp_path / "o"), "--steps", "2",
                                     "--align-weight", "0"])
    train_stage1.main()


# ---- the samplers, on a Gaussian, whose velocity field is known

@pytest.mark.parametrize("mode,steps,tolerance", [("euler", 200, 0.02), ("heun", 40, 0.02), ("sde", 250, 0.03)])
def test_samplers_on_a_gaussian(mode, steps, tolerance):
    """Data N(m, s^2): v(x, t) = E[eps - x0 | x_t = x] in closed form; samples must have mean m and deviation s."""
    m, s = 1.5, 0.4

    def velocity(x, t, y):
        t = t.view(-1, 1, 1, 1)
        var = (1 - t) ** 2 * s ** 2 + t ** 2
        rest = x - (1 - t) * m
        return t / var * rest - (m + (1 - t) * s ** 2 / var * rest), None

    noise = torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    x = sample(velocity, noise, torch.zeros(64, dtype=torch.long), 10, steps=steps, mode=mode, seed=3)
    assert x.dtype == torch.float64
    assert abs(x.mean() - m) < tolerance and abs(x.std() - s) < tolerance


def test_guidance_interval_runs_one_branch_outside():
    sizes = []

    def velocity(x, t, y):
        sizes.append((round(float(t[0]), 6), len(x), y.tolist()))
        return -x, None

    sample(velocity, torch.randn(2, 1, 4, 4), torch.tensor([3, 4]), 10, steps=10, mode="euler", cfg=2.0, guidance_low=0.25, guidance_high=0.65)
    assert len(sizes) == 10
    for t, size, labels in sizes:
        assert (size, labels) == ((4, [3, 4, 10, 10]) if 0.25 <= t <= 0.65 else (2, [3, 4]))


def test_number_of_network_evaluations():
    for mode, steps, wanted in (("euler", 12, 12), ("heun", 12, 23), ("sde", 12, 12)):
        count = []
        sample(lambda x, t, y: (count.append(1), -x)[1:], torch.randn(1, 1, 4, 4), torch.tensor([0]), 10, steps=steps, mode=mode)
        assert len(count) == wanted, mode


def test_an_images_noise_depends_on_its_index_alone():
    one, seeds = initial_noise(5, range(7, 8), (2, 3, 3))
    many, more = initial_noise(5, range(0, 10), (2, 3, 3))
    assert torch.equal(one[0], many[7]) and seeds[0] == more[7]
    model = tiny().eval()
    y = torch.arange(6) % 3
    noise, seeds = initial_noise(0, range(6), (4, 16, 16))
    whole = sample(model, noise, y, 10, steps=4, mode="sde", cfg=2.0, seed=seeds)
    parts = torch.cat([sample(model, noise[i:i + 2], y[i:i + 2], 10, steps=4, mode="sde", cfg=2.0, seed=seeds[i:i + 2]) for i in (0, 2, 4)])
    assert (whole - parts).abs().max() < 1e-4


# ---- the model

def test_sizes_and_published_parameter_counts():
    """DiT's table 1 in millions for patch 2 (q/k norm off): S 33, B 130, L 458, XL 675."""
    for name, millions in (("SiT-S/2", 33), ("SiT-B/2", 130), ("SiT-L/2", 458), ("SiT-XL/2", 675)):
        with torch.device("meta"):
            model = build(name, qk_norm=False)
        assert round(sum(p.numel() for p in model.parameters()) / 1e6) == pytest.approx(millions, abs=1)
    assert len(SIZES) == 15


def test_forward_is_zero_at_first_and_deterministic():
    model = build("SiT-Ti/4", 16, 4, 10)
    x, t, y = torch.randn(2, 4, 16, 16), torch.rand(2), torch.tensor([0, 10])
    v, tokens = model.train()(x, t, y, tap=3)
    assert v.shape == x.shape and v.abs().max() == 0 and tokens.shape == (2, 16, 128)  # adaLN-Zero
    model = tiny().train()
    assert torch.equal(model(x, t, y)[0], model(x, t, y)[0])


def test_flops_match_a_count_by_torch():
    from torch.utils.flop_counter import FlopCounterMode
    model = tiny(patch=4).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(torch.randn(1, 4, 16, 16), torch.rand(1), torch.tensor([0]))
    assert model.forward_flops() == pytest.approx(counter.get_total_flops(), rel=0.01)


# ---- what a GPU would do, as far as a CPU can

@pytest.mark.parametrize("stage", [1, 2])
def test_one_graph_without_breaks_and_the_same_numbers(stage):
    """Dynamo and AOTAutograd trace both losses into one graph, compiled once for all steps; under bf16 autocast, too."""
    from torch._dynamo.utils import counters
    torch._dynamo.reset()
    counters.clear()
    model, rows = tiny(), slice(2, 6)
    projector = Projector(128, 32, to_latent=(8, 4) if stage == 1 else None)
    losses = TwoLosses(model, projector, 2, rows)
    compiled = torch.compile(losses, dynamic=False, backend="aot_eager", fullgraph=True)
    for step in range(3):
        x, t, y = torch.randn(8, 4, 16, 16), torch.rand(8), torch.randint(0, 11, (8,))
        target = x[rows] if stage == 1 else torch.randn(4, 4, 128)
        with torch.autocast("cpu", torch.bfloat16):
            got, want = compiled(x, t, y, x, target), losses(x, t, y, x, target)
        for a, b in zip(got, want):
            assert a.dtype == torch.float32
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
        (got[0].mean() + got[1].mean()).backward()
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_grad_checkpoint_changes_memory_not_numbers():
    model = tiny().train()
    x, t, y = torch.randn(2, 4, 16, 16), torch.rand(2), torch.tensor([0, 10])
    grads = []
    for flag in (False, True):
        model.grad_checkpoint = flag
        model.zero_grad()
        model(x, t, y)[0].square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*grads)


def test_bf16_training_follows_float32():
    """Ten steps under bf16 autocast, weights in float32: the loss falls, close to float32's."""
    ends = []
    for enabled in (False, True):
        model = tiny()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        generator = torch.Generator().manual_seed(0)
        x, t, y = torch.randn(8, 4, 16, 16, generator=generator), torch.rand(8, generator=generator), torch.arange(8)
        history = []
        for _ in range(10):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                diff, _ = TwoLosses(model)(x, t, y, x)
            diff.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            history.append(diff.mean().item())
        assert history[-1] < history[0]
        ends.append(history[-1])
    assert ends[0] == pytest.approx(ends[1], rel=0.02)


def test_the_naive_step_has_the_same_loss():
    """The authors' way, on the whole batch with the mask afterwards (tests/bench.py times it), and ours, on the slice."""
    import bench
    naive = bench.Step("naive", "SiT-Ti/2", 8, 32, torch.device("cpu"))
    ours = bench.Step("ours", "SiT-Ti/2", 8, 32, torch.device("cpu"), like=naive)
    with torch.no_grad():
        assert naive.loss().item() == pytest.approx(ours.loss().item(), rel=1e-6)
