# SPDX-License-Identifier: Apache-2.0
"""Scripted scenarios: what is easily got wrong, each as one script.

Must not know what is right: Linux says it. Specification: inotify(7); docs/oracle.md.
"""

from __future__ import annotations

from tests.oracle.script import Script, parse

_TEXTS = {
    "rename in one directory": """
        mkdir d
        file d/a
        watch d d ALL
        rename d/a d/b
        rename d/b d/c
        rename d/c d/a
    """,
    "rename across two watched directories": """
        mkdir d
        mkdir e
        file d/a
        watch d d ALL
        watch e e ALL
        watch a d/a ALL
        rename d/a e/a
        write e/a
        rename e/a d/b
        write d/b
    """,
    "rename into and out of what is watched": """
        mkdir d
        mkdir u
        file d/a
        watch d d ALL
        rename d/a u/a
        write u/a
        rename u/a d/b
        write d/b
        rename d/b u/a
        rename u/a u/b
    """,
    "rename of a watched file between directories that nobody watches": """
        mkdir u
        mkdir v
        file u/a
        watch a u/a ALL
        rename u/a v/a
        write v/a
        rename v/a v/b
        chmod v/b
        unlink v/b
    """,
    "rename over a watched file": """
        mkdir d
        file d/old
        file d/new
        watch d d ALL
        watch old d/old ALL
        watch new d/new ALL
        rename d/new d/old
        write d/old
        unlink d/old
    """,
    "rename over one of two links": """
        mkdir d
        mkdir e
        file d/old
        link d/old e/other
        file d/new
        watch d d ALL
        watch e e ALL
        watch old d/old ALL
        rename d/new d/old
        write e/other
        unlink e/other
    """,
    "rename onto another link of the same": """
        mkdir d
        file d/a
        link d/a d/b
        watch d d ALL
        watch a d/a ALL
        rename d/a d/b
        unlink d/a
        unlink d/b
    """,
    "exchange of files": """
        mkdir d
        mkdir e
        file d/a
        file e/b
        watch d d ALL
        watch e e ALL
        watch a d/a ALL
        watch b e/b ALL
        exchange d/a e/b
        write d/a
        write e/b
        exchange d/a e/b
    """,
    "exchange of a file and a directory": """
        mkdir d
        mkdir e
        file d/a
        mkdir e/b
        file e/b/x
        watch d d ALL
        watch e e ALL
        watch b e/b ALL
        watch a d/a ALL
        exchange d/a e/b
        write d/a/x
        write e/b
        list d/a
        exchange d/a e/b
    """,
    "exchange with one directory watched": """
        mkdir d
        mkdir u
        file d/a
        file u/b
        watch d d ALL
        exchange d/a u/b
        write d/a
        exchange u/b d/a
    """,
    "directory rename with watches below": """
        mkdir d
        mkdir e
        mkdir d/s
        mkdir d/s/t
        file d/s/t/f
        watch d d ALL
        watch e e ALL
        watch s d/s ALL
        watch t d/s/t ALL
        watch f d/s/t/f ALL
        rename d/s e/r
        write e/r/t/f
        file e/r/new
        chmod e/r
        list e/r/t
        rename e/r/t d/t
        chmod d/t
        write d/t/f
    """,
    "directory rename through what is not watched": """
        mkdir d
        mkdir u
        mkdir d/s
        watch d d ALL
        watch s d/s ALL
        rename d/s u/s
        chmod u/s
        file u/s/f
        rename u/s u/r
        chmod u/r
        rename u/r d/back
        chmod d/back
        rmdir d/back
        unlink d/back/f
        rmdir d/back
    """,
    "directory renamed over an empty one": """
        mkdir d
        mkdir d/a
        mkdir d/b
        watch d d ALL
        watch a d/a ALL
        watch b d/b ALL
        rename d/a d/b
        file d/b/f
        chmod d/b
    """,
    "chain": """
        mkdir d
        mkdir e
        mkdir u
        file d/a
        watch d d ALL
        watch e e ALL
        watch a d/a ALL
        rename d/a d/b
        rename d/b e/c
        rename e/c u/d
        rename u/d d/a
        rename d/a e/a
        write e/a
    """,
    "two names change places": """
        mkdir d
        file d/a
        file d/b
        watch d d ALL
        watch a d/a ALL
        watch b d/b ALL
        rename d/a d/t
        rename d/b d/a
        rename d/t d/b
        write d/a
        write d/b
    """,
    "the end of a file": """
        mkdir d
        file d/f
        watch d d ALL
        watch f d/f ALL
        unlink d/f
        file d/f
        write d/f
    """,
    "the end of a file that is open, to who does not watch its links": """
        mkdir d
        file d/f
        watch d d ALL
        watch f d/f MODIFY|DELETE_SELF
        openr 1 d/f
        unlink d/f
        close 1
    """,
    "two objects renamed to one name, the second from what is not watched": """
        mkdir d
        mkdir u
        file u/x
        file d/a
        watch d d ALL
        rename d/a d/y
        rename u/x d/y
        file d/b
        file u/z
        rename d/b d/y
        exchange u/z d/y
    """,
    "a last link that goes right after a change of its attributes": """
        mkdir d
        file d/f
        watch d d ALL
        watch f d/f ALL
        write d/f
        chmod d/f
        unlink d/f
    """,
    "a name that is a watched file's by the time": """
        mkdir d
        mkdir u
        file u/x
        watch d d ALL
        watch x u/x ALL
        file d/c
        truncate u/x
        write u/x
        rename u/x d/c
    """,
    "the end of hard links": """
        mkdir d
        mkdir u
        file d/f
        link d/f d/g
        link d/f u/h
        watch d d ALL
        watch f d/f ALL
        unlink d/g
        write d/f
        unlink d/f
        write u/h
        link u/h d/f
        unlink u/h
        unlink d/f
    """,
    "the end of a file that is open on the host": """
        mkdir d
        file d/f
        open 1 d/f
        watch d d ALL
        watch f d/f ALL
        unlink d/f
        put 1
        close 1
        file d/f
    """,
    "the end of an empty directory": """
        mkdir d
        mkdir d/s
        watch d d ALL
        watch s d/s ALL
        rmdir d/s
        mkdir d/s
        file d/s/f
    """,
    "the end of a directory that is watched alone": """
        mkdir d
        mkdir d/s
        watch s d/s ALL
        file d/s/f
        unlink d/s/f
        rmdir d/s
    """,
    "the end of a tree": """
        mkdir d
        mkdir d/s
        mkdir d/s/t
        file d/s/f
        file d/s/t/g
        watch d d ALL
        watch s d/s ALL
        watch t d/s/t ALL
        watch g d/s/t/g ALL
        unlink d/s/t/g
        rmdir d/s/t
        unlink d/s/f
        rmdir d/s
    """,
    "a name used again at once by another type": """
        mkdir d
        file d/n
        watch d d ALL
        watch n d/n ALL
        unlink d/n
        mkdir d/n
        chmod d/n
        rmdir d/n
        symlink d/n
        unlink d/n
        fifo d/n
        chmod d/n
        unlink d/n
        file d/n
        write d/n
    """,
    "inode numbers used again at once": """
        mkdir d
        file d/a
        watch d d ALL
        watch a d/a ALL
        unlink d/a
        file d/b
        write d/b
        unlink d/b
        mkdir d/c
        chmod d/c
        rmdir d/c
        file d/a
        write d/a
    """,
    "names by hard links": """
        mkdir d
        mkdir e
        mkdir u
        file d/f
        link d/f e/g
        link d/f u/h
        watch d d ALL
        watch e e ALL
        watch f d/f ALL
        write d/f
        write e/g
        write u/h
        chmod e/g
        truncate u/h
        read d/f
    """,
    "attributes": """
        mkdir d
        file d/f
        mkdir d/s
        symlink d/l
        watch d d ALL
        watch f d/f ALL
        watch s d/s ALL
        chmod d/f
        chown d/f
        utime d/f
        atime d/f
        mtime d/f
        setxattr d/f
        rmxattr d/f
        rmxattr d/f
        chmod d/s
        setxattr d/s
        utime d/s
        chown d/l
        utime d/l
        link d/f d/g
        unlink d/g
    """,
    "content": """
        mkdir d
        file d/f
        file d/g
        watch d d ALL
        watch f d/f ALL
        write d/f
        rewrite d/f
        truncate d/f
        allocate d/f
        copy d/f d/g
        copy d/g d/f
        mapwrite d/f
        read d/f
        list d
        open 1 d/f
        put 1
        get 1
        close 1
        openr 1 d/f
        get 1
        close 1
    """,
    "what is not asked for": """
        mkdir d
        file d/f
        watch d d CREATE|DELETE
        watch f d/f CLOSE_NOWRITE
        write d/f
        read d/f
        list d
        file d/g
        rename d/g d/h
        unlink d/h
        chmod d
    """,
    "only halves are asked for": """
        mkdir d
        mkdir e
        file d/a
        watch d d MOVED_TO
        watch e e MOVED_FROM
        watch a d/a MOVE_SELF
        rename d/a e/a
        rename e/a d/a
        rename d/a d/b
    """,
    "once only": """
        mkdir d
        file d/f
        watch d d ALL|ONESHOT
        watch f d/f ATTRIB|ONESHOT
        chmod d/f
        chmod d/f
        file d/g
    """,
    "directories only": """
        mkdir d
        file d/f
        watch d d ALL|ONLYDIR
        watch f d/f ALL|ONLYDIR
        file d/g
    """,
    "a file without a name that gets one": """
        mkdir d
        mkdir u
        watch d d ALL
        tmplink d/f
        write d/f
        tmplink u/g
        rename u/g d/g
    """,
    "the way editors save": """
        mkdir d
        file d/f
        write d/f
        watch d d CHANGES
        watch f d/f CHANGES
        file d/.f.swp
        write d/.f.swp
        rename d/f d/f~
        file d/f
        write d/f
        chmod d/f
        unlink d/f~
        unlink d/.f.swp
        file d/.new
        write d/.new
        rename d/.new d/f
    """,
    "watches that come and go": """
        mkdir d
        file d/f
        watch d d ALL
        file d/a
        unwatch d
        file d/b
        watch again d CREATE
        file d/c
        unlink d/b
        watch more d ALL
        unlink d/c
        watch f d/f ALL
        write d/f
        unwatch again
        write d/f
    """,
    "a directory that goes where nobody looks, behind its own events": """
        mkdir d
        mkdir u
        mkdir d/s
        file d/s/x
        watch d d CHANGES
        watch s d/s ALL
        rename d/s u/s
        rename u/s/x u/x
        rmdir u/s
        chmod d
    """,
    "a directory that changes, moves and is removed": """
        mkdir u
        mkdir u/s
        mkdir u/s/x
        mkdir u/t
        watch s u/s CHANGES
        chmod u/s
        rmdir u/s/x
        exchange u/s u/t
        rmdir u/t
    """,
    "a directory that changes and is replaced": """
        mkdir u
        mkdir u/s
        mkdir u/t
        watch s u/s CHANGES
        chmod u/s
        rename u/t u/s
    """,
    "a directory that is replaced by one that is removed": """
        mkdir d
        mkdir d/s
        mkdir u
        mkdir u/t
        watch d d ALL
        watch s d/s ALL
        watch t u/t ALL
        rename u/t d/t
        rename d/t d/s
        rmdir d/s
    """,
    "a file that loses a name, is written, and loses its last": """
        mkdir u
        file u/a
        link u/a u/b
        watch a u/a ALL
        unlink u/b
        write u/a
        unlink u/a
    """,
    "a directory that is replaced right after another changed": """
        mkdir d
        mkdir d/n
        mkdir d/u
        mkdir d/n/t
        watch d d CREATE|DELETE_SELF
        watch u d/u CREATE|DELETE_SELF
        sync
        rename d/u d/n/u
        sync
        chmod d/n
        rename d/n/t d/n/u
    """,
    "directories that are removed by one name, one after the other": """
        mkdir d
        mkdir d/s
        mkdir u
        mkdir u/t
        watch d d DELETE
        watch s d/s ALL
        watch t u/t ALL
        rename u/t d/s
        rmdir d/s
    """,
    "renames of one name, one right after the other": """
        mkdir d
        mkdir e
        mkdir u
        file d/a
        file u/b
        watch d d MOVED_FROM
        watch e e MOVED_TO
        exchange d/a u/b
        rename d/a e/c
    """,
    "a name that goes from hand to hand while it is written": """
        mkdir d
        mkdir u
        file d/a
        link d/a u/a
        watch d d ALL
        watch a d/a ALL
        write d/a
        file d/.tmp
        write d/.tmp
        rename d/.tmp d/a
        write d/a
        rename u/a d/a
        write d/a
        file d/.tmp
        rename d/.tmp d/a
        allocate d/a
    """,
    "a file that was opened by a name that is gone": """
        mkdir d
        mkdir u
        file d/a
        watch a d/a OPEN|MODIFY|ATTRIB
        open 1 d/a
        link d/a u/a
        unlink d/a
        unlink u/a
        put 1
        chmod d
    """,
    "a name that others get, for who excludes those that are gone": """
        mkdir d
        file d/b
        watch d d CREATE|MODIFY|CLOSE_WRITE|MOVED_FROM|MOVED_TO|DELETE|EXCL_UNLINK
        file d/y
        copy d/b d/y
        rename d/y d/c
        file d/y
        write d/y
        unlink d/y
        file d/y
        rename d/y d/c
    """,
    "a name that is gone soon, for who does not ask for that": """
        mkdir d
        mkdir u
        file d/a
        file u/a
        watch d d ACCESS|MODIFY|MOVED_TO|EXCL_UNLINK
        rename u/a d/a
        read d/a
        truncate d/a
        write d/a
        unlink d/a
    """,
    "a file that is changed and soon gone, for who excludes names that are": """
        mkdir d
        file d/a
        link d/a d/b
        watch a d/a MODIFY|ATTRIB|EXCL_UNLINK
        truncate d/a
        unlink d/a
    """,
    "files that never had a name, for who excludes those that are gone": """
        mkdir d
        watch d d ALL|EXCL_UNLINK
        tmplink d/a
        write d/a
    """,
    "a directory is removed whose parent is watched for less since": """
        mkdir d1
        mkdir u
        mkdir u/y
        watch y u/y ALL
        watch d d1 ALL
        watch u u ALL
        rmdir u/y
        exchange u d1
        rename u d1/y
        watch u d1 ACCESS|ATTRIB|CREATE|DELETE_SELF
        rmdir d1/y
    """,
    "one replaces a directory where nobody watches for that, and is removed": """
        mkdir p
        mkdir u
        mkdir u/x
        mkdir u/y
        mkdir u/y/z
        watch p p CREATE|DELETE
        watch x u/x ALL
        watch z u/y/z MODIFY
        rename u/y/z u/z
        rename u/x p/x
        rename u/y p/x
        rmdir p/x
    """,
    "a directory wanders, and others that have its name meanwhile are removed": """
        mkdir u
        mkdir u/a
        mkdir u/b
        watch u u ALL
        watch a u/a ALL
        rename u/a u/b/a
        rename u/b/a u/b/b
        rename u/b/b u/a
        rename u/a u/b
        rename u/b u/a
        mkdir u/a/a
        mkdir u/b
        rename u/a u/b/a
        mkdir u/a
        rmdir u/a
        rename u/b/a u/a
        rename u/a u/b/b
        rmdir u/b/b/a
        rename u/b/b u/a
        rmdir u/a
        mkdir u/a
        exchange u/b u/a
    """,
    "a directory leaves a name as another did, after a file had left it": """
        mkdir d0
        mkdir d1
        mkdir d0/n
        mkdir u
        watch w0 u ALL
        rename u d0/y
        file d1/a
        file d1/b
        rename d1/a d0/c
        rename d0/n d0/b
        rename d0/b d0/y/a
        rename d0/y d0/a
        rename d1/b d0/y
        rename d0/a d1/b
        exchange d0/y d1/b/a
        rename d0 d1/b/c
        rename d1/b/c/y d1/b/b
        exchange d1/b/c/c d1/b/b
        rename d1/b/c d1/c
        rename d1/b/a d1/y
        rename d1/y d1/c/a
        rename d1/c/c d1/c/b
        exchange d1/b d1/c
        exchange d1/b d1/c/b
        rename d1/c d1/y
        rename d1/y/b/b d1/y/a
        rename d1/y/a d1/a
        link d1/b d1/y/a
        exchange d1/y/a d1/a
        rename d1/y/a d1/y/y
    """,
    "one comes to a name twice, and once as the end of an exchange": """
        mkdir d0
        mkdir d1
        mkdir d0/n
        mkdir u
        file d0/b
        file d1/x
        watch w0 d0 ALL
        rename d0/n d0/a
        rename d0/a u/b
        exchange u/b d1/x
        rename d0/b d1/x/x
        rename d1/x d0/b
        file d0/x
        exchange d0/x d0/b
        file d0/x/a
        exchange d0/x d0/b
        exchange d0/x d0/b
        rename d0/x/x d0/a
        exchange d0/a d0/x
        exchange d0/a d0/x
        rename d0/x/a d0/a
        rename d0/a d0/x/x
        rename d0/x/x d0/a
        rename d0/a d0/x/a
    """,
    "two come to one name, the second from where nobody watches": """
        mkdir d
        mkdir e
        mkdir u
        mkdir e/b
        mkdir u/b
        watch d d ALL
        watch e e ALL
        watch b u/b ALL
        rename e/b d/b
        rename u/b d/b
        rename d/b u/b
    """,
    "names that are exchanged again and again, and another that comes to one": """
        mkdir d
        mkdir u
        mkdir d/x
        mkdir d/y
        mkdir u/b
        watch d d ALL
        exchange d/x d/y
        exchange d/y d/x
        exchange d/y d/x
        rename u/b d/y
        rename d/y u/c
        rename d/x u/x
    """,
    "a name that goes twice in a row, the second time to another": """
        mkdir d
        mkdir u
        mkdir u/b
        mkdir u/y
        mkdir u/z
        mkdir d/a
        watch d d ALL
        rename u/y d/b
        rename u/z d/b
        rename d/b u/z
        exchange u/b d/a
        rename d/a d/b
        rename d/b u/c
    """,
    "a directory that moved changes after one in it": """
        mkdir d
        mkdir e
        mkdir d/n
        mkdir d/b
        file d/n/b
        watch n d/n ALL
        exchange d/b d/n/b
        exchange d/b d/n
        exchange d/b e
        rename e d/b/b
        chmod d/b/b/b
        chmod d/b/b
        chmod d/b/b/b
        chmod d/b/b
    """,
    "names that come to a directory, and others are written to between": """
        mkdir d
        mkdir u
        mkdir d/n
        mknod d/n/c
        mknod d/n/x
        mknod u/a
        mknod u/b
        watch n d/n ALL
        rename d/n/c d/n/a
        rename u/a d/n/a
        write d/n/x
        rename u/b d/n/a
        unlink d/n/a
    """,
    "names that come to a directory, which moves in between": """
        mkdir d
        mkdir u
        mkdir v
        mkdir d/n
        mknod d/n/c
        mknod u/a
        mknod u/b
        watch n d/n ALL
        rename d/n/c d/n/a
        rename u/a d/n/a
        rename d/n v/n
        rename u/b v/n/a
        rename v/n d/n
        unlink d/n/a
    """,
    "a directory that moved and is removed, with a file open that was in it": """
        mkdir d
        mkdir u
        mkdir d/b
        mkdir u/y
        watch y u/y ALL
        mknod u/y/c
        open 1 u/y/c
        rename u/y d/y
        unlink d/y/c
        rename d/y d/b/x
        rmdir d/b/x
        close 1
    """,
}

SCENARIOS: dict[str, Script] = {name: parse(text) for name, text in _TEXTS.items()}
"""By what they show."""
