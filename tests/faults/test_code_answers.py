"""Reports of right programs that were marked wrong: the shapes in which answers hold their code.

evalplus/evalplus#188 (statements after the function), UKGovernmentBEIS/inspect_ai#581 (a fence without a language),
EleutherAI/lm-evaluation-harness#3769 (the first word of bare code lost), open-compass/opencompass#129 (the question
repeated before the code).
"""

import pytest

from nspo.evaluation.sandbox.programs import judged_programs, whole_program

CHECK = {
    "type": "program",
    "prompt": 'def double(x):\n    """Twice x."""\n',
    "entry_point": "double",
    "test": "def check(candidate):\n    assert candidate(21) == 42\n",
}
RIGHT = "def double(x):\n    return x * 2\n"
WRONG = "def double(x):\n    return x\n"


def fence(code: str, info: str = "python", mark: str = "```") -> str:
    """A block of code."""
    end = "" if code.endswith("\n") else "\n"
    return f"{mark}{info}\n{code}{end}{mark}\n"


HELPED = "def double(x):\n    return twice(x)\n"
HELPER = "def twice(x):\n    return x * 2\n"
LISTED = "1. Write it:\n\n   ```python\n   def double(x):\n       return x * 2\n   ```\n\n2. Done."
SHAPES = {
    "bare function": RIGHT,
    "bare function, prose after": f"{RIGHT}\nThis doubles x.",
    "prose, bare function, prose": f"Sure! Here it is:\n\n{RIGHT}\nIt multiplies by two.",
    "fence": fence(RIGHT),
    "fence without a language": fence(RIGHT, ""),
    "fence, Python3": fence(RIGHT, "Python3"),
    "fence with attributes": fence(RIGHT, "python title=double.py"),
    "fence in braces": fence(RIGHT, "{.python}"),
    "fence of tildes": fence(RIGHT, mark="~~~"),
    "fence of four": fence(RIGHT, mark="````"),
    "fence never closed": f"```python\n{RIGHT}",
    "carriage returns": fence(RIGHT).replace("\n", "\r\n"),
    "in a list": LISTED,
    "opened by a bullet": "- ```python\n  def double(x):\n      return x * 2\n  ```",
    "in a quotation": "".join(f"> {line}\n" for line in fence(RIGHT).splitlines()),
    "helper in its own block first": f"{fence(HELPER)}Then:\n{fence(HELPED)}",
    "helper in its own block last": f"{fence(HELPED)}with\n{fence(HELPER)}",
    "imports in an earlier block": fence("from operator import mul\n")
    + fence("def double(x):\n    return mul(x, 2)\n"),
    "constant in an earlier block": fence("TWO = 2\n") + fence("def double(x):\n    return x * TWO\n"),
    "table filled after it": fence("T = {}\nfor i in range(99):\n    T[i] = 2 * i\ndef double(x):\n    return T[x]\n"),
    "draft, then its correction": f"{fence(WRONG)}That is wrong. Better:\n{fence(RIGHT)}",
    "signature first": fence("def double(x):") + fence("    return x * 2"),
    "stub first": fence("def double(x):\n    ...") + "then\n" + fence(RIGHT),
    "stub last": fence(RIGHT) + "so the interface is\n" + fence("def double(x):\n    pass"),
    "usage in another block": f"{fence(RIGHT)}Use it:\n{fence('print(double(int(input())))')}",
    "usage after the function": fence(f"{RIGHT}\nassert double(1) == 3\nprint(1 / 0)\n"),
    "main at the end": fence(f"{RIGHT}\nif __name__ == '__main__':\n    print(double(int(input())))\n"),
    "output in a block": f"{fence(RIGHT)}Output:\n{fence('42', '')}",
    "shell in a block": f"{fence('pip install numpy', 'bash')}{fence(RIGHT)}",
    "broken block beside it": f"{fence('def double(x) return x')}Fixed:\n{fence(RIGHT)}",
    "question repeated": f"def double(x) should return twice x.\n\n{fence(CHECK['prompt'] + '    return x * 2')}",
    "from the future": fence(f"from __future__ import annotations\n{RIGHT}"),
    "deep recursion allowed": fence(f"import sys\nsys.setrecursionlimit(5000)\n{RIGHT}"),
    "lambda": fence("double = lambda x: x * 2\n"),
    "async helper and class": fence(
        "class B:\n    n = 2\nasync def g():\n    pass\ndef double(x):\n    return x * B.n"
    ),
    "after its thoughts": f"<think>\n{fence(WRONG)}</think>\n{fence(RIGHT)}",
    "tags of MBPP's prompt": f"[BEGIN]\n{RIGHT}[DONE]",
    "tags of Code Llama": f"[PYTHON]\n{RIGHT}[/PYTHON]",
    "code on one line": "Use ```def double(x): return x * 2```.",
    "code between single marks": "Use `def double(x): return x * 2`.",
    "continuation": "    return x * 2",
    "continuation, first indent lost": "y = x\n    return y * 2\n\nThis doubles x.",
    "continuation in a fence": fence("    return x * 2\n"),
    "continuation in a fence, no indent": fence("y = x\nreturn y * 2\n"),
    "continuation, then another function": "    return x * 2\n\ndef other():\n    return 1",
}
NONE = ["", "I cannot help with that.", "```", "```python\n", "\ud800", "(" * 3000, fence(WRONG)]
SPOILT = {"* 2": "* 3", "mul(x, 2)": "mul(x, 3)", "* TWO": "+ TWO", "2 * i": "3 * i", "B.n": "B.n + 1"}


def passes(program: str) -> bool:
    """Whether a harmless program of this file runs to its end."""
    try:
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    except (Exception, SystemExit):
        return False
    return True


@pytest.mark.parametrize("answer", SHAPES.values(), ids=SHAPES)
def test_a_right_program_is_found(answer: str) -> None:
    """In whatever shape, the program is right; the same shape around wrong code is wrong."""
    assert passes(whole_program(CHECK, answer))
    for right, wrong in SPOILT.items():
        answer = answer.replace(right, wrong)
    assert not passes(whole_program(CHECK, answer))


@pytest.mark.parametrize("answer", NONE)
def test_no_program_is_a_wrong_one(answer: str) -> None:
    """What holds no solution is marked wrong and raises nothing."""
    assert not passes(whole_program(CHECK, answer))


def test_a_program_that_reads_input_is_the_last_one() -> None:
    """A block of output or of shell after the program is not run in its place; imports may stand before a class."""
    case = {"input": "21", "output": "42"}
    reads = {"tests": [case], "function": ""}
    answer = f"{fence('print(int(input()) * 2)')}Run:\n{fence('python3 a.py', 'bash')}{fence('2 4 2', 'text')}"
    assert all(map(passes, judged_programs(reads, answer)))
    method = {"tests": [case], "function": "f"}
    solved = fence("import math\n") + fence("class Solution:\n    def f(self, x):\n        return math.prod([x, 2])\n")
    assert all(map(passes, judged_programs(method, solved)))
