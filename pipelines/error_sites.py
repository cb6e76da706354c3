"""
Every error that the code can tell of, read from its text: what is said, what to do, the exit code.

Nothing is imported and nothing runs: a call of a class that derives from `FleetError` is an entry,
its first argument the message, `hint` the next step. What an f-string fills in is given by the
name that it has in the code, as a word.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pipelines.errors import FleetError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

PACKAGE: Final = Path(__file__).parent
# Calls that only dress what they are given.
_DRESSES: Final = frozenset((
    "clean", "quoted", "quote", "shortened", "str", "sorted", "set", "repr", "clause", "join",
    "did_you_mean", "number", "declared", "beyond", "human", "lower", "upper", "strip", "rstrip",
    "as_posix", "get", "format", "list", "tuple", "spell", "code", "names", "listed",
))  # fmt: skip
# What a name of the code is called by people.
_WORDS: Final = {
    "done": "its last lines", "e": "cause", "error": "cause", "exc": "cause", "err": "cause",
    "at": "place", "n": "number", "i": "number", "k": "key", "v": "value", "p": "path",
    "strerror": "cause", "m": "model", "f": "file", "x": "value", "self": "it", "sha": "sha256",
}  # fmt: skip
# Nothing of it reaches a person: another part of the code answers.
_CAUGHT: Final = frozenset(("NotToldError", "NotJsonError"))
_SPACES: Final = re.compile(r"\s+")
# A call of one, or a class that derives from one.
_ERRORS: Final = re.compile(r"Error[()]")
_FILLED_IN: Final = re.compile(r"<[^<>]*>")
_OWN_WORDS: Final = re.compile(r"[a-z]{3} .*[a-z]")


@dataclass(frozen=True, order=True)
class Site:
    """
    One error of the code.

    Attributes:
        module: Of the package, with dots: `stores.s3`.
        message: What is said; what varies stands as `<word>`.
        hint: The next step, likewise; may be empty.
        exit_code: Of the verb that ends with it.
    """

    module: str
    message: str
    hint: str
    exit_code: int


@cache
def sites(package: Path = PACKAGE) -> tuple[Site, ...]:
    """
    Return every error of a package once, sorted by module and message.

    The code is read once in a process: that takes a second or two.

    Args:
        package: Folder with the modules.
    """
    texts = dict(_read(package))
    trees = {module: ast.parse(text) for module, text in texts.items()}
    codes = _exit_codes(trees.values())
    found: set[Site] = set()
    for module, tree in trees.items():
        found.update(_of_module(module, texts[module], tree, codes))
    return tuple(sorted(found))


def _read(package: Path) -> Iterator[tuple[str, str]]:
    """Yield name and text of every module that knows an error."""
    for path in sorted(package.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if _ERRORS.search(text):
            yield path.relative_to(package).with_suffix("").as_posix().replace("/", "."), text


def _exit_codes(trees: Iterable[ast.Module]) -> dict[str, int]:
    """Return the exit code of every class of errors by its name; subclasses inherit it."""
    classes = {
        node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)
    }
    codes = {FleetError.__name__: FleetError.exit_code}
    while found := {
        name: _own_code(node) or codes[base]
        for name, node in classes.items()
        if name not in codes
        for base in map(_name, node.bases)
        if base in codes
    }:
        codes |= found
    return {name: code for name, code in codes.items() if name not in _CAUGHT}


def _own_code(node: ast.ClassDef) -> int | None:
    for line in node.body:
        if isinstance(line, ast.Assign) and _name(line.targets[0]) == "exit_code":
            return int(ast.literal_eval(line.value))
    return None


def _of_module(
    module: str, text: str, tree: ast.Module, codes: Mapping[str, int]
) -> Iterator[Site]:
    called = re.compile(rf"\b(?:{'|'.join(codes)})\(")
    lines = text.splitlines()
    known = _texts(node for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign))
    for scope in _scopes(tree):
        # Most functions raise nothing themselves, and a walk is what takes the time.
        if not called.search("\n".join(lines[scope.lineno : scope.end_lineno])):
            continue
        nodes = list(ast.walk(scope))
        local = {**known, **_texts(nodes)}
        for node in nodes:
            if isinstance(node, ast.Call) and (code := codes.get(_name(node.func))) and node.args:
                hint = next((each.value for each in node.keywords if each.arg == "hint"), None)
                message = _one_line(_said(node.args[0], local))
                # What only passes on the words of another error is there already.
                if _OWN_WORDS.search(_FILLED_IN.sub("", message)):
                    said = _one_line(_said(hint, local)) if hint else ""
                    yield Site(module, message, said, code)


def _scopes(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Yield each function of the top level and of a class."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node
        elif isinstance(node, ast.ClassDef):
            yield from (each for each in node.body if isinstance(each, ast.FunctionDef))


def _texts(nodes: Iterable[ast.AST]) -> dict[str, ast.expr]:
    """Return the text behind each name that is given one, and given nothing else."""
    found: dict[str, list[ast.expr | None]] = {}
    for node in nodes:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                found.setdefault(_name(target), []).append(node.value)
        elif isinstance(node, ast.AnnAssign):
            found.setdefault(_name(node.target), []).append(node.value)
    return {
        name: values[0]
        for name, values in found.items()
        if len(values) == 1 and values[0] is not None and _is_text(values[0])
    }


def _is_text(node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp):
        return _is_text(node.left)
    return isinstance(node, ast.JoinedStr) or isinstance(getattr(node, "value", None), str)


# --- in words ---------------------------------------------------------------------------------


def _said(node: ast.expr, known: Mapping[str, ast.expr]) -> str:
    """Return the text of an expression, with `<word>` for what is only known when it happens."""
    match node:
        case ast.Constant(value=str(text)):
            said = text
        case ast.JoinedStr(values=parts):
            said = "".join(_said(part, known) for part in parts)
        case ast.FormattedValue(value=inner):
            said = _said(inner, known)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            said = _said(left, known) + _said(right, known)
        case ast.IfExp(body=one, orelse=other):
            said = _either(_said(one, known), _said(other, known))
        case ast.BoolOp(op=ast.Or(), values=[one, *_]):
            said = _said(one, known)
        case ast.Name(id=name) if name in known:
            said = _said(known[name], {k: v for k, v in known.items() if k != name})
        case ast.Call(func=ast.Attribute(attr="rstrip" | "strip", value=inner)):
            said = _said(inner, known)
        case _:
            said = f"<{_word(node)}>"
    return said


def _either(one: str, other: str) -> str:
    """Of two ways to say it the fuller one; of two words both."""
    if min(len(one), len(other)) < 3 or "<" in one + other:  # noqa: PLR2004 - a plural, a comma
        return max(one, other, key=len)
    return f"{one} / {other}"


def _word(node: ast.expr) -> str:
    """Return what a value is called: the last name in the expression that gives it."""
    match node:
        case ast.Attribute(attr="name" | "path" | "key" | "text" | "value" as attr, value=owner):
            # `quant.name` is a quant; `self.name` is a name.
            of = _name(owner).strip("_")
            word = _spelled(attr if of in {"", "self", "each", "args"} else of)
        case ast.Name(id=name) | ast.Attribute(attr=name):
            word = _spelled(name)
        case ast.Call(func=called, args=args):
            word = _word_of_call(called, args)
        case ast.Subscript(slice=ast.Constant(value=str(key))):
            word = _spelled(key)
        case ast.Subscript(value=inner) | ast.Starred(value=inner):
            word = _word(inner)
        case ast.GeneratorExp(elt=inner) | ast.ListComp(elt=inner):
            word = _word(inner)
        case ast.BinOp(left=inner) | ast.UnaryOp(operand=inner):
            word = _word(inner)
        case _:
            word = "..."
    return word


def _word_of_call(called: ast.expr, args: list[ast.expr]) -> str:
    name = _name(called)
    if name == "len":
        return "number"
    if name in {"tail", "last_lines"}:
        return "its last lines"
    if name in _DRESSES and args:
        return _word(args[0])
    if name in _DRESSES and isinstance(called, ast.Attribute):
        return _word(called.value)
    return _spelled(name)


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    return node.attr if isinstance(node, ast.Attribute) else ""


def _spelled(name: str) -> str:
    return _WORDS.get(name, name.strip("_").replace("_", " ").lower()) or "..."


def _one_line(text: str) -> str:
    return _SPACES.sub(" ", text).strip()
