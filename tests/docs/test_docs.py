"""The pages say what the program does: their messages, commands, options and links exist."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from llava_scale.cli import build_app
from llava_scale.config import Config
from llava_scale.config.load import load_config
from llava_scale.eval.task_file import load_task

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/README.md")])
GENERATED = {"commands.md", "settings.md"}


def strings_of_the_package() -> str:
    """All texts in the package's code, parts of f-strings joined without their values."""
    found = []
    for path in (ROOT / "llava_scale").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value for part in node.values if isinstance(part, ast.Constant)]
                found.append("\0".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_messages_under_troubleshooting_are_those_of_the_program():
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    quoted = [text for line in page.splitlines() if line.startswith("`") for text in re.findall("`([^`]+)`", line)]
    texts = strings_of_the_package()
    settings = {f"{section}.{name}" for section in ("data", "train") for name in fields_of(section)}
    assert len(quoted) > 12
    assert [text for text in quoted if text not in texts and text not in settings] == []


def fields_of(section: str) -> list[str]:
    return list(Config.__pydantic_fields__[section].annotation.__pydantic_fields__)


def command_lines(page: Path) -> list[list[str]]:
    """Calls of the program in a page's code blocks, indented or fenced, continued lines joined."""
    text = re.sub(r" *\\\n\s*", " ", page.read_text(encoding="utf-8"))
    lines = [line.strip() for line in text.splitlines() if re.match(r"(    |[a-z./]|[A-Z_]+=)", line)]
    calls = [line for line in lines if re.search(r"(^|/|no-python |apart from |auto )llava-scale ", line)]
    return [shlex.split(line, comments=True) for line in calls if "`" not in line]


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in GENERATED], ids=lambda page: page.name)
def test_commands_and_options_in_pages_exist(page):
    app = typer.main.get_command(build_app())
    for words in command_lines(page):
        start = next(place for place, word in enumerate(words) if word.endswith("llava-scale"))
        command, rest = app, words[start + 1 :]
        while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
            assert rest[0] in command.commands, words
            command, rest = command.commands[rest[0]], rest[1:]
        options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        used = {word.partition("=")[0] for word in rest if word.startswith("--")}
        assert used - {"--help"} <= options, words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_files_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if target not in GENERATED and not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_recipes_in_pages_are_valid(page, tmp_path):
    """YAML blocks that look like recipes or task files are accepted as they are."""
    for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block, encoding="utf-8")
        if "scorer:" in block:
            assert load_task(path).scorer
        elif re.match(r"(model|data|train|name):", block):
            whole = re.search("language_model|preset|init_from", block)
            assert isinstance(load_config(path, [] if whole else ["model.preset=tiny"]), Config)


@pytest.mark.slow
def test_the_pages_build_without_a_warning(tmp_path):
    pytest.importorskip("sphinx", reason="needs the extra docs")
    pytest.importorskip("myst_parser", reason="needs the extra docs")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", str(tmp_path / "html")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "html" / "settings.html").exists()
