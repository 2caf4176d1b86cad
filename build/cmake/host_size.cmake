# Builds for size what no token waits for: options, chat templates, HTTP, pictures. It makes these
# libraries a third smaller; inference (ggml, libllama) and sampling keep -O3 (docs/size.md).
# farm/plan.py names this file as CMAKE_PROJECT_INCLUDE: CMake reads it after each project().

# Compiles a target's sources in batches, except those that match ALONE. The demo's, for the pinned
# source alone: most of the seconds of a small file are its headers.
function(farm_unite target batch alone)
    if(TARGET ${target})
        get_target_property(sources ${target} SOURCES)
        get_target_property(folder ${target} SOURCE_DIR)
        foreach(source IN LISTS sources)
            set(skip OFF)
            if(source MATCHES "${alone}")
                set(skip ON)
            endif()
            get_filename_component(source "${source}" ABSOLUTE BASE_DIR "${folder}")
            set_source_files_properties("${source}"
                TARGET_DIRECTORY ${target} PROPERTIES SKIP_UNITY_BUILD_INCLUSION ${skip})
        endforeach()
        set_target_properties(${target} PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE ${batch})
    endif()
endfunction()

# Compiles whole targets at an optimisation level; a later call wins.
function(farm_optimise level)
    foreach(target IN LISTS ARGN)
        if(TARGET ${target})
            target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:C,CXX>:${level}>)
        endif()
    endforeach()
endfunction()

# Compiles one source of llama-common at a level of its own, which wins over its target's.
function(farm_optimise_source level source)
    if(TARGET llama-common)
        set_source_files_properties("${CMAKE_SOURCE_DIR}/common/${source}"
            TARGET_DIRECTORY llama-common PROPERTIES COMPILE_OPTIONS ${level})
    endif()
endfunction()

function(farm_build_for_size)
    set(targets llama-common server-context llama-server-impl llama-cli-impl mtmd cpp-httplib)
    foreach(target IN LISTS targets)
        if(NOT TARGET ${target})
            message(WARNING "host_size.cmake: llama.cpp has no target ${target} any more")
        endif()
    endforeach()
    farm_optimise(-Os ${targets})
    farm_optimise_source(-O3 sampling.cpp)
    if(FARM_CPU_VARIANTS)
        farm_unite(llama 16 "^llama-kv-cache-dsv4\\.cpp$")
        farm_unite(llama-cli-impl 3 "^$")
        farm_unite(llama-common 24 "^(arg|json|jinja/value)\\.cpp$")
        farm_unite(llama-server-impl 3 "^$")
        farm_unite(mtmd 25 "^mtmd-helper")
        farm_unite(server-context 9 "^server-context\\.cpp$")
        # arguments, HTTP and pictures: no token waits for these, and the demo's person does
        farm_optimise(-O0 cpp-httplib llama-cli-impl mtmd)
        farm_optimise_source(-O0 arg.cpp)
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
