"""experiments/methods: PLADIS's attention, few keys a query, CFGRL, guides that are swapped."""

import colorsys
import json
import math
import statistics

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import TRAIN, call, tiny, write_checkpoint, write_folder
from PIL import Image

import models
import train_stage1
from common import UserError
from experiments.cifar10 import frontier, judge
from experiments.methods import cfgrl, information_pathways, pladis, policy_swap, sampled
from train_stage1 import draw
from vae_latents import AutoencoderKL, LatentFolder

pathways = information_pathways


def double(*shape, seed=0, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(*shape, generator=generator, dtype=torch.float64)


def close(a, b, tolerance=1e-10):
    return torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance)


# ---- PLADIS


def bisected(row, power, divisor):
    """max(0, row / divisor - tau)^power, with the tau at which it sums to 1, by halving."""
    x = [float(score) / divisor for score in row]
    low, high = max(x) - 1, max(x)  # at low the highest alone gives 1
    for _ in range(100):
        tau = (low + high) / 2
        total = sum(max(0.0, score - tau) ** power for score in x)
        low, high = (tau, high) if total > 1 else (low, tau)
    return [max(0.0, score - low) ** power for score in x]


BISECTED = {
    "entmax15": lambda row: bisected(row, 2, 2),
    "sparsemax": lambda row: bisected(row, 1, 1),
}


def rows_of_scores():
    rows = [
        double(40, 16, seed=1),
        double(20, 16, seed=2, size=6),
        double(20, 16, seed=3, size=0.1),
    ]
    tied = double(20, 16, seed=4).round()
    return torch.cat([*rows, tied, torch.zeros(1, 16), torch.tensor([[50.0] + [-50.0] * 15])])


@pytest.mark.parametrize("name", BISECTED)
def test_sparse_rows_against_bisection(name):
    scores = rows_of_scores()
    wanted = torch.tensor([BISECTED[name](row) for row in scores.tolist()], dtype=torch.float64)
    got = pladis.SPARSE[name](scores)
    assert close(got, wanted, 1e-9) and close(got.sum(dim=-1), torch.ones(len(scores)))
    assert close(pladis.SPARSE[name](scores + 1000), wanted, 1e-9)
    assert 0.1 < (got == 0).double().mean() < 0.9
    assert torch.equal(pladis.SPARSE[name](scores[:, :1]), torch.ones(len(scores), 1).double())


@pytest.mark.parametrize("name", BISECTED)
def test_sparse_rows_against_the_package(name):
    entmax = pytest.importorskip("entmax")
    wanted = getattr(entmax, name)(rows_of_scores(), dim=-1)
    assert close(pladis.SPARSE[name](rows_of_scores()), wanted, 1e-12)


@pytest.mark.parametrize("kind", ["none", "bool", "added"])
@pytest.mark.parametrize("sparse", BISECTED)
def test_attention_by_hand(sparse, kind):
    """Query by query: softmax + lambda (sparse - softmax) over the keys that are not masked."""
    q, k, v = double(2, 3, 4, 8, seed=5), double(2, 3, 6, 8, seed=6), double(2, 3, 6, 5, seed=7)
    allowed = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    added = torch.zeros(2, 1, 1, 6, dtype=torch.float64)
    if kind == "bool":
        allowed[0, ..., 4:] = False
    if kind == "added":
        added = double(2, 1, 1, 6, seed=8)
    mask = {"none": None, "bool": allowed, "added": added}[kind]
    got = pladis.attention(q, k, v, attn_mask=mask, lam=2.0, sparse=sparse)
    negative = 0
    for i, head, query in np.ndindex(2, 3, 4):
        keys = [key for key in range(6) if allowed[i, 0, 0, key]]
        dot = [(q[i, head, query] @ k[i, head, key]).item() for key in keys]
        row = [
            d / math.sqrt(8) + added[i, 0, 0, key].item() for d, key in zip(dot, keys, strict=True)
        ]
        total = sum(math.exp(score) for score in row)
        few, out = BISECTED[sparse](row), torch.zeros(5, dtype=torch.float64)
        for score, p, key in zip(row, few, keys, strict=True):
            weight = math.exp(score) / total
            weight += 2.0 * (p - weight)
            negative += weight < 0
            out += weight * v[i, head, key]
        assert close(got[i, head, query], out, 1e-8)
    assert negative


class Reader(nn.Module):
    """Cross-attention as others write it: with a mask, and a function in an attribute."""

    attend = staticmethod(F.scaled_dot_product_attention)

    def forward(self, q, kv, mask):
        return self.attend(q, kv, kv, attn_mask=mask)


def test_any_module_attends_sparsely_once_it_is_installed():
    q, kv = double(2, 3, 4, 8), double(2, 3, 6, 8, seed=1)
    mask = torch.rand(2, 1, 1, 6, generator=torch.manual_seed(0)) > 0.3
    sparse, other = Reader(), Reader()
    before = other(q, kv, mask)
    for lam, kind in (2.0, "entmax15"), (1.0, "sparsemax"):  # the second replaces the first
        pladis.install(sparse, lam=lam, sparse=kind)
        wanted = pladis.attention(q, kv, kv, attn_mask=mask, lam=lam, sparse=kind)
        assert torch.equal(sparse(q, kv, mask), wanted) and not close(wanted, before)
        assert torch.equal(other(q, kv, mask), before)
    pladis.install(sparse, lam=0.0, sparse="entmax15")
    assert torch.equal(sparse(q, kv, mask), before)  # the fused attention, bit for bit
    assert torch.equal(F.scaled_dot_product_attention(q, kv, kv, attn_mask=mask), before)


# ---- Information Pathways


def test_random_keys_are_fair_and_a_function_of_t():
    t = torch.rand(8000, generator=torch.manual_seed(0))
    keys = pathways.random_keys(t, 1, 16, 4)
    assert keys.shape == (8000, 4) and all(len(set(row)) == 4 for row in keys[:99].tolist())
    chosen = F.one_hot(keys, 16).sum(dim=1).double()  # each key with a probability of a quarter
    sigma = math.sqrt(0.25 * 0.75 / 8000)
    assert (chosen.mean(dim=0) - 0.25).abs().max() < 4.5 * sigma
    one = torch.equal(pathways.random_keys(t[[7, 3]], 1, 16, 4), keys[[7, 3]])
    assert one  # whatever else is in the batch
    for block, salt in (2, 0), (1, 1), (12, 0):
        others = F.one_hot(pathways.random_keys(t, block, 16, 4, salt), 16).sum(dim=1).double()
        # Independent choices of 4 of 16 share one key on average; the variance of the number is
        # 4 * 1/4 * 3/4 * 12/15 (hypergeometric)
        common_keys = (chosen * others).sum(dim=1).mean()
        assert abs(common_keys - 1) < 4.5 * math.sqrt(0.6 / 8000)
    neighbours = (chosen[1:] * chosen[:-1]).sum(dim=1).mean()
    assert abs(neighbours - 1) < 4.5 * math.sqrt(0.6 / 8000)


@pytest.fixture
def subsampled(monkeypatch):
    """What main() puts in the place of others is taken back after the test."""
    for name in ("Attention", "SiT", "build_for"):
        monkeypatch.setattr(models, name, getattr(models, name))
    monkeypatch.setattr(train_stage1, "Settings", train_stage1.Settings)


class Masked(torch.overrides.TorchFunctionMode):
    """Dense attention that sees the keys of each block through a mask: the reference."""

    def __init__(self, allowed):
        super().__init__()
        self.allowed = list(allowed)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            q, k, v = args
            scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(
                ~self.allowed.pop(0), -math.inf
            )
            return scores.exp() / scores.exp().sum(dim=-1, keepdim=True) @ v
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_a_subsampled_pass_is_a_masked_dense_one(subsampled):
    plain = tiny(patch=4).double()
    models.Attention = pathways.SubsampledAttention
    model = pathways.SubsampledSiT(models.SIZES["Ti"], 4, 16, 4, 10, True).double()
    model.load_state_dict(plain.state_dict())
    x, y, t = double(3, 4, 16, 16), torch.tensor([1, 10, 4]), torch.tensor([0.2, 0.5, 0.9]).double()
    assert torch.equal(model(x, t, y)[0], plain(x, t, y)[0])  # in training, a share of 1
    model.share = 4
    assert torch.equal(model.eval()(x, t, y)[0], plain(x, t, y)[0])  # at test: dense
    for salt, few in (None, model.train()), (3, model.eval()):
        allowed = torch.zeros(8, 3, 1, 1, 16, dtype=torch.bool)
        for block in range(8):
            for i, row in enumerate(pathways.random_keys(t, block + 1, 16, 4, salt or 0).tolist()):
                allowed[block, i, ..., row] = True
        few.training = salt is None
        got, taps = few(x, t, y, taps=[2], salt=salt)
        with Masked(allowed):
            wanted, taps_wanted = plain(x, t, y, taps=[2])
        assert close(got, wanted) and close(taps[2], taps_wanted[2])
        assert not close(got, plain(x, t, y)[0], 1e-3)
    both = [model(x, t, y, salt=salt)[0] for salt in range(2)]
    assert close(pathways.Ensemble(model, 2)(x, t, y)[0], (both[0] + both[1]) / 2)
    assert not close(both[0], both[1], 1e-3)


def test_few_keys_in_a_continued_run(subsampled, tmp_path):
    """2 + 2 steps are 4 steps, byte for byte; more keys are another run."""
    data = write_folder(tmp_path / "data")
    flags = [*TRAIN, "--model", "SiT-P/4", "--data", data, "--align-weight", 0]
    logs = []
    for name, stops in ("whole", [4]), ("cut", [2, 4]), ("dense", [4]):
        share = 1 if name == "dense" else 4
        for steps in stops:
            out = ["--out", tmp_path / name, "--steps", steps, "--share", share]
            call(pathways, "train", *flags, *out)
        logs.append((tmp_path / name / "log.jsonl").read_bytes())
    assert logs[0] == logs[1] != logs[2]


def test_another_checkpoint_is_refused(subsampled, checkpoints, tmp_path):
    with pytest.raises(UserError, match=r"is none of information_pathways.py; make one"):
        call(pathways, "measure", f"a={checkpoints['own']}", "--out", tmp_path / "figures.jsonl")


def test_what_is_kept_for_the_backward_pass():
    """Written out: q, k and v, 768 bytes a token and head, and a matrix of T x keys."""
    qkv, keys = (
        torch.randn(3, 1, 4, 64, 64, requires_grad=True),
        pathways.random_keys(torch.rand(1), 1, 64, 4),
    )
    for chosen, number, copies in (None, 64, 0), (keys, 16, 2):
        wanted = 4 * 4 * (3 * 64 * 64 + 64 * number + copies * number * 64)
        extra = 0 if chosen is None else chosen.untyped_storage().nbytes()  # of the indices
        assert pathways.cost(pathways.written_out, qkv, chosen)[1] - extra == wanted


# ---- CFGRL


def test_rewards_by_hand():
    rng = np.random.default_rng(0)
    images = np.empty((6, 16, 16, 3), np.uint8)
    for i, image in enumerate(images):
        image[:] = (230, 240, 235)  # paper
        image[2 : 5 + i, 3:9] = rng.integers(0, 160, 3)
        image[12, 12] = (200, 210, 205)  # 30 grey levels from the paper: no ink
    image[0, :3] = 0  # ink on the frame does not make it paper
    sizes = [(3 + i) * 6 / 256 + (3 / 256 if i == 5 else 0) for i in range(6)]
    assert cfgrl.rewards(images, "size") == pytest.approx(sizes)
    for image, got in zip(images[:5], cfgrl.rewards(images, "saturation"), strict=False):
        assert got == pytest.approx(colorsys.rgb_to_hsv(*(image[3, 4] / 255.0))[1])
    assert cfgrl.rewards(np.full((1, 8, 8, 3), 9, np.uint8), "saturation") == 0


@pytest.fixture
def labelled(tmp_path):
    """(A folder of plain squares, the same with labels (class, o)): five classes of 12."""
    data, rng = write_folder(tmp_path / "data", num=60, classes=5), np.random.default_rng(1)
    images = np.full((60, 16, 16, 3), 240, np.uint8)
    for image in images:
        high, wide = rng.integers(1, 12, 2)
        image[2 : 2 + high, 2 : 2 + wide] = 30
    for i, image in enumerate(images):
        Image.fromarray(image).save(data / f"{i}.png")
    (data / "files.json").write_text(json.dumps([f"{i}.png" for i in range(60)]))
    meta = json.loads((data / "meta.json").read_text())
    meta.update(source=str(data), image_size=16)
    (data / "meta.json").write_text(json.dumps(meta))
    call(cfgrl, "label", data, "--out", tmp_path / "labelled")
    return LatentFolder(data), LatentFolder(tmp_path / "labelled"), images


def test_labels_say_who_is_better_than_the_class(labelled):
    before, after, images = labelled
    sizes = [(image[..., 0] == 30).sum() / 256 for image in images]
    means = [statistics.mean(sizes[k::5]) for k in range(5)]
    for i, label in enumerate(after.labels.tolist()):
        assert label == i % 5 + 5 * (sizes[i] > means[i % 5])
    names = before.meta["classes"]
    assert after.meta["classes"] == [*names, *(f"{name}, better" for name in names)]
    assert np.array_equal(after.moments, before.moments)
    known = json.loads((after.path / "rewards.json").read_text())
    assert known["mean"] == pytest.approx(statistics.mean(means))
    best = [max(sorted(sizes[k::5])[-2:]) + min(sorted(sizes[k::5])[-2:]) for k in range(5)]
    assert known["best_tenth"] == pytest.approx(sum(best) / 10)  # two of twelve
    with pytest.raises(UserError, match="exists already"):
        call(cfgrl, "label", before.path, "--out", after.path)


def test_rows_of_a_step(labelled):
    """With drop any picture and its class; else a better picture of that class, all alike often."""
    folder, args = labelled[1], cfgrl.Settings(batch_size=64, label_drop=0.5)
    counted, asked = torch.zeros(60), torch.zeros(60)
    for step in range(60):
        draws = draw(step, args, folder, "cpu")
        batch = cfgrl.make_batch(folder, draws)
        known = folder.labels[batch.indices]
        assert torch.equal(batch.indices[draws.drop], draws.indices[draws.drop])
        assert torch.equal(batch.y_input, torch.where(draws.drop, known % 5, known))
        assert (known[~draws.drop] >= 5).all()
        assert torch.equal(known % 5, folder.labels[draws.indices] % 5)
        moments = torch.from_numpy(folder.moments[batch.indices.numpy()]).float()
        x0 = moments[:, :4] + moments[:, 4:] * draws.posterior
        assert close(batch.x0, x0, 1e-5) and close(batch.velocity, draws.eps - x0, 1e-5)
        counted += torch.bincount(batch.indices[~draws.drop], minlength=60)
        asked += torch.bincount(draws.indices[~draws.drop] % 5, minlength=60)
    for k in range(5):
        better = torch.nonzero(folder.labels == k + 5)[:, 0]
        expected = asked[k] / len(better)
        assert ((counted[better] - expected).abs() < 5 * expected.sqrt()).all()


def test_a_policy_is_guided_from_its_own_class(labelled):
    model = tiny(num_classes=10).double()
    x, t, y = double(3, 4, 16, 16), torch.tensor([0.1, 0.5, 0.9]).double(), torch.tensor([0, 3, 4])
    v_null, v_better = (model(x, t, labels)[0] for labels in (y, y + 5))
    for w in (0.0, 1.0, 2.5):
        wanted = (1 - w) * v_null + w * v_better
        assert close(cfgrl.Policy(model, w)(x, t, y)[0], wanted)
    assert not close(v_null, v_better, 1e-3)


def test_cfgrl_from_labels_to_its_figure(labelled, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train_stage1, "make_batch", train_stage1.make_batch)
    data, run = labelled[1].path, tmp_path / "run"
    flags = "--batch-size 8 --lr 1e-3 --log-every 2 --ema-ramp --device cpu --model SiT-P/8".split()
    logs = []
    for name, stops in ("whole", [4]), ("run", [2, 4]):  # a continued run is the same
        for steps in stops:
            out = ["--data", data, "--out", tmp_path / name, "--steps", steps]
            call(cfgrl, "train", *flags, *out)
        logs.append((tmp_path / name / "log.jsonl").read_bytes())
    assert logs[0] == logs[1]
    monkeypatch.setattr(cfgrl, "find_vae", lambda given, meta: AutoencoderKL((8, 16), layers=1))
    monkeypatch.setattr(judge, "load", lambda path: (None, None))
    monkeypatch.setattr(judge, "measure", lambda *found: {"FD-CNN": 1.5, "agreement": 0.5})
    capsys.readouterr()
    flags = ["--data", data, "--scales", "0,2", "--num", 10, "--steps", 2]
    flags += ["--out", tmp_path / "figures.jsonl"]
    call(cfgrl, "measure", run, *flags, "--figure", tmp_path / "figure.png")
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [json.loads(line)["w"] for line in printed] == [0, 2]
    assert Image.open(tmp_path / "figure.png").size == (1100, 320)


# ---- Guides that are swapped, and what the scripts write


def test_the_student_in_the_direction_of_a_guide():
    student, guide = tiny(seed=1).double(), tiny(seed=2, name="SiT-N").double()
    x, t, y = double(3, 4, 16, 16), torch.tensor([0.1, 0.5, 0.9]).double(), torch.tensor([0, 3, 9])
    direction = guide(x, t, y)[0] - guide(x, t, torch.tensor([10, 10, 10]))[0]
    got = policy_swap.Guided(student, guide, 2.5)(x, t, y)[0]
    assert close(got, student(x, t, y)[0] + 1.5 * direction)


def test_the_spread_over_guides():
    rng = np.random.default_rng(0)
    values = rng.uniform(size=(4, 2))
    lines = [{"w": 2.0, "cnn": {"distance": a, "class": b}} for a, b in values]
    words = policy_swap.spread(lines)
    for key, column in ("distance", values[:, 0]), ("class", values[:, 1]):
        numbers = f"{column.mean():.4g}, range {np.ptp(column):.3g}, sd {column.std(ddof=1):.2g}"
        assert f"cnn {key} {numbers}" in words


@pytest.fixture
def checkpoints(tmp_path, monkeypatch):
    """A student, guides of the same latents and of others; a VAE and a judge that are quick."""
    paths = {}
    for name, size, identity in ("student", "Ti", "a"), ("own", "N", "a"), ("foreign", "N", "b"):
        path = tmp_path / f"{name}.pt"
        write_checkpoint(path, tiny(seed=len(paths), name=f"SiT-{size}"), f"SiT-{size}/8")
        saved = torch.load(path)
        saved["meta"]["vae"]["identity"] = identity
        torch.save(saved, path)
        paths[name] = path
    torch.manual_seed(0)
    vae = AutoencoderKL((8, 16), layers=1)
    monkeypatch.setattr(sampled, "find_vae", lambda given, meta: vae)

    def measured(images, labels):
        return {"distance": images.double().mean().item(), "class": 0.5}

    quick = frontier.Judge(measured, "judge", 32, 10)
    monkeypatch.setattr(frontier, "load_judges", lambda *args: {"cnn": quick})
    return paths


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


FEW = ["--num", 4, "--steps", 2, "--device", "cpu"]


def test_swapping_guides(checkpoints, tmp_path, capsys):
    out = tmp_path / "swap.jsonl"
    words = [f"own={checkpoints['own']}", f"again={checkpoints['own']}"]
    flags = ["--student", checkpoints["student"], "--out", out, *FEW]
    for _ in range(2):  # the second time nothing is made again
        call(policy_swap, *words, f"foreign={checkpoints['foreign']}", *flags)
        lines = lines_of(out)
        assert [line["guide"] for line in lines] == ["own", "again", "foreign"]
        assert [line["same_latents"] for line in lines] == [True, True, False]
    own, again, foreign = (line["cnn"]["distance"] for line in lines)
    assert own == again != foreign
    assert "2 guides of the same latents: cnn distance" in capsys.readouterr().out
    with pytest.raises(UserError, match="has no guide"):
        call(policy_swap, *flags)
    wrong = tmp_path / "wrong.pt"
    write_checkpoint(wrong, tiny(num_classes=7, name="SiT-N"), "SiT-N/8")
    with pytest.raises(UserError, match=r"wrong.pt: has channels, side, classes \(4, 16, 7\)"):
        call(policy_swap, f"wrong={wrong}", *flags)


def test_the_figures_of_pladis_in_self_attention(checkpoints, tmp_path):
    out, given = tmp_path / "pladis.jsonl", f"student={checkpoints['student']}"
    call(pladis, given, "--lambdas", "0,2", "--out", out, *FEW)
    call(pladis, given, "--lambdas", "0,2", "--sparse", "sparsemax", "--out", out, *FEW)
    lines = lines_of(out)
    dense, entmax, again, sparsemax = (line["cnn"]["distance"] for line in lines)
    assert dense == again and len({dense, entmax, sparsemax}) == 3
    assert all("self-attention, which is not PLADIS" in line["method"] for line in lines)
    args = sampled.SampleSettings(num=4, steps=2)
    bench = sampled.Bench(checkpoints["student"], args)
    images = frontier.make_samples(bench.network, bench.vae, torch.arange(4), 1, args, "cpu")
    assert images.double().mean().item() == dense  # lambda 0 is the frontier's own figure
