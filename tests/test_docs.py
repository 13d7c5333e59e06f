"""The README's quotes stand in the files, its flags exist, its pictures too; the budget holds."""

import json
import re
import runpy
import sys
import textwrap

import pytest
from conftest import ROOT, TRAIN

README = (ROOT / "README.md").read_text()
EIGHT = "common models vae_latents train_stage1 build_teacher train_stage2 sample fid".split()


def lines_of(name):
    return (ROOT / f"{name}.py").read_text().splitlines()


def test_quotes_stand_in_the_files():
    quotes = re.findall(r"```python\n# (\S+)\.py\n(.*?)```", README, re.S)
    assert len(quotes) >= 3
    for name, quote in quotes:
        lines = [line.strip() for line in lines_of(name)]
        wanted = [line.strip() for line in textwrap.dedent(quote).strip().splitlines()]
        places = range(len(lines))
        assert any(lines[i : i + len(wanted)] == wanted for i in places), (name, quote)


@pytest.mark.slow
def test_the_example_of_a_loss_runs(latents, runs, tmp_path, monkeypatch, capsys):
    page = (ROOT / "CONTRIBUTING.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, re.S)[1]
    (tmp_path / "cosine.py").write_text(code)
    flags = [*TRAIN, "--data", latents, "--steps", 2, "--out", tmp_path / "run"]
    flags += ["--teacher", runs / "teacher/teacher.pt"]
    monkeypatch.setattr(sys, "argv", ["cosine.py", *map(str, flags)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(tmp_path / "cosine.py"), run_name="__main__")
    assert stop.value.code == 0, capsys.readouterr().err
    record = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[0])
    assert 0 < record["loss_cosine"] < 2 * 0.5  # at most 2, and counted on part of the batch


def commands():
    """(script, flags) of every command in the README, the pages and the shell scripts."""
    pages = [ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    pages.remove(ROOT / "docs/log.md")  # whose commands stand as they were run
    scripts = [*(ROOT / "experiments").glob("*/*.sh"), *(ROOT / "runs").iterdir()]
    texts = [f.read_text() for f in (*pages, *scripts)]
    texts.append(README)
    for line in "\n".join(texts).replace("\\\n", " ").splitlines():
        for script, rest in re.findall(r"(?:python|=8|\$RUN) ([\w/]+\.py)([^#|&;`]*)", line):
            if script != "cosine.py":  # the example that CONTRIBUTING.md itself has
                yield script, re.findall(r" (--[a-z-]+)", rest)
        module_of = r"(?:python|\$RUN) -m (experiments\.\w+\.\w+)([^#|&;`]*)"
        for module, rest in re.findall(module_of, line):
            yield f"{module.replace('.', '/')}.py", re.findall(r" (--[a-z-]+)", rest)


def test_flags_in_the_readme_and_scripts_exist():
    wanted = {}
    for script, flags in commands():
        wanted.setdefault(script, set()).update(flags)
    assert len(wanted) >= 8
    for script, flags in wanted.items():
        assert (ROOT / script).is_file(), script
        source = (ROOT / script).read_text()
        if script.startswith(("train_stage2", "experiments/methods")):
            source += (ROOT / "train_stage1.py").read_text() + (
                ROOT / "train_stage2.py"
            ).read_text()
        if "methods" in script:
            source += (ROOT / "experiments/methods/method.py").read_text()
        for flag in flags:
            name = flag[2:].replace("-", "_")
            known = (f"{name}:", f'"{flag}"', f'alias="{flag[2:]}"', "TrainSettings")
            assert any(word in source for word in known), (script, flag)


def test_help_works_of_one_script(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_stage2.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "train_stage2.py"), run_name="__main__")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--guide-weight" in text and "(default: 0.5)" in text


def test_pictures_and_pages_are_there():
    for path in re.findall(r"\]\(([^)#]+)\)", README):
        assert path.startswith("http") or (ROOT / path).is_file(), path
    for picture in (ROOT / "assets").iterdir():
        assert picture.stat().st_size < 300_000, picture
