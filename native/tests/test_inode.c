/* SPDX-License-Identifier: Apache-2.0 */
/* The inode table as operations see it: nodeids, descriptors and file handles, threads. */
#include <dirent.h>
#include <sys/resource.h>

#include "../events.h"
#include "share.h"

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

static void a_reused_slot_is_told_of_only_when_it_can_be_found(struct guest *g)
{
	struct vf_inode *inode;
	uint64_t a, b;

	host_write("a", "x");
	host_write("b", "x");
	CHECK_EQ(vf_handle_index_start(g->share), 0);
	a = must_lookup(g, 1, "a");
	inode = vf_inode_get(g->share, a);
	CHECK(vf_inode_is_told(g->share, inode));
	vf_inode_put(g->share, inode);
	forget(g, a, 1);
	vf_handle_index_stop(g->share);
	b = must_lookup(g, 1, "b");
	CHECK_EQ((uint32_t)b, (uint32_t)a);
	inode = vf_inode_get(g->share, b);
	CHECK(!vf_inode_is_told(g->share, inode));
	vf_inode_put(g->share, inode);
	forget(g, b, 1);
}

/* ---- sessions ----------------------------------------------------------- */

static atomic_bool asking;

/* As for FUSE_IOCTL, which is not an operation of the core's. */
static void *ask_for_files(void *share)
{
	for (uint64_t i = 0; atomic_load(&asking); i++) {
		int fd = vf_share_file_fd(share, FUSE_ROOT_ID, VF_FH_DEFERRED | (1 + i % 8));

		if (fd >= 0)
			close(fd);
	}
	return NULL;
}

static void sessions_begin_while_files_are_asked_for(struct guest *g)
{
	pthread_t threads[2];

	atomic_store(&asking, true);
	for (int i = 0; i < 2; i++)
		pthread_create(&threads[i], NULL, ask_for_files, g->share);
	for (int i = 0; i < 200; i++) {
		vf_share_start_session(g->share, SESSION, 1 << 20);
		CHECK_EQ(vf_deferred_start(g->share), 0);
		for (int n = 0; n < 100 && !stats(g).open_files; n++)
			sched_yield();
	}
	atomic_store(&asking, false);
	for (int i = 0; i < 2; i++)
		pthread_join(threads[i], NULL);
	vf_share_start_session(g->share, SESSION, 1 << 20);
	CHECK_EQ(stats(g).open_files, 0);
	CHECK_EQ(vf_share_file_fd(g->share, FUSE_ROOT_ID, VF_FH_DEFERRED | 1), -EBADF);
	vf_share_start_session(g->share, 0, 0);
	CHECK_EQ(vf_share_file_fd(g->share, FUSE_ROOT_ID, VF_FH_DEFERRED | 1), -EIO);
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

struct in_turn {
	struct vf_share *share;
	uint64_t nodeids[2];
	atomic_bool stop;
};

/* Gives each of two inodes its descriptor back in turn, which takes the other's. */
static void *use_in_turn(void *arg_)
{
	struct in_turn *p = arg_;

	while (!atomic_load(&p->stop))
		for (int i = 0; i < 2; i++) {
			struct vf_inode *inode = vf_inode_get(p->share, p->nodeids[i]);

			CHECK(inode && vf_inode_path_fd(p->share, inode) >= 0);
			vf_inode_put(p->share, inode);
		}
	return NULL;
}

static void a_name_is_known_whoever_needs_descriptors(struct guest *g)
{
	static const char *const names[] = {"a", "b"};
	struct in_turn p = {.share = g->share};
	struct vf_inode *root = vf_inode_get(g->share, FUSE_ROOT_ID);
	pthread_t thread;

	for (int i = 0; i < 2; i++) {
		host_write(names[i], "");
		p.nodeids[i] = must_lookup(g, 1, names[i]);
	}
	CHECK_EQ(pthread_create(&thread, NULL, use_in_turn, &p), 0);
	for (int i = 0; i < 20000; i++) {
		struct vf_inode *known = vf_inode_known(g->share, root, names[i % 2]);

		CHECK(known && vf_inode_nodeid(known) == p.nodeids[i % 2]);
		vf_inode_put(g->share, known);
	}
	atomic_store(&p.stop, true);
	pthread_join(thread, NULL);
	vf_inode_put(g->share, root);
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

static void long_handles_work_too(struct guest *g)
{
	static const char *const parts[] = {"lower", "upper", "work", "m"};
	char options[300], path[64], name[16];
	uint64_t d, ids[100];

	for (int i = 0; i < 4; i++)
		CHECK_EQ(mkdirat(host_fd, parts[i], 0755), 0);
	snprintf(path, sizeof(path), "%s/m", base);
	snprintf(options, sizeof(options),
		 "lowerdir=%s/lower,upperdir=%s/upper,workdir=%s/work,index=on,nfs_export=on", base,
		 base, base);
	if (mount("none", path, "overlay", 0, options)) {
		fprintf(stderr, "(SKIPPED: no overlayfs with nfs_export here) ");
		CHECK(!getenv("CI"));
		return;
	}
	d = must_lookup(g, 1, "m");
	for (int i = 0; i < 100; i++) {
		snprintf(name, sizeof(name), "m/f%d", i);
		host_write(name, name);
		ids[i] = must_lookup(g, d, name + 2);
	}
	CHECK(stats(g).inode_fds < 20);
	for (int i = 0; i < 100; i++) {
		snprintf(name, sizeof(name), "f%d", i);
		CHECK_EQ(getattr(g, ids[i], NULL), 0);
		CHECK_EQ(must_lookup(g, d, name), ids[i]);
		forget(g, ids[i], 2);
	}
	forget(g, d, 1);
	CHECK_EQ(umount(path), 0);
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

int main(void)
{
	set_up();
	RUN_ALL_MODES(hard_links_are_one_inode_and_counts_balance);
	RUN_ALL_MODES(made_up_nodeids_are_stale);
	RUN_ALL_MODES(batch_forget_believes_the_size_not_the_count);
	RUN_ALL_MODES(bad_names_are_refused);
	RUN_ALL_MODES(the_parent_of_a_directory_never_leaves_the_share);
	RUN(many_inodes_live_with_few_descriptors, VF_HANDLES_PREFER, 50);
	RUN(many_inodes_live_with_few_descriptors, VF_HANDLES_MANDATORY, 50);
	RUN_ALL_MODES(a_name_is_known_whoever_needs_descriptors);
	RUN(a_reused_inode_number_is_another_object, VF_HANDLES_PREFER, 50);
	RUN(a_reused_inode_number_is_another_object, VF_HANDLES_PREFER, 5000);
	RUN(what_the_guest_removes_it_still_holds, VF_HANDLES_PREFER, 50);
	RUN(what_the_guest_removes_it_still_holds, VF_HANDLES_NEVER, 5000);
	RUN(a_process_out_of_descriptors_sheds_them, VF_HANDLES_PREFER, 5000);
	RUN_ALL_MODES(submounts_are_announced);
	RUN(long_handles_work_too, VF_HANDLES_PREFER, 10);
	RUN(long_handles_work_too, VF_HANDLES_MANDATORY, 10);
	RUN_ALL_MODES(threads_and_a_busy_host_end_with_balanced_counts);
	RUN(a_reused_slot_is_told_of_only_when_it_can_be_found, VF_HANDLES_NEVER, 5000);
	RUN(sessions_begin_while_files_are_asked_for, VF_HANDLES_NEVER, 5000);
	CHECK_EQ(rmdir(base), 0);
	return 0;
}
