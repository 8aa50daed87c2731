"""Benchmarks and their pages: commands name scripts that exist, links lead somewhere, and the list holds them all."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.catalogue import scripts, topics

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "benchmarks").rglob("RESULTS.md"))]
COMMAND = re.compile(r"-m benchmarks\.(\w+)\.(\w+)")


def test_every_topic_has_a_page_and_every_page_a_topic() -> None:
    assert sorted(path.parent.name for path in (ROOT / "benchmarks").glob("*/RESULTS.md")) == topics()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_links_of_a_page_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for topic, script in COMMAND.findall(text) + re.findall(r"\[`(\w+)\.(\w+)[^`]*`\]\(\w+/RESULTS", text):
        assert script in scripts(topic)
    for target, _, heading in (link.partition("#") for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text)):
        linked = page.parent / target if target else page
        assert linked.exists()
        if heading:
            assert heading in anchors(linked)


@pytest.mark.parametrize("topic", topics())
def test_a_script_says_first_by_which_command_it_starts(topic: str) -> None:
    for script, first_line in scripts(topic).items():
        docstring = (ROOT / "benchmarks" / topic / f"{script}.py").read_text()
        assert docstring.startswith(f'"""{first_line}\n\n    python -P -m benchmarks.{topic}.{script}')


def test_a_topic_starts_its_scripts_and_refuses_other_names() -> None:
    started, refused = (call("benchmarks.data", *words) for words in (("order", "--help"), ("ordr",)))
    assert started.returncode == 0
    assert "--again" in started.stdout
    assert refused.returncode == 2
    assert refused.stderr == "benchmarks.data: ordr: no such script; nearest: order\n"


def call(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def anchors(page: Path) -> set[str]:
    """Names that links to a page's headings have: lower case, no punctuation, dashes for blanks."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
