"""Chat templates that read the clock or roll dice: the same prompts for every model, whenever it is asked.

transformers gives a template the function `strftime_now`, by which Llama 3.2 and others put today's date into every
prompt. A template is loaded with a fixed date in its place: the one that Llama's own falls back to without a clock.
"""

import re
from datetime import UTC, datetime
from typing import Any

from nspo.errors import UserError

DATE = datetime(2024, 7, 26, tzinfo=UTC)
CLOCK = "strftime_now"
DIRECTIVES = "aAbBcdDefFGHIjmMpRSTuUVwWxXyYzZ"
CHANCE = re.compile(r"\|\s*random\b|\blipsum\b")  # what Jinja has of it


def frozen(template: Any, named: str) -> Any:
    """A tokenizer's chat template (or several by name, or None) with `DATE` for the date of today.

    Raises:
        UserError: for a template that draws random numbers; called `named`.
    """
    if isinstance(template, dict):
        return {name: frozen(text, named) for name, text in template.items()}
    if not isinstance(template, str):
        return template
    if CHANCE.search(template):
        raise UserError(f"{named}: its chat template draws random numbers", expected="the same prompt every time")
    return _clock() + template if CLOCK in template and _clock() not in template else template


def date_of(template: Any) -> str | None:
    """The date that a template from `frozen` shows for today; None where it asks for none."""
    texts = template.values() if isinstance(template, dict) else [template]
    return f"{DATE:%Y-%m-%d}" if any(isinstance(text, str) and _clock() in text for text in texts) else None


def _clock() -> str:
    """A macro in the place of `strftime_now`, which knows what every directive gives on `DATE`."""
    known = [f"%{flag}{letter}" for letter in DIRECTIVES for flag in ("-", "")]
    steps = "".join(f" | replace({directive!r}, {DATE.strftime(directive)!r})" for directive in known)
    # The empty expression keeps a line break at the start of the template, which the end of a block would take away.
    return f"{{%- macro {CLOCK}(format) -%}}{{{{ format{steps} | replace('%%', '%') }}}}{{%- endmacro -%}}{{{{ '' }}}}"
