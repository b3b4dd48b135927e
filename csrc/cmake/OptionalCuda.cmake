# The CUDA router as a module of its own, _cuda. STAGE1_CUDA:
#   AUTO  for the GPUs of this machine, where there are one and nvcc; otherwise nothing (the default: an install is quick)
#   ON    for every architecture below that nvcc knows, and PTX of the newest; no nvcc is an error
#   OFF   nothing
# CMAKE_CUDA_ARCHITECTURES, where given, overrides the list. Nothing here needs a GPU or a driver at build time.
set(STAGE1_CUDA AUTO CACHE STRING "Build the CUDA router: AUTO, ON or OFF")
set_property(CACHE STAGE1_CUDA PROPERTY STRINGS AUTO ON OFF)
if(NOT STAGE1_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "STAGE1_CUDA must be AUTO, ON or OFF, got '${STAGE1_CUDA}'")
endif()

# The machine's compute capabilities as architectures, such as 89;120; empty without a GPU.
function(stage1_machine_architectures result)
  set(${result} "" PARENT_SCOPE)
  find_program(STAGE1_NVIDIA_SMI nvidia-smi)
  mark_as_advanced(STAGE1_NVIDIA_SMI)
  if(STAGE1_NVIDIA_SMI)
    execute_process(COMMAND "${STAGE1_NVIDIA_SMI}" --query-gpu=compute_cap --format=csv,noheader
                    OUTPUT_VARIABLE found ERROR_QUIET RESULT_VARIABLE status TIMEOUT 20)
    if(status EQUAL 0)
      string(REGEX MATCHALL "[0-9]+\\.[0-9]" found "${found}")
      string(REPLACE "." "" found "${found}")
      list(REMOVE_DUPLICATES found)
      set(${result} "${found}" PARENT_SCOPE)
    endif()
  endif()
endfunction()

# The intersection of ours with what this nvcc compiles, and PTX of the newest.
function(stage1_every_architecture result)
  execute_process(COMMAND "${STAGE1_NVCC}" --list-gpu-arch OUTPUT_VARIABLE known COMMAND_ERROR_IS_FATAL ANY)
  set(kept "")
  foreach(architecture IN ITEMS 75 80 86 89 90 100 120)
    if(known MATCHES "compute_${architecture}\n")
      list(APPEND kept "${architecture}")
    endif()
  endforeach()
  list(TRANSFORM kept APPEND "-real" OUTPUT_VARIABLE all)
  list(GET kept -1 newest)
  list(APPEND all "${newest}-virtual")
  set(${result} "${all}" PARENT_SCOPE)
endfunction()

# A language is enabled in a file's scope, never in a function's.
if(STAGE1_CUDA STREQUAL "OFF")
  return()
endif()
find_program(STAGE1_NVCC nvcc HINTS ENV CUDACXX ENV CUDA_HOME ENV CUDA_PATH /usr/local/cuda PATH_SUFFIXES bin)
mark_as_advanced(STAGE1_NVCC)
set(stage1_architectures "${CMAKE_CUDA_ARCHITECTURES}")
if(STAGE1_CUDA STREQUAL "AUTO")
  stage1_machine_architectures(stage1_machine)
  if(NOT STAGE1_NVCC OR NOT stage1_machine)
    message(STATUS "stage1: no CUDA router (AUTO needs nvcc and a GPU here; STAGE1_CUDA=ON builds it for all GPUs)")
    return()
  endif()
  if(NOT stage1_architectures)
    list(TRANSFORM stage1_machine APPEND "-real" OUTPUT_VARIABLE stage1_architectures)
  endif()
elseif(NOT STAGE1_NVCC)
  message(FATAL_ERROR "STAGE1_CUDA=ON needs nvcc; install a CUDA toolkit or point CUDA_HOME at one")
elseif(NOT stage1_architectures)
  stage1_every_architecture(stage1_architectures)
endif()

# A found nvcc that is not on PATH is handed over the one way that check_language reads; a wrapper stays a wrapper.
set(ENV{CUDACXX} "${STAGE1_NVCC}")
set(CMAKE_CUDA_ARCHITECTURES "${stage1_architectures}")
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  set(stage1_problem "${STAGE1_NVCC} does not compile with this C++ compiler")
  if(STAGE1_CUDA STREQUAL "ON")
    message(FATAL_ERROR "STAGE1_CUDA=ON: ${stage1_problem}")
  endif()
  message(WARNING "stage1: no CUDA router: ${stage1_problem}")
  return()
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
message(STATUS "stage1: CUDA router for ${stage1_architectures} with nvcc ${CMAKE_CUDA_COMPILER_VERSION}")

pybind11_add_module(_cuda csrc/bindings/cuda.cpp csrc/route/route.cu)
target_include_directories(_cuda PRIVATE csrc/include)
target_compile_features(_cuda PRIVATE cxx_std_20)
# The static runtime looks for the driver at its first call, so the module loads where there is none.
target_link_libraries(_cuda PRIVATE CUDA::cudart_static)
set_target_properties(_cuda PROPERTIES CUDA_ARCHITECTURES "${stage1_architectures}" CUDA_RUNTIME_LIBRARY Static
                                       CUDA_VISIBILITY_PRESET hidden INTERPROCEDURAL_OPTIMIZATION OFF)
string(REPLACE ";" " " stage1_words "${stage1_architectures}")
target_compile_definitions(_cuda PRIVATE "STAGE1_VERSION=\"${PROJECT_VERSION}\""
                                         "STAGE1_ARCHITECTURES=\"${stage1_words}\"")
# Each step one correctly rounded operation, as on the CPU: no contraction, no fast division. The standard is spelled
# out because CMake 3.25 knows of none above 17 for nvcc.
target_compile_options(
  _cuda
  PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-std=c++20 -fmad=false --prec-div=true --expt-relaxed-constexpr
          $<$<BOOL:${STAGE1_WERROR}>:--Werror=all-warnings>>
          $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wpedantic -Wconversion -ffp-contract=off
          $<$<BOOL:${STAGE1_WERROR}>:-Werror>>)
install(TARGETS _cuda LIBRARY DESTINATION stage1_pro)
