"""Puts midstream's own modules into the package as it is built; the rest of the build is in pyproject.toml."""

import runpy
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

HERE = Path(__file__).parent
PACKAGE = HERE / "src" / "midstream_vllm"
SHARED = runpy.run_path(str(PACKAGE / "shared.py"))


class BuildWithShared(build_py):
    """Writes the modules beside the others in the build folder."""

    def run(self):
        super().run()
        if not self.editable_mode:  # an editable install reads them from the checkout, as PYTHONPATH does
            SHARED["write"](Path(self.build_lib) / "midstream_vllm" / "_midstream")


class SourceWithShared(sdist):
    """Writes them into the source distribution, which has no checkout around it."""

    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, files)
        SHARED["write"](Path(base_dir) / "src" / "midstream_vllm" / "_midstream")


setup(cmdclass={"build_py": BuildWithShared, "sdist": SourceWithShared})
