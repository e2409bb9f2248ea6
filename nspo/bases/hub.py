"""The Hugging Face hub: download a file of bases, upload it; whatever goes wrong on the way is one line.

The token is the hub's own (`hf auth login`, or HF_TOKEN), never a setting of ours.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from nspo.errors import UserError

FILE_NAME = "bases.safetensors"
LOG_IN = "log in (`hf auth login`, or HF_TOKEN)"
REASONS: tuple[tuple[type[Exception], str], ...] = (  # the first that fits
    (GatedRepoError, f"is gated: ask for access on its page, then {LOG_IN}"),
    (RepositoryNotFoundError, f"was not found, or is private: check ORG/NAME, or {LOG_IN}"),
    (RevisionNotFoundError, "has no such revision: check REVISION"),
    (RemoteEntryNotFoundError, f"holds no {FILE_NAME}, expected a repository that `nspo bases push` wrote"),
    (OfflineModeIsEnabled, "cannot be reached: unset HF_HUB_OFFLINE"),
    (LocalEntryNotFoundError, "cannot be reached, and the cache has no copy: check the network and HF_HUB_OFFLINE"),
    (HFValidationError, "is not the name of a repository, expected ORG/NAME"),
)


def download(repo: str, revision: str | None = None) -> Path:
    """The bases file of a repository, in the hub's cache; `revision` is a commit, tag or branch, by default `main`.

    Raises:
        UserError: the hub cannot be reached, or has no such repository, revision or file for this login.
    """
    with one_line(repo):
        return Path(hf_hub_download(repo, FILE_NAME, revision=revision, library_name="nspo"))


def upload(repo: str, files: Mapping[str, Path], private: bool = False) -> str:
    """Publish `files`, by their names in the repository, with one commit; returns the commit's address.

    Raises:
        UserError: the hub cannot be reached or refuses, or `private` is asked for in a repository that is public.
    """
    api = HfApi(library_name="nspo", library_version=version("nspo"))
    with one_line(repo):
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise UserError(
                f"hub repository {repo} is public", expected="a private one", change="make it private, or push openly"
            )
        operations = [CommitOperationAdd(name, path) for name, path in files.items()]
        return api.create_commit(repo, operations, commit_message="Null-space bases").commit_url


@contextmanager
def one_line(repo: str) -> Iterator[None]:
    """Turn what the hub's client raises into a `UserError` that names the repository."""
    try:
        yield
    except tuple(kind for kind, _ in REASONS) as error:
        reason = next(reason for kind, reason in REASONS if isinstance(error, kind))
        raise UserError(f"hub repository {repo} {reason}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = _flat(error.server_message or error.response.reason_phrase)
        remedy = f"{LOG_IN} with a token that may write there" if status in (401, 403) else "try again later"
        raise UserError(f"hub repository {repo}: the hub answers {status} ({said}): {remedy}") from error
    except HTTPError as error:
        raise UserError(f"hub repository {repo} cannot be reached ({_flat(str(error))}): check the network") from error
    except ValueError as error:  # the client's word for a card that the hub refuses, an unknown licence for one
        raise UserError(f"hub repository {repo}: {_flat(str(error))}: change the licence") from error


def _flat(text: str) -> str:
    return " ".join(text.split())
