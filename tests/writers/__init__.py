# SPDX-License-Identifier: Apache-2.0
"""Programs that write as people's programs do, and watchers that follow a whole tree while they do it."""
