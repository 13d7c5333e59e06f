"""The README's quotes still stand in the files, its flags exist, and the line budget holds."""
import re
import subprocess
import sys
import textwrap

import pytest

from conftest import ROOT

README = (ROOT / "README.md").read_text()
SEVEN = ["models.py", "vae_latents.py", "train_stage1.py", "build_teacher.py", "train_stage2.py", "sample.py", "fid.py"]


def test_quotes_stand_in_the_files():
    quotes = re.findall(r"```python\n# (\S+\.py)\n(.*?)```", README, re.S)
    assert len(quotes) >= 5
    for name, quote in quotes:
        lines = [line.strip() for line in (ROOT / name).read_text().splitlines()]
        wanted = [line.strip() for line in textwrap.dedent(quote).strip().splitlines()]
        assert any(lines[i:i + len(wanted)] == wanted for i in range(len(lines))), (name, quote)


@pytest.mark.parametrize("name", [n for n in SEVEN if n != "models.py"])
def test_help_works_and_knows_the_readmes_flags(name):
    text = subprocess.run([sys.executable, str(ROOT / name), "--help"], capture_output=True, text=True, check=True).stdout
    for line in README.splitlines():
        if line.startswith("    ") and f"{name} " in line:
            for flag in re.findall(r"(--[a-z-]+)", line.split(name)[1].split("#")[0]):
                assert flag in text, (name, flag)


def test_under_2000_lines_of_120_columns():
    lines = {name: (ROOT / name).read_text().splitlines() for name in SEVEN}
    assert sum(map(len, lines.values())) < 2000
    assert not [(name, i + 1) for name in SEVEN for i, line in enumerate(lines[name]) if len(line) > 120]
    source = "".join((ROOT / name).read_text() for name in SEVEN)
    assert not [call for call in re.findall(r"torch\.load\([^\n]*", source) if "weights_only=True" not in call]
