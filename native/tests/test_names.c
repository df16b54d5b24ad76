/* SPDX-License-Identifier: Apache-2.0 */
/* Operations on names and attributes, and whose the objects are that they make. */
#include <grp.h>
#include <limits.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <sys/xattr.h>

#include "share.h"

/* ---- objects that the guest makes --------------------------------------- */

static void create_is_atomic_and_opens_nothing_but_files(struct guest *g)
{
	uint64_t fh, other, id;

	CHECK_EQ(create(g, 1, "c", O_RDWR | O_CREAT | O_EXCL, S_IFREG | 0666, 027, &fh), 0);
	id = entry(g)->nodeid;
	CHECK_EQ(entry(g)->attr.mode, S_IFREG | 0640);
	CHECK_EQ(stats(g).open_files, 1);
	CHECK_EQ(create(g, 1, "c", O_RDWR | O_CREAT | O_EXCL, 0666, 0, &other), -EEXIST);
	CHECK_EQ(create(g, 1, "c", O_RDWR | O_CREAT, 0666, 0, &other), 0);
	CHECK_EQ(entry(g)->nodeid, id);
	release(g, id, fh);
	release(g, id, other);
	CHECK_EQ(symlinkat("c", host_fd, "l"), 0);
	CHECK_EQ(mkfifoat(host_fd, "p", 0666), 0);
	CHECK_EQ(mkdirat(host_fd, "dir", 0755), 0);
	CHECK_EQ(create(g, 1, "l", O_RDWR | O_CREAT, 0666, 0, &fh), -ESTALE);
	CHECK_EQ(create(g, 1, "p", O_RDWR | O_CREAT, 0666, 0, &fh), -ESTALE);
	CHECK_EQ(create(g, 1, "dir", O_RDWR | O_CREAT, 0666, 0, &fh), -EISDIR);
	CHECK_EQ(create(g, 1, "dangling", O_RDWR, 0666, 0, &fh), 0);
	release(g, entry(g)->nodeid, fh);
	forget(g, entry(g)->nodeid, 1);
	forget(g, id, 2);
	CHECK_EQ(stats(g).inodes, 1);
	CHECK_EQ(stats(g).open_files, 0);
}

static void create_on_anothers_secret_is_refused(struct guest *g)
{
	uint64_t fh;

	host_write("secret", "x");
	CHECK_EQ(fchmodat(host_fd, "secret", 0600, 0), 0);
	CHECK_EQ(fchmodat(host_fd, ".", 0777, 0), 0);
	g->header.uid = g->header.gid = 1000;
	CHECK_EQ(create(g, 1, "secret", O_RDWR | O_CREAT, 0666, 0, &fh), -EACCES);
	CHECK_EQ(stats(g).inodes, 1);
}

static void failed_registration_leaves_nothing_behind(struct guest *g)
{
	uint64_t fh[101];
	char name[16];
	int i;

	for (i = 0; i < 100; i++) {
		snprintf(name, sizeof(name), "o%d", i);
		CHECK_EQ(create(g, 1, name, O_RDWR, 0600, 0, &fh[i]), 0);
	}
	CHECK_EQ(create(g, 1, "one more", O_RDWR, 0600, 0, &fh[i]), -ENFILE);
	CHECK_EQ(stats(g).inodes, 101);
	CHECK_EQ(stats(g).open_files, 100);
}

static void objects_belong_to_the_caller(struct guest *g)
{
	struct fuse_mkdir_in in = {.mode = 0777, .umask = 022};
	struct {
		struct fuse_ext_header header;
		uint32_t n, group;
	} groups = {{sizeof(groups), VF_FUSE_EXT_GROUPS}, 1, 2000};
	uint64_t d, fh;
	gid_t list[8];

	CHECK_EQ(fchmodat(host_fd, ".", 0755, 0), 0);
	g->header.uid = 1000;
	g->header.gid = 1001;
	arg(g, &in, sizeof(in));
	arg_string(g, "mine");
	CHECK_EQ(run(g, vf_op_mkdir, 1), -EACCES);
	CHECK_EQ(fchmodat(host_fd, ".", 0777, 0), 0);
	arg(g, &in, sizeof(in));
	arg_string(g, "mine");
	CHECK_EQ(run(g, vf_op_mkdir, 1), sizeof(struct fuse_entry_out));
	CHECK_EQ(entry(g)->attr.uid, 1000);
	CHECK_EQ(entry(g)->attr.gid, 1001);
	CHECK_EQ(entry(g)->attr.mode, S_IFDIR | 0755);
	/* A directory of a group that only the extension tells. */
	CHECK_EQ(mkdirat(host_fd, "team", 0770), 0);
	CHECK_EQ(fchownat(host_fd, "team", 0, 2000, 0), 0);
	CHECK_EQ(fchmodat(host_fd, "team", 0770, 0), 0);
	d = must_lookup(g, 1, "team");
	CHECK_EQ(create(g, d, "f", O_RDWR, 0600, 0, &fh), -EACCES);
	in.umask = 0;
	for (int i = 0; i < 2; i++) {
		arg(g, &in, sizeof(in));
		arg_string(g, i ? "second" : "first");
		arg(g, &groups, sizeof(groups));
		CHECK_EQ(run(g, vf_op_mkdir, d), sizeof(struct fuse_entry_out));
		CHECK_EQ(entry(g)->attr.uid, 1000);
	}
	CHECK_EQ(create(g, d, "f", O_RDWR, 0600, 0, &fh), -EACCES);
	CHECK_EQ(syscall(SYS_getgroups, 8, list), 0);
	CHECK_EQ(geteuid() | getegid(), 0);
	/* A guest that cannot tell its groups is trusted to have checked them. */
	vf_share_start_session(g->share, SESSION & ~VF_FUSE_CREATE_SUPP_GROUP, 4096);
	d = must_lookup(g, 1, "team");
	CHECK_EQ(create(g, d, "f", O_RDWR, 0600, 0, &fh), 0);
	CHECK_EQ(entry(g)->attr.uid, 1000);
	CHECK_EQ(g->thread.caps, vf_effective_capabilities());
}

static void bad_extensions_are_refused(struct guest *g)
{
	struct fuse_mkdir_in in = {.mode = 0777};
	uint32_t bad[][4] = {
	    {7, 1, 0, 0},    {17, 32, 1, 5},	     {12, 32, 1, 5}, {16, 32, 2, 5},
	    {16, 1, 100, 0}, {16, 2, 1, 0x61006161}, {8, 32, 1, 5},
	};

	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		arg(g, &in, sizeof(in));
		arg_string(g, "x");
		arg(g, bad[i], sizeof(bad[i]));
		CHECK_EQ(run(g, vf_op_mkdir, 1), -EINVAL);
		CHECK_EQ(faccessat(host_fd, "x", F_OK, 0), -1);
	}
}

static void security_contexts_are_set(struct guest *g)
{
	static const char name[] = "security.test", value[] = "label";
	struct fuse_mkdir_in in = {.mode = 0777};
	struct {
		struct fuse_secctx_header header;
		struct fuse_secctx context;
		char name[sizeof(name)];
		char value[5];
		char pad[5];
	} context = {.context.size = 5};
	char got[64], path[128];
	uint64_t fh;

	context.header.nr_secctx = 1;
	context.header.size = sizeof(context);
	memcpy(context.name, name, sizeof(name));
	memcpy(context.value, value, 5);
	for (int i = 0; i < 3; i++) {
		const char *object = i == 0 ? "dir" : i == 1 ? "link" : "file";
		struct fuse_create_in create_in = {.flags = O_RDWR, .mode = 0600};

		if (i == 0)
			arg(g, &in, sizeof(in));
		else if (i == 2)
			arg(g, &create_in, sizeof(create_in));
		arg_string(g, object);
		if (i == 1)
			arg_string(g, "target");
		arg(g, &context, sizeof(context));
		CHECK(run(g, i == 0 ? vf_op_mkdir : i == 1 ? vf_op_symlink : vf_op_create, 1) > 0);
		snprintf(path, sizeof(path), "%s/%s", base, object);
		CHECK_EQ(lgetxattr(path, name, got, sizeof(got)), 5);
		CHECK(!memcmp(got, value, 5));
		if (i == 2) {
			fh = ((struct fuse_open_out *)(entry(g) + 1))->fh;
			release(g, entry(g)->nodeid, fh);
		}
	}
	/* A label that cannot be set leaves no object. */
	memcpy(context.name, "nonsense.test", sizeof(name));
	arg(g, &in, sizeof(in));
	arg_string(g, "unlabelled");
	arg(g, &context, sizeof(context));
	CHECK(run(g, vf_op_mkdir, 1) < 0);
	CHECK_EQ(faccessat(host_fd, "unlabelled", F_OK, 0), -1);
}

static void links_symlinks_and_temporary_files(struct guest *g)
{
	struct fuse_create_in tmp = {.flags = O_RDWR | O_TMPFILE, .mode = 0640};
	struct fuse_link_in link = {0};
	struct fuse_mknod_in node = {.mode = S_IFIFO | 0644, .umask = 022};
	char target[PATH_MAX];
	uint64_t fh, id;

	memset(target, 't', 4095);
	target[4095] = 0;
	arg_string(g, "s");
	arg_string(g, target);
	CHECK_EQ(run(g, vf_op_symlink, 1), sizeof(struct fuse_entry_out));
	link.oldnodeid = entry(g)->nodeid;
	CHECK_EQ(run(g, vf_op_readlink, link.oldnodeid), 4095);
	CHECK(!memcmp(g->thread.reply, target, 4095));
	arg(g, &link, sizeof(link));
	arg_string(g, "s2");
	CHECK_EQ(run(g, vf_op_link, 1), sizeof(struct fuse_entry_out));
	CHECK_EQ(entry(g)->nodeid, link.oldnodeid);
	CHECK_EQ(entry(g)->attr.nlink, 2);
	CHECK(S_ISLNK(entry(g)->attr.mode));

	arg(g, &tmp, sizeof(tmp));
	arg_string(g, "/");
	CHECK_EQ(run(g, vf_op_tmpfile, 1),
		 sizeof(struct fuse_entry_out) + sizeof(struct fuse_open_out));
	id = entry(g)->nodeid;
	fh = ((struct fuse_open_out *)(entry(g) + 1))->fh;
	CHECK_EQ(entry(g)->attr.nlink, 0);
	link.oldnodeid = id;
	arg(g, &link, sizeof(link));
	arg_string(g, "named");
	CHECK_EQ(run(g, vf_op_link, 1), sizeof(struct fuse_entry_out));
	CHECK_EQ(entry(g)->nodeid, id);
	release(g, id, fh);
	CHECK_EQ(must_lookup(g, 1, "named"), id);
	CHECK_EQ(entry(g)->attr.mode, S_IFREG | 0640);
	CHECK_EQ(run(g, vf_op_readlink, id), -EINVAL);

	arg(g, &node, sizeof(node));
	arg_string(g, "fifo");
	CHECK_EQ(run(g, vf_op_mknod, 1), sizeof(struct fuse_entry_out));
	CHECK_EQ(entry(g)->attr.mode, S_IFIFO | 0644);
	node.mode = S_IFDIR | 0755;
	arg(g, &node, sizeof(node));
	arg_string(g, "directory");
	CHECK_EQ(run(g, vf_op_mknod, 1), -EINVAL);
}

static void rename_knows_its_flags(struct guest *g)
{
	struct stat st;

	host_write("a", "a");
	host_write("b", "bb");
	CHECK_EQ(rename_flags(g, 1, "a", 1, "b", RENAME_NOREPLACE), -EEXIST);
	CHECK_EQ(rename_flags(g, 1, "a", 1, "b", RENAME_EXCHANGE), 0);
	CHECK_EQ(fstatat(host_fd, "a", &st, 0), 0);
	CHECK_EQ(st.st_size, 2);
	CHECK_EQ(rename_flags(g, 1, "a", 1, "c", RENAME_WHITEOUT), 0);
	CHECK_EQ(fstatat(host_fd, "a", &st, 0), 0);
	CHECK(S_ISCHR(st.st_mode) && !st.st_rdev);
	CHECK_EQ(rename_flags(g, 1, "b", 1, "c", 8), -EINVAL);
	CHECK_EQ(rename_flags(g, 1, "b", 99, "c", 0), -ESTALE);
	CHECK_EQ(rename_flags(g, 1, "b", 1, "..", 0), -EINVAL);
}

/* ---- attributes --------------------------------------------------------- */

static void setattr_changes_what_it_says(struct guest *g)
{
	struct fuse_setattr_in in = {.valid = FATTR_UID | FATTR_GID | FATTR_MODE | FATTR_SIZE |
					      FATTR_MTIME | FATTR_ATIME_NOW};
	struct fuse_attr attr;
	uint64_t id, link;

	host_write("a", "text");
	id = must_lookup(g, 1, "a");
	in.uid = 7;
	in.gid = 8;
	in.mode = S_IFREG | 06755;
	in.size = 10;
	in.mtime = (uint64_t)-5;
	in.mtimensec = 123;
	CHECK_EQ(setattr(g, id, &in), 0);
	CHECK_EQ(getattr(g, id, &attr), 0);
	CHECK_EQ(attr.uid, 7);
	CHECK_EQ(attr.gid, 8);
	CHECK_EQ(attr.mode, S_IFREG | 06755);
	CHECK_EQ(attr.size, 10);
	CHECK_EQ(attr.mtime, -5);
	CHECK_EQ(attr.mtimensec, 123);
	CHECK(attr.atime > 1000000);
	in = (struct fuse_setattr_in){.valid = FATTR_SIZE, .size = 3};
	CHECK_EQ(setattr(g, id, &in), 0);
	CHECK_EQ(getattr(g, id, &attr), 0);
	CHECK_EQ(attr.mode, S_IFREG | 06755);
	in.valid |= FATTR_KILL_SUIDGID;
	in.size = 2;
	CHECK_EQ(setattr(g, id, &in), 0);
	CHECK_EQ(getattr(g, id, &attr), 0);
	CHECK_EQ(attr.mode, S_IFREG | 0755);
	in = (struct fuse_setattr_in){.valid = FATTR_MODE, .mode = 02644}; /* CAP_FSETID is back */
	CHECK_EQ(setattr(g, id, &in), 0);
	CHECK_EQ(getattr(g, id, &attr), 0);
	CHECK_EQ(attr.mode, S_IFREG | 02644);

	/* A symlink's own owner and times; its target stays. */
	CHECK_EQ(symlinkat("a", host_fd, "l"), 0);
	link = must_lookup(g, 1, "l");
	in = (struct fuse_setattr_in){.valid = FATTR_UID | FATTR_MTIME, .uid = 9, .mtime = 77};
	CHECK_EQ(setattr(g, link, &in), 0);
	CHECK_EQ(getattr(g, link, &attr), 0);
	CHECK_EQ(attr.uid, 9);
	CHECK_EQ(attr.mtime, 77);
	CHECK_EQ(getattr(g, id, &attr), 0);
	CHECK_EQ(attr.uid, 7);
	in = (struct fuse_setattr_in){.valid = FATTR_SIZE};
	CHECK_EQ(setattr(g, link, &in), -EINVAL);
	CHECK_EQ(setattr(g, 1, &in), -EISDIR);
	in = (struct fuse_setattr_in){.valid = FATTR_UID, .uid = UINT32_MAX};
	CHECK_EQ(setattr(g, id, &in), -EINVAL);
}

static void statx_tells_what_the_host_does(struct guest *g)
{
	struct vf_fuse_statx_in in = {.sx_mask = STATX_BTIME | STATX_MNT_ID};
	struct vf_fuse_statx_out *out;

	host_write("a", "text");
	must_lookup(g, 1, "a");
	arg(g, &in, sizeof(in));
	CHECK_EQ(run(g, vf_op_statx, entry(g)->nodeid), sizeof(*out));
	out = (void *)g->thread.reply;
	CHECK_EQ(out->stat.mask & STATX_BASIC_STATS, STATX_BASIC_STATS);
	CHECK_EQ(out->stat.mask & STATX_MNT_ID, 0);
	CHECK(!(out->stat.mask & STATX_BTIME) || out->stat.btime.tv_sec);
	CHECK_EQ(out->stat.size, 4);
}

static void access_is_the_callers(struct guest *g)
{
	struct fuse_access_in in = {.mask = R_OK};
	uint64_t id;

	host_write("a", "text");
	CHECK_EQ(fchmodat(host_fd, "a", 0640, 0), 0);
	id = must_lookup(g, 1, "a");
	arg(g, &in, sizeof(in));
	CHECK_EQ(run(g, vf_op_access, id), 0);
	g->header.uid = 1000;
	arg(g, &in, sizeof(in));
	CHECK_EQ(run(g, vf_op_access, id), 0); /* by its group 0 */
	g->header.gid = 1000;
	arg(g, &in, sizeof(in));
	CHECK_EQ(run(g, vf_op_access, id), -EACCES);
	in.mask = 8;
	arg(g, &in, sizeof(in));
	CHECK_EQ(run(g, vf_op_access, id), -EINVAL);
}

static void a_server_without_privilege_creates_as_itself(struct guest *g)
{
	uint64_t fh;

	CHECK_EQ(create(g, 1, "by-root", O_RDWR, 0600, 0, &fh), 0);
	CHECK_EQ(entry(g)->attr.uid, 12345);
	g->header.uid = 12345;
	g->header.gid = 12346;
	CHECK_EQ(create(g, 1, "by-itself", O_RDWR, 0600, 0, &fh), 0);
	g->header.uid = 1;
	CHECK_EQ(create(g, 1, "by-another", O_RDWR, 0600, 0, &fh), -EPERM);
	g->header.uid = 0;
	g->header.gid = 1;
	CHECK_EQ(create(g, 1, "by-another", O_RDWR, 0600, 0, &fh), -EPERM);
	CHECK_EQ(faccessat(host_fd, "by-another", F_OK, 0), -1);
	CHECK_EQ(geteuid(), 12345);
	for (int i = 0; i < 200; i++) { /* no handles: descriptors up to the budget */
		char name[16];

		snprintf(name, sizeof(name), "f%d", i);
		host_write(name, name);
		must_lookup(g, 1, name);
	}
}

static void without_privilege(void)
{
	pid_t child = fork();
	int status;

	CHECK(child >= 0);
	if (!child) {
		CHECK_EQ(fchownat(host_fd, ".", 12345, 12346, 0), 0);
		CHECK(!setgroups(0, NULL) && !setgid(12346) && !setuid(12345));
		with("a_server_without_privilege_creates_as_itself",
		     a_server_without_privilege_creates_as_itself, VF_HANDLES_PREFER, 5000);
		_exit(0);
	}
	CHECK_EQ(waitpid(child, &status, 0), child);
	CHECK_EQ(status, 0);
	CHECK_EQ(fchownat(host_fd, ".", 0, 0, 0), 0);
}

int main(void)
{
	set_up();
	RUN_ALL_MODES(create_is_atomic_and_opens_nothing_but_files);
	RUN_ALL_MODES(create_on_anothers_secret_is_refused);
	RUN_ALL_MODES(failed_registration_leaves_nothing_behind);
	RUN_ALL_MODES(objects_belong_to_the_caller);
	RUN_ALL_MODES(bad_extensions_are_refused);
	RUN_ALL_MODES(security_contexts_are_set);
	RUN_ALL_MODES(links_symlinks_and_temporary_files);
	RUN_ALL_MODES(rename_knows_its_flags);
	RUN_ALL_MODES(setattr_changes_what_it_says);
	RUN_ALL_MODES(statx_tells_what_the_host_does);
	RUN_ALL_MODES(access_is_the_callers);
	without_privilege();
	CHECK_EQ(rmdir(base), 0);
	return 0;
}
