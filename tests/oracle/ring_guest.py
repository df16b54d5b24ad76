# SPDX-License-Identifier: Apache-2.0
"""A guest at the ring whose one inotify group is a model: what its watchers get for the elements that come.

The model is section 8 of docs/protocol.md and nothing more; it knows where a directory is from what it looked
up and from the elements since. Must not know what is right.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
from dataclasses import dataclass

from tests.limits import HANG_S
from tests.oracle.native import without_number
from tests.oracle.streams import BY_PATH, In, Seen, event_words
from tests.ring.events import NOTIFYING
from tests.ring.share import Share
from vhostfs.frontend import NotificationQueue
from vhostfs.frontend.fsnotify import ALL_EVENTS, Element, ElementFlag, Event, Granted

Key = tuple[int, int]
"""nodeid and generation."""
_ENTRY = Event.CREATE | Event.DELETE | Event.MOVED_FROM | Event.MOVED_TO
_SELF = Event.DELETE_SELF | Event.MOVE_SELF
_WANTED = Granted.VIRTQUEUE | Granted.RENAME | Granted.CHILD | Granted.PARENT
_FENCE = ".fence"
_BUSY = ".busy"


@dataclass(slots=True)
class _Watch:
    name: str
    mask: In


class RingGuest:
    """Looks paths up anew for each watch, as a guest that caches no names, and holds what it found."""

    def __init__(self, share: Share, buffers: int) -> None:
        self._path = share.path
        self._fs = share.mount(NOTIFYING)
        self._notifications = NotificationQueue(self._fs.vmm, buffers=buffers, poison=False)
        self._fs.root = 1
        entry = self._fs.walk(share.relative)
        self._fs.root = entry.nodeid
        self._fs.fsnotify_init(_WANTED, ALL_EVENTS)
        self._root: Key = entry.nodeid, entry.generation
        self._counts: dict[Key, int] = {}
        self._places: dict[Key, tuple[Key, bytes]] = {}
        self._watches: dict[Key, _Watch] = {}
        self._watched_as: dict[str, Key] = {}
        self._fences = itertools.count()
        (self._path / _FENCE).mkdir()
        fence = self._fs.lookup(self._root[0], _FENCE)
        self._fs.watch(fence.nodeid, Event.CREATE, fence.generation)
        self._fence: Key = fence.nodeid, fence.generation
        (self._path / _BUSY).mkdir()
        self._busy = self._fs.lookup(self._root[0], _BUSY).nodeid
        self._elements: list[Element] = []

    # ---- what it holds and watches ---------------------------------------------------------------------

    def look(self, path: str) -> tuple[Key, bool]:
        """Looks up each component; the object, and whether it is a directory. Raises OSError."""
        at, is_dir, is_link = self._root, True, False
        for part in path.split("/"):
            if part == ".":
                continue
            if is_link:
                raise FileNotFoundError(errno.ENOENT, "a symlink of a script leads nowhere", path)
            entry = self._fs.lookup(at[0], part)
            found = entry.nodeid, entry.generation
            self._counts[found] = self._counts.get(found, 0) + 1
            self._places[found] = at, part.encode()
            at, is_dir, is_link = found, stat.S_ISDIR(entry.attr.mode), stat.S_ISLNK(entry.attr.mode)
        return at, is_dir

    def forget(self) -> None:
        """Gives up all that no watch needs: not what is watched, and not the directories above it."""
        kept = {self._root}
        for key in self._watches:
            at: Key | None = key
            while at is not None and at not in kept:
                kept.add(at)
                at = self._places[at][0] if at in self._places else None
        for key in [key for key in self._counts if key not in kept]:
            self._fs.forget(key[0], self._counts.pop(key))
            self._places.pop(key, None)

    def watch(self, name: str, path: str, mask: In) -> int:
        """The errno of inotify_add_watch(2)."""
        try:
            key, is_dir = self.look(path)
            if mask & In.ONLYDIR and not is_dir:
                return errno.ENOTDIR
            # The driver always asks for the end: it is the watch's, too.
            wanted = int(mask & (In.ALL | In.EXCL_UNLINK) | In.DELETE_SELF)
            wanted |= int(Event.EVENT_ON_CHILD) if is_dir else 0
            self._fs.watch(key[0], wanted, key[1])
        except OSError as error:
            assert error.errno is not None
            return error.errno
        watch = self._watches.setdefault(key, _Watch(name, mask))
        watch.mask = mask
        self._watched_as[name] = key
        return 0

    def unwatch(self, name: str) -> None:
        """Nothing when the watch has ended."""
        key = self._watched_as.pop(name, None)
        if key in self._watches:
            self._end(key)

    def _end(self, key: Key) -> None:
        del self._watches[key]
        # A watch of it that is made later is another, whatever names this one had.
        self._watched_as = {name: other for name, other in self._watched_as.items() if other != key}
        self._fs.watch(key[0], 0, key[1])

    # ---- what it does itself ---------------------------------------------------------------------------

    def busy(self) -> None:
        """Events of many kinds on the host, by the server, that no watcher is to be told of."""
        fs, at = self._fs, self._busy
        entry, opened = fs.create(at, "a")
        fs.write(entry.nodeid, opened.fh, b"text")
        fs.read(entry.nodeid, opened.fh, 4)
        fs.release(entry.nodeid, opened.fh)
        fs.setattr(entry.nodeid, mode=0o600, size=1)
        fs.rename(at, "a", at, "b")
        fs.read_file(entry.nodeid)
        fs.list(at)
        fs.forget(fs.mkdir(at, "c").nodeid)
        fs.rmdir(at, "c")
        fs.unlink(at, "b")
        fs.forget(entry.nodeid)

    # ---- what it is told -------------------------------------------------------------------------------

    def stall(self) -> None:
        """Gives no buffer back from now on, until `resume`."""
        self._notifications.give_back = False

    def resume(self) -> None:
        self._notifications.give_back = True
        self._notifications.give_back_all()

    def read(self) -> list[Seen]:
        """What its watchers get for all that happened on the host before now. TimeoutError: it is cut off."""
        self._elements = self.take()
        seen: list[Seen] = []
        for element in self._elements:
            for event in self._raised(element):
                seen += event
        return seen

    def explained(self) -> list[str]:
        """The elements of the last `read`, for whoever looks for the cause."""
        return ["elements:", *(f"  {self._described(element)}" for element in self._elements)]

    def _described(self, element: Element) -> str:
        words = f"{event_words(element.mask)} {self._called(element.nodeid, element.generation)}"
        if element.name:
            words += f"[{os.fsdecode(element.name)}]"
        if element.child_nodeid:
            words += f"={self._called(element.child_nodeid, element.child_generation)}"
        return f"{words} cookie {element.cookie} flags {int(element.flags)}" if element.cookie else words

    def _called(self, nodeid: int, generation: int) -> str:
        names = [name for name, key in self._watched_as.items() if key == (nodeid, generation)]
        return f"{'/'.join(names) or 'unwatched'}({nodeid:x}.{generation})"

    def take(self) -> list[Element]:
        """All elements for what happened on the host before now."""
        # One queue, in order: what comes before an event made for this is all. A loss may be of that event.
        taken: list[Element] = []
        while True:
            wanted = str(next(self._fences)).encode()
            (self._path / _FENCE / os.fsdecode(wanted)).mkdir()
            before, last = self._notifications.until(
                lambda element, wanted=wanted: (  # type: ignore[misc]
                    bool(element.mask & Event.Q_OVERFLOW)
                    or ((element.nodeid, element.generation) == self._fence and element.name == wanted)
                ),
                HANG_S,
            )
            taken += [e for e in before if (e.nodeid, e.generation) != self._fence]
            if not last.mask & Event.Q_OVERFLOW:
                return taken
            taken.append(last)

    def _raised(self, element: Element) -> list[list[Seen]]:
        kind = element.mask & ~Event.ISDIR
        if kind == Event.Q_OVERFLOW:
            return [[Seen("", In.Q_OVERFLOW)]]
        key: Key = element.nodeid, element.generation
        child: Key = element.child_nodeid, element.child_generation
        if kind & _SELF:
            # inotify has never had ISDIR with these.
            return [self._delivered(key, In(kind))]
        words = In(element.mask)
        if element.flags & ElementFlag.UNLINKED:
            words |= In.EXCL_UNLINK
        if kind & _ENTRY:
            raised = [self._delivered(key, words, element.name, element.cookie)]
            self._follow(kind, key, element.name, child)
            return raised
        if element.name:
            return [self._delivered(key, words, element.name), self._delivered(child, words)]
        parent = self._places.get(key) if element.flags & ElementFlag.FOR_PARENT else None
        above = self._delivered(parent[0], words, parent[1]) if parent is not None else []
        return [above, self._delivered(key, words)]

    def _delivered(self, key: Key, mask: In, name: bytes = b"", cookie: int = 0) -> list[Seen]:
        watch = self._watches.get(key)
        if watch is None:
            return []
        if not watch.mask & mask & In.ALL:
            if not mask & In.DELETE_SELF:
                return []
            self._end(key)
            return [Seen(watch.name, In.IGNORED)]
        if watch.mask & mask & In.EXCL_UNLINK and mask & BY_PATH:
            return []
        mask &= ~In.EXCL_UNLINK
        seen = [Seen(watch.name, mask, without_number(os.fsdecode(name)), cookie)]
        if mask & In.DELETE_SELF or watch.mask & In.ONESHOT:
            self._end(key)
            seen.append(Seen(watch.name, In.IGNORED))
        return seen

    def _follow(self, kind: Event, directory: Key, name: bytes, child: Key) -> None:
        place = directory, name
        # Whatever it had by this name is elsewhere now, as its dentry is invalid.
        for other in [key for key, at in self._places.items() if at == place]:
            del self._places[other]
        if kind & (Event.CREATE | Event.MOVED_TO) and child in self._counts:
            self._places[child] = place
