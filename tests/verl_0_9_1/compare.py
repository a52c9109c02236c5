"""Compares the parts beside this file with an unpacked verl: ``python compare.py PATH_OF_THE_WHEEL``."""

import ast
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
BASE = Path("verl/checkpoint_engine/base.py")
RAY_UTILS = Path("verl/utils/ray_utils.py")


def signatures(module: Path) -> dict[str, str]:
    """Of every method of the module's classes and of its functions: names of its arguments, and whether it awaits."""
    found = {}
    for node in ast.parse(module.read_text()).body:
        functions = node.body if isinstance(node, ast.ClassDef) else [node]
        for function in functions:
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                owner = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
                names = [argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)]
                found[owner + function.name] = f"{type(function).__name__} {names}"
    return found


def differences(wheel: Path) -> list[str]:
    """What our parts say otherwise than the wheel."""
    wrong = []
    for module in (BASE, RAY_UTILS):
        theirs = signatures(wheel / module)
        ours = signatures(HERE / module)
        wrong += [f"{name}: {said}, not {theirs.get(name)}" for name, said in ours.items() if theirs.get(name) != said]
    return wrong


if __name__ == "__main__":
    found = differences(Path(sys.argv[1]))
    print("\n".join(found) or "the same")
    sys.exit(bool(found))
