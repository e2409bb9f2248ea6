"""How one row of a benchmark's data becomes a prompt: a function per format, named in the registry.

A prompt is worded as its benchmark's authors word it. What a `check` means stands in `nspo/evaluation/checks.py`; a
`doc` is scored by lm-evaluation-harness (`nspo/evaluation/benchmarks/harness.py`).
"""

import base64
import json
import pickletools
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nspo.errors import UserError
from nspo.evaluation.benchmarks.registry import Task

ROLES = {"safety": "harmful", "over_refusal": "benign", "ability": "general"}
WRAPPED = re.compile(r"^### Instruction:\s*(.*?)\s*### Response:\s*$", re.DOTALL)  # ALERT's
OPTION = re.compile(r"\n*\s*\b((?:answer|option|solution)\d): ?", re.IGNORECASE)
WRITE = "Write a solution to the following problem and make sure that it passes the tests:\n"
MBPP_TEST = range(11, 511)  # task ids of its test split, in copies that hold every split
BOXED = "\n\nReason step by step, and put the final answer within \\boxed{}."

Row = Mapping[str, Any]


def first(row: Row, columns: Sequence[str]) -> Any:
    """The value of the first of `columns` that the row has, None where it has none."""
    return next((row[name] for name in columns if row.get(name) is not None), None)


def prompts(task: Task, row: Row) -> dict[str, Any]:
    """A prompt as it stands: the first turn, where there are several; HarmBench's context before its request."""
    text = first(row, task.prompt)
    text = text[0] if isinstance(text, list) and text else text
    if isinstance(text, str):
        wrapped = WRAPPED.match(text)
        text = wrapped[1] if wrapped else text
        text = f"{row['ContextString'].strip()}\n\n---\n\n{text}" if row.get("ContextString") else text
    return {"prompt": text}


def instructions(task: Task, row: Row) -> dict[str, Any]:
    """AlpacaEval's rows; `output` is the published answer that others are compared with."""
    return {**prompts(task, row), "published": row.get("output")}


def xstest(task: Task, row: Row) -> dict[str, Any]:
    """Safe prompts test over-refusal, their unsafe contrasts safety: two domains, never pooled."""
    label = row.get("label") or ("unsafe" if str(row.get("type")).startswith("contrast") else "safe")
    if label not in ("safe", "unsafe"):
        raise UserError(f"a row has the label {label!r}", expected="safe or unsafe")
    return {**prompts(task, row), "role": "benign" if label == "safe" else "harmful", "domain": f"xstest_{label}"}


def code(task: Task, row: Row) -> dict[str, Any]:
    """HumanEval's and MBPP's rows; the tests are run in the sandbox."""
    text = first(row, task.prompt)
    if "entry_point" in row:
        check = {"prompt": text, "entry_point": row["entry_point"], "test": row["test"]}
        return {"prompt": f"{WRITE}```python\n{text}\n```", "check": {"type": "program", **check}}
    tests = "\n".join(row["test_list"])
    defined = re.findall(r"^def (\w+)", row["code"], re.MULTILINE)
    name = next((name for name in defined if re.search(rf"\b{name}\b", row["test_list"][0])), None)
    if name is None:
        raise UserError(f"the test {row['test_list'][0]!r:.80} calls no function that the solution defines")
    body = "\n".join("    " + line for test in row["test_list"] for line in test.splitlines())
    program = f"{row.get('test_setup_code') or ''}\ndef check(candidate):\n{body}\n"
    check = {"type": "program", "prompt": "", "entry_point": name, "test": program}
    return {"prompt": f"{WRITE}{text}\n{tests}", "check": check}


def livecodebench(task: Task, row: Row) -> dict[str, Any]:
    """LiveCodeBench's rows: programs that read standard input, or a method of `class Solution`; every test is run."""
    text, starter = first(row, task.prompt), row.get("starter_code") or ""
    tests = [*_tests(row["public_test_cases"]), *_tests(row["private_test_cases"])]
    metadata = json.loads(row["metadata"]) if isinstance(row.get("metadata"), str) else row.get("metadata") or {}
    how = (
        f"Complete this code:\n```python\n{starter}\n```"
        if starter
        else "Read the input from standard input and print the answer to standard output."
    )
    check = {"type": "judged_program", "tests": tests, "function": metadata.get("func_name") or ""}
    return {"prompt": f"{text}\n\n{how}\n\nAnswer with one block of Python code.", "check": check}


def _tests(stored: Any) -> list[dict[str, str]]:
    """Test cases as the data set stores them: JSON, or JSON in a pickled string, compressed, in base64.

    The pickle is read opcode by opcode for its one string and never executed.
    """
    if not isinstance(stored, str):
        found = stored
    elif stored.lstrip().startswith("["):
        found = json.loads(stored)
    else:
        pickled = zlib.decompress(base64.b64decode(stored))
        strings = [value for _, value, _ in pickletools.genops(pickled) if isinstance(value, str)]
        if len(strings) != 1:
            raise UserError(
                f"private_test_cases hold {len(strings)} strings", expected="one", change="not LiveCodeBench's form"
            )
        found = json.loads(strings[0])
    return [{key: case[key] for key in ("input", "output", "testtype")} for case in found]


def choices(task: Task, row: Row) -> dict[str, Any]:
    """LLM-Adapters' wording of multiple choice, taken apart again: the question, the options, the right one."""
    question, _, listed = str(row["instruction"]).partition(": ")[2].partition("Answer format:")
    question, *parts = OPTION.split(question)
    options = [text.strip() for text in parts[1::2]] or [part.strip() for part in listed.split("/")]
    names = [name.lower() for name in parts[0::2]] or options
    if row["answer"] not in names or not question.strip():
        raise UserError(f"a row has the answer {row['answer']!r:.40}", expected=f"one of {', '.join(names)[:80]}")
    question = question.strip()
    return {
        "prompt": question,
        "doc": {"question": question, "choices": options, "answer": names.index(row["answer"])},
    }


def options(task: Task, row: Row) -> dict[str, Any]:
    """SuperGPQA's rows: up to ten options, named by their letters."""
    letters = "ABCDEFGHIJ"[: len(row["options"])]
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(letters, row["options"], strict=True))
    question = f"{first(row, task.prompt)}\n{listed}\nAnswer:"
    return {
        "prompt": question,
        "doc": {"question": question, "choices": list(letters), "answer": letters.index(row["answer_letter"])},
    }


def maths(task: Task, row: Row) -> dict[str, Any]:
    """OlympiadBench's open questions with one or several final answers."""
    answer = row["final_answer"]
    answers = answer if isinstance(answer, list) else [answer]
    return {"prompt": f"{first(row, task.prompt)}{BOXED}", "check": {"type": "maths", "answer": ", ".join(answers)}}


def harness(task: Task, row: Row) -> dict[str, Any]:
    """A row as the harness's own task reads it."""
    doc = dict(row)
    for name in ("mc0_targets", "mc1_targets", "mc2_targets"):  # TruthfulQA's own file holds {choice: label}
        if isinstance(doc.get(name), Mapping) and "choices" not in doc[name]:
            doc[name] = {"choices": list(doc[name]), "labels": list(doc[name].values())}
    return {"prompt": first(row, task.prompt), "doc": doc}


FORMATS: dict[str, Callable[[Task, Row], dict[str, Any]]] = {
    "prompts": prompts,
    "instructions": instructions,
    "xstest": xstest,
    "code": code,
    "livecodebench": livecodebench,
    "choices": choices,
    "options": options,
    "maths": maths,
    "harness": harness,
}
