# SPDX-License-Identifier: Apache-2.0
"""vhostfs: a virtio-fs server that tells the guest what changes on the host.
Must not import anything: every command pays for it.
Specification: README.md, docs/architecture.md."""

__version__ = "0.1.0"
