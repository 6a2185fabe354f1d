"""A command's settings stop at its door: below it every part gets what it needs and no more."""

import ast
from collections.abc import Collection, Iterator
from dataclasses import is_dataclass
from pathlib import Path

import mfdetr_cli.app as app_module
import mfdetr_pipelines

import mfdetr_cache

LIBRARY = Path(mfdetr_cache.__file__).parent
PIPELINES = Path(mfdetr_pipelines.__file__).parent
# The settings of the commands, as the command line imports them.
CONFIGS = {name for name, kind in vars(app_module).items() if is_dataclass(kind)}


def functions(folder: Path) -> Iterator[tuple[str, ast.FunctionDef, bool]]:
    """Place and definition of every function, and whether only its own file may call it."""
    for path in sorted(folder.rglob("*.py")):
        tree = ast.parse(path.read_text())
        private = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef) and node.name.startswith("_")
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                hidden = node.name.startswith("_") and node.name != "__init__"
                place = f"{path.relative_to(folder)}:{node.name}"
                yield place, node, hidden or id(node) in private


def takes_settings(function: ast.FunctionDef, configs: Collection[str] = CONFIGS) -> bool:
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    hints = [ast.unparse(a.annotation) for a in arguments if a.annotation is not None]
    return any(name in hint for hint in hints for name in configs)


def test_every_command_has_settings() -> None:
    assert len(CONFIGS) >= 18


def test_no_function_of_the_library_takes_a_commands_settings() -> None:
    assert [place for place, node, _ in functions(LIBRARY) if takes_settings(node)] == []


def test_only_commands_and_their_own_parts_take_their_settings() -> None:
    found = [
        place
        for place, node, private in functions(PIPELINES)
        if takes_settings(node)
        and not (private or node.name.startswith("run_"))
        # A command that is a folder.
        and not (place.startswith("ablation/") and takes_settings(node, {"AblateConfig"}))
    ]
    assert found == []


def imported(path: Path) -> Iterator[tuple[Path, str]]:
    """File and name of everything a file imports from the pipelines, settings aside."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mfdetr_pipelines."):
            parts = str(node.module).split(".")[1:]
            other = PIPELINES.joinpath(*parts).with_suffix(".py")
            if parts[0] != "config" and other.is_file():
                yield from ((other, alias.name) for alias in node.names)


def test_a_command_imports_another_one_only_to_run_it() -> None:
    found = []
    for path in sorted(PIPELINES.rglob("*.py")):
        for other, name in imported(path):
            is_command = "\ndef run_" in other.read_text()
            runs = name.startswith("run_") or name[0].isupper()
            if name.startswith("_") or (is_command and not runs):
                found.append(f"{path.stem} imports {name} from {other.stem}")
    assert found == []
