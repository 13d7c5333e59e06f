"""What compare.sh measured: a table, sentences and out/compare/compare.png, with standard errors.

Stage 2 and vanilla SiT, each with the same seeds and the same noise of its samples, after equal
steps and after equal total compute (the teacher's training and passes counted). A judge looks at
drawn figures with ease, so CIFAR-10's figures, by the judge from outside, stand beside.
"""

import re
from pathlib import Path

import numpy as np
import torch

import common
from common import UserError, say
from experiments.checkpoints.plot import new_figure
from experiments.cifar10 import judge
from experiments.cifar10.report import compute, read_run
from experiments.demo.toy import mean_and_error, sentence

RUNS, JUDGE, RESULTS = (
    Path("out/compare"),
    Path("data/shapes/classifier.pt"),
    Path("docs/results.md"),
)
STUDENT = "SiT-Ti/4"
ARMS = {"stage2": "stage 2", "vanilla-steps": "vanilla", "vanilla-compute": "vanilla"}
COMPARED = {"vanilla-steps": "equal steps", "vanilla-compute": "equal total compute"}
GUIDANCE = {1: "no guidance", 3: "guided, cfg 3"}


def measured(runs: Path, judge_path: Path) -> dict:
    """{(arm, cfg): (class asked for in % (seeds,), FD-CNN (seeds,))}."""
    cnn, saved = judge.load(judge_path)
    seeds, found = sorted(runs.glob("seed*")), {}
    if len(seeds) < 2:
        raise UserError(f"{runs}: a standard error needs two seeds; run make compare")
    for arm in ARMS:
        for cfg in GUIDANCE:
            figures = []
            for seed in seeds:
                samples = judge.read_samples(seed / f"{arm}-cfg{cfg}/samples.npz", saved)
                one = judge.measure(cnn, saved, *samples)
                figures.append((100 * one["agreement"], one["FD-CNN"]))
            found[arm, cfg] = torch.tensor(figures, dtype=torch.float64).unbind(dim=1)
    return found


def spent(runs: Path) -> dict[str, tuple[int, float]]:
    """{arm: (steps, total compute in steps of vanilla)} of the first seed; all cost the same."""
    seed = min(runs.glob("seed*"))
    stage2 = read_run(seed / "stage2")[2]
    steps = {"stage2": stage2, "vanilla-steps": stage2}
    steps["vanilla-compute"] = read_run(seed / "vanilla")[2]
    return {
        arm: (step, compute(seed / arm.split("-")[0], step, STUDENT)) for arm, step in steps.items()
    }


def outside_judge(page: str, w: int) -> dict[str, np.ndarray]:
    """{row: (seeds, 2): distance, class in %} of docs/results.md's table of the judge from outside,
    CIFAR-10 at equal total compute, guidance w; UserError where the page has it no more."""
    found = {}
    for row in ("stage 2", "vanilla, equal total compute"):
        lines = re.findall(rf"^\| {row} \| [\d,]+ \| {w} \|.*\| (.*) \|$", page, re.MULTILINE)
        pairs = re.findall(r"([\d.]+), ([\d.]+) %", lines[0].replace("*", "")) if lines else []
        if len(pairs) < 2:
            raise UserError(f"{RESULTS}: has no row of {row} with w = {w}; correct compare.py")
        found[row] = np.array(pairs, dtype=float)
    return found


def draw(found: dict, cifar: dict):
    """Class asked for, as bars with standard errors; to the right CIFAR-10's."""
    figure = new_figure(8.4, 3.6)
    left, right = figure.subplots(1, 2, width_ratios=[2, 1], sharey=True)
    bars = {"stage2": ("stage 2", "tab:blue")}
    bars["vanilla-compute"] = "vanilla, equal total compute", "tab:gray"
    bars["vanilla-steps"] = "vanilla, equal steps", "silver"
    for number, (arm, (label, colour)) in enumerate(bars.items()):
        values = [mean_and_error(found[arm, cfg][0]) for cfg in GUIDANCE]
        mean, error = zip(*values, strict=True)
        places = np.arange(len(values)) + 0.28 * (number - 1)
        drawn = left.bar(places, mean, 0.26, yerr=error, color=colour, label=label)
        left.bar_label(drawn, fmt="%.0f", label_type="center", fontsize=10)
    left.set_xticks(range(len(GUIDANCE)), GUIDANCE.values(), fontsize=10)
    left.set_title("drawn figures: class asked for, %, standard error", fontsize=10)
    left.set_ylim(0, 100)
    left.legend(fontsize=9)
    for place, (row, colour) in enumerate(zip(cifar, ("tab:blue", "tab:gray"), strict=True)):
        drawn = right.bar(place, cifar[row][:, 1].mean(), 0.6, color=colour)
        right.bar_label(drawn, fmt="%.0f", label_type="center", fontsize=10)
    right.set_xticks(range(2), ["stage 2", "vanilla"], fontsize=10)
    right.set_title("CIFAR-10, w = 2, outside judge", fontsize=10)
    return figure


def main():
    found, costs = measured(RUNS, JUDGE), spent(RUNS)
    with common.reading(RESULTS, "is no page of results"):
        page = RESULTS.read_text()
    cifar = outside_judge(page, w=2)
    say(f"{'':34}" + "".join(f"{title:>34}" for title in GUIDANCE.values()))
    for arm, (step, total) in costs.items():
        cells = []
        for cfg in GUIDANCE:
            share, distance = (mean_and_error(values) for values in found[arm, cfg])
            cells.append("{:.1f} ± {:.1f} %, FD {:.2f} ± {:.2f}".format(*share, *distance))
        say(
            f"{ARMS[arm]:8}{step:6,} steps, in all {total:6,.0f}  "
            + "".join(map("{:>34}".format, cells))
        )
    say("Class asked for and FD-CNN (lower is better), by a CNN, mean ± standard error over seeds.")
    for arm, condition in COMPARED.items():
        for cfg, name in GUIDANCE.items():
            say(sentence(found["stage2", cfg][0], found[arm, cfg][0], f"{condition}, {name}"))
    (distance, share), (vanilla_distance, vanilla_share) = (x.mean(axis=0) for x in cifar.values())
    seeds = f"{len(cifar['stage 2'])} seeds"
    where = f"SiT-W, equal total compute, w = 2, by a judge from outside, {seeds}, docs/results.md"
    say(
        f"CIFAR-10 ({where}): class {share:.1f} and {vanilla_share:.1f} %, "
        f"distance {distance:.0f} and {vanilla_distance:.0f} (lower is better)"
    )
    with common.atomic_write(RUNS / "compare.png") as file:
        draw(found, cifar).savefig(file, format="png", dpi=110)
    say(f"Look at {RUNS}/compare.png")


if __name__ == "__main__":
    common.run(main)
