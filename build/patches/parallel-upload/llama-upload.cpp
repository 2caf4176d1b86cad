#include "llama-upload.h"

#include "llama-impl.h"
#include "llama-mmap.h"

#include "ggml-cpp.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <future>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>

#ifndef _WIN32
#include <unistd.h>
#endif

// large enough that a piece's fixed costs vanish, small enough that pinning the buffers does not
// matter: 2 * 12 threads * 2 MiB
static constexpr size_t LLAMA_UPLOAD_PIECE = 2 * 1024 * 1024;

static constexpr int LLAMA_UPLOAD_MAX_THREADS = 12;

// a thread that has less than this to do costs more than it saves
static constexpr size_t LLAMA_UPLOAD_PER_THREAD = 8 * LLAMA_UPLOAD_PIECE;

int llama_upload_n_threads() {
#ifdef _WIN32
    return 0;
#else
    const char * env = getenv("LLAMA_UPLOAD_THREADS");
    const int    n   = env && *env ? atoi(env) : (int) std::thread::hardware_concurrency();
    return std::max(0, std::min(n, LLAMA_UPLOAD_MAX_THREADS));
#endif
}

bool llama_upload_supports(ggml_backend_buffer_type_t buft) {
    ggml_backend_dev_t dev = ggml_backend_buft_get_device(buft);
    if (!dev || ggml_backend_buft_is_host(buft) || buft != ggml_backend_dev_buffer_type(dev)) {
        return false;
    }
    ggml_backend_dev_props props;
    ggml_backend_dev_get_props(dev, &props);
    return props.caps.async && props.caps.host_buffer && props.caps.events && ggml_backend_dev_host_buffer_type(dev);
}

#ifndef _WIN32
static void llama_upload_read(const llama_upload & from, size_t offs, size_t size, char * dst) {
    size_t n_read = 0;
    while (n_read < size) {
        const ssize_t n = pread(from.file->file_id(), dst + n_read, size - n_read, from.offs + offs + n_read);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            throw std::runtime_error(format("tensor '%s' cannot be read at byte %zu of its file: %s",
                ggml_get_name(from.tensor), from.offs + offs + n_read, n < 0 ? strerror(errno) : "the file ends there"));
        }
        n_read += n;
    }
}

namespace {

// what the threads of one upload share
struct upload_state {
    struct piece {
        const llama_upload * from;
        size_t               offs;
        size_t               size;
    };

    std::vector<piece>  pieces;
    std::atomic<size_t> next{0};
    std::atomic<size_t> n_done{0}; // bytes
    std::atomic<bool>   stop{false};

    std::mutex              mutex; // guards what follows
    std::condition_variable ended;
    int                     n_running = 0;
    std::string             error;

    void run(ggml_backend_dev_t dev);
    void send(ggml_backend_dev_t dev);
};

}

void upload_state::run(ggml_backend_dev_t dev) {
    std::string what;
    try {
        send(dev);
    } catch (const std::exception & err) {
        what = err.what();
        stop = true;
    }
    std::lock_guard<std::mutex> lock(mutex);
    if (error.empty()) {
        error = what;
    }
    n_running--;
    ended.notify_one();
}

void upload_state::send(ggml_backend_dev_t dev) {
    struct slot {
        ggml_backend_event_ptr  sent;
        ggml_backend_buffer_ptr host;
    };

    slot slots[2];
    ggml_backend_ptr backend(ggml_backend_dev_init(dev, nullptr));
    for (auto & slot : slots) {
        // the event first: it selects the device in this thread
        slot.sent.reset(ggml_backend_event_new(dev));
        slot.host.reset(ggml_backend_buft_alloc_buffer(ggml_backend_dev_host_buffer_type(dev), LLAMA_UPLOAD_PIECE));
        if (!backend || !slot.sent || !slot.host) {
            throw std::runtime_error(format("no stream or pinned memory for %s; LLAMA_UPLOAD_THREADS=0 loads without", ggml_backend_dev_name(dev)));
        }
    }
    for (int i = 0; !stop; i ^= 1) {
        const size_t idx = next++;
        if (idx >= pieces.size()) {
            break;
        }
        const piece & p    = pieces[idx];
        char        * data = (char *) ggml_backend_buffer_get_base(slots[i].host.get());

        ggml_backend_event_synchronize(slots[i].sent.get());
        llama_upload_read(*p.from, p.offs, p.size, data);
        ggml_backend_tensor_set_async(backend.get(), p.from->tensor, data, p.offs, p.size);
        ggml_backend_event_record(slots[i].sent.get(), backend.get());
        n_done += p.size;
    }
    ggml_backend_synchronize(backend.get());
}

bool llama_upload_tensors(std::vector<llama_upload> uploads, const std::function<bool(size_t n_bytes)> & progress) {
    if (uploads.empty()) {
        return true;
    }
    const int64_t t_start_us = ggml_time_us();
    std::sort(uploads.begin(), uploads.end(), [](const llama_upload & a, const llama_upload & b) {
        return a.file != b.file ? a.file < b.file : a.offs < b.offs;
    });

    upload_state state;
    size_t n_bytes = 0;
    for (const auto & upload : uploads) {
        const size_t size = ggml_nbytes(upload.tensor);
        for (size_t offs = 0; offs < size; offs += LLAMA_UPLOAD_PIECE) {
            state.pieces.push_back({ &upload, offs, std::min(LLAMA_UPLOAD_PIECE, size - offs) });
        }
        n_bytes += size;
    }

    ggml_backend_dev_t dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(uploads.front().tensor->buffer));

    const int n_threads = std::min<size_t>(llama_upload_n_threads(), 1 + n_bytes / LLAMA_UPLOAD_PER_THREAD);

    std::vector<std::thread> threads;
    state.n_running = n_threads;
    for (int i = 0; i < n_threads; ++i) {
        threads.emplace_back(&upload_state::run, &state, dev);
    }

    bool cancelled = false;
    {
        std::unique_lock<std::mutex> lock(state.mutex);
        while (!state.ended.wait_for(lock, std::chrono::milliseconds(10), [&] { return state.n_running == 0; })) {
            lock.unlock();
            if (!cancelled && !progress(state.n_done)) {
                cancelled  = true;
                state.stop = true;
            }
            lock.lock();
        }
    }
    for (auto & thread : threads) {
        thread.join();
    }
    if (!state.error.empty()) {
        throw std::runtime_error(state.error);
    }
    if (cancelled) {
        return false;
    }
    LLAMA_LOG_INFO("%s: %zu MiB to %s with %d threads in %.0f ms\n", __func__,
        n_bytes / 1024 / 1024, ggml_backend_dev_name(dev), n_threads, (ggml_time_us() - t_start_us) / 1000.0);
    return true;
}
#else
bool llama_upload_tensors(std::vector<llama_upload>, const std::function<bool(size_t n_bytes)> &) {
    throw std::runtime_error("the parallel upload needs pread()");
}
#endif

bool llama_upload_beside(const std::function<void(const std::function<void()> & ready)> & beside, const std::function<bool()> & upload) {
    std::promise<void> ready;
    auto other = std::async(std::launch::async, [&] {
        bool told = false;
        const auto tell = [&] {
            if (!told) {
                told = true;
                ready.set_value();
            }
        };
        try {
            beside(tell);
        } catch (...) {
            tell();
            throw;
        }
        tell();
    });
    ready.get_future().wait();

    bool               uploaded = false;
    std::exception_ptr error;
    try {
        uploaded = upload();
    } catch (...) {
        error = std::current_exception();
    }
    other.get(); // its error comes first: the upload may have failed of it
    if (error) {
        std::rethrow_exception(error);
    }
    return uploaded;
}
