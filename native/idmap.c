/* SPDX-License-Identifier: Apache-2.0 */
/* --translate-uid and --translate-gid: the first rule that matches decides; none: unchanged. */
#include "cred.h"

static bool in_range(const struct vf_id_rule *rule, uint32_t id)
{
	return id >= rule->from && id - rule->from < rule->count;
}

int vf_map_id(const struct vf_id_rule *rules, uint32_t n_rules, uint32_t guest_id,
	      uint32_t *host_id)
{
	*host_id = guest_id;
	for (uint32_t i = 0; i < n_rules; i++) {
		const struct vf_id_rule *rule = &rules[i];

		if (!in_range(rule, guest_id))
			continue;
		switch (rule->kind) {
		case VF_ID_GUEST_TO_HOST:
			*host_id = rule->to + (guest_id - rule->from);
			return 0;
		case VF_ID_SQUASH_GUEST:
			*host_id = rule->to;
			return 0;
		case VF_ID_FORBID_GUEST:
			return -EPERM;
		}
	}
	return 0;
}

uint32_t vf_unmap_id(const struct vf_id_rule *rules, uint32_t n_rules, uint32_t host_id)
{
	for (uint32_t i = 0; i < n_rules; i++) {
		const struct vf_id_rule *rule = &rules[i];

		if (!in_range(rule, host_id))
			continue;
		if (rule->kind == VF_ID_HOST_TO_GUEST)
			return rule->to + (host_id - rule->from);
		if (rule->kind == VF_ID_SQUASH_HOST)
			return rule->to;
	}
	return host_id;
}
