# SPDX-License-Identifier: Apache-2.0
"""Owns the base of all errors that are meant for people, and the exit status of each.
Must not know how they are shown: vhostfs/cli prints the text as one line on stderr.
Specification: house style, "errors to people": what was seen, what was expected, what to try."""


class UserError(Exception):
    """Its text is one complete line for people; never shown with a traceback."""

    exit_status = 1
