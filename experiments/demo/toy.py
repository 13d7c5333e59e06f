"""The method in two dimensions, in seconds: points instead of images, no VAE, one picture.

    python -m experiments.demo.toy                    # make toy -> out/toy/toy.png

Six clumps lie on a ring, and each has eight spots on a small circle. The class is the spot: noise
hides it long before it hides the clump. Stage 1 trains a small network, which then teaches by its
features: f_g = f_u + s (f_c - f_u). Stage 2 trains a larger one, whose block ds regresses f_g.
Beside it a vanilla one, with the same initial weights, sees the same batches. All seeds train at
once. The names are the README's.

The task is the best of four that were tried, and three seeds served in choosing it: on the others
the gain was smaller. So it shows what f_g is and how it can help, not how much it helps elsewhere.
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from common import say, setting
from experiments.checkpoints.plot import new_figure

CLASSES, CLUMPS = 8, 6
BATCH, RATE = 128, 1e-2  # the rate was chosen on vanilla
T_MIN, T_MAX = 0.4, 0.7  # L_align and L_guide count where t lies between them
DEPTH, WIDTH, TEACHER_WIDTH = 4, 64, 16
D1, DT, DS = 1, 3, 2  # the blocks, counted from 1, that are aligned, that teach and that learn
COLOURS, ARMS = "tab10", ("tab:blue", "tab:gray")  # of the classes; of stage 2 and vanilla


def spots():
    """The middles of the spots (CLUMPS, CLASSES, 2), in units in which the data's variance is 1."""
    clump, y = torch.arange(CLUMPS)[:, None], torch.arange(CLASSES)
    ring = (2 * math.pi * clump / CLUMPS).expand(-1, CLASSES)
    spot = 2 * math.pi * (y / CLASSES + 0.37 * clump)  # each clump is turned by another angle
    x, up = ring.cos() + 0.28 * spot.cos(), ring.sin() + 0.28 * spot.sin()
    return torch.stack([x, up], dim=2) / 0.735


def points(shape, generator):
    """Points x0 (*shape, 2) and their classes y (*shape,)."""
    clump = torch.randint(CLUMPS, shape, generator=generator)
    y = torch.randint(CLASSES, shape, generator=generator)
    return spots()[clump, y] + 0.04 * torch.randn(*shape, 2, generator=generator), y


# ---- The networks: R of them at once, which share nothing. Each weight has R in front


class Linear(nn.Module):
    """R linear layers, (R, N, before) -> (R, N, after), by one batched product."""

    def __init__(self, generators, before, after):
        super().__init__()
        weight = [torch.randn(before, after, generator=g) / before**0.5 for g in generators]
        self.weight = nn.Parameter(torch.stack(weight))
        self.bias = nn.Parameter(torch.zeros(len(weight), 1, after))

    def forward(self, x):
        return torch.baddbmm(self.bias, x, self.weight)


class Block(nn.Module):
    """Features h and condition c, both (R, N, D) -> (R, N, D)."""

    def __init__(self, generators, width):
        super().__init__()
        self.inside = Linear(generators, width, 2 * width)
        self.condition = Linear(generators, width, 2 * width)
        self.outside = Linear(generators, 2 * width, width)

    def forward(self, h, c):
        inside = self.inside(F.layer_norm(h, h.shape[-1:])) + self.condition(c)
        return h + self.outside(F.silu(inside))


class Networks(nn.Module):
    """x_t (R, N, 2), t (R, N), y (R, N) -> (velocity (R, N, 2), {d: (R, N, D) after block d}).
    Network i depends on the i-th seed alone."""

    def __init__(self, seeds, width):
        super().__init__()
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        labels = [0.02 * torch.randn(CLASSES + 1, width, generator=g) for g in generators]
        self.y_embedder = nn.Parameter(torch.stack(labels))  # the last row is the null label's
        self.x_embedder = Linear(generators, 2, width)
        self.t_embedder = Linear(generators, 16, width)
        self.blocks = nn.ModuleList(Block(generators, width) for _ in range(DEPTH))
        self.final = Linear(generators, width, 2)

    def forward(self, x_t, t, y):
        angles = t[..., None] * torch.logspace(0, 1.5, 8)
        times = self.t_embedder(torch.cat([angles.cos(), angles.sin()], dim=-1))
        labels = y[..., None].expand(*y.shape, self.y_embedder.shape[-1])
        c = F.silu(times + self.y_embedder.gather(1, labels))
        h, features = self.x_embedder(x_t), {}
        for depth, block in enumerate(self.blocks, 1):
            h = features[depth] = block(h, c)
        return self.final(F.layer_norm(h, h.shape[-1:])), features


class Projectors(nn.Sequential):
    """P1 or P2 of R networks: an MLP that sees the features of one point, (R, N, D)."""

    def __init__(self, seeds, width, out):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        layers = Linear(generators, width, 2 * width), Linear(generators, 2 * width, out)
        super().__init__(layers[0], nn.SiLU(), layers[1])


@torch.no_grad()
def guided_features(teacher, x_t, t, y, s):
    """f_g (R, N, D) of the teachers' last blocks: f_u where s = 0, f_c where s = 1."""
    null_label = torch.full_like(y, CLASSES)
    x_twice, t_twice = torch.cat([x_t, x_t], dim=1), torch.cat([t, t], dim=1)
    _, features = teacher(x_twice, t_twice, torch.cat([y, null_label], dim=1))
    f_c, f_u = features[len(teacher.blocks)].chunk(2, dim=1)
    return f_u + s * (f_c - f_u)


# ---- Training


def rows_in_range():
    """The rows of a batch that can have T_MIN <= t <= T_MAX: t_i = (i + u_i) / BATCH."""
    return slice(math.floor(T_MIN * BATCH), math.ceil(T_MAX * BATCH))


def make_batch(seeds, generator):
    """x_t (seeds, BATCH, 2), t, y, y_input (seeds, BATCH) and velocity (seeds, BATCH, 2)."""
    x0, y = points((seeds, BATCH), generator)
    eps = torch.randn(x0.shape, generator=generator)
    u, drop = torch.rand(2, seeds, BATCH, generator=generator)
    t = (torch.arange(BATCH) + u) / BATCH
    x_t = (1 - t[..., None]) * x0 + t[..., None] * eps
    return x_t, t, y, torch.where(drop < 0.1, CLASSES, y), eps - x0


def auxiliary_loss(predicted, target, t):
    """Mean (predicted - target)^2 where t is in range, zero elsewhere; the sum of all networks."""
    in_range = (t >= T_MIN) & (t <= T_MAX)
    return ((predicted - target).square().mean(dim=2) * in_range).sum() / BATCH


def train(networks, depth, projectors, target, steps, seed, keep=()):
    """L_diff + 0.5 L_aux; {step: the averaged networks} at the steps in `keep`. L_aux: block
    `depth` predicts target(x_t, t, y, velocity) through a projector. There may be more networks
    than projectors: then the last ones have L_aux, the first ones see the same batches without."""
    seeds, rows = len(projectors[0].weight), rows_in_range()
    arms = len(networks.final.weight) // seeds
    weights = [*networks.parameters(), *projectors.parameters()]
    average = copy.deepcopy(networks).requires_grad_(False)
    averaged = [*average.parameters()]
    optimizer = torch.optim.Adam(weights, lr=RATE, betas=(0.9, 0.99), foreach=True)
    generator, kept = torch.Generator().manual_seed(seed), {}
    for step in range(1, steps + 1):
        x_t, t, y, y_input, velocity = make_batch(seeds, generator)
        predicted, features = networks(*(torch.cat([a] * arms) for a in (x_t, t, y_input)))
        error = predicted - torch.cat([velocity] * arms)
        wanted = target(x_t[:, rows], t[:, rows], y[:, rows], velocity[:, rows])
        answer = projectors(features[depth][-seeds:, rows])
        loss = error.square().mean(dim=(1, 2)).sum()  # each network has its own gradient
        loss = loss + 0.5 * auxiliary_loss(answer, wanted, t[:, rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay = min(0.99, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(averaged, weights[: len(averaged)], 1 - decay)
        if step in keep:
            kept[step] = copy.deepcopy(average)
    return kept


def cost(width, depth=DEPTH):
    """Multiply-adds of the forward pass of one point through the first `depth` blocks."""
    return (2 + 16 + 2) * width + depth * 6 * width**2


def costs(teacher_steps):
    """In steps of a vanilla student, of three passes each: (the teacher's training with P1, how
    much a guided step costs). The teacher and the projectors see the rows in range alone."""
    share, three = T_MAX - T_MIN, 3 * cost(WIDTH)
    p1 = share * 2 * TEACHER_WIDTH * (TEACHER_WIDTH + 2)
    p2 = share * 2 * WIDTH * (WIDTH + TEACHER_WIDTH)
    before = teacher_steps * 3 * (cost(TEACHER_WIDTH) + p1) / three
    return before, 1 + (3 * p2 + share * 2 * cost(TEACHER_WIDTH, DT)) / three


# ---- Samples, figures, picture


@torch.no_grad()
def sample(networks, y, seed=0, steps=20):
    """Samples (R, N, 2) of classes y (N,) by Euler's method, the same noise for all networks."""
    noise = torch.randn(len(y), 2, generator=torch.Generator().manual_seed(seed))
    many = len(networks.final.weight)
    x, y = noise.expand(many, -1, -1), y.expand(many, -1)
    for i in range(steps):
        t = torch.full(y.shape, 1 - i / steps)
        x = x - networks(x, t, y)[0] / steps
    return x


def nearest_class(x):
    """The classes (...) of the spots nearest to points x (..., 2)."""
    distance = torch.cdist(x.reshape(-1, 2), spots().flatten(0, 1))
    return distance.argmin(dim=1).view(x.shape[:-1]) % CLASSES


def neighbours_class(features, y, k=5):
    """Share of the second half of features (N, D) to which its k nearest in the first half give
    the right class."""
    half = len(y) // 2
    nearest = torch.cdist(features[half:], features[:half]).topk(k, largest=False).indices
    votes = F.one_hot(y[:half][nearest], CLASSES).sum(dim=1)
    return (votes.argmax(dim=1) == y[half:]).double().mean().item()


def mean_and_error(values):
    """(Mean, its standard error) of one value for each seed."""
    return values.mean().item(), values.std().item() / len(values) ** 0.5


def sentence(stage2, vanilla, unit):
    """What paired shares (seeds,), in %, say of stage 2; an error is of the mean over seeds."""
    gain, error = mean_and_error(stage2 - vanilla)
    clear = "more than twice that error" if abs(gain) > 2 * error else "so it is not clear here"
    where = "ahead" if gain > 0 else "behind"
    return (
        f"{unit}: stage 2 {stage2.mean():.1f} %, vanilla {vanilla.mean():.1f} % in the class asked "
        f"for; {where} by {abs(gain):.1f} ± {error:.1f} points (standard error over "
        f"{len(stage2)} seeds), {clear}"
    )


def draw_points(axis, x, y, right, title, size=5):
    """Points x (N, 2) in the colours of their classes; grey where they are not `right`."""
    axis.scatter(*x[~right].T, s=size, color="0.82", linewidths=0)
    axis.scatter(*x[right].T, s=size, c=y[right], cmap=COLOURS, vmin=0, vmax=9, linewidths=0)
    axis.set_title(title, fontsize=10)
    axis.set(xticks=[], yticks=[], aspect="equal")
    axis.spines[:].set_color("0.8")


def draw_features(axes, x0, x_t, y, features, s):
    """The data, the same with noise, and three panels of `features`, {title: (N, D)}, f_g last,
    along the two directions in which the classes' means of f_g differ most, at one scale."""
    everyone = torch.ones_like(y, dtype=torch.bool)
    draw_points(axes[0], x0, y, everyone, "data: a colour is a class\n")
    draw_points(axes[1], x_t, y, everyone, "the same with noise, t = 0.5\n")
    f_g = [*features.values()][-1]
    means = torch.stack([f_g[y == label].mean(dim=0) for label in range(CLASSES)])
    directions = torch.linalg.svd(means - means.mean(dim=0))[2][:2].T
    reach = ((f_g - f_g.mean(dim=0)) @ directions).abs().quantile(0.98).item()
    for axis, (name, f) in zip(axes[2:], features.items(), strict=True):
        share = 100 * neighbours_class(f, y)
        title = f"{name}\nclass by neighbours: {share:.0f} %"
        draw_points(axis, (f - f.mean(dim=0)) @ directions, y, everyone, title)
        axis.set(xlim=(-reach, reach), ylim=(-reach, reach))


def draw_curves(axis, curves, total):
    """{label: (compute of each checkpoint, shares (checkpoints, seeds) in %)}: mean and error."""
    for (label, (compute, shares)), colour in zip(curves.items(), ARMS, strict=True):
        found = [mean_and_error(values) for values in shares]
        mean, error = torch.tensor(found).T
        axis.plot(compute, mean, "o-", color=colour, label=label, markersize=4)
        axis.fill_between(compute, mean - error, mean + error, color=colour, alpha=0.2)
    axis.axvline(total, color="0.6", linestyle=":")
    axis.axhline(100 / CLASSES, color="0.6", linestyle="--", linewidth=0.8)
    axis.set_xlabel("total compute, in steps of vanilla", fontsize=9)
    axis.set_title("% in the class asked for\nmean and standard error", fontsize=10)
    axis.set(xlim=(0, None), ylim=(0, None))
    axis.legend(fontsize=9, loc="upper left", frameon=False)


@dataclass
class Settings:
    out: str = "out/toy/toy.png"  # picture to write
    seeds: int = setting(4, at_least=2)  # how many times everything is done, at once
    first_seed: int = setting(10, at_least=0, at_most=2**31)  # the others follow it
    guide_scale: float = setting(3.0, at_least=1)  # s
    teacher_steps: int = setting(600, at_least=1)  # steps of stage 1
    steps: int = setting(520, at_least=20)  # steps of the two students


def main():
    args = common.parse_settings(Settings, __doc__)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    figure = new_figure(10, 6.3)  # first: without matplotlib nothing is trained
    torch.set_num_threads(1)  # products this small are slower on two cores

    # Stage 1: block d1 predicts the velocity through P1
    teacher_seeds = [seed + 1000 for seed in seeds]  # a teacher has another seed than its student
    teacher = Networks(teacher_seeds, TEACHER_WIDTH)
    P1 = Projectors(teacher_seeds, TEACHER_WIDTH, 2)
    train(teacher, D1, P1, lambda x_t, t, y, v: v, args.teacher_steps, teacher_seeds[0])
    del teacher.blocks[DT:]  # frozen, and cut after block dt

    # Stage 2, where block ds predicts f_g through P2, and vanilla, from the same initial weights
    before, guided_step = costs(args.teacher_steps)
    equal = max(1, round((args.steps - before) / guided_step))  # steps for vanilla's total compute
    checkpoints = sorted({*(args.steps * i // 4 for i in range(1, 5)), equal})
    students = Networks([*seeds, *seeds], WIDTH)
    P2 = Projectors(seeds, WIDTH, TEACHER_WIDTH)

    def f_g(x_t, t, y, _):
        return guided_features(teacher, x_t, t, y, args.guide_scale)

    kept = train(students, DS, P2, f_g, args.steps, seeds[0], checkpoints)

    asked = torch.arange(400) % CLASSES
    samples = {step: sample(networks, asked) for step, networks in kept.items()}
    right = {step: nearest_class(x) == asked for step, x in samples.items()}
    shares = torch.stack([100 * right[step].double().mean(dim=1) for step in checkpoints])
    vanilla, stage2 = shares.unflatten(1, (2, args.seeds)).unbind(dim=1)

    cost_is = f"the teacher costs {before:.0f} steps of vanilla, a guided step {guided_step:.3f}"
    say(f"s = {args.guide_scale:g}, {args.steps} steps; {cost_is}")
    say(sentence(stage2[-1], vanilla[-1], f"after {args.steps} steps of both"))
    last = stage2[checkpoints.index(equal)]
    say(sentence(last, vanilla[-1], f"after equal total compute ({equal} steps of stage 2)"))
    say("The task is the best of four that were tried: on the others the gain was smaller.")

    generator = torch.Generator().manual_seed(0)
    x0, y = points((1600,), generator)
    x_t = 0.5 * x0 + 0.5 * torch.randn(x0.shape, generator=generator)
    features = {}
    for name, s in (("f_u", 0), ("f_c", 1), (f"f_g, s = {args.guide_scale:g}", args.guide_scale)):
        inputs = (each.expand(args.seeds, *each.shape) for each in (x_t, torch.full(y.shape, 0.5)))
        features[name] = guided_features(teacher, *inputs, y.expand(args.seeds, -1), s)[0]
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.15])
    draw_features(top.subplots(1, 5), x0, x_t, y, features, args.guide_scale)
    axes = bottom.subplots(1, 4, width_ratios=[1, 1, 1, 1.3])
    panels = {"samples of vanilla": (0, args.steps), "stage 2, equal compute": (args.seeds, equal)}
    panels["stage 2, equal steps"] = args.seeds, args.steps
    for axis, (name, (row, step)) in zip(axes, panels.items(), strict=False):
        title = f"{name}\nright: {100 * right[step][row].double().mean():.0f} %"
        draw_points(axis, samples[step][row], asked, right[step][row], title, 9)
        axis.set(xlim=(-2.1, 2.1), ylim=(-2.1, 2.1))
    steps = torch.tensor(checkpoints)
    curves = {"stage 2": (before + guided_step * steps, stage2), "vanilla": (steps, vanilla)}
    draw_curves(axes[-1], curves, args.steps)
    with common.atomic_write(args.out) as file:
        figure.savefig(file, format="png", dpi=120)
    say(f"Look at {args.out}: grey samples are nearest to a spot of another class")


if __name__ == "__main__":
    common.run(main)
