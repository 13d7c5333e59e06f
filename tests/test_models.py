"""models.py: the network against timm and published formulas; weights that were never trained."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import (
    EULER,
    SMALL,
    build,
    call,
    changed_checkpoint,
    largest,
    tiny,
)
from torch.utils.flop_counter import FlopCounterMode

import build_teacher
import models
import sample
import train_stage1
from common import UserError
from models import SIZES, parse_name

# ---- the network


def test_teacher_is_the_full_networks_tap():
    model = tiny()
    x, t, y = torch.randn(3, 4, 16, 16), torch.rand(3), torch.tensor([0, 5, 10])
    tapped = model(x, t, y, taps=[5])[1][5]
    full = len(list(model.parameters()))
    teacher = model.cut(5)
    velocity, tokens = teacher(x, t, y, taps=[5])
    assert velocity is None and torch.equal(tokens[5], tapped)
    assert len(teacher.blocks) == teacher.depth == 5 and len(list(teacher.parameters())) < full
    assert not any(key.startswith(("final_layer", "blocks.5")) for key in teacher.state_dict())


def test_sizes_and_published_parameter_counts():
    """DiT's table 1 in millions for patch 2 (q/k norm off): S 33, B 130, L 458, XL 675."""
    for name, millions in (("SiT-S/2", 33), ("SiT-B/2", 130), ("SiT-L/2", 458), ("SiT-XL/2", 675)):
        with torch.device("meta"):
            model = build(name, qk_norm=False)
        count = sum(p.numel() for p in model.parameters())
        assert round(count / 1e6) == pytest.approx(millions, abs=1)
    assert list(SIZES) == ["P", "N", "Ti", "W", "S", "B", "L", "XL"]
    blocks = {"S": (2, 8, 6), "B": (2, 8, 6), "L": (8, 16, 12), "XL": (8, 19, 14)}  # d1, dt, ds
    assert {key: SIZES[key][3:] for key in blocks} == blocks
    for key, size in SIZES.items():
        assert size.width % size.heads == 0 and size.width % 4 == 0
        assert 1 <= size.align_depth <= size.student_depth < size.teacher_depth <= size.depth
        for patch in (1, 2, 4, 8):
            assert parse_name(f"SiT-{key}/{patch}") == (size, patch)
    for wrong in ("SiT-B/3", "SiT-H/2", "DiT-B/2", "SiT-B", "SiT-B/22"):
        with pytest.raises(UserError, match=f"--model {wrong}: .*SiT-"):
            parse_name(wrong)


def test_forward_is_zero_at_first_and_deterministic():
    model = build("SiT-Ti/4", 16, 4, 10)
    x, t, y = torch.randn(2, 4, 16, 16), torch.rand(2), torch.tensor([0, 10])
    v, tokens = model.train()(x, t, y, taps=[3])
    assert v.shape == x.shape and v.abs().max() == 0  # adaLN-Zero
    assert list(tokens) == [3] and tokens[3].shape == (2, 16, 128)
    model = tiny().train()
    assert torch.equal(model(x, t, y)[0], model(x, t, y)[0])
    v, tokens = model(x, t, y)
    assert tokens == {}
    many = model(x, t, y, taps=(2, 7))
    assert torch.equal(many[0], v) and sorted(many[1]) == [2, 7]  # a tap changes nothing
    assert not torch.equal(many[1][2], many[1][7])


def test_the_time_embedding_stays_in_float32_under_bfloat16():
    """Neighbouring t's embeddings differ little: in bfloat16 even the direction would be lost."""
    embedder = tiny().t_embedder
    exact = copy.deepcopy(embedder).double()
    t = torch.rand(256, generator=torch.Generator().manual_seed(0)) * 255 / 256
    near = t + 1 / 256

    def sinusoids(t, dtype):
        steps = torch.arange(128, dtype=dtype)
        angles = t[:, None].to(dtype) * torch.exp(-math.log(10000) * steps / 128)
        return torch.cat([angles.cos(), angles.sin()], dim=1)

    with torch.no_grad():
        true = exact.mlp(sinusoids(near, torch.float64)) - exact.mlp(sinusoids(t, torch.float64))
        with torch.autocast("cpu", torch.bfloat16):
            out, ours = embedder(near), embedder(near) - embedder(t)
            rounded = [embedder.mlp(sinusoids(x, torch.float32)) for x in (near, t)]
    assert out.dtype == torch.float32 and rounded[0].dtype == torch.bfloat16
    ours = torch.cosine_similarity(ours.double(), true, dim=1)
    by_hand = torch.cosine_similarity(rounded[0].double() - rounded[1].double(), true, dim=1)
    print(
        f"time embedding: cosine {ours.min():.6f} at least, in bfloat16 {by_hand.max():.3f} at most"
    )
    assert ours.min() > 0.999
    assert by_hand.max() < 0.9


@pytest.mark.parametrize("cut", [False, True])
def test_flops_match_a_count_by_torch(cut):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model = tiny(patch=4).eval()
    inputs = torch.randn(1, 4, 16, 16), torch.rand(1), torch.tensor([0])
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        (model.cut(5) if cut else model)(*inputs)
    # of a cut network the final layer is counted, too, though it does not run: 1 in 100
    assert model.forward_flops() == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.quick
@pytest.mark.parametrize("wrong", ["x", "t", "y", "taps"])
def test_the_network_says_which_input_is_wrong(wrong):
    model = tiny()
    given = {"x": torch.zeros(2, 4, 16, 16), "t": torch.zeros(2), "y": torch.tensor([0, 1])}
    model(**given, taps=[1, 8])
    bad = {
        "x": torch.zeros(2, 4, 8, 16),
        "t": torch.zeros(2, 1),
        "y": torch.tensor([0]),
        "taps": [9],
    }
    with pytest.raises(UserError, match=f"^{wrong} (has shape|are)"):
        model(**{**given, wrong: bad[wrong]})


# ---- SiT against a model put together from timm's parts, as REPA's is


class TimmSiT(nn.Module):
    """REPA's recipe: timm's PatchEmbed, Attention and Mlp inside adaLN-Zero blocks."""

    def __init__(self, depth, width, heads, patch, size, channels, classes, qk_norm):
        super().__init__()
        vit = pytest.importorskip("timm.models.vision_transformer")
        self.x_embedder = vit.PatchEmbed(size, patch, channels, width)
        self.t_embedder, self.y_embedder = nn.Module(), nn.Module()
        layers = [nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width)]
        self.t_embedder.mlp = nn.Sequential(*layers)
        self.y_embedder.embedding_table = nn.Embedding(classes + 1, width)
        table = torch.zeros(1, self.x_embedder.num_patches, width)
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.blocks = nn.ModuleList()
        options = {"qkv_bias": True, "qk_norm": qk_norm, "norm_layer": nn.LayerNorm}
        for _ in range(depth):
            block = nn.Module()
            block.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
            block.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
            block.attn = vit.Attention(width, num_heads=heads, **options)
            block.mlp = vit.Mlp(width, 4 * width, act_layer=lambda: nn.GELU(approximate="tanh"))
            block.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
            self.blocks.append(block)
        self.final_layer = nn.Module()
        self.final_layer.linear = nn.Linear(width, patch * patch * channels)
        self.final_layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.patch, self.channels = patch, channels

    def forward(self, x, t, y, tap):
        freqs = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
        angles = t[:, None].float() * freqs
        c = self.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(x.dtype))
        c = c + self.y_embedder.embedding_table(y)
        h, tapped = self.x_embedder(x) + self.pos_embed, None
        for depth, b in enumerate(self.blocks, 1):
            s1, k1, g1, s2, k2, g2 = (z[:, None] for z in b.adaLN_modulation(c).chunk(6, -1))
            h = h + g1 * b.attn(b.norm1(h) * (1 + k1) + s1)
            h = h + g2 * b.mlp(b.norm2(h) * (1 + k2) + s2)
            tapped = h if depth == tap else tapped
        shift, scale = (z[:, None] for z in self.final_layer.adaLN_modulation(c).chunk(2, -1))
        h = nn.functional.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift
        n, side, p = len(x), x.shape[2] // self.patch, self.patch
        h = self.final_layer.linear(h).reshape(n, side, side, p, p, self.channels)
        return torch.einsum("nhwpqc->nchpwq", h).reshape(x.shape), tapped


SIT_S = pytest.param("SiT-S/2", marks=pytest.mark.slow)


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("name", [SIT_S, "SiT-Ti/4", "SiT-N/1", "SiT-P/2"])
def test_sit_equals_one_made_of_timm(name, qk_norm):
    torch.manual_seed(0)
    (size, patch), side = parse_name(name), 8 if name.endswith("/1") else 16
    ours = build(name, side, 4, 1000, qk_norm).double()
    for p in ours.parameters():
        a_norm = p.dim() == 1 and p.numel() == size.width // size.heads
        nn.init.normal_(p, mean=float(a_norm), std=0.05)
    dimensions = (size.depth, size.width, size.heads)
    theirs = TimmSiT(*dimensions, patch, side, 4, 1000, qk_norm).double()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(ours.state_dict())
    x, t = torch.randn(3, 4, side, side).double(), torch.rand(3).double()
    y = torch.tensor([0, 999, 1000])
    with torch.no_grad():
        (v1, tokens), (v2, h2) = ours(x, t, y, taps=[3]), theirs(x, t, y, tap=3)
    print("SiT", name, qk_norm, f"{largest(v1, v2):.1e} {largest(tokens[3], h2):.1e}")
    assert largest(v1, v2) < 1e-9 and largest(tokens[3], h2) < 1e-9


def test_position_table_is_mae_and_dits():
    """DiT's pos_embed from its definition: w varies fastest, the first half of channels has it."""
    table = build("SiT-S/2", 8, 4, 10).pos_embed[0].double().numpy()
    omega = 1 / 10000 ** (np.arange(96) / 96)
    for token, (row, column) in enumerate((r, c) for r in range(4) for c in range(4)):
        waves = [f(place * omega) for place in (column, row) for f in (np.sin, np.cos)]
        assert np.abs(table[token] - np.concatenate(waves)).max() < 1e-6


# ---- parts that were never trained


def test_a_null_label_that_was_never_trained_is_not_used(numbered, refused, tmp_path):
    run = [*SMALL, "--data", numbered.data, "--out", tmp_path / "run", "--label-drop", 0]
    call(train_stage1, *run, "--steps", 2)
    out = tmp_path / "out"
    guided = ["--ckpt", tmp_path / "run", "--num-images", 2, *EULER, "--cfg", 2, "--out", out]
    refused(sample, *guided, says=["null label", "--label-drop 0", "--cfg"])
    teach = ["--ckpt", tmp_path / "run", "--out", out]
    refused(build_teacher, *teach, says=["null label", "--label-drop 0"])
    assert not out.exists()
    call(
        sample, "--ckpt", tmp_path / "run", "--num-images", 2, *EULER, "--out", out
    )  # plain: it works
    call(sample, *guided[:-3], 1, "--out", tmp_path / "out1")


def test_an_average_that_is_still_the_beginning_is_not_used(numbered, refused, tmp_path):
    """0.9999 to the power of 2: what the message advises works."""
    run = [*SMALL, "--no-ema-ramp", "--data", numbered.data, "--out", tmp_path / "run"]
    call(train_stage1, *run, "--steps", 2)
    given = ["--ckpt", tmp_path / "run", "--num-images", 2, *EULER, "--out", tmp_path / "out"]
    refused(sample, *given, says=["100%", "--weights model"])
    assert not (tmp_path / "out").exists()
    call(sample, *given, "--weights", "model")
    call(build_teacher, "--ckpt", tmp_path / "run", "--out", tmp_path / "teacher")
    for ema, refuses in ((0.3, True), (0.32, True), (0.31, False), (0.0, False)):
        step = 2 if ema != 0.31 else 3
        ckpt = changed_checkpoint(tmp_path / "run", tmp_path / "e.pt", ema=ema)
        saved = torch.load(ckpt, weights_only=True)
        torch.save({**saved, "step": step}, ckpt)
        if refuses and ema**step > 0.1:
            with pytest.raises(UserError, match="--weights model"):
                models.load_checkpoint(ckpt, "ema")
        else:
            models.load_checkpoint(ckpt, "ema")


# ---- the newest checkpoint


@pytest.mark.slow
def test_checkpoints_are_ordered_by_number(tmp_path):
    for name in ("ckpt-9999999.pt", "ckpt-10000000.pt"):
        (tmp_path / name).touch()
    names = [file.name for file in models.checkpoints(tmp_path)]
    assert names == ["ckpt-10000000.pt", "ckpt-9999999.pt"]
