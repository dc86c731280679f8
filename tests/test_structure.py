"""The house's order: which file may import which, and where; read from the sources themselves."""

import ast
import graphlib
import importlib
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import interviewmate_mlx
from interviewmate_mlx.cli.main import COMMANDS, main
from interviewmate_mlx.config import load_run, shipped, shipped_runs

PACKAGE = "interviewmate_mlx"
FOLDER = Path(interviewmate_mlx.__file__).parent
CHECKOUT = FOLDER.parent

# From the bottom up. A file imports from floors below its own, and from its own folder.
FLOORS = [
    {"errors", "elf"},
    {"files"},
    {"config", "backend"},
    {"hosts"},
    {"formats"},
    {"model"},
    {"data"},
    {"adapter"},
    {"hub"},
    {"base"},
    {"training"},
    {"coach"},
    {"evaluation"},
    {"serve"},
    {"results"},
    {"cli"},
    {"__main__"},
]
MAX_FILES = 15  # of a folder, without `__init__.py`; `cli` has one a command
# What tells one machine from another.
MACHINE = {
    "mx": {
        "cpu",
        "cuda",
        "default_device",
        "device_info",
        "gpu",
        "is_available",
        "metal",
        "set_default_device",
        "set_wired_limit",
    },
    "os": {"sysconf", "uname"},
    "sys": {"platform"},
}


def modules() -> dict[str, str]:
    """Source by dotted name, without the package's own: `data.records`, `data`."""
    sources = {}
    for path in FOLDER.rglob("*.py"):
        parts = path.relative_to(FOLDER).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        sources[name] = path.read_text(encoding="utf-8")
    del sources[""]  # the package itself: its version, and names that are loaded when used
    return sources


MODULES = modules()


def package_imports(source: str) -> Iterator[str]:
    """Dotted names of this package's modules that a source imports, wherever it does."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in found:
            head, _, rest = name.partition(".")
            if head == PACKAGE:
                parts = rest.split(".")
                # `from data.records import Record` names a class: its module is what counts.
                while parts and ".".join(parts) not in MODULES:
                    parts.pop()
                if parts:
                    yield ".".join(parts)


def top_level_imports(source: str) -> Iterator[str]:
    """Dotted names of all that a source imports when it is loaded."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def floor(module: str) -> int:
    top = module.split(".")[0]
    return next(number for number, tops in enumerate(FLOORS) if top in tops)


def upward_imports(module: str, source: str) -> list[str]:
    """Imports that go up, or across a floor to another topic."""

    def may(imported: str) -> bool:
        same_folder = imported.split(".")[0] == module.split(".")[0]
        return floor(imported) < floor(module) or same_folder

    return [name for name in package_imports(source) if not may(name)]


def machine_questions(source: str) -> list[str]:
    """Where a source asks what machine it runs on."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr in MACHINE.get(node.value.id, ()):
                found.append(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name == "platform"]
        elif isinstance(node, ast.ImportFrom):
            known = MACHINE.get({"mlx.core": "mx"}.get(node.module or "", node.module or ""), set())
            found += [alias.name for alias in node.names if alias.name in known]
            found += ["platform"] if node.module == "platform" else []
    return found


def test_every_module_has_its_floor():
    tops = {name.split(".")[0] for name in MODULES}
    assert tops == set().union(*FLOORS)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_module_imports_only_from_below(module):
    assert upward_imports(module, MODULES[module]) == []


@pytest.mark.parametrize(
    ("module", "source", "upward"),
    [
        ("data.records", "from interviewmate_mlx.config import shipped", []),
        ("data.records", "from interviewmate_mlx.data.prompts import encode", []),
        ("data.records", "from interviewmate_mlx.hub.pull import pull", ["hub.pull"]),
        ("data.records", "import interviewmate_mlx.cli", ["cli"]),
        ("data.records", "def f():\n    from interviewmate_mlx import cli", ["cli"]),
        ("config", "from interviewmate_mlx import backend", ["backend"]),
        ("config", "from interviewmate_mlx import __version__", []),
        ("errors", "from interviewmate_mlx.files import atomic_file", ["files"]),
        ("adapter.card", "from interviewmate_mlx.hub.names import is_hub_id", ["hub.names"]),
        ("base.base", "from interviewmate_mlx.hub.names import is_hub_id", []),
    ],
)
def test_upward_import_is_found(module, source, upward):
    assert upward_imports(module, source) == upward


def test_no_modules_import_each_other():
    graph = {name: set(package_imports(source)) - {name} for name, source in MODULES.items()}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert set(order) == set(MODULES)
    assert order.index("errors") < order.index("cli")


@pytest.mark.parametrize("folder", sorted({path.parent for path in FOLDER.rglob("*.py")}))
def test_folder_is_small_enough_to_be_one_topic(folder):
    files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert folder.name == "cli" or len(files) <= MAX_FILES


def test_every_command_is_listed_with_its_own_first_line():
    names = {path.stem for path in (FOLDER / "cli").glob("*.py")}
    helpers = {"__init__", "main", "options", "signals", "typed"}
    assert set(COMMANDS) == names - helpers
    context = click.Context(main)
    for name, summary in COMMANDS.items():
        command = main.get_command(context, name)
        assert command.name == name
        assert command.help.splitlines()[0] == summary


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"backend"}))
def test_module_does_not_ask_what_machine_it_runs_on(module):
    assert machine_questions(MODULES[module]) == []


@pytest.mark.parametrize(
    "source",
    [
        "import platform",
        "from platform import machine",
        "import sys\nif sys.platform == 'darwin': pass",
        "from sys import platform",
        "mx.metal.is_available()",
        "mx.default_device()",
        "from mlx.core import default_device",
    ],
)
def test_question_about_the_machine_is_found(source):
    assert machine_questions(source)
    assert {"sys.platform", "mx.metal", "mx.default_device"} <= set(
        machine_questions(MODULES["backend"])
    )


def backend_comes_first(source: str) -> bool:
    """Whether the first import of a source is the backend."""
    body = [node for node in ast.parse(source).body if not isinstance(node, ast.Expr)]
    first = body[0] if body else None
    return isinstance(first, ast.ImportFrom) and (first.module, first.names[0].name) == (
        PACKAGE,
        "backend",
    )


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"backend"}))
def test_backend_is_loaded_before_mlx(module):
    """By the folder of each file that imports it, or by the file."""
    if any(name.split(".")[0] in ("mlx", "mlx_lm") for name in top_level_imports(MODULES[module])):
        folder = MODULES.get(module.rpartition(".")[0], "")
        assert backend_comes_first(MODULES[module]) or backend_comes_first(folder)


def test_model_file_travels_alone():
    source = MODULES["model.falcon"]
    assert list(package_imports(source)) == []
    # mlx-lm runs it outside sys.modules, where dataclasses cannot look up text annotations.
    assert "from __future__" not in source


def test_names_at_the_root_are_those_of_their_files():
    for name, home in interviewmate_mlx._HOME.items():
        module = importlib.import_module(f"{PACKAGE}.{home}")
        assert getattr(interviewmate_mlx, name) is getattr(module, name)
        assert name in dir(interviewmate_mlx)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = interviewmate_mlx.nonsense


@pytest.mark.usefixtures("with_torch")
@pytest.mark.parametrize("statement", ["import interviewmate_mlx", "import interviewmate_mlx.cli"])
def test_importing_the_package_prints_nothing_and_loads_no_mlx(statement):
    script = f"""
        import sys
        {statement}
        heavy = {{"mlx", "mlx_lm", "numpy", "transformers", "huggingface_hub", "torch", "rich"}}
        sys.exit(", ".join(sorted(heavy & set(sys.modules))) or 0)
        """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_file_that_a_wheel_ships_is_found_in_the_checkout():
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included
    for source, target in included.items():
        files = [path for path in (CHECKOUT / source).rglob("*") if path.is_file()]
        assert files, f"{source} ships nothing"
        for file in files:
            name = Path(target).relative_to(PACKAGE) / file.relative_to(CHECKOUT / source)
            assert shipped(name.as_posix()) == file


def test_every_shipped_run_is_named_and_loads():
    assert sorted(shipped("configs").iterdir()) == sorted(shipped_runs().values())
    names = [load_run(name).name for name in shipped_runs()]
    assert names == ["run_A", "run_B", "run_C", "mini", "alpaca", "dpo"]
