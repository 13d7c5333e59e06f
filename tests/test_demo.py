"""The demo: the toy's networks, losses and sampler, its figures, the page, the comparison."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, call
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import sample
import train_stage1
from common import UserError
from experiments.cifar10 import judge as judging
from experiments.cifar10 import report
from experiments.demo import compare, page, toy


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Networks of width 8 and batches of 32, so that a test takes no time."""
    monkeypatch.setattr(toy, "WIDTH", 8)
    monkeypatch.setattr(toy, "TEACHER_WIDTH", 4)
    monkeypatch.setattr(toy, "BATCH", 32)


def inputs(networks, num, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(networks, num, 2, generator=generator)
    t = torch.rand(networks, num, generator=generator)
    return x, t, torch.randint(toy.CLASSES + 1, (networks, num), generator=generator)


# ---- Networks, losses, training


def alone(weights, x, t, y):
    """One point through one network, by its weights in float64: (velocity, features by block)."""

    def linear(name, x):
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"][0]

    def norm(x):
        return (x - x.mean()) / (((x - x.mean()) ** 2).mean() + 1e-5).sqrt()

    angles = torch.stack([t * 10 ** (1.5 * i / 7) for i in range(8)])
    c = linear("t_embedder", torch.cat([angles.cos(), angles.sin()])) + weights["y_embedder"][y]
    c, h, features = c * c.sigmoid(), linear("x_embedder", x), {}
    for block in range(toy.DEPTH):
        name = f"blocks.{block}"
        inside = linear(f"{name}.inside", norm(h)) + linear(f"{name}.condition", c)
        h = features[block + 1] = h + linear(f"{name}.outside", inside * inside.sigmoid())
    return linear("final", norm(h)), features


def test_networks_at_once_are_each_one_alone():
    """Velocities, features and gradients, against a loop over networks and points."""
    networks = toy.Networks([3, 4], 8)
    x, t, y = inputs(2, 5)
    velocity, features = networks(x, t, y)
    (velocity.square().sum() + features[2].square().sum()).backward()
    for r in range(2):
        own = {name: p.detach()[r].double() for name, p in networks.named_parameters()}
        own = {name: weight.requires_grad_() for name, weight in own.items()}
        loss = 0
        for i in range(5):
            v, f = alone(own, x[r, i].double(), t[r, i].double(), y[r, i])
            assert torch.allclose(v, velocity[r, i].double(), atol=1e-5)
            assert torch.allclose(f[3], features[3][r, i].double(), atol=1e-5)
            loss = loss + v.square().sum() + f[2].square().sum()
        loss.backward()
        for name, p in networks.named_parameters():
            assert torch.allclose(own[name].grad, p.grad[r].double(), rtol=1e-3, atol=1e-4), name


def test_a_network_depends_on_its_own_seed_alone():
    both, other = toy.Networks([3, 4], 8), toy.Networks([4, 7, 9], 8)
    for a, b in zip(both.parameters(), other.parameters(), strict=True):
        assert torch.equal(a[1], b[0])
    assert not torch.equal(both.final.weight[0], both.final.weight[1])


def test_the_rows_in_range_are_those_of_stage_1():
    for size in (32, 64, 128):
        toy.BATCH = size
        rows = toy.rows_in_range()
        assert rows == train_stage1.rows_in_range(size, 1, 0.4, 0.7)
        t = toy.make_batch(3, torch.Generator().manual_seed(0))[1]
        inside = (t >= 0.4) & (t <= 0.7)
        assert inside[:, rows].sum() == inside.sum() > 0


def test_a_batch_is_the_interpolant():
    x_t, t, y, y_input, v = toy.make_batch(200, torch.Generator().manual_seed(0))
    x0 = x_t - t[..., None] * v  # (1 - t) x0 + t eps = x0 + t (eps - x0)
    assert (toy.nearest_class(x0) == y).double().mean() > 0.99
    eps = x_t + (1 - t[..., None]) * v
    assert abs(eps.mean()) < 0.02 and abs(eps.std() - 1) < 0.02
    assert abs(x0.std() - 1) < 0.02  # as the latents have it
    dropped = y_input == toy.CLASSES
    assert 0.08 < dropped.double().mean() < 0.12 and torch.equal(y[~dropped], y_input[~dropped])
    assert torch.equal((t * toy.BATCH).floor(), torch.arange(32.0).expand(200, -1))


def test_the_auxiliary_loss_against_a_loop():
    torch.manual_seed(0)
    predicted, target, t = torch.randn(2, 9, 3), torch.randn(2, 9, 3), torch.rand(2, 9)
    t[0, :2] = torch.tensor([0.4, 0.7])  # the ends count
    wanted = 0.0
    for r in range(2):
        for i in range(9):
            if 0.4 <= t[r, i] <= 0.7:
                wanted += sum((predicted[r, i, j] - target[r, i, j]) ** 2 for j in range(3)) / 3
    found = toy.auxiliary_loss(predicted, target, t)
    assert found.item() == pytest.approx(float(wanted) / toy.BATCH, rel=1e-5)


def test_f_g_goes_from_f_u_through_f_c():
    teacher = toy.Networks([1, 2], 4)
    x, t, y = inputs(2, 7)
    y = y % toy.CLASSES
    f_c, f_u = (teacher(x, t, labels)[1][toy.DT] for labels in (y, torch.full_like(y, 8)))
    del teacher.blocks[toy.DT :]
    for s, wanted in ((0, f_u), (1, f_c), (3, 3 * f_c - 2 * f_u)):
        found = toy.guided_features(teacher, x, t, y, s)
        assert torch.allclose(found, wanted, atol=1e-5) and not found.requires_grad


def test_the_auxiliary_loss_moves_only_the_last_networks():
    """Vanilla beside stage 2 is what it is beside another stage 2; the averages are of its own."""

    def trained(target):
        networks, projectors = toy.Networks([1, 2, 1, 2], 8), toy.Projectors([5, 6], 8, 2)
        return toy.train(networks, 2, projectors, target, 12, 3, keep=(6, 12))

    one, other = trained(lambda x, t, y, v: v), trained(lambda x, t, y, v: 9 + 0 * v)
    for step in (6, 12):
        for a, b in zip(one[step].parameters(), other[step].parameters(), strict=True):
            assert torch.equal(a[:2], b[:2])
        shallow = one[step].blocks[0].inside.weight, other[step].blocks[0].inside.weight
        assert not torch.equal(shallow[0][2:], shallow[1][2:])
    assert not torch.equal(one[6].final.weight, one[12].final.weight)


def test_training_lowers_the_loss_of_each_network():
    networks, projectors = toy.Networks([1, 2], 8), toy.Projectors([5, 6], 8, 2)
    before = toy.Networks([1, 2], 8)
    after = toy.train(networks, 1, projectors, lambda x, t, y, v: v, 80, 3, keep=(80,))[80]
    x_t, t, y, _, v = toy.make_batch(2, torch.Generator().manual_seed(99))
    losses = [(n(x_t, t, y)[0] - v).square().mean(dim=(1, 2)) for n in (before, after)]
    assert (losses[1] < 0.7 * losses[0]).all()


def test_the_costs_against_a_counter():
    """Multiply-adds that torch counts; the embedding of t is counted, that of y looks up a row."""
    for width, depth in ((8, 4), (4, 3)):
        networks = toy.Networks([0], width)
        del networks.blocks[depth:]
        counter = FlopCounterMode(display=False)
        with counter:
            networks(*inputs(1, 10))
        assert counter.get_total_flops() == 2 * 10 * toy.cost(width, depth)
    counter = FlopCounterMode(display=False)
    with counter:
        toy.Projectors([0], 8, 4)(torch.zeros(1, 10, 8))
    p2 = 0.3 * counter.get_total_flops() / 20
    before, guided = toy.costs(600)
    passes = 3 * toy.cost(8) + 3 * p2 + 0.3 * 2 * toy.cost(4, toy.DT)
    assert guided == pytest.approx(passes / (3 * toy.cost(8)))
    with FlopCounterMode(display=False) as counter:
        toy.Projectors([0], 4, 2)(torch.zeros(1, 10, 4))
    p1 = 0.3 * counter.get_total_flops() / 20
    assert before == pytest.approx(600 * (toy.cost(4) + p1) / toy.cost(8))


# ---- Samples and figures


def test_the_sampler_is_sample_pys():
    networks, y = toy.Networks([1, 2], 8), torch.arange(9) % toy.CLASSES
    found = toy.sample(networks, y, seed=4, steps=5)
    noise = torch.randn(9, 2, generator=torch.Generator().manual_seed(4))

    def network(x, t, y):  # both networks, of which sample.py sees one
        both = networks(*(a.expand(2, *a.shape) for a in (x.float(), t.float(), y)))
        return [both[0][r]]

    for r in range(2):
        wanted = sample.sample(network, noise, y, toy.CLASSES, steps=5, mode="euler")
        assert torch.allclose(found[r].double(), wanted, atol=1e-4)


def test_the_sampler_against_a_formula():
    """Of the velocity v = x, ten Euler steps leave (1 - 1/10)^10 of the noise."""

    def networks(x, t, y):
        assert (t > 0).all() and (t <= 1).all()
        return x, {}

    networks.final = toy.Linear([torch.Generator()] * 3, 2, 2)
    found = toy.sample(networks, torch.zeros(5, dtype=torch.long), seed=1, steps=10)
    noise = torch.randn(5, 2, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(found, 0.9**10 * noise.expand(3, 5, 2))


def test_classes_by_the_nearest_spot_and_by_neighbours():
    x = toy.spots()
    assert torch.equal(toy.nearest_class(x), torch.arange(8).expand(toy.CLUMPS, 8))
    centres = x.mean(dim=1)  # of the clumps, on a ring of radius 1 / 0.735
    assert torch.allclose(centres.norm(dim=1), torch.full((6,), 1 / 0.735), atol=1e-5)
    generator = torch.Generator().manual_seed(0)
    f, y = torch.randn(40, 3, generator=generator), torch.randint(8, (40,), generator=generator)
    right = 0
    for i in range(20, 40):
        order = sorted(range(20), key=lambda j: (f[i] - f[j]).norm().item())[:5]
        votes = [sum(y[j] == label for j in order) for label in range(8)]
        right += votes.index(max(votes)) == y[i].item()
    assert toy.neighbours_class(f, y) == pytest.approx(right / 20)


def test_what_a_gain_is_called():
    vanilla = torch.tensor([10.0, 10.0, 10.0])
    assert toy.mean_and_error(torch.tensor([1.0, 2.0, 3.0])) == pytest.approx((2, 3**-0.5))
    clear = toy.sentence(torch.tensor([12.0, 13.0, 14.0]), vanilla, "so")
    assert "so: stage 2 13.0 %, vanilla 10.0 %" in clear and "ahead by 3.0 ± 0.6 points" in clear
    assert clear.endswith("more than twice that error")
    same = toy.sentence(torch.tensor([9.0, 10.0, 12.0]), vanilla, "so")
    assert "ahead by 0.3 ± 0.9" in same and same.endswith("so it is not clear here")
    behind = toy.sentence(torch.tensor([5.0, 6.0, 5.0]), vanilla, "so")
    assert "behind by 4.7 ± 0.3 points" in behind and behind.endswith("more than twice that error")


def test_the_toy_from_end_to_end(tmp_path, capsys):
    out = tmp_path / "toy.png"
    call(toy, "--seeds", 2, "--steps", 20, "--teacher-steps", 4, "--out", out)
    said = capsys.readouterr().out
    assert said.count("standard error over 2 seeds") == 2 and "best of four" in said
    assert Image.open(out).size == (1000, 610)


# ---- The page


def test_the_demos_page(runs, tmp_path, monkeypatch):
    demo = tmp_path / "demo"
    monkeypatch.setattr(page, "DEMO", demo)
    shutil.copytree(runs, demo)
    for step in (300, 1200, 600):
        (demo / f"samples-{step:04}").mkdir()
        images = np.full((10, 32, 32, 3), step // 10, np.uint8)
        np.savez(demo / f"samples-{step:04}/samples.npz", arr_0=images)
    call(page)
    assert Image.open(demo / "demo.png").size[0] == 924
    rows = page.samples(demo, 8)
    assert [pixels[0, 0, 0, 0] for pixels in rows.values()] == [30, 60, 120]  # in order of steps
    assert all(len(pixels) == 8 for pixels in rows.values())
    (demo / "samples-0600/samples.npz").write_bytes(b"")
    with pytest.raises(UserError, match="make demo"):
        page.samples(demo, 8)


def test_what_the_teacher_sees_is_one_picture_of_each_class(runs, latents):
    rows, names = page.seen_by_the_teacher(runs / "teacher/teacher.pt")
    assert len(names) == 8 and list(rows)[0] == "picture" and len(rows) == 5
    f_u, f_c, f_g = list(rows.values())[2:]
    assert f_u.shape == f_g.shape == (8, 2, 2, 3)  # 16 x 16 latents in patches of 8
    changes = [np.abs(f.astype(int) - f_u).mean() for f in (f_c, f_g)]
    assert changes[1] > 2 * changes[0]  # what the label changes is enlarged
    labels = torch.from_numpy(np.load(latents / "labels.npy"))
    assert torch.equal(labels.unique(), torch.arange(8))
    assert len({pixels.tobytes() for pixels in rows["picture"]}) == 8


# ---- The comparison


@pytest.fixture
def compared(runs, tmp_path, monkeypatch):
    """Two seeds whose samples a judge of random weights finds right as often as is wanted."""
    monkeypatch.setattr(compare, "RUNS", tmp_path / "compare")
    monkeypatch.setattr(compare, "JUDGE", tmp_path / "classifier.pt")
    monkeypatch.setattr(compare, "RESULTS", ROOT / "docs/results.md")
    torch.manual_seed(0)
    cnn = judging.CNN(10, 4).eval()
    known = {"mu": torch.zeros(128), "sigma": torch.eye(128), "reference": torch.zeros(9, 128)}
    saved = {"model": cnn.state_dict(), "classes": 10, "width": 4, "size": 32, **known}
    torch.save(saved, compare.JUDGE)
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)
    seen = judging.describe(cnn, torch.from_numpy(images))[1].numpy()
    for seed in (0, 2):
        run = compare.RUNS / f"seed{seed}"
        for name, source in (("stage2", "stage2"), ("vanilla", "stage1")):
            shutil.copytree(runs / source, run / name)
        for number, arm in enumerate(("vanilla-steps", "vanilla-compute", "stage2")):
            for cfg in (1, 3):
                right = 4 * (number + 1) * (2 if cfg == 3 else 1) + seed
                labels = np.where(np.arange(40) < right, seen, (seen + 1) % 10)
                (run / f"{arm}-cfg{cfg}").mkdir()
                np.savez(run / f"{arm}-cfg{cfg}/samples.npz", arr_0=images, labels=labels)
    return compare.RUNS


def test_the_comparison(compared, capsys):
    call(compare)
    said = capsys.readouterr().out
    # of 40 samples: 12 and 14 right of stage 2, 4 and 6 of vanilla at equal steps
    assert "equal steps, no guidance: stage 2 32.5 %, vanilla 12.5 %" in said
    assert "ahead by 20.0 ± 0.0 points" in said
    assert "equal total compute, guided, cfg 3: stage 2 62.5 %, vanilla 42.5 %" in said
    assert "32.5 ± 2.5 %" in said and "CIFAR-10" in said
    total = report.compute(compared / "seed0/stage2", 8, "SiT-Ti/4")
    assert f"in all {total:6,.0f}" in said
    assert Image.open(compared / "compare.png").size == (924, 396)


def test_one_seed_has_no_standard_error(compared):
    shutil.rmtree(compared / "seed2")
    with pytest.raises(UserError, match="two seeds"):
        call(compare)
    assert not (compared / "compare.png").exists()


TABLE = """
| stage 2 | 3,000 | 2 | **1.0, 2.0 %; 3.0, 4.0 %** | 196, **35.5 %**; **190**, 36.5 % |
| vanilla, equal total compute | 3,250 | 2 | 1, 2 %; 3, 4 % | **184**, 31 %; 186, 33 % |
| stage 2 | 3,000 | 3 | 1, 2 %; 3, 4 % | 1, 2 %; 3, 4 % |
"""


def test_the_outside_judges_row_is_read():
    found = compare.outside_judge(TABLE, w=2)
    assert found["stage 2"].tolist() == [[196, 35.5], [190, 36.5]]
    assert found["vanilla, equal total compute"].tolist() == [[184, 31], [186, 33]]
    with pytest.raises(UserError, match="no row of vanilla"):
        compare.outside_judge(TABLE, w=3)


def test_the_page_of_results_has_the_outside_judges_rows():
    found = compare.outside_judge(Path(ROOT / "docs/results.md").read_text(), w=2)
    assert all(pairs.shape[0] >= 2 for pairs in found.values())
    assert all((pairs[:, 0] > 100).all() and (pairs[:, 1] < 60).all() for pairs in found.values())
