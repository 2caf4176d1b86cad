#pragma once

#include "ggml-backend.h"

#include <cstddef>
#include <functional>
#include <vector>

struct llama_file;

// Weights for device memory, read by several threads.
//
// Each thread takes pieces of a few megabytes in the order of the files, reads them with pread()
// into two pinned buffers of its own, and sends them on a backend (a stream) of its own: while one
// buffer is on its way to the device, the next piece is read into the other.

// the bytes of a tensor in a file
struct llama_upload {
    ggml_tensor      * tensor;
    const llama_file * file;
    size_t             offs;
};

// Number of threads: LLAMA_UPLOAD_THREADS, or one for each CPU that this process may use, 12 at
// most. 0 turns the parallel upload off, as on systems without pread().
int llama_upload_n_threads();

// Whether buffers of this type are filled this way: device memory whose backend copies from pinned
// host memory in the background.
bool llama_upload_supports(ggml_backend_buffer_type_t buft);

// Fills tensors of one device. progress is called on the calling thread with the number of bytes
// sent so far; if it returns false, no further piece is read. Every thread has ended on return.
// Returns false if cancelled.
// Throws std::runtime_error if a file cannot be read or ends within a tensor.
bool llama_upload_tensors(std::vector<llama_upload> uploads, const std::function<bool(size_t n_bytes)> & progress);

// Runs upload on this thread and beside on another one. upload begins when beside has called ready
// (or has ended), and both have ended on return.
// Returns what upload returns; throws what beside throws, else what upload throws.
bool llama_upload_beside(const std::function<void(const std::function<void()> & ready)> & beside, const std::function<bool()> & upload);
