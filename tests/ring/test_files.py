# SPDX-License-Identifier: Apache-2.0
"""Open files: create, read, write, truncate, sync, sparse files, copied ranges, deleted-but-open, ioctl.

Must not test locks or xattrs. Specification: fuse.h, open(2), fallocate(2), copy_file_range(2), lseek(2).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import random
import select
import stat
import struct
import termios

import pytest

from tests.ring.conftest import MakeShare
from tests.ring.share import Share, refused
from vhostfs.frontend import FuseClient
from vhostfs.frontend import fuse_abi as abi
from vhostfs.frontend import operations as op

FALLOC_KEEP_SIZE = 1
FALLOC_PUNCH_HOLE = 2
FALLOC_COLLAPSE_RANGE = 8
FALLOC_ZERO_RANGE = 16
FALLOC_INSERT_RANGE = 32
MIB = 1 << 20


def test_create_opens_what_it_makes(share: Share, fs: FuseClient) -> None:
    entry, opened = fs.create(fs.root, "a", os.O_RDWR, 0o640)
    assert fs.write(entry.nodeid, opened.fh, b"hello") == 5
    assert fs.read(entry.nodeid, opened.fh, 100) == b"hello"
    assert stat.S_IMODE((share.path / "a").stat().st_mode) == 0o640
    assert entry.attr.size == 0


def test_exclusive_create_refuses_what_exists(share: Share, fs: FuseClient) -> None:
    (share.path / "a").write_text("host")
    with refused(errno.EEXIST):
        fs.create(fs.root, "a", os.O_RDWR | os.O_EXCL)
    assert (share.path / "a").read_text() == "host"


def test_create_without_excl_opens_what_exists(share: Share, fs: FuseClient) -> None:
    (share.path / "a").write_text("host")
    entry, opened = fs.create(fs.root, "a", os.O_RDWR)
    assert fs.read(entry.nodeid, opened.fh, 10) == b"host"
    entry, _ = fs.create(fs.root, "a", os.O_RDWR | os.O_TRUNC)
    assert (share.path / "a").read_text() == ""
    assert entry.attr.size == 0


def test_create_does_not_follow_a_symlink(share: Share, fs: FuseClient) -> None:
    (share.path / "link").symlink_to("target")
    with refused(errno.EEXIST, errno.ELOOP, errno.ENXIO, errno.EBADF, errno.ESTALE):
        fs.create(fs.root, "link", os.O_RDWR)
    assert not (share.path / "target").exists()


def test_content_written_is_content_read_in_any_pieces(share: Share, fs: FuseClient) -> None:
    rng = random.Random(7)
    content = rng.randbytes(3 * MIB + 123)
    entry = fs.write_file(fs.root, "a", content)
    assert (share.path / "a").read_bytes() == content
    fh = fs.open(entry.nodeid).fh
    for _ in range(40):
        offset, size = rng.randrange(len(content) + 10), rng.choice((1, 511, 4096, 70_001, MIB))
        assert fs.read(entry.nodeid, fh, size, offset) == content[offset : offset + size]


def test_random_writes_land_where_they_should(share: Share, fs: FuseClient) -> None:
    rng = random.Random(11)
    entry, opened = fs.create(fs.root, "a")
    expected = bytearray(2 * MIB)
    for _ in range(60):
        data = rng.randbytes(rng.choice((1, 100, 4096, 65_537)))
        offset = rng.randrange(len(expected) - len(data))
        assert fs.write(entry.nodeid, opened.fh, data, offset) == len(data)
        expected[offset : offset + len(data)] = data
    fs.setattr(entry.nodeid, size=len(expected))
    assert hashlib.sha256((share.path / "a").read_bytes()).digest() == hashlib.sha256(expected).digest()


def test_requests_of_one_mebibyte_go_through_whole(share: Share, fs: FuseClient) -> None:
    content = os.urandom(MIB)
    entry, opened = fs.create(fs.root, "a")
    assert fs.write(entry.nodeid, opened.fh, content) == MIB
    assert fs.read(entry.nodeid, opened.fh, MIB) == content


def test_reading_at_and_beyond_the_end_is_short_or_empty(fs: FuseClient) -> None:
    entry = fs.write_file(fs.root, "a", b"12345")
    fh = fs.open(entry.nodeid).fh
    assert fs.read(entry.nodeid, fh, 100, 3) == b"45"
    assert fs.read(entry.nodeid, fh, 100, 5) == b""
    assert fs.read(entry.nodeid, fh, 100, 1 << 40) == b""


def test_reading_at_an_impossible_offset_is_einval(fs: FuseClient) -> None:
    entry = fs.write_file(fs.root, "a", b"12345")
    fh = fs.open(entry.nodeid).fh
    with refused(errno.EINVAL, errno.EOVERFLOW):
        fs.read(entry.nodeid, fh, 10, (1 << 64) - 1)


def test_an_empty_write_changes_nothing(fs: FuseClient) -> None:
    entry, opened = fs.create(fs.root, "a")
    assert fs.write(entry.nodeid, opened.fh, b"") == 0
    assert fs.getattr(entry.nodeid).size == 0


def test_what_the_guest_writes_the_host_reads_and_back(share: Share, fs: FuseClient) -> None:
    entry, opened = fs.create(fs.root, "a")
    fs.write(entry.nodeid, opened.fh, b"guest")
    assert (share.path / "a").read_bytes() == b"guest"
    (share.path / "a").write_bytes(b"host!")
    assert fs.read(entry.nodeid, opened.fh, 10) == b"host!"


def test_append_goes_to_the_end_whatever_the_offset(share: Share, fs: FuseClient) -> None:
    (share.path / "a").write_text("host")
    entry = fs.lookup(fs.root, "a")
    fh = fs.open(entry.nodeid, os.O_WRONLY | os.O_APPEND).fh
    with open(share.path / "a", "a") as host:
        host.write(" more")
    flags = os.O_WRONLY | os.O_APPEND
    fs.write(entry.nodeid, fh, b" guest", 0, flags=flags)
    assert (share.path / "a").read_text() == "host more guest"


def test_open_with_truncation_empties_the_file(share: Share, fs: FuseClient) -> None:
    entry = fs.write_file(fs.root, "a", b"12345")
    fs.open(entry.nodeid, os.O_WRONLY | os.O_TRUNC)
    assert (share.path / "a").read_bytes() == b""


def test_open_modes_are_kept(fs: FuseClient) -> None:
    entry = fs.write_file(fs.root, "a", b"12345")
    reader = fs.open(entry.nodeid, os.O_RDONLY).fh
    writer = fs.open(entry.nodeid, os.O_WRONLY).fh
    with refused(errno.EBADF):
        fs.write(entry.nodeid, reader, b"x")
    with refused(errno.EBADF):
        fs.read(entry.nodeid, writer, 1)


def test_flags_that_make_no_sense_for_a_server_do_no_harm(fs: FuseClient) -> None:
    entry = fs.write_file(fs.root, "a", b"12345")
    for flags in (os.O_NOFOLLOW, os.O_CREAT, os.O_EXCL | os.O_CREAT, os.O_NOCTTY, os.O_NONBLOCK, os.O_SYNC):
        fh = fs.open(entry.nodeid, os.O_RDONLY | flags).fh
        assert fs.read(entry.nodeid, fh, 10) == b"12345"
        fs.release(entry.nodeid, fh)


@pytest.mark.parametrize("kind", [stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR], ids=["fifo", "socket", "tty"])
def test_a_special_file_is_never_opened_on_the_host(
    fs: FuseClient, kind: int, needs_root: None, ours: None
) -> None:
    """Opening a FIFO would hang the server, a device would act on the host."""
    entry = fs.mknod(fs.root, "a", kind | 0o666, 5 << 8 if kind == stat.S_IFCHR else 0)
    with refused(errno.ENXIO, errno.EINVAL, errno.EPERM):
        fs.open(entry.nodeid, os.O_RDWR)


def test_opening_a_symlink_or_directory_as_a_file_is_refused(fs: FuseClient) -> None:
    link = fs.symlink(fs.root, "link", "/etc/passwd")
    with refused(errno.ELOOP, errno.ENXIO, errno.EINVAL, errno.EBADF):
        fs.open(link.nodeid)
    directory = fs.mkdir(fs.root, "dir")
    with refused(errno.EISDIR):
        fs.open(directory.nodeid, os.O_RDWR)


def test_handles_are_good_for_their_own_file_only(fs: FuseClient, ours: None) -> None:
    a, file_a = fs.create(fs.root, "a")
    b, file_b = fs.create(fs.root, "b")
    directory = fs.opendir(fs.root)
    assert len({file_a.fh, file_b.fh, directory.fh}) == 3
    for nodeid, fh in (
        (a.nodeid, file_b.fh),
        (b.nodeid, file_a.fh),
        (fs.root, file_a.fh),
        (a.nodeid, directory.fh),
    ):
        with refused(errno.EBADF):
            fs.read(nodeid, fh, 10)
    for fh in (0xFFFF_FFFF_FFFF_FFFF, 1 << 40, file_a.fh + 1000):
        with refused(errno.EBADF):
            fs.read(a.nodeid, fh, 10)


def test_a_released_handle_is_gone_and_not_given_again(fs: FuseClient, ours: None) -> None:
    entry, opened = fs.create(fs.root, "a")
    fs.release(entry.nodeid, opened.fh)
    with refused(errno.EBADF):
        fs.read(entry.nodeid, opened.fh, 10)
    with refused(errno.EBADF):
        fs.release(entry.nodeid, opened.fh)
    assert fs.open(entry.nodeid).fh != opened.fh


def test_flush_and_fsync_answer(fs: FuseClient) -> None:
    entry, opened = fs.create(fs.root, "a")
    fs.write(entry.nodeid, opened.fh, b"x")
    fs.flush(entry.nodeid, opened.fh)
    fs.fsync(entry.nodeid, opened.fh)
    fs.fsync(entry.nodeid, opened.fh, data_only=True)


def test_statfs_is_the_host_s(share: Share, fs: FuseClient) -> None:
    found, host = fs.statfs(fs.root), os.statvfs(share.path)
    assert (found.blocks, found.files) == (host.f_blocks, host.f_files)
    assert (found.bsize, found.frsize, found.namelen) == (host.f_bsize, host.f_frsize, host.f_namemax)
    assert abs(found.bfree - host.f_bfree) < host.f_blocks // 10 + 1


def test_syncfs_answers(fs: FuseClient, ours: None) -> None:
    fs.write_file(fs.root, "a", b"x")
    fs.syncfs(fs.root)


# ---- deleted, unnamed ----


def test_a_deleted_file_is_usable_while_it_is_open(share: Share, fs: FuseClient) -> None:
    entry, opened = fs.create(fs.root, "a")
    fs.write(entry.nodeid, opened.fh, b"before")
    fs.unlink(fs.root, "a")
    fs.write(entry.nodeid, opened.fh, b" after", 6)
    assert fs.read(entry.nodeid, opened.fh, 100) == b"before after"
    fs.fsync(entry.nodeid, opened.fh)
    again = fs.open(entry.nodeid)
    assert fs.read(entry.nodeid, again.fh, 100) == b"before after"
    fs.setattr(entry.nodeid, fh=opened.fh, size=3)
    assert fs.read(entry.nodeid, again.fh, 100) == b"bef"
    assert os.listdir(share.path) == []


def test_a_file_deleted_on_the_host_is_usable_while_it_is_open(share: Share, fs: FuseClient) -> None:
    entry = fs.write_file(fs.root, "a", b"content")
    fh = fs.open(entry.nodeid, os.O_RDWR).fh
    (share.path / "a").unlink()
    assert fs.read(entry.nodeid, fh, 100) == b"content"
    fs.write(entry.nodeid, fh, b"CON")
    assert fs.read(entry.nodeid, fh, 100) == b"CONtent"


def test_tmpfile_has_no_name_until_it_is_linked(share: Share, fs: FuseClient, ours: None) -> None:
    entry, opened = fs.tmpfile(fs.root, mode=0o640)
    assert stat.S_IMODE(entry.attr.mode) == 0o640
    assert entry.attr.nlink == 0
    fs.write(entry.nodeid, opened.fh, b"unnamed")
    assert os.listdir(share.path) == []
    linked = fs.link(entry.nodeid, fs.root, "named")
    assert linked.nodeid == entry.nodeid
    assert (share.path / "named").read_bytes() == b"unnamed"


def test_tmpfile_with_excl_can_never_be_linked(fs: FuseClient, ours: None) -> None:
    entry, _ = fs.tmpfile(fs.root, os.O_RDWR | os.O_EXCL)
    with refused(errno.ENOENT):
        fs.link(entry.nodeid, fs.root, "named")


# ---- sparse files and ranges ----


def test_holes_and_data_are_found(share: Share, fs: FuseClient) -> None:
    entry, opened = fs.create(fs.root, "a")
    fs.write(entry.nodeid, opened.fh, b"d" * 4096, MIB)
    fs.setattr(entry.nodeid, size=2 * MIB)
    host = os.open(share.path / "a", os.O_RDONLY)
    for offset, whence in ((0, os.SEEK_DATA), (0, os.SEEK_HOLE), (MIB, os.SEEK_HOLE), (MIB, os.SEEK_DATA)):
        assert fs.lseek(entry.nodeid, opened.fh, offset, whence) == os.lseek(host, offset, whence)
    assert fs.lseek(entry.nodeid, opened.fh, 0, os.SEEK_DATA) == MIB
    for offset, whence in ((MIB + 4096, os.SEEK_DATA), (2 * MIB, os.SEEK_DATA), (3 * MIB, os.SEEK_HOLE)):
        with refused(errno.ENXIO):
            fs.lseek(entry.nodeid, opened.fh, offset, whence)
    os.close(host)


def test_lseek_to_the_end_and_with_a_bad_whence(fs: FuseClient) -> None:
    entry = fs.write_file(fs.root, "a", b"12345")
    fh = fs.open(entry.nodeid).fh
    assert fs.lseek(entry.nodeid, fh, 0, os.SEEK_END) == 5
    with refused(errno.EINVAL):
        fs.lseek(entry.nodeid, fh, 0, 99)


def test_seeking_does_not_disturb_reads_and_writes(fs: FuseClient) -> None:
    entry, opened = fs.create(fs.root, "a")
    fs.write(entry.nodeid, opened.fh, b"0123456789")
    fs.lseek(entry.nodeid, opened.fh, 5, os.SEEK_HOLE)
    fs.write(entry.nodeid, opened.fh, b"X", 0)
    assert fs.read(entry.nodeid, opened.fh, 100) == b"X123456789"


def test_fallocate_reserves_and_grows(share: Share, fs: FuseClient) -> None:
    entry, opened = fs.create(fs.root, "a")
    fs.fallocate(entry.nodeid, opened.fh, 0, 0, 100_000)
    assert fs.getattr(entry.nodeid).size == 100_000
    assert (share.path / "a").stat().st_blocks * 512 >= 100_000
    fs.fallocate(entry.nodeid, opened.fh, FALLOC_KEEP_SIZE, 100_000, 100_000)
    assert fs.getattr(entry.nodeid).size == 100_000


def test_fallocate_punches_zeroes_collapses_and_inserts(share: Share, fs: FuseClient) -> None:
    block = share.path.stat().st_blksize
    content = b"".join(bytes([65 + i]) * block for i in range(8))
    entry = fs.write_file(fs.root, "a", content)
    fh = fs.open(entry.nodeid, os.O_RDWR).fh
    expected = bytearray(content)
    fs.fallocate(entry.nodeid, fh, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, block, block)
    expected[block : 2 * block] = bytes(block)
    fs.fallocate(entry.nodeid, fh, FALLOC_ZERO_RANGE, 3 * block + 1, 10)
    expected[3 * block + 1 : 3 * block + 11] = bytes(10)
    fs.fallocate(entry.nodeid, fh, FALLOC_COLLAPSE_RANGE, 4 * block, block)
    del expected[4 * block : 5 * block]
    fs.fallocate(entry.nodeid, fh, FALLOC_INSERT_RANGE, 2 * block, block)
    expected[2 * block : 2 * block] = bytes(block)
    assert (share.path / "a").read_bytes() == bytes(expected)


def test_fallocate_refuses_nonsense(fs: FuseClient) -> None:
    entry, opened = fs.create(fs.root, "a")
    with refused(errno.EINVAL):
        fs.fallocate(entry.nodeid, opened.fh, 0, 0, 0)
    with refused(errno.EINVAL, errno.EOPNOTSUPP):
        fs.fallocate(entry.nodeid, opened.fh, FALLOC_PUNCH_HOLE, 0, 4096)
    with refused(errno.EINVAL, errno.EOPNOTSUPP):
        fs.fallocate(entry.nodeid, opened.fh, 0x8000_0000, 0, 4096)
    with refused(errno.EINVAL, errno.EFBIG):
        fs.fallocate(entry.nodeid, opened.fh, 0, 1 << 63, 4096)


def test_copy_file_range_copies_within_the_share(share: Share, fs: FuseClient) -> None:
    content = os.urandom(300_000)
    a = fs.write_file(fs.root, "a", content)
    b, to = fs.create(fs.root, "b")
    fh = fs.open(a.nodeid).fh
    done = 0
    while done < 200_000:
        done += fs.copy_file_range(a.nodeid, fh, 50_000 + done, (b.nodeid, to.fh), 10 + done, 200_000 - done)
    assert (share.path / "b").read_bytes() == bytes(10) + content[50_000:250_000]


def test_copy_file_range_64_answers_with_64_bits(share: Share, fs: FuseClient, ours: None) -> None:
    content = os.urandom(100_000)
    a = fs.write_file(fs.root, "a", content)
    b, to = fs.create(fs.root, "b")
    fh = fs.open(a.nodeid).fh
    assert fs.copy_file_range_64(a.nodeid, fh, 0, (b.nodeid, to.fh), 0, 1 << 33) == 100_000
    assert (share.path / "b").read_bytes() == content


def test_copy_file_range_refuses_flags_and_foreign_handles(fs: FuseClient, ours: None) -> None:
    a, file_a = fs.create(fs.root, "a")
    b, file_b = fs.create(fs.root, "b")
    with refused(errno.EINVAL):
        fs.copy_file_range(a.nodeid, file_a.fh, 0, (b.nodeid, file_b.fh), 0, 10, flags=1)
    with refused(errno.EBADF):
        fs.copy_file_range(a.nodeid, file_a.fh, 0, (b.nodeid, file_a.fh), 0, 10)
    with refused(errno.EBADF):
        fs.copy_file_range(a.nodeid, file_b.fh, 0, (b.nodeid, file_b.fh), 0, 10)


# ---- ioctl, poll, what is not there ----


def test_an_ioctl_of_a_terminal_is_enotty(fs: FuseClient) -> None:
    entry, opened = fs.create(fs.root, "a")
    with refused(errno.ENOTTY, errno.ENOSYS):
        fs.ioctl(entry.nodeid, opened.fh, termios.TCGETS, out_size=60)


def test_an_ioctl_is_never_passed_on_blindly(share: Share, fs: FuseClient, ours: None) -> None:
    """FIFREEZE, FS_IOC_SHUTDOWN and their like would act on the host's file system as root."""
    entry, opened = fs.create(fs.root, "a")
    freeze, shutdown, trim, clone, encryption = 0xC0045877, 0x8004587D, 0xC0185879, 0x40049409, 0x800C6613
    for command in (freeze, shutdown, trim, clone, encryption):
        with refused(errno.ENOTTY):
            fs.ioctl(entry.nodeid, opened.fh, command, bytes(64), 64)
    (share.path / "alive").write_text("x")


def test_the_inode_flags_ioctl_is_answered_or_refused(fs: FuseClient, ours: None) -> None:
    entry, opened = fs.create(fs.root, "a")
    get_flags = 0x80086601
    try:
        reply = fs.ioctl(entry.nodeid, opened.fh, get_flags, out_size=4)
    except OSError as error:
        number = error.errno
        assert number in (errno.ENOTTY, errno.EOPNOTSUPP)
    else:
        assert reply.result == 0
        assert len(reply.data) == 4


def test_a_guest_cannot_make_the_host_s_files_immutable(share: Share, fs: FuseClient, ours: None) -> None:
    """Not even the host's root could change or delete them then."""
    entry, opened = fs.create(fs.root, "a")
    set_flags, immutable = 0x40086602, 0x10
    with refused(errno.EPERM, errno.ENOTTY, errno.EOPNOTSUPP):
        fs.ioctl(entry.nodeid, opened.fh, set_flags, struct.pack("<I", immutable))
    (share.path / "a").unlink()


def test_an_ioctl_whose_sizes_lie_is_refused(fs: FuseClient, ours: None) -> None:
    entry, opened = fs.create(fs.root, "a")
    for command, in_size, out_size in ((0x40086602, 4, 0), (0x80086601, 0, 4), (0x401C5820, 28, 0)):
        for wrong in (in_size + 1, 1 << 20, 0xFFFFFFFF):
            args = struct.pack("<QIIQII", opened.fh, 0, command, 0, wrong, out_size)
            with refused(errno.EINVAL, errno.ENOTTY, errno.EIO, errno.EFAULT):
                fs.call(op.raw(abi.Opcode.IOCTL, entry.nodeid, args + bytes(in_size)))


def test_poll_of_a_regular_file_says_ready_or_leaves_it_to_the_guest(fs: FuseClient) -> None:
    """ENOSYS makes the guest answer by itself from then on, with "ready"."""
    entry, opened = fs.create(fs.root, "a")
    wanted = select.POLLIN | select.POLLOUT
    try:
        ready = fs.poll(entry.nodeid, opened.fh, wanted)
    except OSError as error:
        assert error.errno == errno.ENOSYS
    else:
        assert ready & wanted == wanted


@pytest.mark.parametrize("opcode", [7, 19, 37, 41, 48, 49, 54, 4096, 0x5803, 0x7FFFFFFF, 0xFFFFFFFF, 0])
def test_an_unknown_opcode_is_enosys(fs: FuseClient, opcode: int) -> None:
    with refused(errno.ENOSYS, errno.EOPNOTSUPP):
        fs.call(op.raw(opcode, args=bytes(64)))


def test_many_files_are_open_at_once(share: Share, fs: FuseClient) -> None:
    files = []
    for i in range(300):
        entry, opened = fs.create(fs.root, str(i))
        fs.write(entry.nodeid, opened.fh, str(i).encode())
        files.append((entry.nodeid, opened.fh))
    for i, (nodeid, fh) in enumerate(files):
        assert fs.read(nodeid, fh, 10) == str(i).encode()
        fs.release(nodeid, fh)


def test_too_many_open_files_is_an_error_and_passes(make_share: MakeShare, ours: None) -> None:
    share = make_share(private=True, descriptor_limit=256)
    fs = share.mount()
    entry = fs.write_file(fs.root, "a", b"x")
    handles = []
    with refused(errno.ENFILE, errno.EMFILE):
        for _ in range(400):
            handles.append(fs.open(entry.nodeid).fh)
    assert len(handles) > 50
    assert fs.getattr(entry.nodeid).size == 1
    (share.path / "b").write_text("host")
    assert fs.lookup(fs.root, "b").attr.size == 4
    for fh in handles:
        fs.release(entry.nodeid, fh)
    assert fs.read_file(entry.nodeid) == b"x"


def test_copying_onto_itself_and_overlapping_is_the_host_s_answer(fs: FuseClient) -> None:
    entry = fs.write_file(fs.root, "a", b"0123456789")
    fh = fs.open(entry.nodeid, os.O_RDWR).fh
    with refused(errno.EINVAL):
        fs.copy_file_range(entry.nodeid, fh, 0, (entry.nodeid, fh), 2, 5)


def test_files_opened_for_the_host_s_locks_stay_usable(share: Share, fs: FuseClient) -> None:
    """A lease or lock of the host on the file must not stop the server."""
    entry = fs.write_file(fs.root, "a", b"x")
    with open(share.path / "a", "r+b") as host:
        fcntl.flock(host, fcntl.LOCK_EX)
        fh = fs.open(entry.nodeid, os.O_RDWR).fh
        assert fs.write(entry.nodeid, fh, b"y", write_flags=abi.WRITE_LOCKOWNER) == 1
