"""From an answer with code in it to the program that tests it."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

FENCED = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
# Runs a program on one input; its exit is an end like any other.
JUDGED = """
import io, sys
sys.stdin = io.TextIOWrapper(io.BytesIO({input}.encode()))
sys.stdout = io.TextIOWrapper(io.BytesIO(), write_through=True)
try:
    {run}
except SystemExit:
    pass
printed = sys.stdout.buffer.getvalue().decode()
assert [line.rstrip() for line in printed.rstrip().split("\\n")] == [
    line.rstrip() for line in {output}.rstrip().split("\\n")
]
"""


def whole_program(check: Mapping[str, Any], answer: str) -> str:
    """The program that tests an answer: the prompt's code, the answer's, then the tests.

    The answer's code is its fenced block (the one that defines the function, where there are several), else all of it.
    Code that defines the function replaces the prompt's, which is left without a body but for its docstring; other code
    goes on where the prompt stops, inside the function, up to the first line that is not indented. (HumanEval's own
    harness knows the continuation only, which no chat model gives.)
    """
    defines = re.compile(rf"^(?:async )?def {re.escape(check['entry_point'])}\b", re.MULTILINE)
    blocks = FENCED.findall(answer)
    code = next(filter(defines.search, blocks), blocks[0] if blocks else answer)
    if not defines.search(code):
        code = "    " + re.split(r"\n(?=[^\s])", code.strip(), maxsplit=1)[0]
    return "\n".join([check["prompt"], code, check["test"], f"check({check['entry_point']})"])


def judged_programs(check: Mapping[str, Any], answer: str) -> Iterator[str]:
    """One program per test case: the answer's last block of code, fed an input, must give the output.

    Without a `function` it reads standard input and prints, and spacing at the ends of lines does not count; with one,
    it is a method of `class Solution`, whose arguments are the lines of the input, as JSON.
    """
    code = (FENCED.findall(answer) or [answer])[-1]
    for case in check["tests"]:
        if check["function"]:
            call = f"Solution().{check['function']}(*map(json.loads, {case['input']!r}.splitlines()))"
            tested = (
                f"import json\ngiven = {call}\nassert json.loads(json.dumps(given)) == json.loads({case['output']!r})"
            )
            yield f"from typing import *\n{code}\n{tested}"
        else:
            run = f"exec(compile({code!r}, 'answer', 'exec'), {{'__name__': '__main__'}})"
            yield JUDGED.format(input=repr(case["input"]), output=repr(case["output"]), run=run)
