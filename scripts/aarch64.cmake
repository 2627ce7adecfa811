# A build for aarch64 on another machine: for scripts/wheels.sh, which sets these variables.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CUDA_HOST_COMPILER aarch64-linux-gnu-g++)
set(Python_INCLUDE_DIR "$ENV{PYTHON_INCLUDE}")
set(PYTHON_MODULE_EXTENSION "$ENV{SETUPTOOLS_EXT_SUFFIX}")
set(PYTHON_MODULE_DEBUG_POSTFIX "")
