"""Captions for labels: the attention against a float64 loop, the table, held-out captions, runs."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TRAIN, call, write_folder
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import models
import vae_latents
from build_teacher import guided_features, load_teacher
from common import UserError
from experiments.latents import small_vae
from experiments.methods import pladis, text
from experiments.text import captions as drawn
from experiments.text import compare, judge
from train_stage1 import draw, make_batch
from vae_latents import LatentFolder

CAPTIONS = ["a red star", "a blue dot left of a red star", "a red dot", "a red star left of a dot"]
HELD_OUT = "a blue star left of a dot"  # the last row, of which no image is
META = {"height": 16, "channels": 4, "classes": [*CAPTIONS, HELD_OUT], "text": {"features": None}}


@pytest.fixture(autouse=True)
def text_networks(monkeypatch):
    monkeypatch.setattr(models, "build_for", text.build_for)


def network(meta=META, seed=0):
    """A TextSiT in float64 with 4 tokens, whose zero-initialised layers are filled."""
    torch.manual_seed(seed)
    model = text.build_for({"model": "SiT-P/8", "qk_norm": True}, meta)
    for p in model.parameters():
        if p.abs().sum() == 0:
            torch.nn.init.normal_(p, std=0.05)
    return model.double().eval()


def inputs(n=5):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, 4, 16, 16, generator=generator, dtype=torch.float64)
    return x, torch.linspace(0.1, 0.9, n, dtype=torch.float64), torch.arange(n) % 6


def layer_norm(vector, weight=1.0, bias=0.0, eps=1e-5):
    centred = vector - vector.mean()
    return centred / np.sqrt((centred**2).mean() + eps) * weight + bias


def weights(scores, lam):
    """softmax + lam (entmax15 - softmax) of a few numbers; entmax's threshold by bisection."""
    softmax = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    low, high = scores.max() / 2 - 1, scores.max() / 2  # of tau: the sum is >= 1, then 0
    for _ in range(100):
        tau = (low + high) / 2
        above = (np.maximum(scores / 2 - tau, 0) ** 2).sum() > 1
        low, high = (tau, high) if above else (low, tau)
    return softmax + lam * (np.maximum(scores / 2 - low, 0) ** 2 - softmax)


@pytest.mark.parametrize("lam", [0, 1, 2])
def test_cross_attention_is_a_plain_loop_over_words(lam):
    """Image by image, token by token, head by head, over the words that are there alone; also with
    PLADIS's attention (arXiv 2503.07677)."""
    torch.manual_seed(1)
    width, heads, N, T, L = 12, 3, 4, 5, 6
    cross = text.CrossAttention(width, heads, qk_norm=True).double()
    for p in cross.parameters():
        torch.nn.init.normal_(p, std=0.5)
    x, caption = torch.randn(N, T, width).double(), torch.randn(N, L, width).double()
    lengths = [6, 1, 3, 4]
    mask = torch.arange(L) < torch.tensor(lengths)[:, None]
    w = {name: p.detach().numpy() for name, p in cross.named_parameters()}
    expected = np.zeros((N, T, width))
    for n in range(N):
        for i in range(T):
            q = w["q.weight"] @ x[n, i].numpy() + w["q.bias"]
            mixed = []
            for head in range(heads):
                part = slice(head * width // heads, (head + 1) * width // heads)
                query = layer_norm(q[part], w["q_norm.weight"], w["q_norm.bias"])
                scores, values = [], []
                for word in caption[n, : lengths[n]].numpy():
                    k, v = np.split(w["kv.weight"] @ word + w["kv.bias"], 2)
                    key = layer_norm(k[part], w["k_norm.weight"], w["k_norm.bias"])
                    scores.append(query @ key / math.sqrt(width // heads))
                    values.append(v[part])
                mixed.append(weights(np.array(scores), lam) @ np.array(values))
            expected[n, i] = w["proj.weight"] @ np.concatenate(mixed) + w["proj.bias"]
    if lam:
        pladis.install(cross, lam=lam)
    got = cross(x, caption, mask).detach().numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


def test_a_block_is_attention_then_caption_then_mlp():
    """PixArt-alpha's order, from the block's parts; the cross-attention has no gate."""
    model = network()
    block, generator = model.blocks[0], torch.Generator().manual_seed(2)
    x, caption = torch.randn(2, 3, 4, 48, generator=generator, dtype=torch.float64)
    c = torch.randn(3, 48, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]).bool()
    got = block(x, c, caption, mask)
    normal = lambda h: F.layer_norm(h, [48], eps=1e-6)  # noqa: E731
    parts = (F.silu(c) @ block.adaLN_modulation[1].weight.T + block.adaLN_modulation[1].bias)[
        :, None
    ]
    shift1, scale1, gate1, shift2, scale2, gate2 = parts.split(48, dim=2)
    x = x + gate1 * block.attn(normal(x) * (1 + scale1) + shift1)
    x = x + block.cross(normal(x), caption, mask)
    x = x + gate2 * block.mlp(normal(x) * (1 + scale2) + shift2)
    torch.testing.assert_close(got, x)


def test_the_attention_can_be_replaced_and_the_caption_reaches_it_alone(monkeypatch):
    """With values of zero in the words' place, no caption makes a difference."""
    model, (x, t, y) = network(), inputs()
    before = model(x, t, y)[0]
    assert not torch.equal(before, model(x, t, y.roll(1))[0])
    nothing = lambda q, k, v, attn_mask: torch.zeros_like(q)  # noqa: E731
    monkeypatch.setattr(text.CrossAttention, "attend", staticmethod(nothing))
    assert torch.equal(model(x, t, y)[0], model(x, t, y.roll(1))[0])


def test_rows_are_words_in_order_and_the_null_is_the_empty_caption():
    table = text.word_table(["b a", "a b c", ""])
    assert table.tolist() == [[1, 3, 2, 0], [1, 2, 3, 4], [1, 0, 0, 0]]
    model = network()
    assert model.num_classes == 5 and model.table[5].tolist() == [1, *[0] * 8]
    x, t, _ = inputs(2)
    swapped = {**META, "classes": ["a dot left of a red star", *META["classes"][1:]]}
    ours, theirs = network(), network(swapped)  # the same words and weights
    first, last = torch.tensor([3, 3]), torch.tensor([0, 0])
    assert not torch.allclose(ours(x, t, first)[0], theirs(x, t, last)[0])  # the order is read


def test_padding_changes_nothing():
    """The same weights on a table with more columns: the words that are not there are not seen."""
    model, (x, t, y) = network(), inputs()
    before, L = model(x, t, y)[0], model.table.shape[1]
    model.table = F.pad(model.table, (0, 3))
    model.word_positions = torch.nn.Parameter(F.pad(model.word_positions, (0, 0, 0, 3), value=7.0))
    assert model.table.shape[1] == L + 3
    torch.testing.assert_close(model(x, t, y)[0], before)


def test_training_and_evaluation_read_alike():
    """PyTorch's transformer layer has a second path for evaluation without gradients."""
    model, (x, t, y) = network(), inputs()
    with torch.no_grad():
        evaluated = model.eval()(x, t, y)[0]
    torch.testing.assert_close(evaluated, model.train()(x, t, y)[0])


@pytest.mark.parametrize("features", [None, 24])
def test_flops_are_those_that_torch_counts(features, tmp_path):
    meta = META
    if features:
        meta = with_features(tmp_path, np.random.default_rng(0).normal(size=(6, 7, features)))
    model = network(meta).float().train()
    products = sdpa_kernel(SDPBackend.MATH)  # whose attention the counter sees
    with products, FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 4, 16, 16), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    assert model.forward_flops() == counter.get_total_flops()


# ---- Features


def with_features(path, features):
    """META with a table of features; their hash is taken as the file's."""
    np.save(path / "features.npy", features)
    _, identity = text.read_features(path / "features.npy", 5)
    return {**META, "text": {"features": str(path / "features.npy"), "identity": identity}}


def test_features_are_read_where_they_are_not_zero(tmp_path):
    """float16 features of lengths 1 to 6; what lies behind a caption's length is never seen."""
    features = np.random.default_rng(1).normal(size=(6, 6, 24)).astype(np.float16)
    for row in range(6):
        features[row, row + 1 :] = 0
    model, (x, t, y) = network(with_features(tmp_path, features)), inputs()
    _, mask = model.read(torch.arange(6))
    assert mask.sum(dim=1).tolist() == [1, 2, 3, 4, 5, 6]
    before = model(x, t, y)[0]
    assert not torch.allclose(before, model(x, t, y.roll(1))[0])
    linear = model.y_embedder["embedding_table"]
    projected = features.astype(float) @ linear.weight.detach().numpy().T
    model.reader.forward = lambda tokens, src_key_padding_mask: tokens
    expected = projected + (linear.bias + model.word_positions).detach().numpy()
    np.testing.assert_allclose(model.read(torch.arange(6))[0].detach(), expected, rtol=1e-10)


# ---- Captions that are held out


def test_no_image_shows_what_is_held_out(tmp_path):
    """By the words themselves: neither a new figure, nor a new pair in either wording."""
    drawn.write(tmp_path, 600, 8)
    captions = json.loads((tmp_path / "captions.json").read_text())
    labels = dict(json.loads((tmp_path / "dataset.json").read_text())["labels"])
    group, pictures = drawn.groups(), {name: set() for name in ("seen", "new pair", "new figure")}
    assert len(labels) == 600 and len({*captions}) == len(captions) == 36 + 2 * 36 * 35
    for caption in captions:
        words = caption.split()
        figures = " ".join(words[1:3]), " ".join(words[6:8])
        picture = figures if "left" in words else figures[::-1]
        pictures[group[caption]].add(picture)
        new = len({*figures} & drawn.NEW_KINDS) > 0
        assert new == (group[caption] == "new figure"), caption
    assert not pictures["seen"] & pictures["new pair"]
    assert len(pictures["new pair"]) == 87  # a tenth of 30 * 29
    assert {kind.split()[1] for kind in drawn.NEW_KINDS} == {*drawn.SHAPES}
    assert len({kind.split()[0] for kind in drawn.NEW_KINDS}) == 6
    shown = {captions[label] for label in labels.values()}
    assert {group[caption] for caption in shown} == {"seen"} and len(shown) > 300


def test_a_drawing_has_what_its_caption_says_where_it_says():
    """The inks of the left and of the right half, by the nearest of the six colours."""
    for index, kinds in enumerate([("red star", "blue heart"), ("green cross", "black circle")]):
        image = drawn.draw_caption(kinds, np.random.default_rng(index), 32)
        for half, kind in zip(
            np.split(np.asarray(image).astype(int), 2, axis=1), kinds, strict=True
        ):
            pixels = half.reshape(-1, 1, 3)
            paper = np.median(pixels, axis=0)
            far = pixels[np.abs(pixels - paper).sum(axis=(1, 2)) > 200]
            nearest = ((far - drawn.INKS) ** 2).sum(axis=2).argmin(axis=1)
            assert [*drawn.COLOURS][np.bincount(nearest).argmax()] == kind.split()[0]


def test_judges_figures_are_counted_by_hand():
    """Two figures: right, swapped, a wrong colour, a wrong shape, one for two. One: right."""
    truths = torch.tensor([[1, 0, 1, 2, 3]] * 5 + [[0, 4, 5, -1, -1]])
    rows = [[1, 0, 1, 2, 3], [1, 2, 3, 0, 1], [1, 5, 1, 2, 3], [1, 0, 1, 2, 0], [0, 0, 1, 2, 3]]
    found = judge.figures(torch.tensor([*rows, [0, 4, 5, 2, 2]]), truths)
    assert judge.truth(("orange square", "green star")) == [1, 1, 1, 2, 3]
    assert judge.truth(("violet heart",)) == [0, 4, 5, -1, -1]
    assert found == {
        "colour": 0.7,  # of ten figures, the swapped two and one more are wrong
        "shape": 0.7,
        "both figures": 0.4,
        "order": 0.5,
        "all": round(2 / 6, 4),
    }


def test_samples_are_asked_for_of_one_group():
    captions = [*drawn.grammar()]
    for name in ("seen", "new pair", "new figure"):
        labels = compare.asked(captions, name, 40, 0)
        assert {drawn.groups()[captions[label]] for label in labels} == {name}
        assert sum(" of " not in captions[label] for label in labels) == 10 * (name != "new pair")


# ---- Runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random latents of four captions of five, with their table, by the command."""
    path = tmp_path_factory.mktemp("text") / "data"
    write_folder(path, num=24, classes=4)
    meta = json.loads((path / "meta.json").read_text())
    meta["classes"] = list("0123")  # as vae_latents.py names what EDM's dataset.json numbers
    (path / "meta.json").write_text(json.dumps(meta))
    (path / "captions.json").write_text(json.dumps(META["classes"]))
    call_text("table", path, "--captions", path / "captions.json")
    return path


def call_text(verb, *flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "build_for", models.build_for)  # main() replaces it
        call(text, verb, *flags)


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """stage1 (6 steps), its teacher, stage2 (6 steps, with a stop after 4)."""
    out = tmp_path_factory.mktemp("runs")
    train = [*TRAIN, "--model", "SiT-P/8", "--data", folder]
    call_text("stage1", *train, "--steps", 6, "--out", out / "stage1")
    call_text("teacher", "--ckpt", out / "stage1", "--out", out / "teacher")
    guide = ["--guide-steps", 5, "--teacher", out / "teacher/teacher.pt"]
    for steps in (4, 6):
        call_text("stage2", *train, *guide, "--steps", steps, "--out", out / "stage2")
    call_text("stage2", *train, *guide, "--steps", 6, "--out", out / "whole")
    return out


def test_a_run_continues_bit_for_bit(runs):
    saved = [torch.load(runs / name / "ckpt-0000006.pt") for name in ("stage2", "whole")]
    for part in ("model", "ema"):
        first, second = saved[0][part], saved[1][part]
        assert first.keys() == second.keys() and "table" not in first
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert (runs / "stage2/log.jsonl").read_bytes() == (runs / "whole/log.jsonl").read_bytes()


def test_the_words_are_trained(runs, folder):
    start = network()
    saved = torch.load(runs / "stage1/ckpt-0000006.pt")["model"]
    for name in ("y_embedder.embedding_table.weight", "word_positions", "blocks.3.cross.kv.weight"):
        assert not torch.equal(saved[name], start.state_dict()[name].float())
    words = saved["y_embedder.embedding_table.weight"]
    assert len(words) == 2 + len({word for caption in META["classes"] for word in caption.split()})


def test_the_batch_drops_captions_to_the_empty_one(folder):
    """The loop's null label is the table's last row."""
    latents = LatentFolder(folder)
    args = text.train_stage1.Settings(batch_size=64, label_drop=0.5)
    batch = make_batch(latents, draw(0, args, latents, "cpu"))
    dropped = batch.y_input != batch.y
    assert batch.y.max() == 3 and {*batch.y_input[dropped].tolist()} == {5} and dropped.any()


def test_the_teachers_null_is_the_empty_caption(runs):
    """f_g of a teacher whose table says an empty caption outright, in row 0, by its own formula."""
    teacher, saved = load_teacher(runs / "teacher/teacher.pt")
    meta = {**saved["meta"], "classes": ["", *saved["meta"]["classes"]]}
    spelt = models.build_for(saved["args"], meta).cut(saved["depth"])
    spelt.load_state_dict(saved["teacher"])
    x, t, _ = (value.float() for value in inputs())
    y = torch.tensor([0, 1, 2, 3, 4])
    tokens = [spelt.eval()(x, t, rows, taps=[3])[1][3] for rows in (y + 1, torch.zeros_like(y))]
    expected = tokens[1] + 30 * (tokens[0] - tokens[1])
    assert (tokens[0] - tokens[1]).abs().max() > 1e-4
    found = guided_features(teacher, x, t, y, 30.0)  # s multiplies the rounding
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_a_caption_without_an_image_is_sampled_by_its_name(runs, tmp_path):
    flags = ["--ckpt", runs / "stage2", "--latents", "--mode", "euler", "--steps", 2, "--cfg", 2]
    named = [*flags, "--num-images", 2, "--device", "cpu", "--classes"]
    call_text("sample", *named, HELD_OUT, "--out", tmp_path / "held")
    call_text("sample", *named, CAPTIONS[0], "--out", tmp_path / "seen")
    held, seen = (np.load(tmp_path / name / "latents.npz") for name in ("held", "seen"))
    assert held["labels"].tolist() == [4, 4]
    assert not np.array_equal(held["latents"], seen["latents"])


def test_features_train_and_sample_and_must_stay_what_they_were(tmp_path):
    path = write_folder(tmp_path / "data", num=24, classes=5)
    meta = json.loads((path / "meta.json").read_text())
    (path / "captions.json").write_text(json.dumps(meta["classes"]))  # folders' names
    features = np.random.default_rng(2).normal(size=(6, 7, 24)).astype(np.float16)
    np.save(tmp_path / "clip.npy", features)
    given = ["--captions", path / "captions.json", "--features", tmp_path / "clip.npy"]
    call_text("table", path, *given)
    out = ["--out", tmp_path / "run"]
    train = [*TRAIN, "--model", "SiT-P/8", "--data", path, *out]
    call_text("stage1", *train, "--steps", 4)
    flags = ["--ckpt", tmp_path / "run", "--latents", "--steps", 2, "--num-images", 2]
    call_text("sample", *flags, "--device", "cpu", "--out", tmp_path / "samples")
    np.save(tmp_path / "clip.npy", features[::-1])
    with pytest.raises(UserError, match="other features"):
        call_text("stage1", *train, "--steps", 6)


def refusal(what, path, *flags):
    with pytest.raises(UserError, match=what):
        call_text("table", path, *flags)


def test_what_the_table_refuses(folder, tmp_path):
    captions = folder / "captions.json"
    refusal("has a table already", folder, "--captions", captions)
    path = write_folder(tmp_path / "data", num=24, classes=5)
    before = (path / "meta.json").read_bytes()
    refusal("the class is class 0", path, "--captions", captions)
    classes = tmp_path / "classes.json"
    classes.write_text(json.dumps([f"class {i}" for i in range(4)]))
    refusal("fits the labels", path, "--captions", classes)  # it has no row for class 4
    classes.write_text(json.dumps([f"class {i}" for i in range(7)]))
    features = np.random.default_rng(2).normal(size=(8, 7, 24))
    for wrong in (features[:7], features[0], features.astype(int)):
        np.save(tmp_path / "f.npy", wrong)
        refusal("table of features", path, "--captions", classes, "--features", tmp_path / "f.npy")
    features[7] = 0
    np.save(tmp_path / "f.npy", features)
    refusal("row of zeros", path, "--captions", classes, "--features", tmp_path / "f.npy")
    assert (path / "meta.json").read_bytes() == before
    with pytest.raises(UserError, match="no table of captions"):
        call_text("stage1", *TRAIN, "--data", path, "--steps", 2, "--out", tmp_path / "run")


def test_the_comparison_from_drawings_to_its_table(runs, tmp_path):
    """Each cell once, lambda reaches the samples, a second run adds nothing, a picture is made."""
    with pytest.raises(UserError, match="other captions"):
        compare.Painter(runs / "stage2")
    drawn.write(tmp_path / "images", 24, 32)
    small = "--size 32 --factor 2 --steps 2 --device cpu".split()
    call(small_vae, tmp_path / "images", *small, "--out", tmp_path / "vae.pt")
    flags = ["--vae", tmp_path / "vae.pt", "--image-size", 32, "--device", "cpu"]
    call(vae_latents, "--images", tmp_path / "images", *flags, "--out", tmp_path / "data")
    call_text("table", tmp_path / "data", "--captions", tmp_path / "images/captions.json")
    train = [*TRAIN, "--model", "SiT-P/8", "--data", tmp_path / "data", "--steps", 4]
    call_text("stage1", *train, "--lr", 0.1, "--out", tmp_path / "run")
    torch.save({"judge": judge.Judge().state_dict()}, tmp_path / "judge.pt")
    given = ["--judge", tmp_path / "judge.pt", "--num", 4, "--scales", 1, "--lambdas", "0,2"]
    given += ["--groups", "new pair", "--out", tmp_path / "table.jsonl"]
    for more in [], ["--figure", tmp_path / "figure.png"]:
        call(compare, f"some={tmp_path}/run", *given, *more)
    lines = [json.loads(line) for line in (tmp_path / "table.jsonl").read_text().splitlines()]
    assert [(line["cfg"], line["lambda"]) for line in lines] == [(1, 0), (1, 2)]
    assert (tmp_path / "figure.png").stat().st_size > 1000
    painter, labels = compare.Painter(tmp_path / "run"), np.array([1, 2])
    dense, sparse = (painter.paint(labels, 0, 1.0, strength) for strength in (0, 2))
    assert not torch.equal(dense, sparse)
