"""The code in an answer: what harnesses of the field accept as a solution, however a chat model wraps it.

A function may come with helpers, imports and constants in blocks of its own, as a draft and its correction, after its
bare signature, or in a list. As in EvalPlus, what the solution does not reach is left out: examples, asserts, prose.
"""

import ast
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

THOUGHT = re.compile(r"\A.*</think(?:ing)?>", re.DOTALL)
QUOTED = re.compile(r"^ {0,3}> ?", re.MULTILINE)
FENCED = re.compile(
    r"^(?P<indent>[ \t]*(?:[-*+][ \t]+|\d+[.)][ \t]+)?)(?P<fence>`{3,}|~{3,})(?P<info>[^\n`]*)\n"
    r"(?P<code>.*?)(?:^[ \t]*(?P=fence)[`~]*[ \t]*$|\Z)",
    re.MULTILINE | re.DOTALL,
)
ON_ONE_LINE = re.compile(r"(?P<fence>`{1,3})(?P<code>[^`\n]+)(?P=fence)")
TAGGED = re.compile(r"\[(?:PYTHON|BEGIN)\]\n?(.*?)(?:\[/?(?:PYTHON|DONE|END)\]|\Z)", re.DOTALL)
PYTHON = re.compile(r"(\{?\.?(python|py|ipython|pycon)[\d.]*)?", re.IGNORECASE)
STARTS = ("def ", "async def ", "class ", "import ", "from ", "@")
Function = ast.FunctionDef | ast.AsyncFunctionDef
MOST_LINES = 400  # of prose around code that is searched


class Block(NamedTuple):
    """A block of code in an answer."""

    python: bool  # by what stands after its fence
    code: str


def plain(answer: str) -> str:
    """An answer with one kind of line break, without its thoughts and the marks of a quotation."""
    text = THOUGHT.sub("", answer.replace("\r\n", "\n").replace("\r", "\n"))
    return QUOTED.sub("", text) if re.search(r"^ {0,3}> ?(```|~~~)", text, re.MULTILINE) else text


def blocks(answer: str) -> list[Block]:
    """The blocks of code of a `plain` answer in their order, each without the indent it has as a whole."""
    found = [
        Block(bool(PYTHON.fullmatch((match["info"].split() or [""])[0].strip("{}"))), textwrap.dedent(match["code"]))
        for match in FENCED.finditer(answer)
    ]
    if not found:
        found = [Block(True, textwrap.dedent(code)) for code in TAGGED.findall(answer)]
    return found


def solution(answer: str, name: str) -> str | None:
    """The code of an answer that defines `name`, with what that reaches; None where the answer does not define it."""
    text = plain(answer)
    given = blocks(text)
    codes = [block.code for block in given if block.python] or [block.code for block in given]
    inline = [match["code"].strip() for match in ON_ONE_LINE.finditer(text)]
    headed = [f"{codes[0]}\n{textwrap.indent(code, '    ')}" for code in codes[1:]]  # the head in a block of its own
    for candidate in (_each(codes), ["\n".join(codes)], _each(headed), [text], _within(text), _each(inline)):
        body = [statement for code in candidate for statement in parsed(code) or ()]
        if any(name in defined(statement) for statement in body):
            return ast.unparse(ast.Module(_reached(body, name), type_ignores=[]))
    return None


def continuation(answer: str, prompt: str) -> str:
    """An answer without the function's head, as the body that goes on where `prompt` stops."""
    given = blocks(plain(answer))
    code = given[0].code if given else plain(answer)
    ended = "    " + re.split(r"\n(?=[^\s])", code.strip(), maxsplit=1)[0]
    whole = textwrap.indent(textwrap.dedent(code), "    ")
    return whole if given and parsed(f"{prompt}\n{whole}") else ended


def parsed(code: str) -> list[ast.stmt] | None:
    """The statements of a program; None where the text is not one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(code).body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def defined(statement: ast.stmt) -> set[str]:
    """The names that a statement of a module binds or changes."""
    found: set[str] = set()
    for node in ast.walk(statement) if not isinstance(statement, Function | ast.ClassDef) else [statement]:
        if isinstance(node, Function | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Subscript | ast.Attribute) and isinstance(node.ctx, ast.Store):
            found |= {node.value.id} if isinstance(node.value, ast.Name) else set()
    return found


def _each(codes: Sequence[str]) -> list[str]:
    return [code for code in codes if parsed(code)]


def _within(text: str) -> Iterator[str]:
    """The longest program in a text that begins at a line of code, where prose stands around it."""
    lines = text.split("\n")[:MOST_LINES]
    for start, line in enumerate(lines):
        if line.startswith(STARTS):
            for end in range(len(lines), start, -1):
                if parsed("\n".join(lines[start:end])):
                    yield "\n".join(lines[start:end])
                    return


def _reached(body: Sequence[ast.stmt], name: str) -> list[ast.stmt]:
    """The statements that `name` needs, in their order; imports are all kept, and the last definition holds."""
    real = {other for s in body if isinstance(s, Function) and not _stub(s) for other in [s.name]}
    body = [s for s in body if not (isinstance(s, Function) and _stub(s) and s.name in real)]
    needed = {name}
    while True:
        used = {
            node.id
            for statement in body
            if needed & defined(statement)
            for node in ast.walk(statement)
            if isinstance(node, ast.Name)
        }
        if used <= needed:
            break
        needed |= used
    kept = [s for s in body if isinstance(s, ast.Import | ast.ImportFrom) or needed & defined(s) or _sets_a_limit(s)]
    first = [s for s in kept if isinstance(s, ast.ImportFrom) and s.module == "__future__"]
    return first + [s for s in kept if s not in first]


def _stub(function: Function) -> bool:
    """Whether a function is a signature only: its body is a docstring, `pass` or `...`."""
    return all(
        isinstance(part, ast.Pass) or (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))
        for part in function.body
    )


def _sets_a_limit(statement: ast.stmt) -> bool:
    """A call without which deep recursion fails."""
    return isinstance(statement, ast.Expr) and ast.unparse(statement).startswith("sys.setrecursionlimit(")
