"""Shared machinery of the studies: a cache keyed by settings, worker processes, and storage after every job.

A study fills one table, data/NAME.json, and its tensors, data/NAME.safetensors. A job returns one or more rows of one
of the table's lists; it is skipped if its rows are stored with the current settings. A measurement is an entry of the
table that is measured as a whole. Chapters read the files, so that their format must not change.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import apd_minimal as apd
from apd_minimal.config import Config, Schedule

DATA = Path(__file__).resolve().parent.parent / "data"
Job = tuple[Any, ...]
Row = dict[str, Any]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Rows:
    """A list of a table.

    Attributes:
        fields: names of a row's fields whose values, in this order, are the job.
        jobs: lists all jobs, given the stored rows: which runs are reported may depend on the results of a search.
        run: runs a job, on one thread of a worker process; returns its rows without `fields` and settings, and tensors.
        settings: maps a job to its settings, which are stored in its rows; when they change, the job is run again. None
            if the job determines everything.
        order: maps a job to the sort key of its rows.
    """

    fields: tuple[str, ...]
    jobs: Callable[[list[Row]], Sequence[Job]]
    run: Callable[[Any], tuple[list[Row], Tensors]]
    settings: Callable[[Any], Row] | None = None
    order: Callable[[Any], Any] = lambda job: job

    def job_of(self, row: Row) -> Job:
        """Return the job that a row comes from."""
        return tuple(tuple(v) if isinstance(v, list) else v for v in (row[name] for name in self.fields))

    def complete(self, job: Job, row: Row) -> Row:
        """Add a row's job and settings, as JSON stores them."""
        settings = {"settings": self.settings(job)} if self.settings else {}
        stored: Row = json.loads(json.dumps({**dict(zip(self.fields, job, strict=True)), **row, **settings}))
        return stored

    def kept(self, rows: list[Row]) -> list[Row]:
        """Keep the rows whose job still exists and was run with the current settings."""
        jobs, today = set(self.jobs(rows)), {}
        for job in jobs & set(map(self.job_of, rows)):
            today[job] = _comparable(self.complete(job, {}))
        return [row for row in rows if today.get(self.job_of(row)) == _comparable(row)]


def completed(settings: dict[str, Any]) -> dict[str, Any]:
    """Give settings as they were stored the defaults of fields that came into `Config` since then.

    Args:
        settings: fields of `Config`, and others, which are kept.

    Returns:
        dict[str, Any]: as JSON has it.
    """
    own = {f.name for f in fields(Config)} & set(settings)
    config = Config.from_dict({name: settings[name] for name in own})
    return settings | json.loads(json.dumps(asdict(config)))


def _comparable(row: Row) -> Row:
    """Complete a row's settings with the defaults of fields that `Config` has gained since they were stored."""
    settings = row.get("settings", {})
    return completed(settings) if {"n_components", "top_k"} <= set(settings) else settings


def _work(run: Callable[[Job], tuple[list[Row], Tensors]], job: Job) -> tuple[Job, list[Row], Tensors]:
    torch.set_num_threads(1)
    return job, *run(job)


@dataclass(frozen=True)
class Study:
    """A table, and how it is computed.

    Attributes:
        name: of the files in data/.
        lists: lists of the table by name; computed in this order.
        measurements: functions by name in the table; each measures the whole entry.
        about: facts about the run, given the number of processes.
        prefixes: maps a job to the prefixes of its tensors' names.
        compact: write JSON without spaces.
        folder: of the files.
    """

    name: str
    lists: dict[str, Rows]
    measurements: dict[str, Callable[[], Any]] = field(default_factory=dict)
    about: Callable[[int], Row] = lambda processes: {}
    prefixes: Callable[[Any], tuple[str, ...]] = lambda job: (prefix(job),)
    compact: bool = False
    folder: Path = DATA

    @property
    def table(self) -> Path:
        """Path of the JSON table."""
        return self.folder / f"{self.name}.json"

    @property
    def arrays(self) -> Path:
        """Path of the tensors, if there are any."""
        return self.folder / f"{self.name}.safetensors"

    def stored(self) -> Row:
        """Read the table from its file."""
        return json.loads(self.table.read_text()) if self.table.exists() else {"about": {}}

    def read(self) -> tuple[Row, Tensors]:
        """Read the table and the tensors, without results made with other than the current settings."""
        table = self.stored()
        table |= {name: rows.kept(table.get(name, [])) for name, rows in self.lists.items()}
        jobs = {rows.job_of(row) for name, rows in self.lists.items() for row in table[name]}
        starts = {start for job in jobs for start in self.prefixes(job)}
        tensors = load_file(self.arrays) if self.arrays.exists() else {}
        return table, {name: t for name, t in tensors.items() if name.startswith(tuple(starts))}

    def write(self, table: Row, tensors: Tensors, processes: int) -> None:
        """Write both files and the manifest; the tensors first, since the table lists what is stored."""
        if tensors:
            save_file(tensors, _part(self.arrays))
            _part(self.arrays).replace(self.arrays)
        about = {"torch": str(torch.__version__), "threads": 1, **self.about(processes)}
        style: dict[str, Any] = {"separators": (",", ":")} if self.compact else {"indent": 1}
        _part(self.table).write_text(json.dumps(table | {"about": about}, **style) + "\n")
        _part(self.table).replace(self.table)  # at once: a worker may be reading it
        write_manifest(self.folder)

    def add(self, name: str, job: Job, results: list[Row], new_tensors: Tensors, processes: int) -> None:
        """Add a job's results to the files as they are now: another command may have added its own."""
        rows, (table, tensors) = self.lists[name], self.read()
        new = [rows.complete(job, row) for row in results]
        table[name] = [row for row in table[name] if rows.job_of(row) != job] + new
        table[name].sort(key=lambda row: rows.order(rows.job_of(row)))
        self.write(table, tensors | new_tensors, processes)

    def todo(self, name: str, only: Iterable[str] | None = None, again: bool = False) -> list[Job]:
        """List the jobs whose results are missing, in all groups or in `only`; all jobs if `again`."""
        rows, table = self.lists[name], self.read()[0]
        done = set() if again else set(map(rows.job_of, table[name]))
        selected = [job for job in rows.jobs(table[name]) if only is None or {name, str(job[0])} & set(only)]
        return [job for job in selected if job not in done]

    def choices(self) -> list[str]:
        """List what can be made alone: parts of the table if there are several, and the first fields of jobs."""
        parts = [*self.lists, *self.measurements]
        groups = [job[0] for rows in self.lists.values() for job in rows.jobs([]) if isinstance(job[0], str)]
        return list(dict.fromkeys([*(parts if len(parts) > 1 else []), *groups]))

    def main(self, doc: str | None) -> None:
        """Make what is missing, from the command line, and write the files after each job.

        Args:
            doc: description of the study, for `--help`.
        """
        parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        parts = ", ".join(self.choices()).replace("%", "%%")  # argparse fills in what a % announces
        parser.add_argument("--only", nargs="+", choices=self.choices(), metavar="PART", help=parts)
        parser.add_argument("--processes", type=int, default=2, help="jobs at a time, each on one thread")
        parser.add_argument("--again", action="store_true", help="run jobs that are stored as well")
        options = parser.parse_args()
        torch.set_num_threads(1)
        with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
            for name, rows in self.lists.items():
                tried: set[Job] = set()
                while todo := [job for job in self.todo(name, options.only, options.again) if job not in tried]:
                    print(f"{self.name}, {name}: {len(todo)} jobs", flush=True)
                    for job, results, new_tensors in pool.imap_unordered(partial(_work, rows.run), todo):
                        self.add(name, job, results, new_tensors, options.processes)
                        tried.add(job)
                        print(*job, *map(_in_short, results), flush=True)
        for name, measure in self.measurements.items():
            chosen = options.only is None or name in options.only
            if chosen and (options.again or not self.stored().get(name)):
                print(f"{self.name}, {name}", flush=True)
                value = measure()  # before the files are read: it takes long, and they may change meanwhile
                table, tensors = self.read()
                self.write(table | {name: value}, tensors, options.processes)


def _part(path: Path) -> Path:
    """Name the file that is written before it takes the place of `path`."""
    return path.with_name(path.name + ".part")


def _in_short(row: Row) -> str:
    """Summarise a row for the progress output."""
    facts = {name: row[name] for name in ("owned", "seconds") if name in row}
    return str({name: sum(v) if isinstance(v, list) else v for name, v in facts.items()})


def prefix(job: Job) -> str:
    """Build the default prefix of the names of a job's tensors."""
    return "/".join(map(str, job)) + "/"


def write_manifest(folder: Path = DATA) -> None:
    """Store the hash of every artefact, by which a fetched copy is checked."""
    own = [p.name for p in folder.iterdir() if p.suffix != ".part"]
    names = sorted(name for name in own if name not in ("manifest.json", "README.md"))
    hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    (folder / "manifest.json").write_text(json.dumps(hashes, indent=1) + "\n")


def numbers(recipe: Row, **more: Any) -> Row:
    """Extract the settings from the arguments of `decompose`, with defaults filled in, and add further ones."""
    names, arguments = {f.name for f in fields(apd.Config)}, recipe | more
    extra = {name: value for name, value in more.items() if name not in names}
    return extra | asdict(apd.Config.from_dict({name: value for name, value in arguments.items() if name in names}))


def scaled(schedule: Schedule, factor: float) -> Schedule:
    """Multiply a number or a schedule by a factor."""
    if isinstance(schedule, tuple):
        return tuple((t, factor * value) for t, value in schedule)
    return factor * schedule


def taken_apart(target: nn.Module, recipe: Row, **more: Any) -> tuple[apd.Decomposition, float]:
    """Run `decompose`, and return its result and the CPU seconds."""
    start = time.process_time()
    result = apd.decompose(target, progress=False, **{**recipe, **more})
    return result, round(time.process_time() - start, 1)


def factors(components: apd.Components, start: str, dtype: torch.dtype = torch.float32) -> Tensors:
    """Collect the factors of the nonzero components, by name."""
    kept = components.subset((components.norms() > 0).nonzero().flatten().tolist())
    both = (("A", kept.A), ("B", kept.B))
    return {f"{start}{path}.{f}": t.to(dtype).contiguous() for f, own in both for path, t in own.items()}


@cache
def stored(study: str) -> Tensors:
    """Load all tensors of a study."""
    return load_file(DATA / f"{study}.safetensors")


def of(study: str, start: str) -> tuple[apd.Components, Tensors]:
    """Load the components `start`path.A, .B of a study, and the tensors of the target under that name."""
    found = {name.removeprefix(start): t for name, t in stored(study).items() if name.startswith(start)}
    A, B = ({n.removesuffix(f".{f}"): t.float() for n, t in found.items() if n.endswith(f".{f}")} for f in "AB")
    return apd.Components(A, B), {n.removeprefix("target."): t for n, t in found.items() if n.startswith("target.")}


def ownership_lists(own: apd.metrics.Ownership) -> Row:
    """Give what was measured for each true mechanism: whether it is owned, and the three measures behind that."""
    names = ("owned", "cosine", "length_ratio", "purity")
    return {name: getattr(own, name).tolist() for name in names}


def ownership_means(own: apd.metrics.Ownership) -> Row:
    """Count the owned mechanisms, and average cosine, length ratio and purity."""
    means = {name: getattr(own, name).mean().item() for name in ("cosine", "length_ratio", "purity")}
    return {"owned": int(own.owned.sum()), **means}


def scrubbing_means(errors: apd.metrics.Scrubbing) -> Row:
    """Average the errors with the active components, scrubbed, and anti-scrubbed."""
    return {f"{name}_error": getattr(errors, name).mean().item() for name in ("top_k", "scrubbed", "anti_scrubbed")}
