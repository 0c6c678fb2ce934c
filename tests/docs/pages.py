"""Commands of the documentation, in the order in which they stand."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
GENERATED = {"commands.md", "settings.md"}
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(page for page in sorted(ROOT.glob("docs/**/*.md")) if page.name not in GENERATED and "_build" not in page.parts),
    *sorted(ROOT.glob("examples/*/README.md")),
    ROOT / "benchmarks/README.md",
]

NOT_RUN = {
    r"make |\S*python examples/tuxpaint|PYTHONPATH=examples/tuxpaint": "whole jobs of minutes: run by hand",
    r"pip install": "tests install nothing",
    r"python benchmarks/": "benchmarks and studies of minutes to hours",
    r"ray start|RAY_ADDRESS=": "a cluster of several machines; tests/data packs with a local one",
    r"sbatch|kubectl": "a cluster; tests/distributed reads the scripts",
    r"lmms-eval": "data of the hub; tests/eval runs it on a local task",
}
"""Commands that are not run, by how they begin, and why."""

SHORTENED = (
    (
        r"(train configs/quickstart\.yaml .*?)( train\.steps=\d+|$)",
        r"\1 train.steps=4 train.eval_every=0 train.save_every=0",
    ),
    (r"(train (?:recipe|INSTRUCT|toy)\.yaml.*)", r"\1 train.steps=2 train.save_every=0"),
    (r"(data toy .*?)( --num-samples \d+|$)", r"\1 --num-samples 60"),
    (r"--nproc-per-node 8", "--nproc-per-node 2"),
)
"""What is smaller than on the page; all else is run as it is written."""

_PROGRAMS = "llava-scale|lmms-eval|make|pip|python|torchrun|ray|sbatch|kubectl"
_COMMAND = re.compile(rf"(?:[A-Z_]+=\S+ )*(?:\S*/)?(?:{_PROGRAMS}) [^=]")
_SHELLS = ("", "bash", "console")


@dataclass(frozen=True)
class Command:
    """One command, continued lines joined.

    Attributes:
        page: File name of its page.
        text: As it is written.
    """

    page: str
    text: str

    @property
    def reason(self) -> str:
        """Why it is not run; empty for those that are."""
        return next((why for start, why in NOT_RUN.items() if re.match(start, self.text)), "")

    @property
    def shortened(self) -> str:
        """With fewer steps, samples and processes."""
        text = re.sub(r"\s+#.*$", "", self.text)
        for pattern, replacement in SHORTENED:
            text = re.sub(pattern, replacement, text, count=1)
        return text


def commands(page: Path) -> list[Command]:
    """Commands in the fenced blocks of a shell, and in indented ones."""
    found, language = [], None
    for line in re.sub(r" *\\\n\s*", " ", page.read_text(encoding="utf-8")).splitlines():
        if fence := re.match(r"`{3,}(\S*)", line):
            language = fence[1] if language is None else None
        elif language in _SHELLS or (language is None and line.startswith("    ")):
            text = line.strip() if language is None else line
            if _COMMAND.match(text):
                found.append(Command(page.name, text))
    return found


def python_blocks(page: Path) -> list[str]:
    """Python examples of a page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def shown_files(page: Path) -> dict[str, str]:
    """YAML files that the page shows below a line such as: with `toy.yaml`:"""
    found = re.findall(
        r"with `(\S+\.yaml)`:\n\n```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    return dict(found)
