# SPDX-License-Identifier: Apache-2.0
"""Measurements that take minutes, each behind a command in scripts/."""
