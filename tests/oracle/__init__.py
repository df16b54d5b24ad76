# SPDX-License-Identifier: Apache-2.0
"""The differential oracle: what a guest is told of a share, and what Linux tells of a directory beside.

Must not know how the server works. Specification: docs/oracle.md.
"""
