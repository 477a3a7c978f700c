"""The rules of docs/style.md that a machine can check.

Each rule is a function over a source tree that lists what breaks it. Each is tried twice: on this
repository, and on a small tree that breaks it, so that no rule passes for want of looking.
"""

from __future__ import annotations

import ast
import fnmatch
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each may import those before it, never one after it.
PACKAGES = ("plugins", "model", "runtime", "export")

TORCH_FREE = (
    "*/__init__.py",
    "plugins/custom_op.py",
    "plugins/kernel_spec.py",
    "plugins/launcher.py",
    "plugins/registry.py",
    "plugins/hosted_plugin.py",
    "plugins/tensorrt_plugin.py",
    "plugins/aot_plugin.py",
    "plugins/aot_registry.py",
    "plugins/tensorrt_aot.py",
    "plugins/*/aot.py",
    "plugins/*/launches.py",
    "plugins/*/variants.py",
    "model/config.py",
    "model/contract.py",
    "model/generations/*.py",
    "model/hub.py",
    "model/released.py",
    "runtime/*.py",
)
TORCH_ALLOWED = ("runtime/backends/torch_backend.py",)
# Packages that import torch, or that stand for it.
TORCH = ("torch", "torchvision", "transformers", "safetensors.torch", "accelerate")

# Where a heavy package may be imported; `*` crosses folders.
DOORS: dict[str, tuple[str, ...]] = {
    "tensorrt": ("runtime/tensorrt_module.py",),
    "tensorrt_rtx": ("runtime/tensorrt_module.py",),
    "onnxscript": ("export/*",),
    "onnx_ir": (
        "plugins/onnx_function.py",
        "plugins/*/function.py",
        "export/*",
        "runtime/comparison/repro/cut.py",
    ),
    "triton": ("plugins/*/kernel.py", "plugins/*/aot_kernel.py", "export/kernel_compiler.py"),
    "huggingface_hub": ("model/hub.py",),
    "httpx2": ("model/hub.py",),
    "transformers": ("model/transformers_reference.py",),
}
# The files that import a module whose name is not written at the import.
DYNAMIC_IMPORTS = (
    "plugins/custom_op.py",
    "runtime/tensorrt_module.py",
    "runtime/backends/__init__.py",
    "runtime/audit.py",
    "runtime/comparison/published.py",
    "runtime/gpu_checks/decode_timing.py",
    "runtime/gpu_checks/kernel_reference.py",
    "export/dogetrt.py",
    "export/kernel_compiler.py",
)

# Import names of the distributions that pyproject.toml names.
IMPORT_NAMES: dict[str, tuple[str, ...]] = {
    "cuda-python": ("cuda",),
    "doge-tensorrt": (),
    "httpx2": ("httpx2",),
    "huggingface_hub": ("huggingface_hub",),
    "hypothesis": ("hypothesis",),
    "jinja2": ("jinja2",),
    "ml_dtypes": ("ml_dtypes",),
    "mypy": ("mypy", "mypyc"),
    "numpy": ("numpy",),
    "nvidia-cuda-nvrtc": ("nvidia",),
    "onnx": ("onnx",),
    "onnx-ir": ("onnx_ir",),
    "onnxruntime": ("onnxruntime",),
    "onnxruntime-gpu": ("onnxruntime",),
    "onnxscript": ("onnxscript",),
    "polygraphy": ("polygraphy",),
    "pytest": ("pytest",),
    "pytest-xdist": ("xdist",),
    "rich": ("rich",),
    "ruff": ("ruff",),
    "safetensors": ("safetensors",),
    "setuptools": ("setuptools", "pkg_resources"),
    "tensorrt": ("tensorrt", "tensorrt_libs", "tensorrt_bindings"),
    "tensorrt-rtx-cu13": ("tensorrt_rtx", "tensorrt_rtx_libs", "tensorrt_rtx_bindings"),
    "tokenizers": ("tokenizers",),
    "torch": ("torch",),
    "transformers": ("transformers",),
    "triton": ("triton",),
    "ziglang": ("ziglang",),
}

# Put together from pieces, so that this file does not break its own rule.
_FOLDERS = "|".join(("ro" + "ot", "t" + "mp", "wo" + "rk"))
_HOMES = "|".join(("ho" + "me", "Us" + "ers"))
MACHINE_PATH = re.compile(rf"(?<![\w.~/}}-])/(?:(?:{_FOLDERS})(?![\w-])|(?:{_HOMES})/\w+)")
_NOT_KEPT = (".git", ".venv", "build", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info")


@dataclass(frozen=True)
class Import:
    """One imported module: its full name, where it is imported, and when."""

    name: str
    line: int
    typing_only: bool  # under `if TYPE_CHECKING:`, never executed
    literal: bool = True  # False for importlib.import_module(<not a literal>)


def matches(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def source_files(root: Path) -> list[str]:
    """The Python files of the four packages, relative to `root`."""
    found = (path for package in PACKAGES for path in (root / package).rglob("*.py"))
    return sorted(path.relative_to(root).as_posix() for path in found)


def test_files(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in (root / "tests").rglob("*.py"))


test_files.__test__ = False  # type: ignore[attr-defined]


@cache
def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def imports(root: Path, path: str) -> list[Import]:
    """Every absolute import of a file, wherever it stands: at the top, in a function, by name."""
    found: list[Import] = []

    def visit(node: ast.AST, typing_only: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for statement in node.body:
                visit(statement, True)
            for statement in node.orelse:
                visit(statement, typing_only)
            return
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, typing_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.append(Import(node.module, node.lineno, typing_only))
            found.extend(
                Import(f"{node.module}.{alias.name}", node.lineno, typing_only)
                for alias in node.names
            )
        elif isinstance(node, ast.Call):
            function = ast.unparse(node.func).rpartition(".")[2]
            if function in {"import_module", "__import__"} and node.args:
                argument = node.args[0]
                literal = isinstance(argument, ast.Constant) and isinstance(argument.value, str)
                name = str(argument.value) if isinstance(argument, ast.Constant) else ""
                found.append(Import(name, node.lineno, typing_only, literal))
        for child in ast.iter_child_nodes(node):
            visit(child, typing_only)

    visit(_parsed(root / path), False)
    return found


def own_files(root: Path, name: str) -> list[str]:
    """The files of ours that importing module `name` executes: the packages above it, and it."""
    parts = name.split(".")
    if parts[0] not in (*PACKAGES, "tests"):
        return []
    files = [f"{'/'.join(parts[:depth])}/__init__.py" for depth in range(1, len(parts) + 1)]
    files.append(f"{'/'.join(parts)}.py")
    return [file for file in files if (root / file).is_file()]


def imports_package(imported: Import, package: str) -> bool:
    return imported.name == package or imported.name.startswith(f"{package}.")


# --- the rules: each yields one line for each thing that breaks it ---


def wrong_way_imports(root: Path) -> Iterator[str]:
    """plugins → model → runtime → export; tests are imported by tests alone."""
    for path in source_files(root):
        allowed = PACKAGES[: PACKAGES.index(path.split("/")[0]) + 1]
        for imported in imports(root, path):
            package = imported.name.split(".")[0]
            if package in (*PACKAGES, "tests") and package not in allowed:
                yield f"{path}:{imported.line} imports {imported.name}"


def torch_imports(root: Path) -> Iterator[str]:
    """What must run without PyTorch neither imports it nor a file of ours that does."""
    for start in source_files(root):
        if not matches(start, TORCH_FREE) or matches(start, TORCH_ALLOWED):
            continue
        chains: dict[str, tuple[str, ...]] = {start: (start,)}
        queue = [start]
        while queue:
            path = queue.pop()
            for imported in imports(root, path):
                if imported.typing_only:
                    continue
                if any(imports_package(imported, package) for package in TORCH):
                    yield f"{' -> '.join(chains[path])} imports {imported.name}"
                for file in own_files(root, imported.name):
                    if file not in chains:
                        chains[file] = (*chains[path], file)
                        queue.append(file)


def imports_beside_the_door(root: Path) -> Iterator[str]:
    """Heavy packages are imported in the places named for them."""
    for path in source_files(root):
        for imported in imports(root, path):
            for package, doors in DOORS.items():
                if imports_package(imported, package) and not matches(path, doors):
                    yield f"{path}:{imported.line} imports {imported.name}"


def unlisted_dynamic_imports(root: Path) -> Iterator[str]:
    """A module name that is computed hides from every other rule, so the places are few."""
    for path in source_files(root):
        for imported in imports(root, path):
            if not imported.literal and path not in DYNAMIC_IMPORTS:
                yield f"{path}:{imported.line} imports a computed name"


def hiding_names(root: Path) -> Iterator[str]:
    """A file directly inside a package hides a top-level module when a script beside it runs."""
    taken: set[str] = {*sys.stdlib_module_names, *PACKAGES, "tests"}
    for names in IMPORT_NAMES.values():
        taken |= set(names)
    for package in PACKAGES:
        for path in sorted((root / package).glob("*")):
            is_module = path.suffix == ".py" or (path.is_dir() and any(path.glob("*.py")))
            if is_module and path.stem in taken:
                yield f"{package}/{path.name}"


def imported_scripts(root: Path) -> Iterator[str]:
    """A script is run; only its tests import it."""
    scripts = {path for path in source_files(root) if _is_script(_parsed(root / path))}
    for path in source_files(root):
        for imported in imports(root, path):
            for file in own_files(root, imported.name):
                if file in scripts and file != path:
                    yield f"{path}:{imported.line} imports the script {file}"


def _is_script(tree: ast.Module) -> bool:
    return any(
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Compare)
        and {"__name__", "'__main__'"}
        == {ast.unparse(side) for side in (node.test.left, *node.test.comparators)}
        for node in tree.body
    )


def helper_drawers(root: Path) -> Iterator[str]:
    """No file is named after nothing."""
    for path in (*source_files(root), *test_files(root)):
        if Path(path).stem in {"utils", "util", "helpers", "helper", "misc", "common"}:
            yield path


def relative_imports(root: Path) -> Iterator[str]:
    for path in (*source_files(root), *test_files(root)):
        for node in ast.walk(_parsed(root / path)):
            if isinstance(node, ast.ImportFrom) and node.level:
                yield f"{path}:{node.lineno}"


def machine_paths(root: Path) -> Iterator[str]:
    """No text file holds a path that exists on one machine only."""
    for path in kept_files(root):
        try:
            lines = (root / path).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(lines, start=1):
            if found := MACHINE_PATH.search(line):
                yield f"{path}:{number}: {found[0]}"


def kept_files(root: Path) -> list[str]:
    """The files that git keeps or would keep; every file where there is no git checkout."""
    if (root / ".git").exists():
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=root,
            check=True,
            capture_output=True,
            text=True,
        )
        names = [name for name in listed.stdout.split("\0") if name]
        return sorted(name for name in names if (root / name).is_file())
    files = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    return sorted(
        file.as_posix()
        for file in files
        if not any(matches(part, _NOT_KEPT) for part in file.parts)
    )


# --- the rules on this repository, and on trees that break them ---

Rule = Callable[[Path], Iterator[str]]
RULES: tuple[Rule, ...] = (
    wrong_way_imports,
    torch_imports,
    imports_beside_the_door,
    unlisted_dynamic_imports,
    hiding_names,
    imported_scripts,
    helper_drawers,
    relative_imports,
    machine_paths,
)

_SCRIPT = "import sys\n\n\ndef main():\n    return 0\n\n\nif __name__ == '__main__':\n    main()\n"
VIOLATIONS: tuple[tuple[Rule, dict[str, str]], ...] = (
    (wrong_way_imports, {"plugins/op.py": "from model.config import DogeConfig\n"}),
    (wrong_way_imports, {"model/doge.py": "import runtime.session\n"}),
    (wrong_way_imports, {"runtime/session.py": "def f():\n    from export.graph import g\n"}),
    (wrong_way_imports, {"runtime/session.py": "import tests.tiny_doge\n"}),
    (
        wrong_way_imports,
        {"runtime/a.py": "import importlib\nimportlib.import_module('export.graph')\n"},
    ),
    (
        wrong_way_imports,
        {"model/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import runtime\n"},
    ),
    (torch_imports, {"model/__init__.py": "import torch\n"}),
    (torch_imports, {"plugins/registry.py": "def f():\n    import torch.nn as nn\n"}),
    (torch_imports, {"runtime/bundle.py": "from safetensors.torch import load_file\n"}),
    (torch_imports, {"runtime/a.py": "try:\n    import transformers\nexcept ImportError: ...\n"}),
    (
        torch_imports,
        {
            "runtime/bundle.py": "from model.checkpoint import load\n",
            "model/checkpoint.py": "from model import tensors\n",
            "model/tensors.py": "from torch import Tensor\n",
        },
    ),
    (
        torch_imports,
        {
            "model/config.py": "import plugins.op.definition\n",
            "plugins/op/__init__.py": "import torch\n",
            "plugins/op/definition.py": "",
        },
    ),
    (imports_beside_the_door, {"export/engine.py": "import tensorrt as trt\n"}),
    (imports_beside_the_door, {"runtime/backends/a.py": "from tensorrt_rtx import Builder\n"}),
    (imports_beside_the_door, {"plugins/op/function.py": "import onnxscript\n"}),
    (imports_beside_the_door, {"model/doge.py": "from onnx_ir import tape\n"}),
    (imports_beside_the_door, {"plugins/op/plugin.py": "def f():\n    import triton\n"}),
    (imports_beside_the_door, {"export/a.py": "def f():\n    from huggingface_hub import HfApi\n"}),
    (imports_beside_the_door, {"model/doge.py": "from transformers import DogeConfig\n"}),
    (
        imports_beside_the_door,
        {"export/a.py": "from importlib import import_module\nimport_module('tensorrt')\n"},
    ),
    (unlisted_dynamic_imports, {"model/a.py": "import importlib\nimportlib.import_module(name)\n"}),
    (unlisted_dynamic_imports, {"runtime/a.py": "__import__('tor' + 'ch')\n"}),
    (hiding_names, {"export/onnx.py": ""}),
    (hiding_names, {"export/profile.py": ""}),
    (hiding_names, {"runtime/model.py": ""}),
    (hiding_names, {"runtime/tokenizers/__init__.py": ""}),
    (imported_scripts, {"runtime/run.py": _SCRIPT, "export/a.py": "from runtime.run import main"}),
    (imported_scripts, {"model/run.py": _SCRIPT, "model/a.py": "def f():\n    import model.run"}),
    (helper_drawers, {"export/lowerings/utils.py": ""}),
    (helper_drawers, {"tests/helpers.py": ""}),
    (relative_imports, {"model/a.py": "from . import config\n"}),
    (relative_imports, {"tests/model/test_a.py": "from ..tiny_doge import write_checkpoint\n"}),
    (machine_paths, {"README.md": "see " + "/wo" + "rk/main for more\n"}),
    (machine_paths, {"runtime/a.py": 'CACHE = "' + "/ro" + 'ot/.cache"\n'}),
    (machine_paths, {"docs/a.md": "run `ls " + "/ho" + "me/somebody/x`\n"}),
    (machine_paths, {".ci/run": "OUT=" + "/t" + "mp/x\n"}),
)
ALLOWED: tuple[tuple[Rule, dict[str, str]], ...] = (
    (wrong_way_imports, {"export/a.py": "import plugins, model, runtime.session\n"}),
    (torch_imports, {"runtime/backends/torch_backend.py": "import torch\n"}),
    (torch_imports, {"model/doge.py": "import torch\n", "runtime/a.py": "import numpy\n"}),
    (
        torch_imports,
        {"model/config.py": "import typing\nif typing.TYPE_CHECKING:\n    import torch\n"},
    ),
    (imports_beside_the_door, {"runtime/tensorrt_module.py": "import tensorrt_rtx, tensorrt\n"}),
    (imports_beside_the_door, {"runtime/a.py": "from runtime.tensorrt_module import load\n"}),
    (unlisted_dynamic_imports, {"runtime/backends/__init__.py": "import_module(name)\n"}),
    (hiding_names, {"export/lowerings/profile.py": "", "export/profiles.py": ""}),
    (imported_scripts, {"runtime/run.py": _SCRIPT, "tests/test_run.py": "import runtime.run\n"}),
    (machine_paths, {"README.md": "docs/work/plan.md, https://example.org/work/a, and /workers\n"}),
)


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_repository_keeps_the_rule(rule: Rule) -> None:
    assert list(rule(ROOT)) == []


@pytest.mark.parametrize(
    ("rule", "files"), VIOLATIONS, ids=[f"{r.__name__}-{next(iter(f))}" for r, f in VIOLATIONS]
)
def test_rule_finds_a_planted_violation(tmp_path: Path, rule: Rule, files: dict[str, str]) -> None:
    assert list(rule(write_tree(tmp_path, files)))


@pytest.mark.parametrize(
    ("rule", "files"), ALLOWED, ids=[f"{r.__name__}-{next(iter(f))}" for r, f in ALLOWED]
)
def test_rule_lets_pass_what_is_allowed(tmp_path: Path, rule: Rule, files: dict[str, str]) -> None:
    assert list(rule(write_tree(tmp_path, files))) == []


def test_every_rule_has_a_planted_violation() -> None:
    assert {rule for rule, _ in VIOLATIONS} == set(RULES)


def test_rules_look_at_the_whole_repository() -> None:
    files = source_files(ROOT)
    assert {path.split("/")[0] for path in files} == set(PACKAGES)
    assert any(matches(path, TORCH_FREE) for path in files)
    assert {"pyproject.toml", "tests/test_architecture.py"} <= set(kept_files(ROOT))
    assert all((ROOT / path).is_file() for path in (*DYNAMIC_IMPORTS, *TORCH_ALLOWED))


def test_every_dependency_has_an_import_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    requirements = [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *(r for extra in project["project"]["optional-dependencies"].values() for r in extra),
    ]
    names = {re.split(r"[\[<>=!~; ]", requirement)[0] for requirement in requirements}
    assert names <= set(IMPORT_NAMES)


def test_packages_of_pyproject_are_those_of_the_rules() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    include = project["tool"]["setuptools"]["packages"]["find"]["include"]
    found = {name.split(".")[0] for name in include}
    assert found == set(PACKAGES) == set(project["tool"]["mypy"]["packages"])


def test_torch_free_modules_import_where_torch_cannot_be_imported() -> None:
    modules = [
        path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for path in source_files(ROOT)
        if matches(path, TORCH_FREE) and not matches(path, TORCH_ALLOWED)
    ]
    program = "\n".join(
        [
            "import importlib, sys",
            f"sys.modules.update(dict.fromkeys({[t for t in TORCH if '.' not in t]}))",
            f"for name in {modules}:",
            "    importlib.import_module(name)",
        ]
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
