// A backend plugin whose "GPU" is memory of this process: what uploads weights is tried without one.
//
// Its buffers are no host memory for llama.cpp, copies to them are made later by a stream's own
// thread, as a GPU makes them, and the CPU backend computes on them in place. GGML_BACKEND_PATH
// names it. LOOPBACK_DEVICES says how many GPUs there are (1), LOOPBACK_NO_EVENTS that they have no
// events, and LOOPBACK_SHRINKS=SIZE:FILE what is cut off as soon as something is uploaded.
#include "ggml-backend-impl.h"

#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <unistd.h>

namespace {

// Work in its order, done by a thread of its own
struct stream {
    std::mutex                        mutex;
    std::condition_variable           changed;
    std::deque<std::function<void()>> queue;
    size_t                            n_put  = 0;
    size_t                            n_done = 0;
    bool                              ending = false;
    std::thread                       thread{ [this] { work(); } };
    ggml_backend_t                    cpu = nullptr; // made when something is computed

    ~stream() {
        { std::lock_guard<std::mutex> lock(mutex); ending = true; }
        changed.notify_all();
        thread.join();
        ggml_backend_free(cpu);
    }

    void work() {
        std::unique_lock<std::mutex> lock(mutex);
        while (true) {
            changed.wait(lock, [&] { return ending || !queue.empty(); });
            if (queue.empty()) {
                return;
            }
            auto next = std::move(queue.front());
            queue.pop_front();
            lock.unlock();
            next();
            lock.lock();
            n_done++;
            changed.notify_all();
        }
    }

    size_t put(std::function<void()> what) {
        std::lock_guard<std::mutex> lock(mutex);
        queue.push_back(std::move(what));
        changed.notify_all();
        return ++n_put;
    }

    void wait(size_t until) {
        std::unique_lock<std::mutex> lock(mutex);
        changed.wait(lock, [&] { return n_done >= until; });
    }
};

// What was recorded last; it outlives no stream that it was recorded on
struct event {
    stream * on    = nullptr;
    size_t   until = 0;
};

struct device {
    std::string              name;
    ggml_backend_buffer_type buft;
    ggml_backend_buffer_type host_buft;
    ggml_backend_device      dev;
};

device devices[4];

device * of(ggml_backend_dev_t dev) { return (device *) dev->context; }

// buffers

void * base(ggml_backend_buffer_t buffer) { return buffer->context; }

const ggml_backend_buffer_i buffer_i = {
    /* .free_buffer   = */ [](ggml_backend_buffer_t buffer) { free(buffer->context); },
    /* .get_base      = */ base,
    /* .init_tensor   = */ nullptr,
    /* .memset_tensor = */ [](ggml_backend_buffer_t, ggml_tensor * t, uint8_t v, size_t offs, size_t n) { memset((char *) t->data + offs, v, n); },
    /* .set_tensor    = */ [](ggml_backend_buffer_t, ggml_tensor * t, const void * data, size_t offs, size_t n) { memcpy((char *) t->data + offs, data, n); },
    /* .get_tensor    = */ [](ggml_backend_buffer_t, const ggml_tensor * t, void * data, size_t offs, size_t n) { memcpy(data, (const char *) t->data + offs, n); },
    /* .set_tensor_2d = */ nullptr,
    /* .get_tensor_2d = */ nullptr,
    /* .cpy_tensor    = */ nullptr,
    /* .clear         = */ [](ggml_backend_buffer_t buffer, uint8_t v) { memset(buffer->context, v, buffer->size); },
    /* .reset         = */ nullptr,
};

ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    void * data = aligned_alloc(64, (size + 64) / 64 * 64);
    memset(data, 0xff, size); // what is not uploaded is no zero by chance
    return ggml_backend_buffer_init(buft, buffer_i, data, size);
}

// backend

void shrink() {
    if (const char * what = getenv("LOOPBACK_SHRINKS")) {
        char * file;
        const size_t size = strtoull(what, &file, 10);
        if (truncate(file + 1, size) != 0) {
            abort();
        }
    }
}

void set_async(ggml_backend_t backend, ggml_tensor * t, const void * data, size_t offs, size_t n) {
    static std::once_flag shrunk;
    std::call_once(shrunk, shrink);
    ((stream *) backend->context)->put([=] {
        std::this_thread::yield();
        memcpy((char *) t->data + offs, data, n);
    });
}

void get_async(ggml_backend_t backend, const ggml_tensor * t, void * data, size_t offs, size_t n) {
    ((stream *) backend->context)->put([=] { memcpy(data, (const char *) t->data + offs, n); });
}

void synchronize(ggml_backend_t backend) {
    auto * s = (stream *) backend->context;
    s->wait(s->put([] {}));
}

ggml_status compute(ggml_backend_t backend, ggml_cgraph * graph) {
    auto * s = (stream *) backend->context;
    if (!s->cpu) {
        s->cpu = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr);
        // by itself it takes four threads, which wait for each other in busy loops
        auto * reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(s->cpu));
        ((ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads"))(s->cpu, 1);
    }
    synchronize(backend);
    return ggml_backend_graph_compute(s->cpu, graph);
}

const ggml_backend_i backend_i = {
    /* .get_name            = */ [](ggml_backend_t backend) { return of(backend->device)->name.c_str(); },
    /* .free                = */ [](ggml_backend_t backend) { delete (stream *) backend->context; delete backend; },
    /* .set_tensor_async    = */ set_async,
    /* .get_tensor_async    = */ get_async,
    /* .set_tensor_2d_async = */ nullptr,
    /* .get_tensor_2d_async = */ nullptr,
    /* .cpy_tensor_async    = */ nullptr,
    /* .synchronize         = */ synchronize,
    /* .graph_plan_create   = */ nullptr,
    /* .graph_plan_free     = */ nullptr,
    /* .graph_plan_update   = */ nullptr,
    /* .graph_plan_compute  = */ nullptr,
    /* .graph_compute       = */ compute,
    /* .event_record        = */ [](ggml_backend_t backend, ggml_backend_event_t e) {
        auto * s = (stream *) backend->context;
        *(event *) e->context = { s, s->put([] {}) };
    },
    /* .event_wait          = */ [](ggml_backend_t backend, ggml_backend_event_t e) {
        const event on = *(event *) e->context;
        ((stream *) backend->context)->put([=] { if (on.on) { on.on->wait(on.until); } });
    },
    /* .graph_optimize      = */ nullptr,
};

ggml_guid_t guid() {
    static ggml_guid id = { 0x10, 0x0b };
    return &id;
}

// device

ggml_backend_dev_t cpu() { return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU); }

void memory(ggml_backend_dev_t, size_t * free, size_t * total) { *free = *total = size_t(8) << 30; }

const ggml_backend_device_i device_i = {
    /* .get_name             = */ [](ggml_backend_dev_t dev) { return of(dev)->name.c_str(); },
    /* .get_description      = */ [](ggml_backend_dev_t) { return "memory of this process"; },
    /* .get_memory           = */ memory,
    /* .get_type             = */ [](ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; },
    /* .get_props            = */ [](ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
        props->name        = of(dev)->name.c_str();
        props->description = "memory of this process";
        props->type        = GGML_BACKEND_DEVICE_TYPE_GPU;
        props->device_id   = nullptr;
        memory(dev, &props->memory_free, &props->memory_total);
        props->caps = { /* async */ true, /* host_buffer */ true, /* buffer_from_host_ptr */ false, /* events */ getenv("LOOPBACK_NO_EVENTS") == nullptr, /* mmap_support */ true };
    },
    /* .init_backend         = */ [](ggml_backend_dev_t dev, const char *) { return new ggml_backend { guid(), backend_i, dev, new stream }; },
    /* .get_buffer_type      = */ [](ggml_backend_dev_t dev) { return &of(dev)->buft; },
    /* .get_host_buffer_type = */ [](ggml_backend_dev_t dev) { return &of(dev)->host_buft; },
    /* .buffer_from_host_ptr = */ nullptr,
    /* .supports_op          = */ [](ggml_backend_dev_t, const ggml_tensor * op) { return ggml_backend_dev_supports_op(cpu(), op); },
    /* .supports_buft        = */ [](ggml_backend_dev_t dev, ggml_backend_buffer_type_t buft) { return buft == &of(dev)->buft; },
    /* .offload_op           = */ nullptr,
    /* .event_new            = */ [](ggml_backend_dev_t dev) { return new ggml_backend_event { dev, new event }; },
    /* .event_free           = */ [](ggml_backend_dev_t, ggml_backend_event_t e) { delete (event *) e->context; delete e; },
    /* .event_synchronize    = */ [](ggml_backend_dev_t, ggml_backend_event_t e) {
        const event on = *(event *) e->context;
        if (on.on) { on.on->wait(on.until); }
    },
};

const ggml_backend_buffer_type_i buft_i = {
    /* .get_name         = */ [](ggml_backend_buffer_type_t buft) { return of(buft->device)->name.c_str(); },
    /* .alloc_buffer     = */ alloc_buffer,
    /* .alloc_buffer_n   = */ nullptr,
    /* .get_alignment    = */ [](ggml_backend_buffer_type_t) { return size_t(64); },
    /* .get_max_size     = */ nullptr,
    /* .get_alloc_size   = */ nullptr,
    /* .get_alloc_size_n = */ nullptr,
    /* .is_host          = */ nullptr,
};

size_t count(ggml_backend_reg_t) {
    const char * n = getenv("LOOPBACK_DEVICES");
    return n ? atoi(n) : 1;
}

ggml_backend_dev_t get_device(ggml_backend_reg_t reg, size_t i) {
    device & d = devices[i];
    if (d.name.empty()) {
        d.name      = "LOOP" + std::to_string(i);
        d.dev       = { device_i, reg, &d };
        d.buft      = { buft_i, &d.dev, nullptr };
        d.host_buft = { buft_i, &d.dev, nullptr };
        d.host_buft.iface.is_host  = [](ggml_backend_buffer_type_t) { return true; };
        d.host_buft.iface.get_name = [](ggml_backend_buffer_type_t) { return "Loopback_Host"; };
    }
    return &d.dev;
}

ggml_backend_reg_t reg() {
    static ggml_backend_reg r = {
        GGML_BACKEND_API_VERSION,
        {
            [](ggml_backend_reg_t) { return "Loopback"; },
            count,
            get_device,
            [](ggml_backend_reg_t, const char *) -> void * { return nullptr; },
        },
        nullptr,
    };
    return &r;
}

}

GGML_BACKEND_DL_IMPL(reg)
