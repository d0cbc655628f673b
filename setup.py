"""Builds the C++ extension with CMake and Ninja; everything else stands in pyproject.toml."""

import subprocess
import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt where setuptools would have called a compiler."""

    def build_extension(self, ext: Extension) -> None:
        """Leaves the module where setuptools expects it."""
        import pybind11

        source = Path(__file__).resolve().parent
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "--fresh",  # an earlier isolated build left the paths of its tools, now gone
            *("-S", str(source), "-B", str(build), "-G", "Ninja"),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(build)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(
                "CMake stopped, as it says above: the build needs CMake, Ninja and GCC 10 or newer "
                "or Clang"
            ) from error


setup(
    # What a source distribution takes along.
    ext_modules=[Extension("dlzo_kernels._C", ["CMakeLists.txt", *sorted(glob("csrc/*"))])],
    cmdclass={"build_ext": CMakeBuild},
)
