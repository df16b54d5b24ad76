/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Names in directories as numbers.  Anybody who may write there picks names, so how they are
 * spread is another secret in each process: nobody can make them all meet.
 */
#ifndef VHOSTFS_NAME_HASH_H
#define VHOSTFS_NAME_HASH_H

#include <stdint.h>

/* All bits count alike.  place: whatever the name is in. */
uint64_t vf_name_hash(uint64_t place, const char *name, uint32_t namelen);

#endif
