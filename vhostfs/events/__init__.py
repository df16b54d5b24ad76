# SPDX-License-Identifier: Apache-2.0
"""Host events on their way to the guest, as far as Python decides: the source, what is shown to people."""
