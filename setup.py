# SPDX-License-Identifier: Apache-2.0
"""What pyproject.toml cannot say: that cffi builds the C core."""

from setuptools import setup

setup(cffi_modules=["native/build.py:ffibuilder"])
