"""What the source may look like: sizes, names, forbidden calls, module state, the README's map."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.house.source import PACKAGE, ROOT, modules, package_of, shown, tree

MOST_LINES, MOST_METHOD_LINES = 600, 400
FORBIDDEN_NAMES = {"utils", "common", "helpers", "misc"}


def is_method(path: Path) -> bool:
    """A file that defines a method of the catalogue."""
    decorated = (n for n in ast.walk(tree(path)) if isinstance(n, ast.FunctionDef | ast.ClassDef))
    return any(ast.unparse(d).startswith("method(") for n in decorated for d in n.decorator_list)


def test_file_sizes():
    native = [p for p in (PACKAGE / "kernels").rglob("*") if p.suffix in (".cpp", ".h", ".hpp")]
    lines = {p: len(p.read_text("utf-8").splitlines()) for p in [*modules(), *native]}
    assert {
        shown(p): n for p, n in lines.items() if n > (MOST_METHOD_LINES if p.suffix == ".py" and is_method(p) else MOST_LINES)
    } == {}


def test_file_names():
    assert [
        shown(p) for p in modules() if FORBIDDEN_NAMES & {part.removesuffix(".py") for part in p.relative_to(ROOT).parts}
    ] == []


def test_every_module_has_a_docstring():
    assert [shown(p) for p in modules() if not ast.get_docstring(tree(p))] == []


def forbidden(node: ast.AST) -> str:
    """Why this node may not be in the source, or nothing."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [a.name for a in node.names] + [getattr(node, "module", "") or ""]
        if any(n.split(".")[0] in ("pickle", "cPickle", "dill", "joblib") for n in names):
            return "pickle"
    if isinstance(node, ast.Call):
        called = ast.unparse(node.func)
        if called in ("torch.load", "torch.save", "eval", "exec", "os.system"):
            return called
        for keyword in node.keywords:
            value = keyword.value
            if keyword.arg == "trust_remote_code" and isinstance(value, ast.Constant) and value.value is not False:
                return "trust_remote_code=True"
            if keyword.arg == "shell" and isinstance(value, ast.Constant) and value.value:
                return "shell=True"
    if isinstance(node, ast.Global):
        return f"global {', '.join(node.names)}"
    if isinstance(node, ast.ExceptHandler) and node.type is None:
        return "bare except"
    if isinstance(node, ast.Raise) and node.exc is not None and "NotImplementedError" in ast.unparse(node.exc):
        return "NotImplementedError"
    return ""


def test_nothing_forbidden():
    found = [
        f"{shown(p)}:{getattr(n, 'lineno', 0)}: {why}" for p in modules() for n in ast.walk(tree(p)) if (why := forbidden(n))
    ]
    assert found == []


@pytest.mark.parametrize(
    "code", ["import pickle", "from pickle import load", "torch.load(f)", "f(trust_remote_code=True)", "eval(x)"]
)
def test_forbidden_is_caught(code):
    assert any(forbidden(n) for n in ast.walk(ast.parse(code)))


def names_a_family(node: ast.AST) -> bool:
    """Whether a node compares model_type with a name written out in the source."""
    if isinstance(node, ast.Match):
        return "model_type" in ast.unparse(node.subject)
    if not isinstance(node, ast.Compare):
        return False
    sides = [node.left, *node.comparators]
    strings = [n for side in sides for n in ast.walk(side) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return any("model_type" in ast.unparse(side) for side in sides) and any(n.value != "model_type" for n in strings)


def test_model_type_is_compared_only_in_families():
    outside = [p for p in modules() if "families" not in p.parts]
    assert [f"{shown(p)}:{n.lineno}" for p in outside for n in ast.walk(tree(p)) if names_a_family(n)] == []  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "code", ["config.model_type == 'mixtral'", "c['model_type'] in ('a', 'b')", "match c.model_type:\n case 'a': pass"]
)
def test_a_family_by_name_is_caught(code):
    assert any(names_a_family(n) for n in ast.walk(ast.parse(code)))
    assert not any(names_a_family(n) for n in ast.walk(ast.parse("config.model_type not in KNOWN")))


def module_state(module: ast.Module) -> list[int]:
    """Lines of module-level names that hold something mutable: a lower-case name, or a constant that the module changes."""
    mutable: dict[str, int] = {}
    for node in module.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target if isinstance(node, ast.AnnAssign) else None
        value = getattr(node, "value", None)
        made = isinstance(value, ast.Call) and ast.unparse(value.func) in (
            "dict",
            "list",
            "set",
            "defaultdict",
            "Counter",
            "deque",
        )
        if isinstance(target, ast.Name) and (
            made or isinstance(value, ast.Dict | ast.List | ast.Set | ast.ListComp | ast.DictComp)
        ):
            mutable[target.id] = node.lineno
    lines = [line for name, line in mutable.items() if name.lower() == name and not name.startswith("__")]
    changers = {"append", "add", "update", "pop", "clear", "extend", "setdefault", "insert", "remove", "discard", "popitem"}
    for node in ast.walk(module):
        if isinstance(node, ast.Assign | ast.AugAssign | ast.Delete):
            targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else [node.target]
            lines += [
                node.lineno
                for t in targets
                if isinstance(t, ast.Subscript)
                and isinstance(t.value, ast.Name)
                and t.value.id.isupper()
                and t.value.id in mutable
            ]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in changers:
            base = node.func.value
            if isinstance(base, ast.Name) and base.id.isupper() and base.id in mutable:
                lines.append(node.lineno)
    return lines


def test_no_module_level_state():
    assert [f"{shown(p)}:{line}" for p in modules() for line in module_state(tree(p))] == []


@pytest.mark.parametrize(
    "code", ["cache = {}", "_seen: list[int] = []", "SEEN = {}\ndef f(x):\n    SEEN[x] = 1", "A = []\nA.append(1)"]
)
def test_module_state_is_caught(code):
    assert module_state(ast.parse(code))


def test_core_names_no_method():
    """core knows kinds and cards, never a particular method."""
    from moestro.core.method import catalogue

    names = {row["name"] for row in catalogue()}
    found = []
    for path in modules():
        if package_of(path) == "core":
            strings = {n.value for n in ast.walk(tree(path)) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
            found += [f"{shown(path)}: {name}" for name in names if name in strings]
    assert names and found == []


def test_readme_map_matches_the_tree():
    """The README's map of packages has one line for every package and nothing else."""
    text = (ROOT / "README.md").read_text("utf-8")
    listed = re.findall(r"^\| `(moestro/[\w/]+)/?` \|", text, re.MULTILINE)
    real = {"moestro/" + p.name for p in PACKAGE.iterdir() if p.is_dir() and any(p.rglob("*.py"))}
    assert sorted(listed) == sorted(real)


def test_links_in_the_documents_lead_somewhere():
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    assert len(documents) > 5
    broken = []
    for document in documents:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text("utf-8")):
            if not re.match(r"[a-z]+:", target) and not (document.parent / target).exists():
                broken.append(f"{shown(document)} -> {target}")
    assert broken == []
