"""Who may import whom: the layers of the package, read from syntax trees."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib

import pytest

from tests.house.source import PACKAGE, imports, module_name, modules, package_of, shown, tree

LAYER = {
    "core": 0,
    "kernels": 0,
    "layers": 1,
    "models": 1,
    "profile": 2,
    "train": 2,
    "evaluate": 2,
    "compress": 3,
    "steer": 3,
    "build": 3,
    "adapt": 3,
    "place": 3,
    "engine": 3,
    "compose": 3,
    "serve": 4,
    "cli": 5,
    "testing": 3,
}
LAB = (
    "torch",
    "transformers",
    "scipy",
    "psutil",
    "matplotlib",
    "accelerate",
    "scikit-learn",
    "sklearn",
    "networkx",
    "threadpoolctl",
    "llama_cpp",
)


def allowed(user: str, used: str) -> bool:
    """May package `user` import package `used`?"""
    if user == used or used == "":
        return True
    if used == "testing" or used == "cli":
        return False
    if user == "cli":
        return True
    if user == "testing":
        return LAYER[used] <= 2
    if user == "serve":
        return used in ("engine", "compose") or LAYER[used] <= 1
    if user == "models" and used == "layers":
        return True
    return LAYER[used] < LAYER[user]


def breaches(path, node: ast.AST) -> list[str]:
    user, found = package_of(path), []
    for name, line, inside in imports(node):
        if not name.startswith("moestro"):
            continue
        parts = name.split(".")
        used = parts[1] if len(parts) > 1 and parts[1] in LAYER else ""
        if user == "" or user == "cli":
            bad = used == "testing" or (not inside and used not in ("", "cli"))
        else:
            bad = not allowed(user, used)
        if bad:
            found.append(f"{shown(path)}:{line} ({user or 'package'}) imports {name}")
    return found


def test_every_package_has_a_layer():
    found = {p.name for p in PACKAGE.iterdir() if p.is_dir() and any(p.rglob("*.py"))}
    assert found <= set(LAYER)


def test_import_rule():
    assert [b for path in modules() for b in breaches(path, tree(path))] == []


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("core/x.py", "import moestro.kernels.ffn"),
        ("kernels/x.py", "from moestro.core import errors"),
        ("engine/x.py", "def f():\n    from moestro.build.upcycle import copy"),
        ("engine/x.py", "from moestro.testing import tiny"),
        ("models/x.py", "from moestro.engine import cache"),
        ("cli/x.py", "from moestro.engine import cache"),
        ("serve/x.py", "from moestro.compress import plan"),
    ],
)
def test_the_rule_catches(file, code):
    assert breaches(PACKAGE / file, ast.parse(code)), code


def test_the_rule_lets_pass():
    assert not breaches(PACKAGE / "cli/x.py", ast.parse("def f():\n    from moestro.engine import cache"))
    assert not breaches(PACKAGE / "engine/x.py", ast.parse("from moestro.models import layout\nfrom moestro.core import plan"))


def test_no_import_cycle():
    names = {module_name(p): p for p in modules()}
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        found = {n for n, _, inside in imports(tree(path)) if not inside}
        graph[name] = {n if n in names else n.rsplit(".", 1)[0] for n in found} & (set(names) - {name})
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_runtime_imports_without_the_lab():
    """core, kernels, models, engine and cli import with every lab package made unavailable."""
    lean = [module_name(p) for p in modules() if package_of(p) in ("", "core", "kernels", "models", "engine", "cli")]
    lean = [n for n in lean if not n.endswith("__main__")]
    code = (
        "import sys, importlib, warnings\n"
        "warnings.simplefilter('error')\n"
        f"lab = {LAB!r}\n"
        "sys.modules.update(dict.fromkeys(lab))\n"  # None in sys.modules: importing it raises ImportError
        f"for name in {lean!r}: importlib.import_module(name)\n"
        "assert not [m for m in sys.modules if m.split('.')[0] in lab and sys.modules[m] is not None]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr


def package_names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=\[~!]", row)[0] for row in requirements}


def test_the_lab_is_what_the_project_file_says():
    from moestro.cli import doctor

    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text("utf-8"))["project"]
    assert package_names(project["dependencies"]) == set(doctor.LEAN)
    assert package_names(project["optional-dependencies"]["lab"]) == set(doctor.LAB) <= set(LAB)
