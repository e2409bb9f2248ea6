"""The activation store on disk: what `collect` writes, and what every later question about inputs reads.

    manifest.json                          model, data, settings, sites, tokens of every part, norms of the base weights
    raw/site=NAME/part-000.parquet         one row per kept token
    moments/site=NAME/part-000.parquet     one row per row of the second moment S = sum_n k_n k_n^T, packed

Part n is the chunk at place n of the manifest's `parts`; a domain and split has one or several. Both folders are
partitioned by site. The folder of a site is a Parquet dataset (`pyarrow.dataset.dataset("activations/raw/site=NAME")`),
and so is all of `moments`; raw sites of different widths differ in schema. S is symmetric, so its row i holds only the
d - i values from the diagonal on; moments of different parts add up. They are summed in float64 and stored as float32
(relative error 6e-8, below the rounding of the forward pass). Pages carry checksums, so a damaged file is noticed.
Equal inputs give equal bytes. Reading a second moment takes one (d, d) float64 matrix and, of moments, the packed half.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from nspo.errors import UserError
from nspo.files.manifest import MANIFEST_NAME, check_manifest, read_json
from nspo.models.structure.sites import Site
from nspo.nullspace.moments import add_second_moment, mirror, unpack, upper_blocks

HARMFUL, BENIGN, IMAGE = "harmful", "benign", "image"  # the domains that do not come from general tasks
QUEUE = 8  # tables of raw rows that wait for the thread that writes them
READ_VALUES = 2**22  # values read at a time
LABEL = pa.dictionary(pa.int8(), pa.string())


def part_file(store: Path, site: str, storage: str, index: int) -> Path:
    """Where part `index` of a site lies; `storage` is `raw` or `moments`."""
    return store / storage / f"site={site}" / f"part-{index:03d}.parquet"


class PartWriter:
    """Writes one part's files of some sites: rows as they come, moments when the `with` block ends without an error.

    Rows are encoded and written by a thread, while the model goes on; at most `QUEUE` tables wait for it.
    """

    def __init__(
        self,
        store: Path,
        index: int,
        domain: str,
        split: str,
        sites: Sequence[Site],
        storage: Mapping[str, str],
        device: torch.device,
    ):
        """Open the files of part `index`; `storage` says `raw` or `moments` for every site name."""
        self.labels = {"domain": domain, "split": split}
        self.paths = {site.name: part_file(store, site.name, storage[site.name], index) for site in sites}
        for path in self.paths.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        self.tokens = {site.name: 0 for site in sites}
        self.moments = {
            site.name: torch.zeros(site.width, site.width, dtype=torch.float64, device=device)
            for site in sites
            if storage[site.name] == "moments"
        }
        self.writers = {
            site.name: _open(self.paths[site.name], _raw_schema(site.width))
            for site in sites
            if storage[site.name] == "raw"
        }
        self.thread = ThreadPoolExecutor(max_workers=1)  # one, so that batches keep their order
        self.queue: deque[Future[None]] = deque()

    def add(self, site: Site, rows: Tensor, about: Mapping[str, Tensor]) -> None:
        """Take one batch of a site's inputs.

        Args:
            rows: (n, d) float32.
            about: `sample`, `position`, `token` (integers) and `is_answer` (bool) of every row, (n,) each, on the CPU.
        """
        self.tokens[site.name] += len(rows)
        if not len(rows):
            return
        if site.name in self.moments:
            add_second_moment(self.moments[site.name], rows)
            return
        schema = _raw_schema(site.width)
        columns = {name: pa.array(column.numpy(), schema.field(name).type) for name, column in about.items()}
        values = pa.array(rows.cpu().numpy().ravel())
        columns["activation"] = pa.FixedSizeListArray.from_arrays(values, site.width)
        table = self._table(columns, len(rows), schema)
        self.queue.append(self.thread.submit(self.writers[site.name].write_table, table))
        if len(self.queue) > QUEUE:
            self.queue.popleft().result()

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.thread.shutdown()
        for writer in self.writers.values():
            writer.close()
        if kind is None:
            for written in self.queue:
                written.result()
            for name, total in self.moments.items():
                self._write_moment(name, total)

    def _write_moment(self, name: str, total: Tensor) -> None:
        width = len(total)
        with _open(self.paths[name], MOMENT_SCHEMA) as writer:
            for rows, mask in upper_blocks(width, total.device):
                numbers = range(width)[rows]
                offsets = [0, *itertools.accumulate(width - row for row in numbers)]
                values = pa.array(total[rows][mask].float().cpu().numpy())
                columns = {
                    "tokens": pa.array([self.tokens[name]] * len(numbers), pa.int64()),
                    "row": pa.array(numbers, pa.int32()),
                    "values": pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values),
                }
                writer.write_table(self._table(columns, len(numbers), MOMENT_SCHEMA))

    def _table(self, columns: Mapping[str, pa.Array], length: int, schema: pa.Schema) -> pa.Table:
        zeros = pa.array(np.zeros(length, np.int8))
        labels = {name: pa.DictionaryArray.from_arrays(zeros, pa.array([text])) for name, text in self.labels.items()}
        return pa.Table.from_pydict({**labels, **columns}, schema=schema)


class ActivationStore:
    """A finished store: which sites, domains and tokens it has, and their second moments.

    Attributes:
        manifest: the store's identity, as `collect` wrote it.
        sites: site name -> `Site`, in model order.
    """

    def __init__(self, path: Path | str):
        """Open the folder that `collect` wrote.

        Raises:
            UserError: no manifest there, one of another kind or schema, or a missing data file.
        """
        self.path = Path(path)
        self.manifest = read_json(self.path / MANIFEST_NAME)
        check_manifest(self.manifest, "activations", self.path)
        sites = self.manifest["sites"]
        # JSON sorts its keys, so every site carries its place in the model.
        names = sorted(sites, key=lambda name: sites[name]["place"])
        self.sites = {
            name: Site(name, tuple(sites[name]["layers"]), sites[name]["width"], sites[name].get("share", 1.0))
            for name in names
        }
        self._parts: dict[tuple[str, str], list[int]] = {}  # domain and split -> places in the manifest
        for index, part in enumerate(self.manifest["parts"]):
            self._parts.setdefault((part["domain"], part["split"]), []).append(index)
        for site, index in itertools.product(self.sites, range(len(self.manifest["parts"]))):
            if not self._file(site, index).is_file():
                raise UserError(
                    f"{self._file(site, index)} does not exist, but {MANIFEST_NAME} lists it: collect again"
                )

    def domains(self, split: str) -> list[str]:
        """Domains with inputs in `split` (`basis` or `validation`), `harmful` and `benign` included if collected."""
        return [domain for domain, of in self._parts if of == split]

    def tokens(self, domain: str, split: str) -> int:
        """How many tokens were kept.

        Raises:
            UserError: when the store has no such domain in this split.
        """
        return sum(int(self.manifest["parts"][index]["tokens"]) for index in self._indices(domain, split))

    def gram(
        self,
        site: str,
        split: str,
        domains: Iterable[str] | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> tuple[Tensor, int]:
        """G = K K^T / N of one site: sum_d w_d S_d / sum_d w_d N_d over domains d.

        Args:
            split: `basis` or `validation`.
            domains: which to add up; None takes all but `harmful`: the inputs to protect.
            weights: w_d, how much every token of a domain counts; 1 where none is given.

        Returns:
            G (d, d) float64, symmetric, on the CPU; and the number of tokens behind it, unweighted: for an expert those
            that were routed to it (none: G is zero).

        Raises:
            UserError: an unknown site, domain or split, weights that are all zero, or a damaged file.
        """
        if site not in self.sites:
            raise UserError(
                f"{self.path} has no site {site!r}", expected=f"one of {', '.join(list(self.sites)[:4])}, ..."
            )
        names = [d for d in self.domains(split) if d != HARMFUL] if domains is None else list(domains)
        if not names:
            raise UserError(f"{self.path}: no domain in split {split!r} to sum up", expected="at least one")
        weight = dict.fromkeys(names, 1.0) | dict(weights or {})
        if unknown := sorted(weight.keys() - set(names)):
            raise UserError(f"{self.path}: weights name {', '.join(unknown)}", expected=f"only {', '.join(names)}")
        if all(weight[domain] * self.tokens(domain, split) == 0 for domain in names):
            raise UserError(
                f"bases.weights: all of {', '.join(names)} weigh 0", expected="one above 0", change="raise one"
            )
        parts = [(index, weight[domain]) for domain in names for index in self._indices(domain, split)]
        add = self._sum_rows if self._storage(site) == "raw" else self._sum_moments
        total, counts = add(site, parts)
        mirror(total)
        weighted = sum(count * weight for count, (_, weight) in zip(counts, parts, strict=True))
        return total.div_(weighted or 1.0), sum(counts)

    def _sum_rows(self, site: str, parts: Sequence[tuple[int, float]]) -> tuple[Tensor, list[int]]:
        """sum w S over parts (place, w) of a raw site, on and above the diagonal: (d, d) float64; and their tokens."""
        width = self.sites[site].width
        total, counts = torch.zeros(width, width, dtype=torch.float64), []
        for index, weight in parts:
            with self._reading(site, index, "activation") as (file, batches):
                for values in batches:
                    add_second_moment(total, values.view(-1, width).double(), weight)
                counts.append(file.metadata.num_rows)
        return total, counts

    def _sum_moments(self, site: str, parts: Sequence[tuple[int, float]]) -> tuple[Tensor, list[int]]:
        """The same for a site of moments."""
        width = self.sites[site].width
        packed, counts = torch.zeros(width * (width + 1) // 2, dtype=torch.float64), []
        for index, weight in parts:
            with self._reading(site, index, "values") as (file, batches):
                start = 0
                for values in batches:
                    packed[start : start + len(values)].add_(values, alpha=weight)
                    start += len(values)
                if start != len(packed):
                    raise ValueError(f"{start} values, expected {len(packed)}")
                counts.append(file.read_row_group(0, columns=["tokens"])["tokens"][0].as_py())
        total = torch.zeros(width, width, dtype=torch.float64)
        unpack(packed, total)
        return total, counts

    def _indices(self, domain: str, split: str) -> list[int]:
        if (domain, split) not in self._parts:
            known = ", ".join(f"{d} ({s})" for d, s in self._parts)
            raise UserError(f"{self.path} has no domain {domain!r} in split {split!r}", expected=f"one of {known}")
        return self._parts[domain, split]

    def _storage(self, site: str) -> str:
        return str(self.manifest["sites"][site]["storage"])

    def _file(self, site: str, index: int) -> Path:
        return part_file(self.path, site, self._storage(site), index)

    @contextmanager
    def _reading(self, site: str, index: int, column: str) -> Iterator[tuple[pq.ParquetFile, Iterator[Tensor]]]:
        """The file of one part, and the numbers in a column of lists, float32, a bounded number at a time."""
        path, rows = self._file(site, index), max(1, READ_VALUES // self.sites[site].width)
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                batches = file.iter_batches(batch_size=rows, columns=[column])
                yield file, (torch.tensor(batch[column].flatten().to_numpy()) for batch in batches)
        except (pa.ArrowException, OSError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path} is damaged ({reason}): delete {self.path} and collect again") from error


def _raw_schema(width: int) -> pa.Schema:
    columns = [("domain", LABEL), ("split", LABEL), ("sample", pa.int32()), ("position", pa.int32())]
    columns += [("token", pa.int32()), ("is_answer", pa.bool_()), ("activation", pa.list_(pa.float32(), width))]
    return pa.schema(columns)


MOMENT_SCHEMA = pa.schema(
    [
        ("domain", LABEL),
        ("split", LABEL),
        ("tokens", pa.int64()),
        ("row", pa.int32()),
        ("values", pa.list_(pa.float32())),
    ]
)


def _open(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """Floats barely repeat: no dictionary or statistics for them, bytes split by significance: exponents compress."""
    floats = "activation" if "activation" in schema.names else "values"
    plain = [name for name in schema.names if name != floats]
    return pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        compression_level=1,
        use_dictionary=plain,
        write_statistics=plain,
        use_byte_stream_split=[f"{floats}.list.element"],
        write_page_checksum=True,
    )
