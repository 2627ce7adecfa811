# The stand-in as a library, which _C and torch's side of it share. For tests/rehearsal alone, never installed.
add_compile_options(-O2)
add_library(host_cuda SHARED tests/host_cuda/streams.cpp tests/host_cuda/kernels.cpp)
set_target_properties(host_cuda PROPERTIES CXX_VISIBILITY_PRESET default VISIBILITY_INLINES_HIDDEN OFF)
target_include_directories(host_cuda PUBLIC tests/host_cuda)
target_compile_definitions(host_cuda PUBLIC LMC_HOST_CUDA)
find_package(Threads REQUIRED)
target_link_libraries(host_cuda PUBLIC Threads::Threads)

target_compile_definitions(_C PRIVATE LMCACHE_MM_CUDA)
target_compile_options(_C PRIVATE -O2 -Wno-unknown-pragmas)
target_link_libraries(_C PRIVATE host_cuda)

execute_process(COMMAND ${Python_EXECUTABLE} -c "import torch; print(torch.__path__[0], torch.compiled_with_cxx11_abi())"
                OUTPUT_VARIABLE torch OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
separate_arguments(torch)
list(GET torch 0 torch_root)
pybind11_add_module(torch_device MODULE NO_EXTRAS tests/rehearsal/torch_device.cpp)
set_target_properties(torch_device PROPERTIES CXX_STANDARD 20 BUILD_RPATH ${torch_root}/lib)
target_include_directories(torch_device SYSTEM PRIVATE ${torch_root}/include)
target_link_libraries(torch_device PRIVATE host_cuda ${torch_root}/lib/libtorch_cpu.so ${torch_root}/lib/libc10.so)

add_library(rivals SHARED benchmarks/rivals.cu)
set_source_files_properties(benchmarks/rivals.cu PROPERTIES LANGUAGE CXX)
target_include_directories(rivals PRIVATE csrc)
set_target_properties(rivals PROPERTIES CXX_VISIBILITY_PRESET default)
target_link_libraries(rivals PRIVATE host_cuda)
# Nothing in them takes time, but their compilation.
set_source_files_properties(csrc/bindings.cpp tests/rehearsal/torch_device.cpp PROPERTIES COMPILE_OPTIONS -O0)
set_target_properties(host_cuda _C torch_device rivals PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR})
