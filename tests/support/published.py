"""Rows of each named benchmark in the form in which it is published, with what is read from them."""

import base64
import json
import pickle
import zlib

CASES = [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]

HIDDEN = base64.b64encode(zlib.compress(pickle.dumps(json.dumps([{**CASES[0], "input": "2 2\n", "output": "4\n"}]))))

PUBLISHED = {
    "advbench": ([{"goal": "Do harm", "target": "Sure"}], "Do harm", "", "harmful"),
    "harmbench": (
        [
            {
                "Behavior": "Do it",
                "FunctionalCategory": "contextual",
                "SemanticCategory": "crime",
                "ContextString": "C.",
            },
            {"Behavior": "Lyrics", "FunctionalCategory": "copyright", "SemanticCategory": "copy", "ContextString": ""},
        ],
        "C.\n\n---\n\nDo it",
        "crime",
        "harmful",
    ),
    "sorry_bench": (
        [
            {"question_id": 1, "category": "7", "turns": ["Insult me"], "prompt_style": "base"},
            {"question_id": 1, "category": "7", "turns": ["1nsult m3"], "prompt_style": "misspellings"},
        ],
        "Insult me",
        "7",
        "harmful",
    ),
    "jailbreakbench": (
        [{"Index": "0", "Goal": "Write libel", "Target": "Here", "Behavior": "Libel", "Category": "Harassment"}],
        "Write libel",
        "Harassment",
        "harmful",
    ),
    "alert": (
        [{"id": 3, "prompt": "### Instruction:\nPlan a theft\n### Response:\n", "category": "crime_theft"}],
        "Plan a theft",
        "crime_theft",
        "harmful",
    ),
    "harmfulqa": ({"Science": {"Biology": ["How to harm?"]}}, "How to harm?", "Science", "harmful"),
    "pku_saferlhf": (
        [{"prompt": "How to steal?", "response_0": "x", "is_response_0_safe": False, "prompt_source": "Alpaca"}] * 2,
        "How to steal?",
        "Alpaca",
        "harmful",
    ),
    "adversarialqa": (["Do this"], "Do this", "", "harmful"),
    "ailuminate": ([{"prompt_text": "How?", "hazard": "prv", "persona": "skilled"}], "How?", "prv", "harmful"),
    "or_bench": ([{"prompt": "Kill a process?", "category": "violence"}], "Kill a process?", "violence", "benign"),
    "coconot": (
        [{"id": "1", "category": "Incomplete", "prompt": "Which?", "chosen": "a"}],
        "Which?",
        "Incomplete",
        "benign",
    ),
    "olympiadbench": (
        [{"question": "Find x.", "final_answer": ["2", "3"], "subfield": "Algebra"}],
        "Find x.\n\nReason step by step, and put the final answer within \\boxed{}.",
        "Algebra",
        "general",
    ),
    "livecodebench": (
        [
            {
                "question_content": "Add two numbers.",
                "starter_code": "",
                "difficulty": "easy",
                "public_test_cases": json.dumps(CASES),
                "private_test_cases": HIDDEN.decode(),
                "metadata": "{}",
            }
        ],
        "Add two numbers.\n\nRead the input from standard input and print the answer to standard output.\n\n"
        "Answer with one block of Python code.",
        "easy",
        "general",
    ),
    "mbpp": (
        [
            {"task_id": 1, "text": "Train.", "code": "def f(x): return x", "test_list": ["assert f(1) == 1"]},
            {"task_id": 11, "text": "Double.", "code": "def f(x): return 2*x", "test_list": ["assert f(1) == 2"]},
        ],
        "Write a solution to the following problem and make sure that it passes the tests:\nDouble.\nassert f(1) == 2",
        "",
        "general",
    ),
    "alpaca_eval": (
        [{"instruction": "Name a city", "output": "Rome", "dataset": "koala"}],
        "Name a city",
        "koala",
        "general",
    ),
    "supergpqa": (
        [{"question": "Which?", "options": ["a", "b"], "answer": "b", "answer_letter": "B", "discipline": "Law"}],
        "Which?\nA. a\nB. b\nAnswer:",
        "Law",
        "general",
    ),
    "siqa": (
        [
            {
                "instruction": "Please choose: Why?\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2",
                "answer": "answer2",
            }
        ],
        "Why?",
        "",
        "general",
    ),
    "boolq": (
        [{"instruction": "Answer, question: is it?\n\nAnswer format: true/false", "answer": "false"}],
        "is it?",
        "",
        "general",
    ),
}
