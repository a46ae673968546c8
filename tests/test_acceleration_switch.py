"""No test builds a machine past the switch ``--kvm`` (:mod:`tests.acceleration`)."""

from __future__ import annotations

import ast
from pathlib import Path

TESTS = Path(__file__).parent
BUILDERS = {"PseriesMachine", "PseriesConfig", "load_scenario", "InlineSystem"}
"""What makes a machine, or says what it is."""
PAST_IT = {
    "guest_drivers/test_trace_replay.py": "a log holds no hypercall that the kernel answered",
    "deploy/test_scenario.py": "no machine is made of what is read",
    "deploy/test_cli.py": "no machine is made of what is read",
    "deploy/test_q35_scenario.py": "a PC has no TCE tables",
    "processes/test_svm.py": "a PC has no TCE tables",
    "interop/peers.py": "is compared with stock QEMU, which has no acceleration",
}


def calls(tree: ast.AST) -> set[str]:
    functions = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {
        function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "") for function in functions
    }


def asks(tree: ast.AST) -> bool:
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return any(
        node.module == "tests.acceleration"
        or (node.module == "tests" and any(a.name == "acceleration" for a in node.names))
        for node in imports
    )


def test_whoever_builds_a_machine_asks_the_switch() -> None:
    past = set()
    for path in TESTS.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if calls(tree) & BUILDERS and not asks(tree):
            past.add(path.relative_to(TESTS).as_posix())
    assert past == set(PAST_IT)
