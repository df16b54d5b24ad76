/* SPDX-License-Identifier: Apache-2.0 */
/* The inode table, names and credentials, as operations see them. */
#include <dirent.h>
#include <ftw.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/xattr.h>

#include "guest.h"

static char base[] = "/tmp/vhostfs-test-XXXXXX";
static int host_fd; /* the share's root, for what the host does */

static struct vf_share *open_share(enum vf_handle_mode mode, uint32_t budget)
{
	struct vf_share_config config = {
	    .root_fd = host_fd,
	    .proc_fd_dir = open("/proc/self/fd", O_PATH | O_DIRECTORY | O_CLOEXEC),
	    .handle_mode = mode,
	    .inode_fd_budget = budget,
	    .open_budget = 100,
	    .lock_waiters = 10,
	    .entry_timeout_ns = 1500000000,
	    .attr_timeout_ns = 1,
	    .xattr = true,
	};
	struct vf_share *share;
	int error;

	share = vf_share_new(&config, &error);
	CHECK(share);
	close(config.proc_fd_dir);
	vf_share_start_session(share, SESSION, 1 << 20);
	return share;
}

static void host_write(const char *name, const char *text)
{
	int fd = openat(host_fd, name, O_WRONLY | O_CREAT | O_TRUNC, 0644);

	CHECK(fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text));
	close(fd);
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
	(void)st, (void)type;
	return ftw->level ? remove(path) : 0;
}

static void host_clean(void)
{
	CHECK_EQ(nftw(base, remove_one, 20, FTW_DEPTH | FTW_PHYS | FTW_MOUNT), 0);
}

static int count_fds(void)
{
	DIR *d = opendir("/proc/self/fd");
	int n = 0;

	while (readdir(d))
		n++;
	closedir(d);
	return n;
}

/* ---- nodeids ------------------------------------------------------------ */

static void hard_links_are_one_inode_and_counts_balance(struct guest *g)
{
	uint64_t a, b;

	host_write("a", "x");
	CHECK_EQ(linkat(host_fd, "a", host_fd, "b", 0), 0);
	a = must_lookup(g, 1, "a");
	b = must_lookup(g, 1, "b");
	CHECK_EQ(a, b);
	CHECK_EQ(must_lookup(g, 1, "a"), a);
	CHECK_EQ(entry(g)->generation, a >> 32);
	CHECK_EQ(entry(g)->entry_valid, 1);
	CHECK_EQ(entry(g)->entry_valid_nsec, 500000000);
	CHECK_EQ(stats(g).inodes, 2);
	forget(g, a, 2);
	CHECK_EQ(getattr(g, a, NULL), 0);
	forget(g, a, 1);
	CHECK_EQ(getattr(g, a, NULL), -ESTALE);
	CHECK_EQ(stats(g).inodes, 1);
	forget(g, a, UINT64_MAX); /* too many are harmless */
	forget(g, 1, UINT64_MAX);
	CHECK_EQ(getattr(g, 1, NULL), 0);
	b = must_lookup(g, 1, "a");
	CHECK(b != a);
	CHECK_EQ(getattr(g, a, NULL), -ESTALE);
	forget(g, b, UINT64_MAX);
	CHECK_EQ(stats(g).inode_fds, 0);
}

static void made_up_nodeids_are_stale(struct guest *g)
{
	uint64_t ids[] = {0, 2, 4096, UINT32_MAX, 1ull << 32 | 1, UINT64_MAX, 1u << 28};

	for (size_t i = 0; i < sizeof(ids) / sizeof(ids[0]); i++) {
		CHECK_EQ(getattr(g, ids[i], NULL), -ESTALE);
		forget(g, ids[i], 1);
		CHECK_EQ(lookup(g, ids[i], "a"), -ESTALE);
	}
}

static void batch_forget_believes_the_size_not_the_count(struct guest *g)
{
	struct fuse_batch_forget_in in = {.count = UINT32_MAX};
	struct fuse_forget_one one = {.nlookup = 1};

	host_write("a", "x");
	one.nodeid = must_lookup(g, 1, "a");
	arg(g, &in, sizeof(in));
	arg(g, &one, sizeof(one));
	arg(g, "rest", 4);
	CHECK_EQ(run(g, vf_op_batch_forget, 0), VF_NO_REPLY);
	CHECK_EQ(getattr(g, one.nodeid, NULL), -ESTALE);
}

static void bad_names_are_refused(struct guest *g)
{
	char longest[257];

	memset(longest, 'n', 256);
	longest[256] = 0;
	CHECK_EQ(lookup(g, 1, longest), -ENAMETOOLONG);
	CHECK_EQ(lookup(g, 1, "a/b"), -EINVAL);
	CHECK_EQ(lookup(g, 1, ""), -EINVAL);
	CHECK_EQ(remove_file(g, 1, ".."), -EINVAL);
	arg(g, "no nul", 6);
	CHECK_EQ(run(g, vf_op_lookup, 1), -EINVAL);
	CHECK_EQ(lookup(g, 1, "absent"), -ENOENT);
	host_write("a", "x");
	CHECK_EQ(lookup(g, must_lookup(g, 1, "a"), "b"), -ENOTDIR);
}

/* ---- the way up --------------------------------------------------------- */

static void the_parent_of_a_directory_never_leaves_the_share(struct guest *g)
{
	uint64_t d, e;
	char away[64];

	CHECK_EQ(mkdirat(host_fd, "d", 0755), 0);
	CHECK_EQ(mkdirat(host_fd, "d/e", 0755), 0);
	d = must_lookup(g, 1, "d");
	e = must_lookup(g, d, "e");
	CHECK_EQ(must_lookup(g, e, ".."), d);
	CHECK_EQ(must_lookup(g, d, ".."), 1);
	CHECK_EQ(must_lookup(g, 1, ".."), 1);
	CHECK_EQ(must_lookup(g, e, "."), e);
	snprintf(away, sizeof(away), "%s-away", base);
	CHECK_EQ(renameat(host_fd, "d/e", AT_FDCWD, away), 0);
	CHECK_EQ(lookup(g, e, ".."), -ESTALE);
	CHECK_EQ(rmdir(away), 0);
	host_write("f", "x");
	CHECK_EQ(lookup(g, must_lookup(g, 1, "f"), ".."), -ENOTDIR);
	vf_share_start_session(g->share, SESSION & ~(uint64_t)FUSE_EXPORT_SUPPORT, 4096);
	CHECK_EQ(lookup(g, 1, ".."), -EINVAL);
}

/* ---- descriptors and handles -------------------------------------------- */

#define MANY 3000
static uint64_t many_ids[MANY];

static void lookup_many(struct guest *g)
{
	char name[16];

	for (int i = 0; i < MANY; i++) {
		snprintf(name, sizeof(name), "f%d", i);
		host_write(name, name);
		many_ids[i] = must_lookup(g, 1, name);
	}
}

static void many_inodes_live_with_few_descriptors(struct guest *g)
{
	struct fuse_attr attr;
	char name[16], text[16];
	int before;

	CHECK_EQ(unlinkat(host_fd, "f0", 0), -1);
	before = count_fds();
	lookup_many(g);
	CHECK(count_fds() - before <= 64);
	CHECK(stats(g).inode_fds <= 50);
	CHECK_EQ(stats(g).inodes, MANY + 1);
	for (int i = 0; i < MANY; i++) {
		struct vf_inode *inode = vf_inode_get(g->share, many_ids[i]);
		int fd;

		snprintf(name, sizeof(name), "f%d", i);
		if (i % 2) {
			CHECK_EQ(must_lookup(g, 1, name), many_ids[i]);
			CHECK_EQ(getattr(g, many_ids[i], &attr), 0);
			CHECK_EQ(attr.size, strlen(name));
		}
		CHECK(inode);
		fd = vf_inode_open(g->share, inode, O_RDONLY);
		CHECK(fd >= 0);
		memset(text, 0, sizeof(text));
		CHECK(read(fd, text, sizeof(text)) > 0 && !strcmp(text, name));
		close(fd);
		vf_inode_put(g->share, inode);
	}
	CHECK(stats(g).inode_fds <= 50);
	for (int i = 0; i < MANY; i++)
		forget(g, many_ids[i], 1 + i % 2);
	CHECK_EQ(stats(g).inodes, 1);
	CHECK_EQ(stats(g).inode_fds, 0);
	CHECK(count_fds() - before <= 1);
}

static void a_reused_inode_number_is_another_object(struct guest *g)
{
	struct stat old, new;
	uint64_t id;
	int reused = 0;

	lookup_many(g);
	for (int i = 0; i < 200; i++) {
		char name[16];

		snprintf(name, sizeof(name), "f%d", i);
		CHECK_EQ(fstatat(host_fd, name, &old, 0), 0);
		CHECK_EQ(unlinkat(host_fd, name, 0), 0);
		host_write(name, "new");
		CHECK_EQ(fstatat(host_fd, name, &new, 0), 0);
		id = must_lookup(g, 1, name);
		CHECK(id != many_ids[i]);
		if (old.st_ino == new.st_ino) {
			reused++;
			CHECK_EQ(getattr(g, many_ids[i], NULL), -ESTALE);
			CHECK_EQ(must_lookup(g, 1, name), id);
		}
	}
	fprintf(stderr, "(%d inode numbers were reused) ", reused);
}

static void what_the_guest_removes_it_still_holds(struct guest *g)
{
	struct fuse_attr attr;

	lookup_many(g);
	for (int i = 0; i < 20; i++) {
		char name[16];

		snprintf(name, sizeof(name), "f%d", i);
		if (i % 2) {
			CHECK_EQ(remove_file(g, 1, name), 0);
			continue;
		}
		host_write("other", "x");
		CHECK_EQ(rename_flags(g, 1, "other", 1, name, 0), 0);
	}
	for (int i = 200; i < MANY; i++) /* drives out what can be */
		CHECK_EQ(getattr(g, many_ids[i], NULL), 0);
	for (int i = 0; i < 20; i++) {
		CHECK_EQ(getattr(g, many_ids[i], &attr), 0);
		CHECK_EQ(attr.nlink, 0);
	}
}

static void a_process_out_of_descriptors_sheds_them(struct guest *g)
{
	struct rlimit old, tight;
	int highest = dup(0);

	close(highest);
	CHECK_EQ(getrlimit(RLIMIT_NOFILE, &old), 0);
	tight = old;
	tight.rlim_cur = (rlim_t)highest + 10;
	lookup_many(g);
	tight.rlim_cur = (rlim_t)dup(0);
	close((int)tight.rlim_cur);
	CHECK_EQ(setrlimit(RLIMIT_NOFILE, &tight), 0);
	for (int i = 0; i < 100; i++) {
		char name[16];
		uint64_t fh;

		snprintf(name, sizeof(name), "new%d", i);
		CHECK_EQ(create(g, 1, name, O_RDWR, 0600, 0, &fh), 0);
		release(g, entry(g)->nodeid, fh);
	}
	CHECK_EQ(setrlimit(RLIMIT_NOFILE, &old), 0);
}

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

static void submounts_are_announced(struct guest *g)
{
	char path[64];
	uint64_t d, f;

	snprintf(path, sizeof(path), "%s/m", base);
	CHECK_EQ(mkdir(path, 0755), 0);
	CHECK_EQ(mount("none", path, "tmpfs", 0, ""), 0);
	host_write("m/f", "x");
	d = must_lookup(g, 1, "m");
	CHECK_EQ(entry(g)->attr.flags, FUSE_ATTR_SUBMOUNT);
	f = must_lookup(g, d, "f");
	CHECK_EQ(entry(g)->attr.flags, 0);
	CHECK_EQ(must_lookup(g, d, ".."), 1);
	CHECK_EQ(entry(g)->attr.flags, 0);
	forget(g, f, 1);
	forget(g, d, 1);
	CHECK_EQ(umount(path), 0); /* nothing of ours keeps it busy */
}

/* ---- all at once -------------------------------------------------------- */

static atomic_bool stop;

static void *host_at_work(void *arg_)
{
	char name[16], other[16];
	unsigned int seed = 1;

	(void)arg_;
	while (!atomic_load(&stop)) {
		snprintf(name, sizeof(name), "r%d", rand_r(&seed) % 40);
		snprintf(other, sizeof(other), "r%d", rand_r(&seed) % 40);
		switch (rand_r(&seed) % 4) {
		case 0:
			unlinkat(host_fd, name, 0);
			break;
		case 1:
			renameat(host_fd, name, host_fd, other);
			break;
		case 2:
			symlinkat("/etc/passwd", host_fd, name);
			break;
		default:
			close(openat(host_fd, name, O_CREAT | O_WRONLY | O_NOFOLLOW, 0644));
		}
	}
	return NULL;
}

struct player {
	struct vf_share *share;
	unsigned int seed;
	uint64_t held[64], counts[64];
};

/* Looks things up, uses them and forgets exactly what it looked up. */
static void *guest_at_work(void *arg_)
{
	struct player *p = arg_;
	struct guest *g = malloc(sizeof(*g));
	struct stat outside;
	char name[16];

	CHECK_EQ(stat("/etc/passwd", &outside), 0);
	guest_enter(g, p->share);
	for (int n = 0; n < 20000; n++) {
		int i = rand_r(&p->seed) % 64, error;
		struct fuse_attr attr;
		uint64_t fh;

		snprintf(name, sizeof(name), "r%d", rand_r(&p->seed) % 40);
		if (p->counts[i]) {
			error = getattr(g, p->held[i], &attr);
			CHECK(!error || error == -ESTALE);
			CHECK(error || attr.ino != outside.st_ino);
			forget(g, p->held[i], p->counts[i]);
			p->counts[i] = 0;
			continue;
		}
		switch (rand_r(&p->seed) % 8) {
		case 0:
			error = remove_file(g, 1, name);
			CHECK(!error || error == -ENOENT);
			break;
		case 1:
			error = create(g, 1, name, O_RDWR | O_CREAT, 0644, 0, &fh);
			CHECK(!error || error == -ESTALE || error == -ENOENT || error == -EEXIST);
			if (error)
				break;
			p->held[i] = entry(g)->nodeid;
			p->counts[i] = 1;
			release(g, p->held[i], fh);
			break;
		default:
			error = lookup(g, 1, name);
			CHECK(!error || error == -ENOENT);
			if (error)
				break;
			CHECK(entry(g)->attr.ino != outside.st_ino);
			p->held[i] = entry(g)->nodeid;
			p->counts[i] = 1;
		}
	}
	for (int i = 0; i < 64; i++) {
		if (p->counts[i])
			forget(g, p->held[i], p->counts[i]);
	}
	guest_leave(g);
	free(g);
	return NULL;
}

static void threads_and_a_busy_host_end_with_balanced_counts(struct guest *g)
{
	struct player players[4] = {0};
	pthread_t threads[4], host;

	atomic_store(&stop, false);
	pthread_create(&host, NULL, host_at_work, NULL);
	for (unsigned int i = 0; i < 4; i++) {
		players[i] = (struct player){.share = g->share, .seed = i};
		pthread_create(&threads[i], NULL, guest_at_work, &players[i]);
	}
	for (int i = 0; i < 4; i++)
		pthread_join(threads[i], NULL);
	atomic_store(&stop, true);
	pthread_join(host, NULL);
	CHECK_EQ(stats(g).inodes, 1);
	CHECK_EQ(stats(g).inode_fds, 0);
	CHECK_EQ(stats(g).open_files, 0);
}

/* ------------------------------------------------------------------------- */

static void with(const char *what, void (*test)(struct guest *), enum vf_handle_mode mode,
		 uint32_t budget)
{
	struct vf_share *share = open_share(mode, budget);
	struct guest g;

	fprintf(stderr, "%s, handles %d, budget %u ", what, mode, budget);
	guest_enter(&g, share);
	test(&g);
	guest_leave(&g);
	vf_share_free(share);
	host_clean();
	fprintf(stderr, "ok\n");
}

#define RUN(test, mode, budget) with(#test, test, mode, budget)
#define RUN_ALL_MODES(test)                                                                        \
	do {                                                                                       \
		RUN(test, VF_HANDLES_NEVER, 5000);                                                 \
		RUN(test, VF_HANDLES_PREFER, 5000);                                                \
		RUN(test, VF_HANDLES_PREFER, 1);                                                   \
		RUN(test, VF_HANDLES_MANDATORY, 5);                                                \
	} while (0)

int main(void)
{
	if (geteuid()) {
		fprintf(stderr, "test_inode: needs root\n");
		return 1;
	}
	umask(0);
	CHECK_EQ(unshare(CLONE_NEWNS), 0);
	CHECK_EQ(mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL), 0);
	CHECK(mkdtemp(base));
	host_fd = open(base, O_PATH | O_DIRECTORY | O_CLOEXEC);
	CHECK(host_fd >= 0);
	RUN_ALL_MODES(hard_links_are_one_inode_and_counts_balance);
	RUN_ALL_MODES(made_up_nodeids_are_stale);
	RUN_ALL_MODES(batch_forget_believes_the_size_not_the_count);
	RUN_ALL_MODES(bad_names_are_refused);
	RUN_ALL_MODES(the_parent_of_a_directory_never_leaves_the_share);
	RUN(many_inodes_live_with_few_descriptors, VF_HANDLES_PREFER, 50);
	RUN(many_inodes_live_with_few_descriptors, VF_HANDLES_MANDATORY, 50);
	RUN(a_reused_inode_number_is_another_object, VF_HANDLES_PREFER, 50);
	RUN(a_reused_inode_number_is_another_object, VF_HANDLES_PREFER, 5000);
	RUN(what_the_guest_removes_it_still_holds, VF_HANDLES_PREFER, 50);
	RUN(what_the_guest_removes_it_still_holds, VF_HANDLES_NEVER, 5000);
	RUN(a_process_out_of_descriptors_sheds_them, VF_HANDLES_PREFER, 5000);
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
	RUN_ALL_MODES(submounts_are_announced);
	RUN_ALL_MODES(threads_and_a_busy_host_end_with_balanced_counts);
	CHECK_EQ(rmdir(base), 0);
	return 0;
}
