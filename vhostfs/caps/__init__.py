# SPDX-License-Identifier: Apache-2.0
"""What this host, its QEMUs and its running servers can do: tried, not guessed. Asking changes nothing."""
