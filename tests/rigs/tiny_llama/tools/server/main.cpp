#include <cstdio>

const char * llama_where();

int main() {
    std::printf("version: %d (%s) %s\n", BUILD_NUMBER, BUILD_COMMIT, llama_where());
    return 0;
}
