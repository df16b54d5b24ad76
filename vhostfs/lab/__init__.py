# SPDX-License-Identifier: Apache-2.0
"""Experiments: what a guest is told, for every combination of host source, server, VMM, driver and kernel."""
