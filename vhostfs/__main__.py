# SPDX-License-Identifier: Apache-2.0
"""`python -m vhostfs`: the same as the vhostfs command."""

import sys

from .cli import main

sys.exit(main())
