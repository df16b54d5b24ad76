# SPDX-License-Identifier: Apache-2.0
"""The control socket: what a running server tells about itself, and the client that asks it."""
