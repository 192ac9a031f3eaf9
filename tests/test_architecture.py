"""The rules that keep the house in order; each names the file that breaks it."""

from __future__ import annotations

import ast
import graphlib
import importlib
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import onp.ops

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python" / "onp"

LAYERS = [
    {
        "errors",
        "config",
        "arguments",
        "masks",
        "answers",
        "trusted",
        "files",
        "ledger",
        "optimizers",
    },
    {"ops"},
    {"graph", "features", "suspect", "data", "triggers", "environment"},
    {"evaluate", "clean", "copies", "probes", "metrics"},
    {"agent"},
    {"verdict", "scene", "evidence", "aftercare"},
    {"search", "renewal", "result", "report", "prepare", "pruning"},
    {"sanitize"},
    {"checkpoint"},
    {"demo", "batch"},
    {"cli"},
    {"__main__"},
]
"""Parts of the package, lowest first. A part imports parts of its own layer or below."""

ANYWHERE = {"__version__"}
"""Names of the package itself that every part may import."""


def _python_files(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def _imports(tree: ast.AST) -> Iterator[tuple[str, str | None]]:
    """Imported (module, name) pairs, wherever they stand, but for those only type checkers see."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (("." * node.level + (node.module or ""), a.name) for a in node.names)
        else:
            yield from _imports(node)


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def _absolute(path: Path, module: str) -> str:
    """The full name of a possibly relative ``module`` imported by the file ``path`` of onp."""
    dots = len(module) - len(module.lstrip("."))
    if dots == 0:
        return module
    package = ["onp", *path.relative_to(PACKAGE).parent.parts]
    return ".".join([*package[: len(package) - dots + 1], module.lstrip(".")]).rstrip(".")


def _part(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def _parts_imported(path: Path) -> set[str]:
    """Parts of onp that the file imports; ``_C`` for the native module."""
    parts = set()
    for module, name in _imports(_parse(path)):
        names = _absolute(path, module).split(".")
        if names[0] != "onp":
            continue
        if len(names) > 1:
            parts.add(names[1])
        elif name is not None and name not in ANYWHERE:
            parts.add(name)
    return parts


PARTS = sorted({_part(path) for path in _python_files(PACKAGE)} - {"__init__"})


def test_every_part_has_one_layer() -> None:
    placed = [part for layer in LAYERS for part in layer]
    assert len(placed) == len(set(placed))
    assert set(PARTS) <= set(placed), "give the new part its place in LAYERS"


@pytest.mark.parametrize("part", PARTS)
def test_arrows_point_down(part: str) -> None:
    rank = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    upward = [
        f"{path.relative_to(ROOT)} imports {imported}"
        for path in _python_files(PACKAGE)
        if _part(path) == part
        for imported in _parts_imported(path) - {"_C", part}
        if rank.get(imported, len(LAYERS)) > rank[part]
    ]
    assert upward == []


def test_no_circles_within_a_layer() -> None:
    graph: dict[str, set[str]] = {part: set() for part in PARTS}
    for path in _python_files(PACKAGE):
        if _part(path) in graph:
            graph[_part(path)] |= _parts_imported(path) - {"_C", _part(path)}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, naming the circle


@pytest.mark.parametrize("name", ["errors.py", "config.py"])
def test_bottom_imports_nothing_of_onp(name: str) -> None:
    path = PACKAGE / name
    assert not path.exists() or _parts_imported(path) == set()


def test_reference_imports_torch_alone() -> None:
    path = PACKAGE / "ops" / "reference.py"
    packages = {module.split(".")[0] for module, _ in _imports(_parse(path))}
    assert packages - set(sys.stdlib_module_names) <= {"torch"}
    assert _parts_imported(path) == set()


def test_only_ops_touches_the_native_module() -> None:
    outside = [
        str(path.relative_to(ROOT))
        for path in _python_files(PACKAGE)
        if _part(path) != "ops" and "_C" in _parts_imported(path)
    ]
    assert outside == []


@pytest.mark.parametrize("path", _python_files(PACKAGE), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_package_imports(path: Path) -> None:
    tree = _parse(path)
    everywhere = {module.split(".")[0] for module, _ in _imports(tree)}
    assert not everywhere & {"tests", "bench"}, "the package knows neither its tests nor benches"
    statements = ast.Module(
        [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)], []
    )
    at_import = {module.split(".")[0] for module, _ in _imports(statements)}
    assert not at_import & {"torchvision", "timm"}, "import it where it is used"


def test_torch_load_is_always_weights_only() -> None:
    bare = []
    for path in _python_files(ROOT / "python", ROOT / "tests", ROOT / "bench"):
        for node in ast.walk(_parse(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                options = {word.arg: ast.unparse(word.value) for word in node.keywords}
                if options.get("weights_only") != "True":
                    bare.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert bare == []


# ---- native code


def _native_files(*folders: str) -> list[Path]:
    return sorted(
        path for f in folders for path in (ROOT / "csrc" / f).rglob("*") if path.is_file()
    )


def test_core_knows_neither_torch_nor_python() -> None:
    foreign = re.compile(r'#\s*include\s*[<"](torch/|ATen/|c10/|caffe2/|pybind11/|Python\.h)')
    files = _native_files("core", "cuda")
    assert files
    assert [str(p.relative_to(ROOT)) for p in files if foreign.search(p.read_text())] == []


def test_one_owner_of_the_mask_layout() -> None:
    word_and_bit = re.compile(r">>\s*6\b|&\s*63\b")
    files = [*_native_files("core", "cuda", "bindings"), *_python_files(PACKAGE)]
    users = {path.name for path in files if word_and_bit.search(path.read_text())}
    assert users <= {"views.h", "masks.py"}


def test_every_operator_has_twin_test_and_bench() -> None:
    stems = [module.name for module in pkgutil.iter_modules(onp.ops.__path__)]
    for stem in stems:
        importlib.import_module(f"onp.ops.{stem}")
    names: list[str] = torch._C._dispatch_get_all_op_names()
    operators = {name.removeprefix("onp::").split(".")[0] for name in names if "onp::" in name}
    twins = [n.name for n in _parse(PACKAGE / "ops/reference.py").body if hasattr(n, "name")]
    for operator in operators:
        assert any(_belongs(operator, twin) for twin in twins), f"{operator} has no naive twin"
        stem = max((s for s in stems if _belongs(operator, s)), key=len, default=operator)
        for needed in (f"tests/ops/test_{stem}.py", f"bench/bench_{stem}.py"):
            assert (ROOT / needed).is_file(), f"{operator} needs {needed}"


def _belongs(operator: str, name: str) -> bool:
    """``name`` is the operator's own, or that of the operator whose gradient it computes."""
    return operator == name or operator.startswith(f"{name}_")


def test_the_reward_never_sees_a_trigger() -> None:
    """Nothing that a repair runs, however far its imports reach, can read a trigger file."""
    reached, ahead = set[Path](), {PACKAGE / "sanitize.py"}
    while ahead:
        path = ahead.pop()
        reached.add(path)
        for module, name in _imports(_parse(path)):
            module = _absolute(path, module)
            for whole in (module, f"{module}.{name}"):
                file = ROOT / "python" / Path(*whole.split("."))
                ahead |= {
                    found
                    for found in (file.with_suffix(".py"), file / "__init__.py")
                    if found.exists() and found != PACKAGE / "__init__.py"
                } - reached
    assert {_part(path) for path in reached} >= {"agent", "evidence", "probes", "suspect", "ops"}
    assert PACKAGE / "suspect" / "lowering" / "norms.py" in reached
    assert not {_part(path) for path in reached} & {"triggers", "demo", "cli"}
