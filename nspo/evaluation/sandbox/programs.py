"""From an answer with code in it to the program that tests it."""

from collections.abc import Iterator, Mapping
from typing import Any

from nspo.evaluation.sandbox.extraction import blocks, continuation, parsed, plain, solution

FUTURE = "from __future__ import "
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

    Code that defines the function replaces the prompt's, which is left without a body but for its docstring, and which
    function, helpers and constants of an answer count is said in `nspo.evaluation.sandbox.extraction`; other code goes
    on where the prompt stops, inside the function. (HumanEval's own harness knows the continuation only, which no chat
    model gives.)
    """
    code = solution(answer, check["entry_point"])
    if code is None:
        code = continuation(answer, check["prompt"])
    lines = code.split("\n")
    first = [line for line in lines if line.startswith(FUTURE)]  # only the start of a program may have these
    rest = "\n".join(line for line in lines if line not in first)
    return "\n".join([*first, check["prompt"], rest, check["test"], f"check({check['entry_point']})"])


def judged_programs(check: Mapping[str, Any], answer: str) -> Iterator[str]:
    """One program per test case: the answer's last program, fed an input, must give the output.

    Without a `function` it reads standard input and prints, and spacing at the ends of lines does not count; with one,
    it is a method of `class Solution`, whose arguments are the lines of the input, as JSON.
    """
    text = plain(answer)
    given = [block.code for block in blocks(text) if block.python and parsed(block.code)]
    if check["function"]:
        code = solution(text, "Solution") or text
    else:
        code = (given or [block.code for block in blocks(text)] or [text])[-1]
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
