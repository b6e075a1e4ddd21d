"""Puts the folders of the repository that are no package into a wheel; pyproject.toml has everything else."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("configs", "examples", "launch")
"""`python -m grpo_jax.init` copies them out again."""


class BuildWithShipped(build_py):
    """Beside the package, grpo_jax/_shipped/FOLDER; an editable install has the folders where they are."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for name in SHIPPED:
            target = Path(self.build_lib) / "grpo_jax" / "_shipped" / name
            shutil.rmtree(target, ignore_errors=True)  # of a build before this one
            shutil.copytree(name, target, ignore=shutil.ignore_patterns("__pycache__"))


setup(cmdclass={"build_py": BuildWithShipped})
