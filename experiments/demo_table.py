"""The demo's last page: what this run measured, stage 2 against vanilla at equal steps, and the pictures to open."""
import json
from pathlib import Path

DEMO = Path("out/demo")
judged = {Path(row["samples"]).parent.name: row for row in map(json.loads, (DEMO / "judged.jsonl").read_text().splitlines())}
lines = {net: [json.loads(line) for line in (DEMO / net / "log.jsonl").read_text().splitlines()] for net in ("stage2", "vanilla")}
random = {net: json.loads((DEMO / f"samples-{net}-cfg4/fid.txt").read_text().splitlines()[-1]) for net in lines}
rows = [(f"L_diff, mean of the last {lines['vanilla'][-1]['step'] - lines['vanilla'][-2]['step']} steps", lambda net: f"{lines[net][-1]['loss_diff']:.4f}")]
for cfg in ("1", "4"):
    rows += [(f"samples given the class asked for, cfg {cfg}", lambda net, c=cfg: f"{100 * judged[f'samples-{net}-cfg{c}']['agreement']:.1f} %"),
             (f"FD-CNN, cfg {cfg} (lower is better)", lambda net, c=cfg: f"{judged[f'samples-{net}-cfg{c}']['FD-CNN']:.2f}")]
rows += [("FD-random, cfg 4, 32 images", lambda net: f"{random[net]['FD-random']:.1f}")]
print(f"\nAfter {lines['stage2'][-1]['step']} steps each                        {'Self-Transcendence':>20} {'vanilla SiT':>14}")
for name, value in rows:
    print(f"{name:46} {value('stage2'):>20} {value('vanilla'):>14}")
print("\nFD-CNN: Frechet distance in the features of the small shapes classifier; FD-random: in an Inception of random weights.\n"
      "Neither is FID. Stage 2 also had a teacher, trained for as many steps again.\n\nPictures to open:")
for picture in ("samples-stage2-cfg4/grid.png", "samples-vanilla-cfg4/grid.png", "teacher/teacher.png"):
    print(f"  {DEMO / picture}")
