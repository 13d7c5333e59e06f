"""Internal Guidance and guide_by.py, against plain float64 loops; and the scripts."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TRAIN, call, ok, one_loss, tiny, write_folder
from test_methods import B, close, filled, in_double, one, settings
from torch.utils.flop_counter import FlopCounterMode

import common
import models
import sample
from common import UserError, fingerprint
from experiments.cifar10 import guide_by
from experiments.cifar10 import judge as judging
from experiments.cifar10.guide_by import ClassDirection
from experiments.methods import ddae, internal_guidance
from experiments.methods.internal_guidance import Head, Internal, InternalGuidance
from fid import statistics
from train_stage1 import draw, make_batch, rows_in_range
from vae_latents import LatentFolder

RAMP = {"ema": 0.9, "ema_ramp": True}


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "data")


def fill(module, std=0.1):
    """Zero at first, as heads and self-conditioning are, nothing would be tested."""
    for p in module.parameters():
        torch.nn.init.normal_(p, std=std)
    return module


def normalised(vector):
    return (vector - vector.mean()) / (vector.var(unbiased=False) + 1e-6).sqrt()


def condition(model, t, y):
    """c (D,) of one image."""
    return model.t_embedder(t[None])[0] + model.y_embedder["embedding_table"].weight[y]


def velocity_of(layer, tokens, c, patch=8, side=16):
    """What a final layer reads off the tokens (T, D) of one image, token by token, by its words."""
    silu = c * torch.sigmoid(c)
    shift, scale = (layer.adaLN_modulation[1].weight @ silu + layer.adaLN_modulation[1].bias).chunk(
        2
    )
    velocity = torch.empty(4, side, side, dtype=torch.float64)
    for token, h in enumerate(tokens):
        h = normalised(h) * (1 + scale) + shift
        numbers = (layer.linear.weight @ h + layer.linear.bias).view(patch, patch, 4)
        row, column = divmod(token, side // patch)
        for i in range(patch):
            for j in range(patch):
                velocity[:, row * patch + i, column * patch + j] = numbers[i, j]
    return velocity


# ---- Internal Guidance


class FilledInternal(Internal):
    def projector(self, model):
        head = super().projector(model)
        fill(head.layer)
        return head


@torch.no_grad()
@pytest.mark.parametrize("t_min,t_max", [(0.0, 1.0), (0.4, 0.7)])
def test_internal_loss(t_min, t_max, folder):
    """At all t, and in a range, where the head must hear the t and labels of these rows alone."""
    args = settings(FilledInternal, depth=3, t_min=t_min, t_max=t_max)
    loss, model, latents = FilledInternal(args), filled(seed=1), LatentFolder(folder)
    head = loss.projector(model).double()
    draws = draw(3, args, latents, "cpu")
    draws = type(draws)(**in_double(draws))
    draws.drop = torch.arange(B) % 3 == 0  # so that true and y_input labels differ
    batch, rows = make_batch(latents, draws), rows_in_range(B, 1, t_min, t_max)
    losses = one_loss(model, head, loss, rows)
    inputs = batch.x_t, batch.t, batch.y_input, batch.velocity, loss.target(batch[rows])
    got, wanted, counted = losses(*inputs)[1].item(), 0.0, 0
    for i in range(B):
        t, y = batch.t[i], batch.y_input[i]
        if t_min <= t <= t_max:
            tokens = one(model, batch.x_t[i], t, y, 3)
            answer = velocity_of(head.layer, tokens, condition(model, t, y))
            wanted += (answer - (batch.eps[i] - batch.x0[i])).square().mean().item() / B
            counted += 1
    close(got, wanted)
    assert 0 < counted and (counted == B) == (t_max == 1) and (batch.y_input != batch.y).any()


def test_internal_average(folder, tmp_path):
    """The head's average follows the loop's rule, which is read off the network's own average."""
    more = ["--save-every", 1, "--keep", 9, "--accum", 2, "--ema", 0.15, "--data", folder]
    for out, lengths in (("whole", [4]), ("cut", [2, 4])):
        for steps in lengths:
            call(internal_guidance, *TRAIN, *more, "--steps", steps, "--out", tmp_path / out)
    network, layer = torch.zeros(8 * 8 * 4, 128), torch.zeros(8 * 8 * 4, 128)  # at first
    for step in range(1, 5):
        model, saved = models.load_checkpoint(tmp_path / f"whole/ckpt-{step:07d}.pt")
        decay = min(0.15, step / (9 + step))
        network = decay * network + (1 - decay) * saved["model"]["final_layer.linear.weight"]
        layer = decay * layer + (1 - decay) * saved["projector"]["layer.linear.weight"]
        torch.testing.assert_close(saved["ema"]["final_layer.linear.weight"], network)
        loaded = InternalGuidance(model, saved).head.layer.linear.weight
        torch.testing.assert_close(loaded, layer)
    assert layer.any()
    cut = common.load_file(tmp_path / "cut/ckpt-0000004.pt")
    for key, tensor in saved["projector"].items():
        assert torch.equal(tensor, cut["projector"][key]), key


def a_head(model, seed=3):
    """(A checkpoint as InternalGuidance reads it, the head's average after its last step)."""
    torch.manual_seed(seed)
    head = Head(model, SimpleNamespace(**RAMP)).double()
    fill(head.layer), fill(head.average.module)
    head.average.n_averaged.fill_(5)
    before = dict(head.average.module.named_parameters())
    wanted = {
        name: before[name].lerp(p, 1 - 5 / 14).detach() for name, p in head.layer.named_parameters()
    }
    saved = {"args": {**RAMP, "stage": "internal", "depth": 2}, "projector": head.state_dict()}
    layer = models.FinalLayer(model.width, model.patch, 4).double()
    layer.load_state_dict(wanted)
    return saved, layer


@torch.no_grad()
@pytest.mark.parametrize("mode", ["euler", "heun"])
@pytest.mark.parametrize("by", ["small", "internal"])
def test_sampling_against_a_plain_loop(by, mode):
    student, small = filled(seed=1), tiny(seed=2, name="SiT-N").double()
    saved, layer = a_head(student)
    if by == "small":
        network = ClassDirection(student, small)
    else:
        network = InternalGuidance(student, saved).double()
    network.w, w = 1.7, 1.7
    noise, y = torch.randn(3, 4, 16, 16), torch.tensor([4, 0, 9])
    got = sample.sample(network, noise, y, 10, 3, mode)

    def velocity(x, t, y):
        t = torch.tensor(t, dtype=torch.float64)
        v = student(x[None], t[None], y[None])[0][0]
        if by == "internal":
            weak = velocity_of(layer, one(student, x, t, y, 2), condition(student, t, y))
            return weak + w * (v - weak)
        y_input, untold = (small(x[None], t[None], label[None])[0][0] for label in (y, 0 * y + 10))
        return v + (w - 1) * (y_input - untold)

    for i in range(3):
        x = noise[i].double()
        for t, t_next in ((1, 2 / 3), (2 / 3, 1 / 3), (1 / 3, 0)):
            v = velocity(x, t, y[i])
            if mode == "heun" and t_next:
                v = (v + velocity(x + (t_next - t) * v, t_next, y[i])) / 2
            x = x + (t_next - t) * v
        torch.testing.assert_close(got[i], x, rtol=1e-5, atol=1e-6)


def test_internal_blocks_weight_and_cost(folder):
    sizes = {"B": 4, "L": 8, "XL": 8, "Ti": 2, "W": 4}
    for size, block in sizes.items():
        assert Internal.blocks(models.SIZES[size]) == {"depth": block}
    args, latents = settings(Internal), LatentFolder(folder)
    assert (args.weight, args.t_min, args.t_max) == (0.5, 0, 1)
    loss, model = Internal(args), filled(seed=1).float()
    batch = make_batch(latents, draw(0, args, latents, "cpu"))

    def flops(head):
        with FlopCounterMode(display=False) as counter:
            losses = one_loss(model, head, loss, slice(0, B))
            target = loss.target(batch) if head else None
            sum(losses(batch.x_t, batch.t, batch.y_input, batch.velocity, target)).backward()
        return counter.get_total_flops()

    extra = (flops(loss.projector(model)) - flops(None)) / (3 * B * model.forward_flops())
    assert loss.extra_cost(model) == pytest.approx(extra, rel=0.06)


# ---- guide_by.py


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    torch.manual_seed(0)
    path, cnn = tmp_path_factory.mktemp("judge") / "judge.pt", judging.CNN(10, 4).eval()
    images = torch.randint(0, 256, (60, 32, 32, 3), dtype=torch.uint8)
    with torch.no_grad():
        features, _ = cnn(images)
    mu, sigma = map(torch.from_numpy, statistics(features))
    known = {"mu": mu, "sigma": sigma, "reference": features, "size": 32}
    torch.save({"model": cnn.state_dict(), "classes": 10, "width": 4, **known}, path)
    return path


def write_small(path, runs, seed=3):
    """A small network of the runs' latents, with a strong opinion."""
    model = tiny(num_classes=8, seed=seed, name="SiT-N")
    saved = common.load_file(next(iter(models.checkpoints(runs / "stage1"))))
    args = {**saved["args"], "model": "SiT-N/8"}
    torch.save({**saved, "args": args, "ema": model.state_dict()}, path)
    return path


def figures(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def calls(monkeypatch):
    """The batches that the first network loaded, the student, was called with."""
    seen, load = [], models.load_checkpoint

    def watched(*given, **more):
        network, saved = load(*given, **more)
        if "--by cfg" in more.values():
            network.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
        return network, saved

    monkeypatch.setattr(models, "load_checkpoint", watched)
    return seen


WAYS = [  # and the evaluations of 2 and of 3 steps
    ("none", "euler", [2, 3]),
    ("none", "heun", [3, 5]),
    ("cfg", "euler", [4, 6]),
    ("cfg", "heun", [6, 10]),
    ("small", "euler", [2, 3]),
    ("small", "heun", [3, 5]),
]


@pytest.mark.slow
def test_guide_by(runs, judge, tmp_path, calls, monkeypatch):
    """Evaluations are counted, figures are made once, and the images are those of sample.py."""
    out, small = tmp_path / "figures.jsonl", write_small(tmp_path / "small.pt", runs)
    monkeypatch.setattr(judging, "measure", lambda cnn, judge, *made: fingerprint(*made))
    base = [runs / "stage2", "--judge", judge, "--out", out, "--num", 14, "--small", small]
    for by, mode, needed in WAYS:
        command = [*base, "--by", by, "--mode", mode, "--scales"]
        calls.clear()
        call(guide_by, *command, "3", "--steps", "2,3")
        assert [line["evaluations"] for line in figures(out)[-2:]] == needed
        assert len(calls) == sum(needed)
        call(guide_by, *command, "3", "--steps", "3,2")  # all known
        assert len(calls) == sum(needed)
    call(guide_by, *base, "--by", "small", "--scales", "1,3", "--steps", 2)  # the half is known
    lines = figures(out)
    assert len(lines) == 2 * len(WAYS) + 1
    share = 2 * tiny(name="SiT-N").forward_flops() / tiny().forward_flops()
    assert {line["share"] for line in lines} == {0.0, round(share, 4)}
    found = {
        tuple(line[key] for key in ("by", "mode", "steps", "w")): line[str(judge)] for line in lines
    }
    assert found["small", "euler", 2, 1] == found["none", "euler", 2, 1]
    assert len(set(found.values())) == len(lines) - 1  # all others differ
    for mode, by in (("euler", "none"), ("heun", "cfg")):
        w = 3 if by == "cfg" else 1
        more = [
            "--num-images",
            14,
            "--mode",
            mode,
            "--steps",
            3,
            "--cfg",
            w,
            "--out",
            tmp_path / by,
        ]
        call(sample, "--ckpt", runs / "stage2", *more)
        samples = np.load(tmp_path / by / "samples.npz")
        assert found[by, mode, 3, w] == fingerprint(samples["arr_0"], samples["labels"])


def test_other_judges_or_weights_are_other_figures(runs, judge, tmp_path):
    out, small = tmp_path / "figures.jsonl", tmp_path / "small.pt"
    base = [runs / "stage2", "--out", out, "--num", 4, "--steps", 1, "--scales", 2]
    other = common.load_file(judge)
    torch.save({**other, "mu": other["mu"] + 1}, tmp_path / "judge.pt")
    for seed in (1, 2):
        write_small(small, runs, seed)
        call(guide_by, *base, "--small", small, "--judge", judge)
    call(guide_by, *base, "--small", small, "--judge", f"{judge},{tmp_path / 'judge.pt'}")
    lines = figures(out)
    assert len({line["tag"] for line in lines}) == len(lines) == 3
    assert lines[2][str(judge)] != lines[2][str(tmp_path / "judge.pt")]


def test_guide_by_internal(latents, judge, tmp_path):
    run, out = tmp_path / "run", tmp_path / "figures.jsonl"
    call(internal_guidance, *TRAIN, "--data", latents, "--steps", 2, "--out", run)
    flags = [run, "--judge", judge, "--out", out, "--num", 12, "--steps", 2, "--scales", "1,3"]
    call(guide_by, *flags, "--by", "internal")
    call(guide_by, *flags, "--by", "none")
    one, three, none = figures(out)
    assert one[str(judge)] == none[str(judge)] and one["evaluations"] == three["evaluations"] == 2


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--steps", "2,x"], "--steps, --scales: need numbers"),
        (["--scales", ""], "--scales: must be a word"),
        (["--small", "classes.pt"], "--small classes.pt: is of other latents than"),
        (["--small", "vae.pt"], "--small vae.pt: is of other latents than"),
        (["--small", "absent.pt"], "absent.pt: .*No such file"),
        (["--by", "internal"], "--by internal: the checkpoint is none of"),
        (["--judge", "other.pt"], "other.pt: is no judge"),
        (["--out", "broken.jsonl"], "broken.jsonl: is no file of figures"),
        (["--out", "absent/figures.jsonl"], "absent/figures.jsonl: is no file of figures"),
    ],
)
def test_user_errors(flags, message, runs, judge, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = common.load_file(write_small(tmp_path / "other.pt", runs))
    classes, vae = {"classes": list("abcdefgh")}, {"vae": {"path": "a.pt", "identity": "other"}}
    for name, change in (("classes", classes), ("vae", vae)):
        torch.save({**saved, "meta": {**saved["meta"], **change}}, f"{name}.pt")
    (tmp_path / "broken.jsonl").write_text('{"ckpt": "a"')
    base = ["--small", runs / "stage1", "--judge", judge, "--num", 4, "--steps", 1]
    with pytest.raises(UserError, match=message):
        call(guide_by, runs / "stage2", *base, *flags)
    assert (tmp_path / "broken.jsonl").read_text() == '{"ckpt": "a"'


# ---- A network of one's own: DDAE++'s


def test_a_network_of_one_s_own_trains_and_samples(latents, tmp_path):
    run, out = tmp_path / "run", tmp_path / "samples"
    train = ["train", *TRAIN, "--align-weight", "0", "--data", latents, "--steps", 4, "--out", run]
    draw = ["sample", "--ckpt", run, "--num-images", 8, "--mode", "euler", "--steps", 2]
    for flags in (train, [*draw, "--device", "cpu", "--out", out]):
        ok("experiments.methods.ddae", *flags)
    assert np.load(out / "samples.npz")["arr_0"].shape == (8, 32, 32, 3)
    learned = common.load_file(run / "ckpt-0000004.pt")["ema"]["reroute.weight"]
    assert learned.shape == (128, 128) and learned.norm() > 0
    with pytest.raises(UserError, match="reroute.weight"):  # and none takes it for a plain one
        models.load_checkpoint(run)


@torch.no_grad()
def test_what_follows_the_middle_is_told_of_it():
    """Against hooks on a plain network."""
    plain = filled(1)
    size = models.parse_name("SiT-Ti/8")[0]
    own = ddae.SelfConditioned(size, 8, 16, 4, plain.num_classes, True).double()
    own.load_state_dict({**own.state_dict(), **plain.state_dict()})
    x, y = torch.randn(3, 4, 16, 16).double(), torch.tensor([0, 1, 2])
    t = torch.tensor([0.1, 0.5, 0.9]).double()
    assert torch.equal(own(x, t, y)[0], plain(x, t, y)[0])  # at first it is the plain network

    own.reroute.weight.data.normal_()
    seen = {}

    def read(block, inputs, tokens):
        mean = tokens.mean(dim=1)
        centred = mean - mean.mean(dim=1, keepdim=True)
        normal = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
        seen["more"] = normal @ own.reroute.weight.T

    def tell(block, inputs):
        return inputs[0], inputs[1] + seen["more"]

    plain.blocks[3].register_forward_hook(read)
    for part in (*plain.blocks[4:], plain.final_layer):
        part.register_forward_pre_hook(tell)
    assert torch.allclose(own(x, t, y)[0], plain(x, t, y)[0], rtol=1e-9)
