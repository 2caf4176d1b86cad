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
