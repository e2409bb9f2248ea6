"""The script that makes a shell complete `nspo`, so that no Python starts at every key.

Command: `nspo completion bash`.
"""

import sys

from nspo.errors import UserError


def show_completion(shell: str) -> None:
    """Print the script for `shell`.

    Raises:
        UserError: for a shell that is not known.
    """
    import shtab

    from nspo.cli.main import whole_parser

    if shell not in shtab.SUPPORTED_SHELLS:
        raise UserError(f"completion {shell}", expected=f"one of {', '.join(shtab.SUPPORTED_SHELLS)}")
    sys.stdout.write(shtab.complete(whole_parser(), shell))
