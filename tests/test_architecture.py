"""The arrows between the rooms, drawn from what their modules import."""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from clip_adapter.adapters.registry import METHODS

ROOT = Path(__file__).parents[1]
HALL = "clip_adapter"
ROOMS = ("adapters", "cache", "clip_adapter", "extract", "pipelines")
PACKAGE = "clip_adapter"
ALLOWED = {
    HALL: {HALL},
    "adapters": {HALL, "adapters"},
    "cache": {HALL, "cache"},
    "extract": {HALL, "cache", "extract"},
    "pipelines": set(ROOMS),
}
FOREIGN = {  # room → packages that it never imports, not even within a function
    "extract": {"jax", "jaxlib", "flax", "optax"},
    "cache": {"torch", "torchvision", "open_clip", "jax", "jaxlib", "flax", "optax"},
    "adapters": {"torch", "torchvision", "open_clip", "h5py"},
}
ARRAY_LIBRARIES = {"numpy", "jax", "jaxlib", "flax", "optax", "scipy", "torch", "jaxtyping", "h5py"}
PATHS = {
    f"{PACKAGE}."
    + ".".join(path.relative_to(ROOT).with_suffix("").parts).removeprefix(f"{HALL}."): path
    for room in ROOMS
    for path in sorted((ROOT / room).rglob("*.py"))
}
MODULES = {name.removesuffix(".__init__"): path for name, path in PATHS.items()}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def room(module: str) -> str:
    """The hall's modules lie in no folder of their own."""
    name = f"{module}.".split(".")[1]
    return name if name in ROOMS else HALL


def for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def statements(nodes: list[ast.stmt], *, at_import: bool) -> Iterator[ast.stmt]:
    """All statements that run, or those that run when the module is imported."""
    for node in nodes:
        yield node
        if for_types_only(node):
            yield from statements(node.orelse, at_import=at_import)  # type: ignore[attr-defined]
        elif not (at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.stmt):
                    yield from statements([child], at_import=at_import)
                elif isinstance(child, ast.ExceptHandler | ast.match_case):
                    yield from statements(child.body, at_import=at_import)


def imports(module: str, *, at_import: bool = False) -> set[str]:
    """Names of modules; of `from package import name` the module `package.name` where it is one."""
    found: set[str] = set()
    for node in statements(tree(module).body, at_import=at_import):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else str(node.module))
    return found


def packages(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def test_the_graph_is_drawn():
    """Otherwise the tests below would show nothing."""
    assert len(MODULES) > 80
    assert f"{PACKAGE}.files" in imports(f"{PACKAGE}.pipelines.fitting.run_folder")
    assert f"{PACKAGE}.pipelines.fitting.run" in imports(f"{PACKAGE}.pipelines.commands.fit")
    assert f"{PACKAGE}.pipelines.fitting.run" not in imports(
        f"{PACKAGE}.pipelines.commands.fit", at_import=True
    )
    assert "torch" in packages(imports(f"{PACKAGE}.extract.encoding.device"))


@pytest.mark.parametrize("module", MODULES)
def test_arrows_run_one_way(module: str):
    ours = {name for name in imports(module) if name.startswith(f"{PACKAGE}.")}
    assert {room(name) for name in ours} <= ALLOWED[room(module)]
    assert not packages(imports(module)) & FOREIGN.get(room(module), set())


FIT = [
    name
    for name in MODULES
    if name.startswith(f"{PACKAGE}.pipelines.commands.fit") and not name.endswith("fitted_head")
]


def reached(start: str, *, at_import: bool) -> set[str]:
    """Modules of ours and packages of others that importing, or running, one brings in."""
    waiting, seen = [start], set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in MODULES:
            waiting += imports(name, at_import=at_import)
            waiting += [p for p in parents(name) if p in MODULES]
    return seen


def parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(2, len(parts))]


@pytest.mark.parametrize("module", FIT)
def test_fit_reaches_no_torch(module: str):
    assert "torch" not in packages(reached(module, at_import=False))


@pytest.mark.parametrize("module", [name for name in MODULES if ".reporting" in name])
def test_a_report_waits_for_no_compiler(module: str):
    """A table of finished runs is there at once."""
    assert not packages(reached(module, at_import=True)) & {"jax", "flax", "optax", "torch"}


def test_records_and_the_registry_load_no_array_library():
    """The command line reads them for --help."""
    for module in (f"{PACKAGE}.adapters.registry", f"{PACKAGE}.pipelines.fitting.options"):
        reach = reached(module, at_import=True)
        assert not packages(reach) & ARRAY_LIBRARIES
    records = {name for name in reached(f"{PACKAGE}.adapters.registry", at_import=True)}
    assert len(records & MODULES.keys()) >= len(METHODS)


def test_no_import_goes_in_a_circle():
    graph = {
        name: {n for n in imports(name, at_import=True) if n in MODULES and n != name}
        for name in MODULES
    }
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " → ".join((*above[above.index(name) :], name))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("module", MODULES)
def test_the_name_is_no_module_of_the_standard_library(module: str):
    assert module.rpartition(".")[2] not in sys.stdlib_module_names


# Where a method's name may stand: what `fit` runs if nothing else is asked for, and the estimator
# that is one of them.
NAMED = {
    f"{PACKAGE}.pipelines.fitting.config": {"clip-adapter", "zero-shot", "linear-probe"},
    f"{PACKAGE}.pipelines.saved.sklearn": {"clip-adapter"},
    f"{PACKAGE}.extract.datasets.registry": {"coop"},  # whose folder layout it is, too
}
# The project itself, its distribution and the format of its adapters are called so too.
NOT_A_METHOD = {"clip-adapter"}
PROJECT_NAME_IN = {
    *(
        f"{PACKAGE}.pipelines.{name}"
        for name in ("console.entry", "console.parser", "saved.adapter_file")
    ),
    *(
        f"{PACKAGE}.pipelines.{name}"
        for name in ("console.jax_setup", "fitting.plan", "fitting.provenance")
    ),
}


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) != "adapters"])
def test_nothing_outside_adapters_names_a_method(module: str):
    """Neither by a word nor by an import: a record is had from the registry."""
    of_methods = f"{PACKAGE}.adapters.methods."
    assert not {name for name in imports(module) if name.startswith(of_methods)}
    allowed = NAMED.get(module, set())
    if module in PROJECT_NAME_IN or room(module) in (HALL, "cache", "extract"):
        allowed = allowed | NOT_A_METHOD
    literals = {
        node.value
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert literals & METHODS.keys() <= allowed


def private_names(module: str) -> Iterator[str]:
    """Functions, classes, constants and attributes whose names begin with one underscore."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


OF_THE_ENGINE = {
    name
    for module in MODULES
    if room(module) == "adapters"
    for name in private_names(module)
    if name.startswith("_") and not name.startswith("__") and name != "_"
}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_tests_know_the_engine_as_its_callers_do(path: Path):
    """No private name of adapters/, and no text of a compiled program."""
    assert len(OF_THE_ENGINE) > 50
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            assert own or node.attr not in {*OF_THE_ENGINE, "as_text"}
        elif isinstance(node, ast.ImportFrom):
            assert not OF_THE_ENGINE & {name.name for name in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("setattr"):
            replaced = {word.value for word in node.args if isinstance(word, ast.Constant)}
            assert not OF_THE_ENGINE & replaced
