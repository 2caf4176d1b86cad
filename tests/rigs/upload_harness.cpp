// Calls llama_upload_tensors() on a loopback device, for ThreadSanitizer.
//
//     upload_harness FILE whole|cancelled|truncated|beside|failed
//
// FILE is written; what arrives on the device is compared with it byte by byte. Prints what came of
// it: "same", "different", "cancelled", or the error.
#include "llama-mmap.h"
#include "llama-upload.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <unistd.h>

extern "C" ggml_backend_reg_t ggml_backend_init(void); // loopback_device.cpp

static const int64_t SIZES[] = { 5, 3 * 1024 * 1024, 700 * 1024, 2 * 1024 * 1024, 60 * 1024 * 1024 + 7 };

static std::vector<char> written(const char * path, size_t size) {
    std::vector<char> bytes(size);
    unsigned state = 1;
    for (auto & byte : bytes) {
        state = state * 1664525 + 1013904223;
        byte  = state >> 24;
    }
    FILE * file = fopen(path, "wb");
    fwrite(bytes.data(), 1, size, file);
    fclose(file);
    return bytes;
}

static std::string uploaded(const char * path, const std::string & how) {
    ggml_backend_dev_t dev = ggml_backend_reg_dev_get(ggml_backend_init(), 0);
    ggml_context_ptr ctx(ggml_init({ 16 * ggml_tensor_overhead(), nullptr, /* no_alloc */ true }));

    size_t size = 11; // no tensor begins at a page
    std::vector<llama_upload> uploads;
    for (const int64_t n : SIZES) {
        uploads.push_back({ ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I8, n), nullptr, size });
        ggml_format_name(uploads.back().tensor, "tensor %zu", uploads.size());
        size += n;
    }
    const auto bytes = written(path, size);
    llama_file file(path, "rb");
    for (auto & upload : uploads) {
        upload.file = &file;
    }
    ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), ggml_backend_dev_buffer_type(dev)));

    if (how == "truncated" && truncate(path, size / 2) != 0) {
        return "no truncate";
    }
    const auto upload = [&] { return llama_upload_tensors(uploads, [&](size_t) { return how != "cancelled"; }); };
    int  beside = 0;
    bool done   = false;
    if (how == "beside") {
        done = llama_upload_beside([&](const std::function<void()> & ready) { beside = 1; ready(); ready(); beside = 2; }, upload) && beside == 2;
    } else if (how == "failed") {
        done = llama_upload_beside([](const std::function<void()> &) { throw std::runtime_error("beside failed"); }, upload);
    } else {
        done = upload();
    }
    if (!done) {
        return "cancelled";
    }
    for (const auto & upload : uploads) {
        std::vector<char> got(ggml_nbytes(upload.tensor));
        ggml_backend_tensor_get(upload.tensor, got.data(), 0, got.size());
        if (memcmp(got.data(), bytes.data() + upload.offs, got.size()) != 0) {
            return "different";
        }
    }
    return "same";
}

int main(int, char ** argv) {
    try {
        puts(uploaded(argv[1], argv[2]).c_str());
    } catch (const std::exception & err) {
        puts(err.what());
    }
    return 0;
}
