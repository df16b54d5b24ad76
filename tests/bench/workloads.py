# SPDX-License-Identifier: Apache-2.0
"""What is measured: for each workload the requests of one operation, and the files that it needs.

Must not know servers or how requests travel. The names are those that docs/performance.md has.
Specification: docs/performance.md, "What is measured".
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tests.bench.ring_load import IN_HEADER_BYTES, OUT_HEADER_BYTES, Copy, Field, FieldKind, Row, Step
from vhostfs.frontend import FuseClient
from vhostfs.frontend import operations as op

FILES = 1000
LISTED = 100
MOST_SLOTS = 16
"""Operations in flight."""
FILE_MIB = 64
KIB = 1024
MIB = 1024 * KIB

_NODEID_IN_REPLY = OUT_HEADER_BYTES
_FH_IN_OPEN_REPLY = OUT_HEADER_BYTES
_ENTRY_BYTES = op.ENTRY_ROOM
_NODEID_IN_HEADER = 16
_OFFSET_IN_READ = 8
_DIRENTPLUS_BYTES = 160
"""With a name of up to 8 bytes."""
_BATCH_FORGET_HEADER_BYTES = 8
_FORGET_ONE_BYTES = 16


def name_of(number: int) -> str:
    return f"f{number:06}"


def prepare(directory: Path) -> None:
    """The files that the workloads use; what is there already is used again."""
    cold = ((f"listed-cold/{name_of(i)}", LISTED) for i in range(MOST_SLOTS))
    for parent, count in (("many", FILES), ("cold", FILES), ("listed", LISTED), *cold):
        (directory / parent).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (directory / parent / name_of(i)).touch()
    (directory / "made").mkdir(exist_ok=True)
    for name in ("read", "written"):
        path = directory / name
        if not path.exists() or path.stat().st_size != FILE_MIB * MIB:
            path.write_bytes(os.urandom(MIB) * FILE_MIB)
        path.read_bytes()  # into the page cache


@dataclass(frozen=True, slots=True)
class Prepared:
    """A workload on a mounted guest."""

    row: Callable[[int], Row]
    fields: Sequence[Field] = ()
    bytes_a_row: int = 0


@dataclass(frozen=True, slots=True)
class Workload:
    """`requests` is how many travel for one operation."""

    name: str
    what: str
    prepare: Callable[[FuseClient], Prepared]
    requests: int = 1


def _names(step: int, count: int, prefix: str = "") -> Field:
    table = [f"{prefix}{name_of(i)}".encode() + b"\0" for i in range(count)]
    return Field(FieldKind.TABLE, step, 0, count, table=table)


def _row(*steps: Step, copies: Sequence[Copy] = ()) -> Callable[[int], Row]:
    return lambda slot: Row(steps, copies)


def _getattr(client: FuseClient) -> Prepared:
    return Prepared(_row(Step(op.getattr_(1))))


def _statfs(client: FuseClient) -> Prepared:
    return Prepared(_row(Step(op.statfs(1))))


def _lookup(client: FuseClient) -> Prepared:
    many = client.walk("many").nodeid
    return Prepared(_row(Step(op.lookup(many, name_of(0)))), [_names(0, FILES)])


def _lookup_cold(client: FuseClient) -> Prepared:
    cold = client.walk("cold").nodeid  # nothing in it is held for another workload
    copies = [Copy(0, _NODEID_IN_REPLY, 1, _NODEID_IN_HEADER)]
    steps = (Step(op.lookup(cold, name_of(0))), Step(op.forget(0)))
    return Prepared(_row(*steps, copies=copies), [_names(0, FILES)])


def _lookup_miss(client: FuseClient) -> Prepared:
    many = client.walk("many").nodeid
    step = Step(op.lookup(many, "no" + name_of(0)), error=errno.ENOENT)
    return Prepared(_row(step), [_names(0, FILES, "no")])


def _open(client: FuseClient) -> Prepared:
    node = client.walk("many/" + name_of(0)).nodeid
    copies = [Copy(0, _FH_IN_OPEN_REPLY, 1, IN_HEADER_BYTES)]
    return Prepared(_row(Step(op.open_(node)), Step(op.release(node, 0)), copies=copies))


def _readdirplus(client: FuseClient) -> Prepared:
    node = client.walk("listed").nodeid
    steps = (
        Step(op.opendir(node)),
        Step(op.readdirplus(node, 0, 0, 32 * KIB)),
        Step(op.releasedir(node, 0)),
    )
    copies = [Copy(0, _FH_IN_OPEN_REPLY, i, IN_HEADER_BYTES) for i in (1, 2)]
    return Prepared(_row(*steps, copies=copies))


def _places_in_listing(client: FuseClient, node: int) -> list[int]:
    """Where the files stand in a listing: "." and "..", which are not to be forgotten, may be anywhere."""
    fh = client.session.call(op.opendir(node)).fh
    found = client.session.call(op.readdirplus(node, fh, 0, 32 * KIB))
    client.session.call(op.releasedir(node, fh))
    places = [i for i, one in enumerate(found) if one.dirent.name not in (b".", b"..")]
    client.session.call(op.batch_forget([(found[i].entry.nodeid, 1) for i in places]))
    return places


def _readdirplus_cold(client: FuseClient) -> Prepared:
    """A directory for each slot. Raises ValueError where the same names are not in the same order in each."""
    nodes = [client.walk(f"listed-cold/{name_of(i)}").nodeid for i in range(MOST_SLOTS)]
    places = _places_in_listing(client, nodes[0])
    if any(_places_in_listing(client, node) != places for node in nodes):
        raise ValueError("this file system lists the same names in another order in each directory")

    def row(slot: int) -> Row:
        # In one piece, for the nodeids to be found in it.
        listing = replace(op.readdirplus(nodes[slot], 0, 0, 32 * KIB), reply_room=32 * KIB, data_room=0)
        steps = (
            Step(op.opendir(nodes[slot])),
            Step(listing),
            Step(op.releasedir(nodes[slot], 0)),
            Step(op.batch_forget([(0, 1)] * len(places))),
        )
        handles = [Copy(0, _FH_IN_OPEN_REPLY, i, IN_HEADER_BYTES) for i in (1, 2)]
        to = IN_HEADER_BYTES + _BATCH_FORGET_HEADER_BYTES
        nodeids = [
            Copy(1, OUT_HEADER_BYTES + place * _DIRENTPLUS_BYTES, 3, to + i * _FORGET_ONE_BYTES)
            for i, place in enumerate(places)
        ]
        return Row(steps, [*handles, *nodeids])

    return Prepared(row)


def _create(client: FuseClient) -> Prepared:
    made = client.walk("made").nodeid

    def row(slot: int) -> Row:
        name = f"{os.getpid()}-{slot}"
        steps = (
            Step(op.create(made, name)),
            Step(op.write(0, 0, bytes(4 * KIB))),
            Step(op.release(0, 0)),
            Step(op.unlink(made, name)),
            Step(op.forget(0)),
        )
        nodeids = [Copy(0, _NODEID_IN_REPLY, i, _NODEID_IN_HEADER) for i in (1, 2, 4)]
        handles = [Copy(0, OUT_HEADER_BYTES + _ENTRY_BYTES, i, IN_HEADER_BYTES) for i in (1, 2)]
        return Row(steps, [*nodeids, *handles])

    return Prepared(row)


def _reader(size: int, kind: FieldKind) -> Callable[[FuseClient], Prepared]:
    def prepared(client: FuseClient) -> Prepared:
        node = client.walk("read").nodeid
        fh = client.session.call(op.open_(node)).fh
        field = Field(kind, 0, _OFFSET_IN_READ, FILE_MIB * MIB // size, size)
        return Prepared(_row(Step(op.read(node, fh, size))), [field], size)

    return prepared


def _writer(size: int) -> Callable[[FuseClient], Prepared]:
    def prepared(client: FuseClient) -> Prepared:
        node = client.walk("written").nodeid
        fh = client.session.call(op.open_(node, os.O_RDWR)).fh
        field = Field(FieldKind.SEQUENTIAL, 0, _OFFSET_IN_READ, FILE_MIB * MIB // size, size)
        return Prepared(_row(Step(op.write(node, fh, bytes(size)))), [field], size)

    return prepared


WORKLOADS = (
    Workload("getattr", "GETATTR of the root", _getattr),
    Workload("statfs", "STATFS", _statfs),
    Workload("lookup", f"LOOKUP of {FILES} names in turn, all known", _lookup),
    Workload("lookup_cold", "LOOKUP and FORGET, so that each is new", _lookup_cold, 2),
    Workload("lookup_miss", "LOOKUP of names that are not there", _lookup_miss),
    Workload("open", "OPEN, RELEASE", _open, 2),
    Workload("readdirplus", f"OPENDIR, READDIRPLUS of {LISTED} known entries, RELEASEDIR", _readdirplus, 3),
    Workload(
        "readdirplus_cold",
        f"OPENDIR, READDIRPLUS of {LISTED} entries, RELEASEDIR, FORGET of all, so that each is new",
        _readdirplus_cold,
        4,
    ),
    Workload("create", "CREATE, WRITE of 4 KiB, RELEASE, UNLINK, FORGET", _create, 5),
    Workload("randread4k", "READ of 4 KiB at random", _reader(4 * KIB, FieldKind.RANDOM)),
    Workload("seqread128k", "READ of 128 KiB in order", _reader(128 * KIB, FieldKind.SEQUENTIAL)),
    Workload("seqread1m", "READ of 1 MiB in order", _reader(MIB, FieldKind.SEQUENTIAL)),
    Workload("seqwrite128k", "WRITE of 128 KiB in order", _writer(128 * KIB)),
    Workload("seqwrite1m", "WRITE of 1 MiB in order", _writer(MIB)),
)
