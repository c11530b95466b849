"""Which folders are packaged; everything else is in pyproject.toml."""

from setuptools import find_namespace_packages, setup

setup(
    # configs/ is at the top of a checkout, and inside the installed package.
    packages=[*find_namespace_packages(include=["replknet_paddle*"]), "replknet_paddle.configs"],
    package_dir={"replknet_paddle.configs": "configs"},
)
