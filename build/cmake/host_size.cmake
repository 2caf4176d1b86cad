# Builds for size what no token waits for: options, chat templates, HTTP, pictures. It makes these
# libraries a third smaller; inference (ggml, libllama) and sampling keep -O3 (docs/size.md).
# farm/plan.py names this file as CMAKE_PROJECT_INCLUDE: CMake reads it after each project().

function(farm_build_for_size)
    foreach(target IN ITEMS
            llama-common server-context llama-server-impl llama-cli-impl mtmd cpp-httplib)
        if(NOT TARGET ${target})
            message(WARNING "host_size.cmake: llama.cpp has no target ${target} any more")
        else()
            target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:C,CXX>:-Os>)
        endif()
    endforeach()
    if(TARGET llama-common)
        set_source_files_properties("${CMAKE_SOURCE_DIR}/common/sampling.cpp"
            TARGET_DIRECTORY llama-common PROPERTIES COMPILE_OPTIONS -O3)
    endif()
endfunction()

if(PROJECT_IS_TOP_LEVEL)
    cmake_language(DEFER DIRECTORY "${CMAKE_SOURCE_DIR}" CALL farm_build_for_size)
endif()

# FARM_CPU_VARIANTS names the CPU variants to build (farm/cpu_variants.py); the others stay in the
# project, but nothing that is built depends on them. ggml makes its library `ggml` depend on each.
if(PROJECT_IS_TOP_LEVEL AND FARM_CPU_VARIANTS)
    function(add_dependencies target)
        foreach(dependency IN LISTS ARGN)
            string(REGEX REPLACE "^ggml-cpu-" "" variant "${dependency}")
            if(variant STREQUAL dependency OR variant IN_LIST FARM_CPU_VARIANTS)
                _add_dependencies("${target}" "${dependency}")
            endif()
        endforeach()
    endfunction()
endif()
