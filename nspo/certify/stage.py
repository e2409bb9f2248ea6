"""The certificate of a saved model, as a stage. Command: `nspo verify --base A --tuned B --bases FILE --out FILE`."""

from pathlib import Path
from typing import Any

from nspo.activations.store import ActivationStore
from nspo.bases.file import NullSpaceBases
from nspo.certify.certificate import verify
from nspo.files.manifest import write_json


def write_certificate(
    out: Path,
    base: Path,
    tuned: Path,
    bases: NullSpaceBases,
    store: ActivationStore | None = None,
    workdir: Path | None = None,
    **facts: Any,
) -> dict[str, Any]:
    """Certify `tuned`, add `facts` (such as `method` and `constrained`), write it to `out` as JSON, and return it.

    Raises:
        UserError: as `verify`.
    """
    certificate = {**verify(base, tuned, bases, store, workdir), **facts}
    write_json(out, certificate)
    return certificate
