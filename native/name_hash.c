/* SPDX-License-Identifier: Apache-2.0 */
/* See name_hash.h. */
#include <sys/random.h>

#include "core.h"
#include "name_hash.h"

/* Chosen before anything runs, and never changed. */
static struct {
	uint64_t start, factor;
} secret;

__attribute__((constructor)) static void choose_secret(void)
{
	/* So early that the kernel has no random numbers yet: then it is a number like another. */
	if (getrandom(&secret, sizeof(secret), GRND_NONBLOCK) != sizeof(secret))
		secret.start = secret.factor = vf_now_ns() * 0x9e3779b97f4a7c15u;
	secret.factor |= 1;
}

uint64_t vf_name_hash(uint64_t place, const char *name, uint32_t namelen)
{
	uint64_t h = place * 0x9e3779b97f4a7c15u + secret.start;

	for (uint32_t i = 0; i < namelen; i++)
		h = (h ^ (uint8_t)name[i]) * secret.factor;
	/* Short names of one directory differ in the lowest bits only. */
	h ^= h >> 32;
	h *= 0x9e3779b97f4a7c15u;
	return h ^ h >> 32;
}
