# SPDX-License-Identifier: Apache-2.0
"""The one exception that the VM layer raises towards people.

Must not know how it is shown: the command line turns it into one line on stderr.
Specification: house style, "errors to people".
"""


class VmError(Exception):
    """Something outside this program is not as it must be; the text says what was seen and what to try."""
