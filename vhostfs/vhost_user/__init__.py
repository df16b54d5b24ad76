# SPDX-License-Identifier: Apache-2.0
"""vhost-user: messages, the device state machine (both without I/O), and the asyncio transport."""
