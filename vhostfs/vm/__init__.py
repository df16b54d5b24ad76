# SPDX-License-Identifier: Apache-2.0
"""Guests for people and tests: finds QEMU, builds a guest image, launches a guest and runs commands in it.

Knows nothing of vhost-user or FUSE: a share is a tag and the path of a socket on which some server listens.
Specification: docs/guest.md for people; the agent's protocol is written down in frames.py.
"""
