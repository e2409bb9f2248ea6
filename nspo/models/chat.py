"""The chat format: a template that reads what every stage gives it, applied once, tokenised without special tokens."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from nspo.errors import UserError, first_line, refuse_no_file
from nspo.models.folders.template import frozen

PROBE, ANSWER = "What is nspo?", "A package."
# Templates of multimodal models read a turn's content as a list of parts, and many show nothing of plain text.
IN_PARTS = (
    "{% set nspo = namespace(turns=[]) %}{% for turn in messages %}{% set nspo.turns = nspo.turns + "
    "[dict(turn, content=[{'type': 'text', 'text': turn.content}]) if turn.content is string else turn] %}"
    "{% endfor %}{% set messages = nspo.turns %}"
)
SYSTEM_TURN = (
    "{% if messages[0].role != 'system' %}{% set messages = [{'role': 'system', 'content': PROMPT}] + messages %}"
    "{% endif %}"
)


def chat_text(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, str]]) -> str:
    """One user turn, as text or as transformers' list of parts, in the model's own chat format, ready for an answer.

    Raises:
        UserError: no chat template, or one that refuses such a chat.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path} has no chat template: give one as model.chat_template, a file or "
            "the Jinja text"
        )
    turn: list[Any] = [{"role": "user", "content": prompt}]
    try:
        return str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a chat template is a program of its own and may raise anything
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} refuses a single user turn ({first_line(error)}): set "
            "model.system_prompt where it asks for one, or give another model.chat_template"
        ) from error


def chat_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of `chat_text`, with no special token added a second time."""
    return tokenizer(chat_text(tokenizer, prompt), add_special_tokens=False)["input_ids"]


def read_plain_text(tokenizer: PreTrainedTokenizerBase, opening: str = "") -> None:
    """Have the chat template show plain text, where it shows text in parts alone.

    Args:
        opening: what to put before the template, such as a system turn.
    """
    own: Any = tokenizer.chat_template
    if not isinstance(own, str):
        return
    for template in (opening + own, opening + IN_PARTS + own):
        tokenizer.chat_template = template
        if _shows_prompt(tokenizer):
            return
    tokenizer.chat_template = opening + own


def set_chat(tokenizer: PreTrainedTokenizerBase, template: str | None, system_prompt: str | None, named: str) -> None:
    """Give the tokenizer a chat template and a system prompt, where they are set, and check that it chats.

    Args:
        template: a file, or the text of a Jinja template.
        named: what errors call the model.

    Raises:
        UserError: no template, a file that is missing, or a template that shows no prompt, or no system prompt.
    """
    if template is not None:
        tokenizer.chat_template = frozen(_template_text(template), named)
    read_plain_text(
        tokenizer, "" if system_prompt is None else SYSTEM_TURN.replace("PROMPT", json.dumps(system_prompt))
    )
    if tokenizer.chat_template is None:
        raise UserError(f"{named} has no chat template: give one as model.chat_template, a file or the Jinja text")
    text = chat_text(tokenizer, PROBE)
    if PROBE not in text:
        raise UserError(
            f"{named}: its chat template does not show the prompt", expected="it to", change="set model.chat_template"
        )
    if system_prompt is not None and system_prompt.strip() not in text:
        raise UserError(f"model.system_prompt: the chat template of {named} does not show it: set model.chat_template")


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template puts behind an answer; None where it puts another text, or nothing."""
    turns = [{"role": "user", "content": PROBE}, {"role": "assistant", "content": ANSWER}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # a chat template is a program of its own and may raise anything
        return None
    ids = tokenizer(text.rpartition(ANSWER)[2].lstrip(), add_special_tokens=False)["input_ids"]
    known = tokenizer.added_tokens_decoder
    return ids[0] if ids and ids[0] in known and known[ids[0]].special else None


def _template_text(template: str) -> str:
    """The text of a template, or of the file that it names."""
    if "{" in template:
        return template
    try:
        refuse_no_file(template)
        return Path(template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"model.chat_template: {template!r} is no Jinja text and cannot be read as a file ({first_line(error)})"
        ) from error


def _shows_prompt(tokenizer: PreTrainedTokenizerBase) -> bool:
    try:
        return PROBE in chat_text(tokenizer, PROBE)
    except UserError:
        return False
