"""Build script. The metadata stand in pyproject.toml; this file is where the native extension will be declared."""

from setuptools import setup

setup()
