/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Threads for requests that may block on storage.  The queue is bounded by
 * the rings: a request waiting here occupies a descriptor chain of its guest.
 */
#include <stdio.h>

#include "core.h"

struct vf_pool {
	struct vf_share *share;
	pthread_mutex_t lock;
	pthread_cond_t work;
	struct vf_req *first, **last;
	bool stopping;
	uint32_t n_threads;
	pthread_t threads[];
};

static void *pool_main(void *arg)
{
	struct vf_pool *pool = arg;
	struct vf_thread t = {.may_block = true};

	if (vf_thread_enter(&t, pool->share, "vhostfs-pool"))
		return NULL;
	pthread_mutex_lock(&pool->lock);
	for (;;) {
		struct vf_req *r = pool->first;

		if (!r) {
			if (pool->stopping)
				break;
			pthread_cond_wait(&pool->work, &pool->lock);
			continue;
		}
		pool->first = r->next;
		if (!pool->first)
			pool->last = &pool->first;
		pthread_mutex_unlock(&pool->lock);
		vf_req_run_in_pool(&t, r);
		pthread_mutex_lock(&pool->lock);
	}
	pthread_mutex_unlock(&pool->lock);
	vf_thread_leave(&t);
	return NULL;
}

struct vf_pool *vf_pool_new(struct vf_share *share, uint32_t n_threads, int *error)
{
	struct vf_pool *pool = calloc(1, sizeof(*pool) + n_threads * sizeof(pool->threads[0]));

	if (!pool) {
		*error = -ENOMEM;
		return NULL;
	}
	pool->share = share;
	pthread_mutex_init(&pool->lock, NULL);
	pthread_cond_init(&pool->work, NULL);
	pool->last = &pool->first;
	for (; pool->n_threads < n_threads; pool->n_threads++) {
		*error = -pthread_create(&pool->threads[pool->n_threads], NULL, pool_main, pool);
		if (*error) {
			vf_pool_free(pool);
			return NULL;
		}
	}
	return pool;
}

void vf_pool_free(struct vf_pool *pool)
{
	if (!pool)
		return;
	pthread_mutex_lock(&pool->lock);
	pool->stopping = true;
	pthread_cond_broadcast(&pool->work);
	pthread_mutex_unlock(&pool->lock);
	for (uint32_t i = 0; i < pool->n_threads; i++)
		pthread_join(pool->threads[i], NULL);
	pthread_cond_destroy(&pool->work);
	pthread_mutex_destroy(&pool->lock);
	free(pool);
}

void vf_pool_submit(struct vf_pool *pool, struct vf_req *r)
{
	r->next = NULL;
	pthread_mutex_lock(&pool->lock);
	*pool->last = r;
	pool->last = &r->next;
	pthread_cond_signal(&pool->work);
	pthread_mutex_unlock(&pool->lock);
}
