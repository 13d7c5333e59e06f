"""The method against the paper's equations.

The losses by loops in float64, the draws, the slice of the batch, an update, guidance's end.
"""

import copy
import dataclasses
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    NULL,
    TRAIN,
    batch_indices,
    build,
    call,
    one_loss,
    teacher_file,
    tiny,
    write_folder,
)

import train_stage1
import train_stage2
from build_teacher import guided_features, load_teacher
from common import UserError
from models import SIZES, SiT
from train_stage1 import (
    Alignment,
    Auxiliary,
    Batch,
    LossNetwork,
    Projector,
    State,
    draw,
    make_batch,
    rows_in_range,
    train,
)
from train_stage2 import Guidance
from vae_latents import LatentFolder


class Latents:
    """What a step needs of a latent folder, in memory: random numbers, or the arrays given."""

    def __init__(self, shape=(4, 16, 16), images=48, moments=None, labels=None, scale=1.0):
        channels, height, width = self.shape = shape
        generator = torch.Generator().manual_seed(0)
        mean = torch.randn(images, *shape, generator=generator)
        std = 0.1 + torch.rand(images, *shape, generator=generator)
        random = torch.cat([mean, std], dim=1).half()
        self.moments = random if moments is None else torch.tensor(moments)
        self.labels = torch.arange(images) % NULL if labels is None else labels
        classes = [f"class {i}" for i in range(NULL)]
        self.meta = {"channels": channels, "height": height, "width": width}
        self.meta.update(classes=classes, scale=scale)

    def __len__(self):
        return len(self.labels)

    def read(self, indices):
        rows = indices.tolist()
        return torch.stack([self.moments[i] for i in rows]), self.labels[rows]


def drawn(step, batch, shape=(1, 1, 1), seed=0, label_drop=0.1, images=48):
    """The draws of the whole batch of a step, for `images` latents of this shape."""
    args = SimpleNamespace(batch_size=batch, seed=seed, label_drop=label_drop)
    return draw(step, args, Latents(shape, images), "cpu")


def double(draws):
    """The same draws in float64."""
    fields = vars(draws).items()
    fields = {name: z for name, z in fields if z is not None}
    return Batch(**{n: z.double() if z.is_floating_point() else z for n, z in fields.items()})


def auxiliary_loss(stage, teacher=None, depth=2):
    """The auxiliary loss of a stage, without files: stage 1's two targets, or stage 2's."""
    if stage == "guide":
        guidance = Guidance(train_stage2.Settings(projector_dim=32), depth)
        guidance.teacher, guidance.s = teacher, 30.0
        return guidance
    return Alignment(train_stage1.Settings(projector_dim=32, align_target=stage), depth)


DRAWN = "indices t drop posterior eps u"


# ---- the draws


SHARES = [(1, 1), (7, 1), (10, 2), (16, 1), (16, 2), (16, 4), (24, 4), (256, 1), (256, 2), (256, 4)]


@pytest.mark.quick
@pytest.mark.parametrize("batch,ways", SHARES)
def test_slice_holds_every_masked_sample_and_is_tight(batch, ways):
    t_min, t_max = 0.4, 0.7
    rows = rows_in_range(batch, ways, t_min, t_max)
    for step in range(50):
        t = drawn(step, batch, seed=3).t
        stratum = (t * batch).floor()
        assert (stratum - torch.arange(batch)).abs().max() <= 1  # one each (float32 may round up)
        covered = torch.zeros(batch, dtype=torch.bool)
        lengths = set()
        for way in range(ways):
            share = torch.arange(batch)[way::ways][rows]
            covered[share] = True
            lengths.add(len(share))
        assert len(lengths) == 1  # static shapes, the same on every process
        inside = (t >= t_min) & (t <= t_max)
        assert not (inside & ~covered).any()
    # the range, its two boundary strata, rounding to whole rows of ways
    assert covered.sum() <= math.ceil(0.3 * batch) + 2 + 2 * (ways - 1)


@pytest.mark.quick
def test_slice_on_exact_edges():
    """t-min and t-max on stratum borders: a sample exactly on either border is counted."""
    rows = rows_in_range(10, 1, 0.4, 0.7)
    assert rows.start <= 4 and rows.stop >= 8
    assert rows_in_range(256, 1, 0.0, 1.0) == slice(0, 256)
    model, projector = tiny(), Projector(128, hidden=32, to_latent=(8, 4))
    losses = one_loss(model, projector, auxiliary_loss("latent"), slice(0, 1))
    x, y = torch.randn(1, 4, 16, 16), torch.tensor([1])
    for t, counts in ((0.4, True), (0.7, True), (0.3999, False), (0.7001, False)):
        assert (losses(x, torch.tensor([t]), y, x, x)[1] > 0) == counts, t


@pytest.mark.quick
def test_stratified_t_is_uniform():
    t = torch.stack([drawn(step, 16).t for step in range(4000)]).double()
    one_stratum = 0.2887 / 16  # its spread, and so that of t around the strata's middles
    assert abs(t.mean() - 0.5) < 3 * one_stratum / math.sqrt(16 * 4000)
    counts = ((t >= 0.4) & (t <= 0.7)).sum(1)
    assert counts.min() >= 4 and counts.max() <= 6 and abs(counts.double().mean() - 4.8) < 0.05
    assert ((t >= 0) & (t <= 1)).all()


def test_drop_share_and_independence_of_noise():
    draws = [drawn(step, 64, (2, 2, 2), seed=5) for step in range(500)]
    drops, noises = [d.drop for d in draws], [d.eps for d in draws]
    assert abs(torch.stack(drops).double().mean() - 0.1) < 0.01
    assert len({n.sum().item() for n in noises}) == 500  # another step, other noise
    again = drawn(17, 64, (2, 2, 2), seed=5).eps
    assert torch.equal(again, noises[17])
    assert not torch.equal(drawn(17, 64, (2, 2, 2), seed=6).eps, again)


@pytest.mark.quick
@pytest.mark.parametrize("seed,step", [(0, 0), (3, 17), (2**40, 399_999)])
def test_the_extra_uniform_is_drawn_last_from_seed_and_step_alone(seed, step):
    """A replay by hand: the four other draws are what they are without u, which follows them."""
    B, shape = 32, (2, 3, 3)
    draws = drawn(step, B, shape, seed)
    generator = torch.Generator().manual_seed((seed * 0x9E3779B1 + step) % 2**32)
    in_stratum, dropping = torch.rand(2, B, generator=generator)
    two = torch.randn(2, B, *shape, generator=generator)
    assert torch.equal(draws.t, (torch.arange(B) + in_stratum) / B)
    assert torch.equal(draws.drop, dropping < 0.1)
    assert torch.equal(draws.posterior, two[0]) and torch.equal(draws.eps, two[1])
    u = draws.u
    assert u.shape == (B,) and torch.equal(u, torch.rand(B, generator=generator))
    assert ((u >= 0) & (u < 1)).all() and not torch.equal(u, in_stratum)
    # what else is going on does not move it, another step or seed does
    torch.manual_seed(1234)
    torch.rand(5)
    assert torch.equal(drawn(step, B, shape, seed, label_drop=0.7).u, u)
    assert not torch.equal(drawn(step + 1, B, shape, seed).u, u)
    assert not torch.equal(drawn(step, B, shape, seed + 1).u, u)


def test_the_extra_uniform_is_uniform_and_independent_of_t():
    draws = [drawn(step, 64) for step in range(500)]
    t = torch.cat([d.t for d in draws]).double()
    u = torch.cat([d.u for d in draws]).double()
    assert abs(u.mean() - 0.5) < 4 * 0.2887 / math.sqrt(len(u))
    assert abs(u.std() - 0.2887) < 0.005
    assert abs(torch.corrcoef(torch.stack([t, u]))[0, 1]) < 4 / math.sqrt(len(u))


@pytest.mark.quick
def test_every_epoch_visits_every_image_once():
    steps = [drawn(step, 8, seed=1, images=20).indices for step in range(5)]
    seen = torch.cat(steps).tolist()  # two epochs of 20
    assert sorted(seen[:20]) == sorted(seen[20:]) == list(range(20))
    assert seen[:20] != seen[20:]
    assert seen == np.concatenate([batch_indices(step, 8, 20, 1) for step in range(5)]).tolist()
    larger = drawn(1, 50, seed=1, images=20).indices  # a batch larger than the data
    assert larger.dtype == torch.int64 and larger.tolist() == batch_indices(1, 50, 20, 1).tolist()


# ---- the batch


def a_batch(n=7, scale=0.7):
    """(A folder, the draws in float64 of n of its images, the Batch of these)."""
    folder = Latents((4, 6, 6), images=20, scale=scale)
    draws = double(drawn(5, n, folder.shape, seed=1, label_drop=0.4, images=20))
    assert draws.drop.any() and not draws.drop.all()
    return folder, draws, make_batch(folder, draws)


@pytest.mark.quick
def test_batch_holds_what_its_comments_say():
    """Every field by its formula, image by image, number by number, in float64."""
    folder, draws, batch = a_batch(scale=0.7)
    for name in DRAWN.split():
        assert torch.equal(getattr(batch, name), getattr(draws, name)), name
    assert batch.y_input.dtype == batch.y.dtype == torch.int64
    assert batch.x_t.dtype == batch.velocity.dtype == torch.float64
    for i, index in enumerate(draws.indices.tolist()):
        label, t = index % NULL, draws.t[i].item()
        mean, std = folder.moments[index].double().chunk(2)
        assert batch.y[i] == label and batch.y_input[i] == (NULL if draws.drop[i] else label)
        for place in np.ndindex(4, 6, 6):
            eps, of_posterior = draws.eps[i][place].item(), draws.posterior[i][place].item()
            x0 = 0.7 * (mean[place].item() + std[place].item() * of_posterior)
            x_t = (1 - t) * x0 + t * eps
            assert batch.x0[i][place].item() == pytest.approx(x0, abs=1e-12)
            assert batch.x_t[i][place].item() == pytest.approx(x_t, abs=1e-12)
            assert batch.velocity[i][place].item() == pytest.approx(eps - x0, abs=1e-12)
    # dx_t / dt is the velocity: from x_t it leads to the data at t = 0, to the noise at t = 1
    level = batch.t.view(-1, 1, 1, 1)
    torch.testing.assert_close(batch.x_t - level * batch.velocity, batch.x0)
    torch.testing.assert_close(batch.x_t + (1 - level) * batch.velocity, batch.eps)


CUTS = [slice(2, 5), slice(0, 7), torch.tensor([6, 0]), slice(1, None, 3)]


@pytest.mark.parametrize("rows", CUTS)
@pytest.mark.parametrize("made", [False, True])
def test_what_is_cut_is_cut_in_every_field(made, rows):
    _, draws, batch = a_batch()
    uncut, names = (batch, f"{DRAWN} y y_input x0 x_t velocity") if made else (draws, DRAWN)
    known = [field.name for field in dataclasses.fields(Batch)]
    assert sorted(n for n in known if getattr(uncut, n) is not None) == sorted(names.split())
    part = uncut[rows]
    assert sorted(n for n in known if getattr(part, n) is not None) == sorted(names.split())
    for name in names.split():
        whole, cut = getattr(uncut, name), getattr(part, name)
        assert len(whole) == 7 and torch.equal(cut, whole[rows]), name


@pytest.mark.parametrize("rows", CUTS)
def test_the_draws_may_be_cut_before_the_batch_is_made_or_after(rows):
    """One cut: a share of the draws makes the share of the batch, bit for bit."""
    folder, draws, batch = a_batch()
    before, after = make_batch(folder, draws[rows]), batch[rows]
    for name, value in vars(after).items():
        assert torch.equal(getattr(before, name), value), name


@pytest.mark.parametrize("accum", [1, 2])
def test_what_the_loop_hands_to_an_auxiliary_loss(accum, tmp_path):
    """A loss of one's own is a subclass with `target`, which sees each share's slice, whole."""
    handed = []

    class Own(Auxiliary):
        name = "own"

        def target(self, batch):
            handed.append(batch)
            return torch.zeros(len(batch.t), 4, 128)

    data = write_folder(tmp_path / "d", scale=0.7)
    where = {"data": str(data), "out": str(tmp_path / "o"), "model": "SiT-Ti/8", "device": "cpu"}
    args = train_stage1.Settings(**where, steps=2, batch_size=16, accum=accum)
    train(args, Own(args, depth=3))
    arrays = {name: np.load(data / f"{name}.npy") for name in ("moments", "labels")}
    folder = Latents(moments=arrays["moments"], labels=torch.tensor(arrays["labels"]), scale=0.7)
    rows = rows_in_range(16, accum, 0.4, 0.7)
    assert len(handed) == 2 * accum
    for number, got in enumerate(handed):
        step, way = divmod(number, accum)
        draws = vars(drawn(step, 16, (4, 16, 16)))
        assert draws["indices"].tolist() == batch_indices(step, 16, 48, 0).tolist()
        drawn_now = {name: whole for name, whole in draws.items() if whole is not None}
        draws = Batch(**{name: whole[way::accum] for name, whole in drawn_now.items()})
        whole = make_batch(folder, draws)
        for field in dataclasses.fields(Batch):
            want = getattr(whole, field.name)[rows]
            assert torch.equal(getattr(got, field.name), want), field.name


# ---- the losses, against loops in float64


def reference_losses(model, projector, depth, x0, eps, t, y, target_of, t_min=0.4, t_max=0.7):
    """The losses, read aloud: image by image, an `if` for a mask, the mean over the whole batch."""
    diff, aux = 0.0, 0.0
    for i in range(len(t)):
        x_t = (1 - t[i]) * x0[i] + t[i] * eps[i]
        v, tokens = model(x_t[None], t[i][None], y[i][None], taps=[depth])
        diff += ((v[0] - (eps[i] - x0[i])) ** 2).sum() / x0[i].numel()
        if t_min <= t[i] <= t_max:
            answer, target = projector(tokens[depth])[0], target_of(i, x_t)
            aux += ((answer - target) ** 2).sum() / target.numel()
    return diff / len(t), aux / len(t)


def reference_target(stage, x0, eps, t, y_true, teacher=None, depth=5, s=30.0):
    """What the projector must answer for image i: a function (i, x_t), by the paper's formulas."""

    def f_g(i, x_t):
        f_c, f_u = (
            teacher(x_t[None], t[i][None], label.view(1), taps=[depth])[1][depth][0]
            for label in (y_true[i], torch.tensor(teacher.num_classes))
        )
        return f_u + s * (f_c - f_u)

    by_stage = {"velocity": lambda i, x_t: eps[i] - x0[i], "latent": lambda i, x_t: x0[i]}
    return by_stage.get(stage, f_g)


@pytest.mark.parametrize("reduce", [torch.mean, lambda x: x.mean(dim=-1), lambda x: x.flatten()])
def test_losses_need_one_distance_an_image(reduce):
    """A mean over the batch would broadcast against the mask, and be wrong without a word."""
    auxiliary = auxiliary_loss("guide", tiny(seed=9).cut(5), 2)
    auxiliary.distance = lambda prediction, target: reduce((prediction - target).square())
    losses = one_loss(tiny(), auxiliary.projector(tiny()), auxiliary, slice(2, 6))
    x, t, y = torch.randn(8, 4, 16, 16), torch.linspace(0, 1, 8), torch.arange(8)
    target = torch.zeros(4, 4, tiny().width)
    with pytest.raises(UserError, match="answer, target, distance do not fit"):
        losses(x, t, y, x, target)


@pytest.mark.quick
@pytest.mark.parametrize("batch,ways", [(7, 1), (16, 2), (16, 4)])
@pytest.mark.parametrize("stage", ["velocity", "latent", "guide"])
def test_losses_against_float64_loops(batch, ways, stage, tmp_path):
    """The loop's own parts (draws, batch, slice, target, mask, mean) against plain loops."""
    folder = LatentFolder(write_folder(tmp_path / "data"))
    model, teacher, depth = tiny().double(), tiny(seed=9).double(), 2
    torch.manual_seed(1)
    auxiliary = auxiliary_loss(stage, copy.deepcopy(teacher).cut(5), depth)
    projector = auxiliary.projector(model).double()
    rows = rows_in_range(batch, ways, 0.4, 0.7)
    losses = one_loss(model, projector, auxiliary, rows)
    draws = double(drawn(3, batch, (4, 16, 16), label_drop=0.5))
    inside = (draws.t >= 0.4) & (draws.t <= 0.7)
    assert 0 < draws.drop[inside].sum() < inside.sum()  # some of those were y_input the null label
    got_diff = got_aux = 0.0
    for way in range(ways):
        share = make_batch(folder, draws[way::ways])
        target = auxiliary.target(share[rows])
        diff, aux = losses(share.x_t, share.t, share.y_input, share.velocity, target)
        got_diff, got_aux = got_diff + diff / ways, got_aux + aux / ways
    indices = batch_indices(3, batch, len(folder), 0)
    mean, std = torch.from_numpy(folder.moments[indices]).double().chunk(2, dim=1)
    x0, y_true = mean + std * draws.posterior, folder.labels[indices]
    y, noise, t = torch.where(draws.drop, NULL, y_true), draws.eps, draws.t
    of = reference_target(stage, x0, noise, t, y_true, teacher)
    want_diff, want_aux = reference_losses(model, projector, depth, x0, noise, t, y, of)
    assert want_aux > 0
    options = {"check_dtype": False, "atol": 0}  # the networks' losses are reduced in float32
    torch.testing.assert_close(got_diff, want_diff, rtol=1e-6, **options)
    torch.testing.assert_close(got_aux, want_aux, rtol=2e-5, **options)


@pytest.mark.parametrize("stage", ["velocity", "latent", "guide", "guide by a smaller network"])
def test_what_the_loop_logs_is_the_formula(stage, tmp_path):
    """One real step of train(): the logged losses are the paper's, for a network that is known.

    The teacher may be of another size: SiT-N/8 teaches SiT-Ti/8, whose P2 answers in its width.
    """
    data, out = write_folder(tmp_path / "data"), tmp_path / "out"
    flags = [*TRAIN, "--data", data, "--out", out, "--steps", 1, "--log-every", 1]
    flags += ["--seed", 5, "--label-drop", 0.5]
    folder = LatentFolder(data)
    torch.manual_seed(5)
    model, teacher, dt = build("SiT-Ti/8", 16, 4, 10), None, None
    if stage in ("velocity", "latent"):
        projector, depth, name = Projector(128, hidden=32, to_latent=(8, 4)), 2, "loss_align"
        call(train_stage1, *flags, "--align-target", stage)
    else:
        size, dt, width = ("SiT-Ti", 5, 128) if stage == "guide" else ("SiT-N", 4, 64)
        projector, depth, name = Projector(128, out=width, hidden=32), 4, "loss_guide"
        teacher = tiny(seed=2, name=size)
        file = teacher_file(tmp_path / "teacher", teacher)
        cut = load_teacher(file)[0]
        heads = cut.blocks[0].attn.heads
        assert (cut.width, cut.depth, heads) == (width, dt, SIZES[size[4:]].heads)
        call(train_stage2, *flags, "--teacher", file)
        saved = torch.load(out / "ckpt-0000001.pt", weights_only=True)
        assert saved["projector"]["mlp.4.weight"].shape == (width, 32)
        teacher.double()
    record = json.loads((out / "log.jsonl").read_text())
    draws = double(drawn(0, 8, (4, 16, 16), seed=5, label_drop=0.5))
    t, drop, noise = draws.t, draws.drop, draws.eps
    inside = [0.4 <= x <= 0.7 for x in t[3:6].tolist()]
    assert inside == [False, True, False]  # both ends of the slice are to be masked
    assert drop[4] and not drop.all()  # the teacher hears a label that the student is not y_input
    indices = batch_indices(0, 8, len(folder), 5)
    mean, std = torch.from_numpy(folder.moments[indices]).double().chunk(2, dim=1)
    x0, y_true = mean + std * draws.posterior, folder.labels[indices]
    y = torch.where(drop, NULL, y_true)
    of = reference_target(stage, x0, noise, t, y_true, teacher, dt)
    with torch.no_grad():
        model, projector = model.double(), projector.double()
        diff, aux = reference_losses(model, projector, depth, x0, noise, t, y, of)
    assert aux > 0
    assert record["loss_diff"] == pytest.approx(diff.item(), rel=1e-5)
    assert record[name] == pytest.approx(aux.item(), rel=1e-4)


# ---- what learns, and until when


def test_gradients_reach_only_the_student():
    teacher, student = tiny(seed=1).cut(5), tiny()  # not frozen: its features need no gradient
    projector, auxiliary = Projector(128, hidden=32), auxiliary_loss("guide", teacher, depth=4)
    x, y = torch.randn(4, 4, 16, 16), torch.tensor([1, 2, 3, 10])
    t, rows = torch.tensor([0.1, 0.45, 0.6, 0.9]), slice(1, 3)
    target = guided_features(teacher, x[rows], t[rows], y[rows], 30.0)
    _, aux = one_loss(student, projector, auxiliary, rows)(x, t, y, x, target)
    aux.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in projector.parameters())
    grads = [block.mlp.fc1.weight.grad for block in student.blocks]
    touched = [i for i, grad in enumerate(grads, 1) if grad is not None]
    assert touched == [1, 2, 3, 4]  # blocks up to ds, and none above


def test_the_average_has_no_graph(tmp_path, monkeypatch):
    """Were the EMA's update recorded by autograd, its graph would grow with every step."""
    averages, lerp = [], torch._foreach_lerp_

    def spy(own, others, weight):
        lerp(own, others, weight)
        averages.extend(own)

    monkeypatch.setattr(torch, "_foreach_lerp_", spy)
    data = write_folder(tmp_path / "d")
    call(train_stage1, *TRAIN, "--data", data, "--out", tmp_path / "o", "--steps", 2)
    assert averages and not any(a.requires_grad or a.grad_fn for a in averages)


@pytest.mark.parametrize("clip,ramp", [(1e9, False), (0.5, True)])
def test_an_update_is_clip_adamw_and_the_average(clip, ramp):
    """Two optimizers, one gradient norm: five updates by the formulas, in float64."""
    how = {"lr": 1e-2, "warmup": 3, "clip": clip, "ema": 0.2, "ema_ramp": ramp}
    args = train_stage1.Settings(model="SiT-P/8", **how)
    loss = auxiliary_loss("latent")
    state = State(args, Latents(), torch.device("cpu"), *2 * [[loss]])
    for network in (state.model, state.ema, loss.module):
        network.double()
    learned = [*state.model.parameters(), *loss.module.parameters()]
    weights = [p.detach().clone() for p in learned]
    averages = [p.clone() for p in state.ema.parameters()]
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    generator, norms = torch.Generator().manual_seed(0), []
    for k in range(1, 6):
        grads = [torch.randn(w.shape, generator=generator).double() for w in weights]
        for p, grad in zip(learned, grads, strict=True):
            p.grad = grad.clone()
        state.update(args, torch.tensor([2.0, 3.0]))
        norms.append(math.sqrt(sum((grad**2).sum().item() for grad in grads)))
        for i, grad in enumerate(grads):
            grad = grad * min(1.0, clip / norms[-1])
            first[i] = 0.9 * first[i] + 0.1 * grad
            second[i] = 0.999 * second[i] + 0.001 * grad**2
            direction = first[i] / (1 - 0.9**k) / ((second[i] / (1 - 0.999**k)).sqrt() + 1e-8)
            weights[i] = weights[i] - 1e-2 * min(1.0, k / 3) * direction
        decay = min(0.2, k / (9 + k)) if ramp else 0.2
        for i, average in enumerate(averages):
            averages[i] = decay * average + (1 - decay) * weights[i]
        assert all(p.grad is None for p in learned)
    own = [*learned, *state.ema.parameters()]
    for got, want in zip(own, weights + averages, strict=True):
        torch.testing.assert_close(got.detach(), want, rtol=0, atol=1e-7)
    assert state.step == 5
    assert state.sums.tolist() == pytest.approx([10, 15, sum(norms), 5], rel=1e-6)


@pytest.mark.parametrize("guide_steps,calls", [(3, 3), (0, 0), (9, 5)])
def test_teacher_and_projector_rest_after_guide_steps(guide_steps, calls, tmp_path, monkeypatch):
    features, project, network = guided_features, Projector.forward, SiT.forward
    images, answers, tapped = [], [], []

    def teaching(teacher, x_t, *rest):
        images.append(len(x_t))
        return features(teacher, x_t, *rest)

    def answering(self, tokens):
        answers.append(len(tokens))
        return project(self, tokens)

    def tapping(self, *args, taps=()):
        if self.final_layer is not None:  # the student, not the teacher
            tapped.append(list(taps))
        return network(self, *args, taps=taps)

    file = teacher_file(tmp_path, tiny())
    monkeypatch.setattr(Projector, "forward", answering)
    monkeypatch.setattr(train_stage2, "guided_features", teaching)
    monkeypatch.setattr(SiT, "forward", tapping)
    flags = ["--data", write_folder(tmp_path / "d"), "--out", tmp_path / "o", "--teacher", file]
    call(train_stage2, *TRAIN, *flags, "--steps", 5, "--guide-steps", guide_steps)
    rows = rows_in_range(8, 1, 0.4, 0.7)
    assert rows.stop - rows.start < 8
    assert images == answers == [rows.stop - rows.start] * calls  # the slice alone
    assert tapped == [[4]] * calls + [[]] * (5 - calls)  # nor are the student's tokens kept


def test_after_guidance_neither_teacher_nor_projector_is_needed(tmp_path):
    """The projector's optimizer is gone, the teacher's file may be, and the run is the same."""
    file = teacher_file(tmp_path / "teacher", tiny(name="SiT-N"))
    flags = [*TRAIN, "--data", write_folder(tmp_path / "d"), "--guide-steps", 3, "--teacher", file]
    flags += ["--model", "SiT-N/8", "--steps", 5, "--log-every", 1, "--save-every", 1, "--keep", 9]
    call(train_stage2, *flags, "--out", tmp_path / "whole")
    saved = {
        step: torch.load(tmp_path / f"whole/ckpt-{step:07d}.pt", weights_only=True)
        for step in range(1, 6)
    }
    model, projector = build("SiT-N/8", 16, 4, 10), Projector(64, hidden=32)
    model, projector = (len(list(m.parameters())) for m in (model, projector))
    for step, content in saved.items():
        counts = {"opt": model, "projector_opt": projector}
        assert (content["projector"] is not None) == (step <= 3)
        assert (content["projector_opt"] is not None) == (step <= 3)
        for name, count in counts.items() if step <= 3 else [("opt", model)]:
            assert content[name]["param_groups"][0]["params"] == list(range(count))
            assert sorted(content[name]["state"]) == list(range(count))
    lines = (tmp_path / "whole/log.jsonl").read_text().splitlines()
    guided = [json.loads(line)["loss_guide"] > 0 for line in lines]
    assert guided == [True, True, True, False, False]

    file.unlink()
    for start in (3, 4):  # guidance has just ended, or one step ago
        part = tmp_path / f"from-{start}"
        part.mkdir()
        shutil.copy(tmp_path / f"whole/ckpt-{start:07d}.pt", part)
        call(train_stage2, *flags, "--out", part)
        again = torch.load(part / "ckpt-0000005.pt", weights_only=True)
        for name in ("model", "ema"):
            assert all(torch.equal(again[name][k], v) for k, v in saved[5][name].items())
        assert again["projector"] is None and again["projector_opt"] is None
        moments = saved[5]["opt"]["state"]
        assert again["opt"]["state"].keys() == moments.keys()
        for i, moment in moments.items():
            assert all(torch.equal(again["opt"]["state"][i][k], v) for k, v in moment.items())
        assert (part / "log.jsonl").read_text().splitlines() == lines[start:]
    part = tmp_path / "from-2"  # but a step before that it is needed
    part.mkdir()
    shutil.copy(tmp_path / "whole/ckpt-0000002.pt", part)
    with pytest.raises(UserError, match="is no teacher"):
        call(train_stage2, *flags, "--out", part)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6])
def test_the_network_is_told_the_null_label_where_one_was_dropped(share, tmp_path, monkeypatch):
    y_input, forward = [], LossNetwork.forward

    def listening(self, x_t, t, labels, *rest):
        y_input.append(labels)
        return forward(self, x_t, t, labels, *rest)

    monkeypatch.setattr(LossNetwork, "forward", listening)
    flags = ["--data", write_folder(tmp_path / "d"), "--out", tmp_path / "o"]
    call(train_stage1, *TRAIN, *flags, "--steps", 5, "--label-drop", share, "--seed", 3)
    folder = LatentFolder(tmp_path / "d")
    labels = [folder.labels[batch_indices(step, 8, len(folder), 3)] for step in range(5)]
    dropped = [drawn(step, 8, (4, 16, 16), 3, share).drop for step in range(5)]
    dropped = torch.stack(dropped)
    assert torch.equal(torch.stack(y_input), torch.where(dropped, NULL, torch.stack(labels)))
    assert (dropped.double().mean() - share).abs() < 0.2


def test_weight_zero_is_vanilla(tmp_path, monkeypatch):
    monkeypatch.setattr(Projector, "forward", lambda self, x: pytest.fail("the projector ran"))
    flags = ["--data", write_folder(tmp_path / "d"), "--out", tmp_path / "o", "--steps", 2]
    call(train_stage1, *TRAIN, *flags, "--align-weight", 0)
    saved = torch.load(tmp_path / "o/ckpt-0000002.pt", weights_only=True)
    assert saved["projector"] is None and saved["projector_opt"] is None
    assert json.loads((tmp_path / "o/log.jsonl").read_text())["loss_align"] == 0


# ---- what a GPU would do, as far as a CPU can


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, "after"])
def test_one_graph_without_breaks_and_the_same_numbers(stage):
    """Dynamo and AOTAutograd trace both losses into one graph, compiled once for all steps."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model, rows = tiny(name="SiT-N"), slice(2, 6)
    model.blocks = model.blocks[:2]  # compiled sooner
    auxiliary = auxiliary_loss("latent" if stage == 1 else "guide", tiny(name="SiT-N").cut(4))
    projector = None if stage == "after" else auxiliary.projector(model)
    losses = one_loss(model, projector, auxiliary, rows)
    compiled = torch.compile(losses, dynamic=False, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        x, t, y = torch.randn(8, 4, 16, 16), torch.rand(8).sort()[0], torch.randint(0, 11, (8,))
        t[3] = 0.5
        target = {1: x[rows], 2: torch.randn(4, 4, 64), "after": None}[stage]
        with torch.autocast("cpu", torch.bfloat16):
            got, want = compiled(x, t, y, x, target), losses(x, t, y, x, target)
        for a, b in zip(got, want, strict=True):
            assert a.dtype == torch.float32
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
        assert (got[1] > 0) == (stage != "after")
        (got[0] + got[1]).backward()
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_bf16_training_follows_float32():
    """Ten steps under bf16 autocast, weights in float32: the loss falls, close to float32's."""
    ends = []
    for enabled in (False, True):
        model = tiny(name="SiT-N")
        losses = one_loss(model, None, auxiliary_loss("latent"), slice(0, 8))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(8, 4, 16, 16, generator=generator)
        t, y = torch.rand(8, generator=generator), torch.arange(8)
        history = []
        for _ in range(10):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                diff, aux = losses(x, t, y, x)
            assert aux == 0
            diff.backward()
            optimizer.step()
            optimizer.zero_grad()
            history.append(diff.item())
        assert history[-1] < history[0]
        ends.append(history[-1])
    assert ends[0] == pytest.approx(ends[1], rel=0.02)
