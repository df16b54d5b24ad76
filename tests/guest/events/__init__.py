# SPDX-License-Identifier: Apache-2.0
"""Host events in the guest."""
