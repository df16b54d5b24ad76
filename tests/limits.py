# SPDX-License-Identifier: Apache-2.0
"""How long tests wait for what must come, and how soon "at once" is.

Must not know what is waited for. Who states how fast something is counts, or compares with what waits for a
given time: a machine may have a third of its processors at any moment.
"""

from __future__ import annotations

HANG_S = 60.0
"""For what takes less than a second or two: whatever is not there by then hangs. It costs only then."""
LONG_HANG_S = 240.0
"""The same for what takes up to a minute: a boot, a compiler, a large tree."""
SETTLED_S = 15.0
"""For what may follow its announcement by a second: right sooner, and a difference is one by then."""
AT_ONCE_S = 8.0
"""For what must not wait for something: such waits take ten seconds at least, and it a fraction of one."""
