"""Build steps of the documentation's site: excerpts, links out of docs/, names of a package, equations, fields.

Pages are written to be read in a checkout, too: they link to `../CHANGELOG.md` or `../examples/trainer.py`. The site
has a page for the first and sends the second to the repository. Equations become MathML, without JavaScript.
"""

from __future__ import annotations

import ast
import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src"
PAGES_FROM_OUTSIDE = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}


def source_file(module: str) -> Path:
    path = SOURCE.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def exported(module: str) -> list[str]:
    """Return the names in `__all__` of a package, without importing it."""
    for node in ast.parse(source_file(module).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    raise ValueError(f"{module} has no __all__, but its page lists its names: add __all__")


def definition(module: str, name: str) -> str:
    """Return the path where a name is defined: static analysis takes `methods.describe` for the file of that name."""
    for node in ast.walk(ast.parse(source_file(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and name in {alias.name for alias in node.names}:
            return definition(node.module, name)
    return f"{module}.{name}"


def public_names(markdown: str) -> Iterator[tuple[str, str]]:
    """Yield package and name of everything that a page's directives document."""
    for path in re.findall(r"^::: ([\w.]+(?:\.\*)?)$", markdown, flags=re.MULTILINE):
        package, _, name = path.rpartition(".")
        if name != "*":
            yield package, name
        else:
            yield from ((package, inner) for inner in exported(package) if inner not in exported("bayeslora"))


def api_directives(markdown: str) -> str:
    """Replace `::: bayeslora.PACKAGE.*` by a directive for each of its names that `bayeslora` itself does not have."""

    def directives(match: re.Match[str]) -> str:
        blocks = []
        for package, name in public_names(match[0]):
            path = f"{package}.{name}"
            defined = definition(package, name)
            shadowed = defined.split(".")[-2] == name or source_file(path).exists()
            anchor = f"[](){{#{path}}}\n\n" if shadowed else ""
            blocks.append(f"{anchor}::: {defined if shadowed else path}")
        return "\n\n".join(blocks)

    return re.sub(r"^::: [\w.]+(?:\.\*)?$", directives, markdown, flags=re.MULTILINE)


def links_out_of_docs(markdown: str, page: str, repository: str) -> str:
    """Point links that leave docs/ to the site's page of that file, or to the repository."""

    def target(match: re.Match[str]) -> str:
        path, anchor = match[1], match[2] or ""
        linked = (ROOT / "docs" / page).parent.joinpath(path).resolve()
        if not linked.is_relative_to(ROOT) or linked.is_relative_to(ROOT / "docs"):
            return match[0]
        name = linked.relative_to(ROOT).as_posix()
        if name in PAGES_FROM_OUTSIDE:
            return f"]({'../' * page.count('/')}{PAGES_FROM_OUTSIDE[name]}{anchor})"
        return f"]({repository}/blob/main/{name}{anchor})"

    return re.sub(r"\]\((\.\.?/[^)#\s]+)(#[^)\s]*)?\)", target, markdown)


def mathml(content: str) -> str:
    r"""Replace `\(...\)` and `\[...\]`, as arithmatex leaves them, by MathML."""

    def equation(match: re.Match[str]) -> str:
        latex = re.sub(r"\\texttt\{.*?\}", lambda word: word[0].replace(r"\_", "_"), html.unescape(match[3]))
        return convert(latex, display="block" if match[2] == "[" else "inline")

    return re.sub(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', equation, content, flags=re.DOTALL)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Change a page before MkDocs turns it into HTML."""
    markdown = markdown.replace("```python notest\n", '```{.python title="Excerpt"}\n')
    return links_out_of_docs(api_directives(markdown), page.file.src_uri, config.extra["repository"])


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """Change a page's HTML."""
    return mathml(content)


class FieldHelp(griffe.Extension):
    """Give fields of configs, `field(default=…, metadata={"help": …})`, their help as docstring and their default."""

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, **_: Any) -> None:
        call = getattr(node, "value", None)
        if not isinstance(call, ast.Call) or ast.unparse(call.func) != "field":
            return
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        metadata = given.get("metadata")
        if isinstance(metadata, ast.Dict) and attr.docstring is None:
            attr.docstring = griffe.Docstring(ast.literal_eval(metadata).get("help", ""), parent=attr)
        if default := given.get("default") or given.get("default_factory"):
            attr.value = ast.unparse(default)
