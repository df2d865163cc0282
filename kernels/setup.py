"""Metadata lives in setup.cfg. `ZEDA_BUILD_KERNELS=1 pip install ./kernels` also builds the kernels."""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
PLACE = "zeda_kernels.libzeda_kernels"


class BuildKernels(build_ext):
    """Runs the package's own build of the kernels in place of a C compiler."""

    def get_ext_filename(self, fullname):
        return f"{fullname.replace('.', os.sep)}.so"  # a plain library, of no Python version

    def build_extension(self, ext):
        sys.path[:0] = [str(HERE), str(HERE.parent)]  # zeda_megatron, of which the build takes its errors
        from zeda_kernels.build import BuildOptions, build
        from zeda_megatron.errors import UserError

        try:
            build(Path(self.get_ext_fullpath(ext.name)).resolve(), BuildOptions.from_environment())
        except UserError as error:
            raise SystemExit(f"error: ZEDA_BUILD_KERNELS=1: {error}") from None


kernels = os.environ.get("ZEDA_BUILD_KERNELS") == "1"
setup(ext_modules=[Extension(PLACE, [])] if kernels else [], cmdclass={"build_ext": BuildKernels})
