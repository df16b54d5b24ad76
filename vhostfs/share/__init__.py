# SPDX-License-Identifier: Apache-2.0
"""The exported tree: its options, id maps, xattr rules and sandbox.
Must not know vhost-user, virtio or how people type options.
Specification: docs/architecture.md."""
