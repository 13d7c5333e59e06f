"""The experiment's tables and its figure, from what experiments/cifar10.sh left in out/cifar10.

    python experiments/report.py        # tables in Markdown on stdout; assets/compute.png

Rows that are not there yet are left out. Total compute counts everything that went into a network,
in training steps of a vanilla student, by matrix products: its own steps, the projector forward and
backward, the teacher's forward passes, and the training of the teacher or encoder before.
"""

import functools
import importlib
import json
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import models
from models import Projector, UserError, say, setting

import experiments.sizes  # noqa: F401 (teachers and students of other sizes)
from build_teacher import load_teacher
from experiments.baselines.cost import projector_cost, share, vanilla_steps
from experiments.plot import auxiliary, new_figure, read_log
from train_stage1 import Alignment

STUDENT = "SiT-Ti/2"  # whose vanilla step is the unit of compute
LARGE = "SiT-W/2"  # and of the rows that begin with W-

ROWS = {  # name of the runs: what the tables call them, in their order
    "vanilla": "vanilla SiT",
    "Ti": "stage 1 alone: the Ti teacher",
    "descTi": "as described, Ti teacher",
    "relTi": "as released, Ti teacher",
    "descN": "as described, N teacher",
    "relN": "as released, N teacher",
    "descN-s3": "as described, N teacher, s = 3",
    "descN-s30": "as described, N teacher, s = 30",
    "descN-ema": "as described, N teacher's EMA",
    "descN-ends-half": "as described, N teacher, guided for half of the steps",
    "repa": "REPA, with features of a CNN that saw the labels",
    "sra": "SRA",
    "vae_repa": "SRA 2 (VAE-REPA)",
    "dispersive": "Dispersive loss",
    "W-descN": "larger student, as described, N teacher",
    "W-descTi": "larger student, as described, Ti teacher",
}
# The stage that a checkpoint names: the script in experiments/baselines that trained it
BASELINES = {"repa": "repa", "sra": "sra", "vae": "vae_repa", "disp": "dispersive"}
SERIES = {  # of the figure, with their colours; the best baseline is added
    "vanilla": "tab:gray",
    "descTi": "tab:blue",
    "descN": "tab:red",
}


def row_title(row: str) -> str:
    """What the tables call a row."""
    if teacher := re.fullmatch(r"desc([PNM])-of-(\d+)", row):  # how small, how long
        return f"as described, {teacher[1]} teacher of {int(teacher[2]):,} steps"
    if rate := re.fullmatch(r"W-vanilla-lr(.+)", row):
        return f"larger student, vanilla, rate {rate[1]}"
    return ROWS.get(row, row)


# ---- What is there


def find_results(runs: Path, judge: str) -> dict:
    """{row: {step: {seed: the judge's figures, and "compute"}}}, rows in the order of ROWS."""
    found = {}
    for path in runs.glob(f"*-seed*/samples-*/judged{judge}.json"):
        run = path.parent.parent
        name = re.fullmatch(r"(.+)-seed(\d+)", run.name)
        step = re.fullmatch(r"samples-(\d+)", path.parent.name)
        if not name or not step:
            continue
        with models.reading(path):
            figures = json.loads(path.read_text())
        step, seed = int(step[1]), int(name[2])
        student = LARGE if name[1].startswith("W-") else STUDENT
        figures["compute"] = compute(run, step, student)
        found.setdefault(name[1], {}).setdefault(step, {})[seed] = figures
    if not found:
        wanted = f"NAME-seedS/samples-STEP/judged{judge}.json"
        raise UserError(f"{runs}: no {wanted} there; experiments/cifar10.sh makes them")
    order = [*ROWS, *sorted(found.keys() - ROWS.keys())]
    rows = {row: found[row] for row in order if row in found}
    return {row: dict(sorted(steps.items())) for row, steps in rows.items()}


def values(seeds: dict, metric: str) -> list[float]:
    """One metric of every seed that has it."""
    return [figures[metric] for _, figures in sorted(seeds.items()) if metric in figures]


# ---- Compute


@functools.cache
def read_run(run: Path) -> tuple[SimpleNamespace, int, tuple]:
    """(The settings, the newest step, the arguments of models.build after the name) of a run."""
    path = next(iter(models.checkpoints(run)), None)
    if path is None:
        raise UserError(f"{run}: holds no checkpoint, so its settings are not known")
    file = models.load_file(path)
    with models.reading(path):
        meta = file["meta"]
        shape = meta["height"], meta["channels"], len(meta["classes"])
        return SimpleNamespace(**file["args"]), file["step"], shape


@functools.cache
def forward(model: str, shape: tuple) -> int:
    """FLOPs of one image's forward pass."""
    return models.build(model, *shape).forward_flops()


def moved(path, args, run: Path) -> Path:
    """A file of the experiment, wherever its folder lies now: args.out was `run` then."""
    path, before = Path(path), Path(args.out).parent
    return run.parent / path.relative_to(before) if path.is_relative_to(before) else path


@functools.cache
def cost(run: Path, student: str) -> tuple[float, float, float]:
    """(A step's cost without its auxiliary loss, what that adds, what was spent before step 1)."""
    args, _, shape = read_run(run)
    model = models.build(args.model, *shape)
    own = model.forward_flops() / forward(student, shape)
    if getattr(args, "align_weight", None) == 0:
        return own, 0.0, 0.0
    if args.stage == "align":
        extra, before = projector_cost(model, Alignment(args, 1).projector(model), args), 0.0
    elif args.stage == "guide":
        extra, before = guidance_cost(model, args, run, student)
    else:
        extra, before = baseline_cost(model, args)
    return own, own * extra, before


def guidance_cost(model, args, run: Path, student: str):
    """f_c and f_u and the projector; the teacher's training, on its own settings, before."""
    teacher, file = load_teacher(moved(args.teacher, args, run))
    forwards = share(args) * 2 * teacher.forward_flops() / (3 * model.forward_flops())
    projector = Projector(model.width, out=teacher.width, hidden=args.projector_dim)
    extra = forwards + projector_cost(model, projector, args)
    source = moved(file["source"]["ckpt"], args, run)
    source = source if source.is_dir() else source.parent
    return extra, compute(source, file["source"]["step"], student)


def baseline_cost(model, args):
    """As the baseline's own script counts; for REPA, the encoder's training and run before."""
    if args.stage not in BASELINES:
        raise UserError(f"{args.out}: its auxiliary loss, {args.stage}, is not known here")
    script = importlib.import_module(f"experiments.baselines.{BASELINES[args.stage]}")
    before = 0.0
    if args.stage == "repa":
        about = Path(args.features).with_suffix(".json")
        with models.reading(about):
            flops = json.loads(about.read_text())
        flops = flops["flops_encoding"] + flops.get("flops_training", 0)
        before = vanilla_steps(flops, model, args)
    return script.extra_cost(model, args), before


def compute(run: Path, step: int, student=STUDENT) -> float:
    """All that went into this run until `step`, in vanilla steps of `student`; NaN: not known."""
    try:
        own, extra, before = cost(run, student)
    except (UserError, OSError) as error:
        say(f"warning: {run.name}: compute is not known ({error})", sys.stderr)
        return float("nan")
    aided = min(step, getattr(read_run(run)[0], "guide_steps", step))
    return before + step * own + aided * extra


# ---- The tables


def spread(numbers, digits, scale=1.0) -> str:
    """Mean and, of several, the standard deviation (n - 1)."""
    if not numbers:
        return "–"
    numbers = [scale * number for number in numbers]
    text = f"{statistics.mean(numbers):,.{digits}f}"
    return text + (f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else "")


def table(found: dict) -> str:
    titles = "FD-CNN | class asked for, % | precision | recall"
    lines = [f"| | seeds | steps | total compute | {titles} |", "|---|---|--:|--:|--:|--:|--:|--:|"]
    for row, steps in found.items():
        for step, seeds in steps.items():
            first = row_title(row) if step == min(steps) else ""
            cells = [first, ", ".join(map(str, sorted(seeds))), f"{step:,}"]
            cells.append(f"{statistics.mean(values(seeds, 'compute')):,.0f}")
            cells.append(spread(values(seeds, "FD-CNN"), 2))
            cells.append(spread(values(seeds, "agreement"), 1, 100))
            cells += [spread(values(seeds, metric), 3) for metric in ("precision", "recall")]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def last_losses(run: Path, last=10) -> tuple[list, list]:
    """([L_diff], [the auxiliary loss]), means of the last lines of the log; empty: not there."""
    try:
        records = read_log(run)
    except UserError as error:
        say(f"warning: {error}", sys.stderr)
        return [], []
    key = auxiliary(records)
    ends = [[r[k] for r in records[-last:]] if k else [] for k in ("loss_diff", key)]
    return tuple([statistics.mean(end)] if end else [] for end in ends)


def losses(runs: Path, found: dict) -> str:
    lines = ["| | seeds | L_diff | auxiliary loss |", "|---|---|--:|--:|"]
    for row, steps in found.items():
        seeds = sorted({seed for part in steps.values() for seed in part})
        ends = [last_losses(runs / f"{row}-seed{seed}") for seed in seeds]
        cells = [row_title(row), ", ".join(map(str, seeds))]
        cells += [spread(sum(column, []), 4) for column in zip(*ends, strict=True)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def real_images(path: Path) -> list[float] | None:
    """[FD-CNN, agreement] of real images after a round trip through the VAE: the limit."""
    return models.load_file(path).get("round_trips") if path.is_file() else None


# ---- The figure


def last_distance(steps: dict) -> float:
    return statistics.mean(values(steps[max(steps)], "FD-CNN"))


def series(found: dict) -> dict:
    """{row: colour} of the rows to draw: SERIES, and the baseline with the least FD-CNN."""
    chosen = {row: colour for row, colour in SERIES.items() if row in found}
    others = [row for row in BASELINES.values() if row in found]
    if others:
        chosen[min(others, key=lambda row: last_distance(found[row]))] = "tab:green"
    return chosen


def draw_row(axis, steps: dict, metric: str, scale: float, label: str, colour: str):
    """The mean over seeds as a line, the least and the greatest as a band."""
    x, y = [], []
    for seeds in steps.values():
        x.append(statistics.mean(values(seeds, "compute")) / 1000)
        y.append([scale * value for value in values(seeds, metric)])
    low, high = [min(part) for part in y], [max(part) for part in y]
    axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    means = [statistics.mean(part) for part in y]
    axis.plot(x, means, color=colour, label=label, marker="o", markersize=3)


def draw(found: dict, real):
    """FD-CNN and agreement against total compute."""
    figure = new_figure(9, 4.2)
    axes = figure.subplots(1, 2)
    panels = {"FD-CNN": ("FD-CNN, lower is better", 1), "agreement": ("class asked for, %", 100)}
    for number, (metric, (title, scale)) in enumerate(panels.items()):
        axis = axes[number]
        for row, colour in series(found).items():
            draw_row(axis, found[row], metric, scale, row_title(row), colour)
        if real:
            limit = {"color": "black", "linestyle": ":", "label": "real images through the VAE"}
            axis.axhline(scale * real[number], **limit)
        axis.set(ylabel=title, xlabel="total compute, thousands of vanilla steps")
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    return figure


@dataclass
class Settings:
    runs: str = setting("out/cifar10", "folder of experiments/cifar10.sh")
    judge: str = setting("", "which judge: classifierJUDGE.pt, judgedJUDGE.json")
    figure: str = setting("assets/compute.png", "picture to write")


def main():
    args = models.parse_settings(Settings, __doc__)
    runs = Path(args.runs)
    found = find_results(runs, args.judge)
    real = real_images(runs / f"classifier{args.judge}.pt")
    say(table(found))
    if real:
        say(f"\nReal images through the VAE: FD-CNN {real[0]:.2f}, {100 * real[1]:.1f} %")
    say("\nMeans of the last 10 lines of the log\n\n" + losses(runs, found))
    figure = draw(found, real)
    with models.atomic_write(args.figure) as file:
        figure.savefig(file, format="png", dpi=100)
    say(f"\n{args.figure}: what the compute brought", sys.stderr)


if __name__ == "__main__":
    models.run(main)
