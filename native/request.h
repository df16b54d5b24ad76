/* SPDX-License-Identifier: Apache-2.0 */
/* One FUSE request between its descriptor chain and its answer. */
#ifndef VHOSTFS_REQUEST_H
#define VHOSTFS_REQUEST_H

#include "core.h"

/*
 * Copies header and arguments out of in[].  0; -EBADMSG: there is no whole header, the chain
 * cannot be answered; another negative errno: to be answered with it.
 */
int vf_req_parse(struct vf_req *r);
/* Puts header and payload into out[]; returns the bytes written (0: there was no room for a
 * header). */
uint32_t vf_req_write_reply(struct vf_req *r, int32_t result, const void *payload);
/* Copies into out[] from byte offset on; the caller has checked that it fits. */
void vf_req_scatter(struct vf_req *r, uint32_t offset, const void *from, uint32_t n);
/* Undoes what an operation did to the arrays, so that it can be run again. */
void vf_req_rewind(struct vf_req *r);
void vf_req_free(struct vf_req *r);

#endif
