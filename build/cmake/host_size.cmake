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
    if(FARM_CPU_VARIANTS AND TARGET mtmd)
        # The demo's, for the pinned source alone: 45 small files as three, as libllama's models are.
        get_target_property(sources mtmd SOURCES)
        get_target_property(folder mtmd SOURCE_DIR)
        list(FILTER sources EXCLUDE REGEX "models/")
        list(TRANSFORM sources PREPEND "${folder}/")
        set_source_files_properties(${sources}
            TARGET_DIRECTORY mtmd PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
        set_target_properties(mtmd PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 16)
    endif()
endfunction()

if(PROJECT_IS_TOP_LEVEL)
    cmake_language(DEFER DIRECTORY "${CMAKE_SOURCE_DIR}" CALL farm_build_for_size)
endif()

# FARM_CPU_VARIANTS names the CPU variants to build (farm/inputs/recipe.py); the others stay in the
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
