# SPDX-License-Identifier: Apache-2.0
"""virtio-fs as a device: feature bits, configuration space, queue roles, the native rings."""
