"""The tree keeps its shape: tests are found by their module's path, and nothing grows out of hand.

``orchestrator/core/machine.py`` is tested in ``tests/unit/core/test_machine.py`` (or in several files that begin with
``test_machine_``), ``agents/link/client.py`` in ``tests/unit/agents/link/test_client.py``.
"""

import ast
import statistics
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UNIT = ROOT / "tests" / "unit"
FOLDERS = ("orchestrator", "agents", "kernels")
MODULES = [
    path.relative_to(ROOT)
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.name != "__init__.py"
]

BY_EACH_ARCHITECTURE = "models/test_models.py holds each table against what transformers saves"
BY_REAL_WRITES = "nixl/test_endpoint.py drives it by real NIXL writes"
BY_BOTH_SHAPES = "adapter/test_common.py runs both shapes of vLLM's interface through it"

TESTED_ELSEWHERE = {
    "agents/trainer/errors.py": "texts of errors, asserted where they are raised",
    "agents/trainer/models/dense.py": BY_EACH_ARCHITECTURE,
    "agents/trainer/models/mla.py": BY_EACH_ARCHITECTURE,
    "agents/trainer/models/moe.py": BY_EACH_ARCHITECTURE,
    "agents/transport/nixl/edge.py": BY_REAL_WRITES,
    "agents/transport/nixl/errors.py": "texts of errors, asserted where they are raised",
    "agents/transport/nixl/open.py": BY_REAL_WRITES,
    "agents/vllm/adapter/callback.py": BY_BOTH_SHAPES,
    "agents/vllm/adapter/choose.py": BY_BOTH_SHAPES,
    "agents/vllm/adapter/lifecycle.py": BY_BOTH_SHAPES,
    "kernels/copy_reference.py": "test_copy runs each implementation through kernels/copy.py",
    "kernels/copy_triton.py": "test_copy runs each implementation through kernels/copy.py",
    "kernels/digest_reference.py": "test_digest runs each implementation through kernels/digest.py",
    "kernels/digest_triton.py": "test_digest runs each implementation through kernels/digest.py",
    "kernels/fp8_reference.py": "test_fp8 runs each implementation through kernels/fp8.py",
    "kernels/fp8_triton.py": "test_fp8 runs each implementation through kernels/fp8.py",
}
"""Modules with code and without a test file of their own, and why."""

WITHOUT_A_MODULE = {
    "agents/trainer/models/test_models.py": "the tables of all architectures, against what transformers saves",
    "agents/trainer/test_gloo.py": "trainer ranks in processes of their own",
    "core/round/test_shadow_rounds.py": "rounds of engines that land beside what they serve, through the whole core",
    "agents/transport/test_third_transport.py": "the seam of transports, by a transport that only the test has",
    "daemon/engines/test_second_engine.py": "the seam of engines, by an engine that only the test has",
    "settings/test_every_key_is_read.py": "the schema of the settings against all code that reads it",
    "settings/test_example.py": "deploy/config.example.yaml",
    "test_alerts.py": "deploy/monitoring/",
    "test_deploy.py": "the files under deploy/",
    "test_docs.py": "the pages under docs/",
    "test_doc_blocks.py": "the fenced blocks of README.md and the pages under docs/",
    "test_hooks.py": ".pre-commit-config.yaml",
    "test_preloaded.py": "tests/e2e/preloaded.py, from which the e2e tests start their processes",
    "test_ports.py": "tests/e2e/ports.py, by which all tests choose the ports of their servers",
    "test_families.py": "what make families prints, and docs/models.md",
    "test_kubernetes.py": "deploy/kubernetes/",
    "test_mirror.py": "the tree itself",
    "test_packaging.py": "pyproject.toml",
    "test_site.py": "docs/site/ and mkdocs.yml",
    "test_tutorial.py": "docs/tutorial.md",
}
"""Test files below tests/unit that test no single module, and what they test."""

MAX_LINES, MAX_MEDIAN_LINES, MAX_FUNCTION_LINES, MAX_MODULES = 400, 150, 70, 16


def has_code(module: ast.Module) -> bool:
    """Whether a module holds a function that does something; declarations alone leave nothing to test."""
    functions = (node for node in ast.walk(module) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return any(not all(_says_nothing(line) for line in function.body) for function in functions)


def _says_nothing(line: ast.stmt) -> bool:
    """A docstring or an ellipsis, which is all that the methods of a Protocol have, or ``pass``."""
    return isinstance(line, ast.Pass) or (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))


def parsed(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text())


def files_of(module: Path) -> list[Path]:
    """The test files of a module that there are."""
    parts = module.parent.parts
    folder = UNIT.joinpath(*(parts[1:] if parts[0] == "orchestrator" else parts))
    return [*folder.glob(f"test_{module.stem}.py"), *folder.glob(f"test_{module.stem}_*.py")]


def test_every_module_with_code_has_its_tests() -> None:
    missing = [
        str(module)
        for module in MODULES
        if str(module) not in TESTED_ELSEWHERE and has_code(parsed(module)) and not files_of(module)
    ]
    assert missing == []


def test_every_test_file_has_its_module() -> None:
    found = {test for module in MODULES for test in files_of(module)}
    astray = [str(test.relative_to(UNIT)) for test in sorted(UNIT.rglob("test_*.py")) if test not in found]
    assert [test for test in astray if test not in WITHOUT_A_MODULE] == []


def test_exceptions_are_of_files_that_there_are() -> None:
    assert [module for module in TESTED_ELSEWHERE if not (ROOT / module).exists()] == []
    assert [module for module in TESTED_ELSEWHERE if files_of(Path(module))] == []
    assert [test for test in WITHOUT_A_MODULE if not (UNIT / test).exists()] == []


def test_modules_are_short() -> None:
    lines = {str(module): len((ROOT / module).read_text().splitlines()) for module in MODULES}
    assert {module: count for module, count in lines.items() if count > MAX_LINES} == {}
    assert statistics.median(lines.values()) <= MAX_MEDIAN_LINES


def test_folders_hold_few_modules() -> None:
    count: dict[str, int] = defaultdict(int)
    for module in MODULES:
        count[str(module.parent)] += 1
    assert {folder: number for folder, number in count.items() if number > MAX_MODULES} == {}


def test_functions_are_short() -> None:
    assert [
        f"{module}:{node.lineno} {node.name}"
        for module in MODULES
        for node in ast.walk(parsed(module))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if (node.end_lineno or node.lineno) - node.lineno >= MAX_FUNCTION_LINES
    ] == []


def test_no_class_has_the_name_of_another() -> None:
    homes: dict[str, list[str]] = defaultdict(list)
    for module in MODULES:
        for node in parsed(module).body:
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(str(module))
    assert {name: found for name, found in homes.items() if len(found) > 1} == {}


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("X = 1", False),
        ("class A(Protocol):\n    def f(self) -> int:\n        'Says what.'\n        ...", False),
        ("class E(Exception):\n    'Nothing.'", False),
        ("def f():\n    return 1", True),
        ("class A:\n    async def f(self):\n        await g()", True),
    ],
)
def test_what_counts_as_code(source: str, code: bool) -> None:
    assert has_code(ast.parse(source)) is code
