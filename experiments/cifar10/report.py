"""The experiment's tables and figures, from what cifar10.sh left in out/cifar10.

    python -m experiments.cifar10.report        # tables in Markdown on stdout; assets/compute*.png

Rows that are not there yet are left out. Total compute counts everything that went into a network,
in training steps of a vanilla student, by matrix products: its own steps, the projector forward and
backward, the teacher's forward passes, and the training of the teacher or encoder before.
"""

import importlib
import json
import operator
import re
import statistics
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import torch

import common
import models
from build_teacher import load_teacher
from common import UserError, say
from experiments.checkpoints.plot import new_figure
from experiments.methods.method import Baseline, projector_cost, share
from train_stage1 import Alignment, Projector

METRICS = {"FD-CNN": (2, 1), "agreement": (1, 100), "precision": (3, 1), "recall": (3, 1)}
STUDENTS = {"": "SiT-Ti/2", "W-": "SiT-W/2"}  # by how a row's name begins: the unit of compute
SERIES = {  # of the figures: what they call a row, and its colour
    "vanilla": ("vanilla SiT", "tab:gray"),
    "descTi": ("stage 2, teacher of its own size", "tab:blue"),
    "descN": ("stage 2, small teacher (N)", "tab:red"),
    "repa": ("REPA, with a CNN that saw the labels", "tab:green"),
    "W-vanilla": ("vanilla SiT", "tab:gray"),
    "W-descN": ("stage 2, small teacher (N)", "tab:red"),
    "W-descP": ("stage 2, smaller teacher (P)", "tab:orange"),
    "W-relN": ("stage 2, small teacher (N), mask as released", "tab:purple"),
}


def student_of(row: str) -> str:
    return "W-" if row.startswith("W-") else ""


def find_results(runs: Path, judge: str) -> dict:
    """{row: {step: {seed: METRICS, and "compute"}}}, vanilla first."""
    found = {}
    for path in runs.glob(f"*-seed*/samples-*/judged{judge}.json"):
        name = re.fullmatch(r"(.+)-seed(\d+)/samples-(\d+)", str(path.parent.relative_to(runs)))
        if not name:
            continue
        row, seed, step = name[1], int(name[2]), int(name[3])
        with common.reading(path, "is no line of judge.py judge"):
            judged = json.loads(path.read_text())
            figures = {metric: float(judged[metric]) for metric in METRICS}
        figures["compute"] = compute(path.parent.parent, step, STUDENTS[student_of(row)])
        found.setdefault(row, {}).setdefault(step, {})[seed] = figures
    if not found:
        wanted = f"NAME-seedS/samples-STEP/judged{judge}.json"
        raise UserError(f"{runs}: no {wanted} there; experiments/cifar10/cifar10.sh makes them")
    order = sorted(found, key=lambda row: (student_of(row), "vanilla" not in row, row))
    return {row: dict(sorted(found[row].items())) for row in order}


def values(seeds: dict, metric: str) -> list[float]:
    return [figures[metric] for _, figures in sorted(seeds.items())]


# ---- Compute


def read_run(run: Path) -> tuple[SimpleNamespace, dict, int]:
    """(The settings, the latents' meta, the newest step) of a run."""
    path = next(iter(models.checkpoints(run)), run / "ckpt-*.pt")
    with common.reading(path, "is no checkpoint"):
        saved = common.load_file(path)
        return SimpleNamespace(**saved["args"]), saved["meta"], saved["step"]


def compute(run: Path, step: int, student: str) -> float:
    """What went into this run until `step`, in vanilla steps of `student`."""
    args, meta, _ = read_run(run)
    return spent(args, meta, step, student)


def spent(args, meta, step, student) -> float:
    """What a run with these settings costs until `step`, in vanilla steps of `student`."""
    model = network(args.model, meta)
    own = model.forward_flops() / network(student, meta).forward_flops()
    names = args.stage.split("+") if args.stage and getattr(args, "align_weight", 1) else []
    total = step * own
    for name in names:
        extra, before, until = aid(name, args, meta)
        total += before * own + min(step, until) * own * extra
    return total


def aid(name, args, meta) -> tuple[float, float, float]:
    """What an auxiliary loss adds to a step of its network; what it has cost before, both in steps
    of that network; and its last step."""
    model, before, until = network(args.model, meta), 0.0, float("inf")
    if name == "align":
        extra = projector_cost(model, Alignment(args, 1).projector(model), args)
    elif name in ("guide", "measured"):
        teacher, saved = load_teacher(args.teacher)
        forwards = share(args) * 2 * teacher.forward_flops() / (3 * model.forward_flops())
        projector = Projector(model.width, out=teacher.width, hidden=args.projector_dim)
        extra = forwards + projector_cost(model, projector, args)
        before = spent(SimpleNamespace(**saved["args"]), saved["meta"], saved["step"], args.model)
        until = args.guide_steps if name == "guide" else released_at(args.out)
    else:
        own_range = {"t_min": 0.0, "t_max": 1.0} if "+" in args.stage else {}
        known = SimpleNamespace(**{**vars(args), **own_range})
        extra = find_baseline(name)(known).extra_cost(model)
    if name == "repa":  # the encoder's training, and its run over the images
        about = Path(args.features).with_suffix(".json")
        with common.reading(about, "does not say what the features cost"):
            flops = json.loads(about.read_text())
            flops = flops["flops_training"] + flops["flops_encoding"]
        before = flops / (3 * model.forward_flops() * args.batch_size)
    return extra, before, until


def released_at(run) -> float:
    """The last logged step of measured_release.py at which its loss was not zero."""
    path = Path(run) / "log.jsonl"
    with common.reading(path, "is no log of a run"):
        lines = [json.loads(text) for text in path.read_text().splitlines()]
        return max(known["step"] for known in lines if known["loss_measured"] > 0)


def network(model: str, meta: dict):
    """A SiT without weights, for its FLOPs."""
    with torch.device("meta"):
        return models.build_for({"model": model, "qk_norm": True}, meta)


def find_baseline(stage: str) -> type[Baseline]:
    """The loss with this name, of the scripts in experiments/methods."""
    for script in Path(__file__).parents[1].glob("methods/*.py"):
        importlib.import_module(f"experiments.methods.{script.stem}")
    known = {Loss.name: Loss for Loss in Baseline.__subclasses__()}
    if stage not in known:
        raise UserError(f"the auxiliary loss {stage} is none of {', '.join(known)}")
    return known[stage]


# ---- The tables


def line(*cells) -> str:
    return f"| {' | '.join(cells)} |"


def spread(numbers, digits, scale) -> str:
    """Mean and, of several, the standard deviation (n - 1)."""
    numbers = [scale * number for number in numbers]
    text = f"{statistics.mean(numbers):,.{digits}f}"
    return text + (f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else "")


def table(found: dict) -> list[str]:
    lines = [line("", "seeds", "steps", "total compute", *METRICS), line(*["---"] * 8)]
    for row, steps in found.items():
        for step, seeds in steps.items():
            total = f"{statistics.mean(values(seeds, 'compute')):,.0f}"
            figures = [spread(values(seeds, name), *how) for name, how in METRICS.items()]
            lines.append(
                line(row, ", ".join(map(str, sorted(seeds))), f"{step:,}", total, *figures)
            )
    return lines


def worth(curve: list[tuple[int, float]], value: float, metric: str) -> str:
    """How many vanilla steps a value is worth: where `curve`, [(steps, value)] with straight lines
    between its points, reaches it first."""
    better = operator.le if metric == "FD-CNN" else operator.ge
    if better(curve[0][1], value):
        return f"at most {curve[0][0]:,}"
    for (step, before), (next_step, after) in pairwise(curve):
        if better(after, value):
            way = (value - before) / (after - before)
            return f"{step + way * (next_step - step):,.0f}"
    return f"more than {curve[-1][0]:,}"


def worths(found: dict) -> list[str]:
    """What the last figures of each run are worth, on the curve of the same seed's vanilla run."""
    lines = [line("", "seed", "total compute", "FD-CNN's worth", "agreement's"), line(*5 * ["---"])]
    for row, steps in found.items():
        vanilla = found.get(f"{student_of(row)}vanilla", {})
        for seed, figures in sorted(steps[max(steps)].items()):
            cells = [row, str(seed), f"{figures['compute']:,.0f}"]
            for name in ("FD-CNN", "agreement"):
                curve = [
                    (step, vanilla[step][seed][name]) for step in vanilla if seed in vanilla[step]
                ]
                cells += [worth(curve, figures[name], name)] if len(curve) > 1 else []
            if "vanilla" not in row and len(cells) == 5:
                lines.append(line(*cells))
    return lines


# ---- The figures


def draw_row(axis, steps: dict, metric: str, label: str, colour: str):
    """The mean over seeds as a line, the least and the greatest as bars."""
    _, scale = METRICS[metric]
    x = [statistics.mean(values(seeds, "compute")) / 1000 for seeds in steps.values()]
    y = [[scale * value for value in values(seeds, metric)] for seeds in steps.values()]
    means = [statistics.mean(part) for part in y]
    bars = [[abs(end(p) - m) for p, m in zip(y, means, strict=True)] for end in (min, max)]
    style = {"color": colour, "label": label, "marker": "o", "markersize": 3, "capsize": 2}
    axis.errorbar(x, means, bars, **style)


def draw(found: dict, rows: list[str], real: list[float] | None):
    """FD-CNN and agreement of `rows` against total compute; `real`: those of real images after a
    round trip through the VAE, in words, because they lie far beyond the curves."""
    figure = new_figure(8.4, 4)
    axes = figure.subplots(1, 2)
    panels = {"FD-CNN": "FD-CNN, lower is better", "agreement": "class asked for, %"}
    for number, (metric, title) in enumerate(panels.items()):
        axis = axes[number]
        for row in rows:
            draw_row(axis, found[row], metric, *SERIES[row])
        if real:
            digits, scale = METRICS[metric]
            limit = f"real images through the VAE: {scale * real[number]:.{digits}f}"
            axis.set_title(limit, fontsize=10, color="dimgray")
        axis.set(ylabel=title, xlabel="total compute, thousands of vanilla steps")
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=10)
    return figure


@dataclass
class Settings:
    runs: str = "out/cifar10"  # folder of experiments/cifar10/cifar10.sh
    judge: str | None = None  # which judge: classifierJUDGE.pt, judgedJUDGE.json
    figure: str = "assets/compute.png"  # picture to write; of the larger student: ..._larger.png


def main():
    args = common.parse_settings(Settings, __doc__)
    runs, figure, judge = Path(args.runs), Path(args.figure), args.judge or ""
    found, classifier = find_results(runs, judge), runs / f"classifier{judge}.pt"
    with common.reading(classifier, "is no judge"):
        real = common.load_file(classifier).get("round_trips") if classifier.is_file() else None
    for text in (*table(found), "", "In steps of vanilla of the same seed:", "", *worths(found)):
        say(text)
    for student in STUDENTS:
        rows = [row for row in SERIES if row in found and student_of(row) == student]
        if rows:
            path = figure.with_stem(f"{figure.stem}_larger") if student else figure
            with common.atomic_write(path) as file:
                draw(found, rows, real).savefig(file, format="png", dpi=100)
            say(f"{path}: what the compute brought")


if __name__ == "__main__":
    common.run(main)
