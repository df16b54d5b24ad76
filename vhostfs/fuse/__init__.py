# SPDX-License-Identifier: Apache-2.0
"""FUSE as Python sees it: the ABI, INIT negotiation, and the operations that are decided here."""
