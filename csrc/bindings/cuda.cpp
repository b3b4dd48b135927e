// The router of one device: owns its buffers, takes device addresses and a stream. Loading this module asks nothing of
// the driver. Arguments arrive checked: stage1_pro.native is the only caller.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "stage1/route_cuda.hpp"

namespace stage1::bindings {
namespace {

namespace py = pybind11;
using Address = std::uintptr_t;

void check(const char* what, cudaError_t status) {
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
    }
}

// The calling thread's device for the length of a block.
class OnDevice {
  public:
    explicit OnDevice(int device) {
        check("device", cudaGetDevice(&before_));
        if (device != before_) {
            check("device", cudaSetDevice(device));
        }
        device_ = device;
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;
    ~OnDevice() {
        if (device_ != before_) {
            cudaSetDevice(before_);
        }
    }

  private:
    int before_ = 0;
    int device_ = 0;
};

struct FreeDevice {
    void operator()(void* memory) const { cudaFree(memory); }
};
struct FreeHost {
    void operator()(void* memory) const { cudaFreeHost(memory); }
};
struct FreeEvent {
    void operator()(cudaEvent_t event) const { cudaEventDestroy(event); }
};

// Number of devices, 0 without a driver; `why` says what is missing then.
int device_count(std::string& why) {
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status != cudaSuccess) {
        why = cudaGetErrorString(status);
        cudaGetLastError();
        return 0;
    }
    if (count == 0) {
        why = "the driver names no device";
    }
    return count;
}

class Router {
  public:
    Router(std::size_t max_rows, bool use_gate, double scale, double offset, float threshold, int device)
        : device_(device), rule_{use_gate ? Score::gate : Score::probability, scale, offset, threshold} {
        const OnDevice here(device_);
        // One allocation, each part at an address that any type may have.
        const std::vector<std::size_t> sizes{max_rows,
                                             4 * max_rows,
                                             4 * max_rows,
                                             4 * max_rows,
                                             4 * max_rows,
                                             sizeof(std::int32_t),
                                             cuda::scratch_bytes(max_rows)};
        std::vector<std::size_t> starts;
        std::size_t total = 0;
        for (const std::size_t size : sizes) {
            starts.push_back(total);
            total += (size + 255) / 256 * 256;
        }
        void* memory = nullptr;
        check("router", cudaMalloc(&memory, total));
        memory_.reset(memory);
        check("router", cudaMemset(memory, 0, total));
        check("router", cudaDeviceSynchronize());
        auto* const base = static_cast<std::uint8_t*>(memory);
        out_.exited = base + starts[0];
        out_.score = reinterpret_cast<float*>(base + starts[1]);
        out_.label = reinterpret_cast<std::int32_t*>(base + starts[2]);
        out_.probability = reinterpret_cast<float*>(base + starts[3]);
        out_.deferred = reinterpret_cast<std::int32_t*>(base + starts[4]);
        out_.count = reinterpret_cast<std::int32_t*>(base + starts[5]);
        scratch_ = base + starts[6];

        void* pinned = nullptr;
        check("router", cudaHostAlloc(&pinned, sizeof(std::int32_t), cudaHostAllocMapped));
        pinned_.reset(static_cast<std::int32_t*>(pinned));
        *pinned_ = 0;
        void* mapped = nullptr;
        check("router", cudaHostGetDevicePointer(&mapped, pinned, 0));
        out_.host_count = static_cast<std::int32_t*>(mapped);
        cudaEvent_t event = nullptr;
        check("router", cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
        event_.reset(event);
    }

    void route(Address logits, std::size_t n, std::size_t n_classes, Address gate, Address stream) {
        const OnDevice here(device_);
        cuda::route(reinterpret_cast<const float*>(logits), n, n_classes, reinterpret_cast<const float*>(gate), rule_,
                    out_, scratch_, stream_of(stream));
    }

    void gather(Address source, std::size_t row_bytes, std::size_t capacity, Address out, Address stream) {
        const OnDevice here(device_);
        cuda::gather(reinterpret_cast<const void*>(source), row_bytes, out_.deferred, out_.count, capacity,
                     reinterpret_cast<void*>(out), stream_of(stream));
    }

    void merge(Address logits, std::size_t n_classes, std::size_t capacity, Address stream) {
        const OnDevice here(device_);
        cuda::merge(reinterpret_cast<const float*>(logits), n_classes, capacity, out_, stream_of(stream));
    }

    void mark(Address stream) {
        const OnDevice here(device_);
        check("count", cudaEventRecord(event_.get(), stream_of(stream)));
    }

    std::int32_t count() const {
        check("count", cudaEventSynchronize(event_.get()));
        return *static_cast<const volatile std::int32_t*>(pinned_.get());
    }

    const cuda::Routed& out() const { return out_; }

  private:
    static cuda::Stream stream_of(Address stream) { return reinterpret_cast<cuda::Stream>(stream); }

    int device_;
    Rule rule_;
    cuda::Routed out_{};
    void* scratch_ = nullptr;
    std::unique_ptr<void, FreeDevice> memory_;
    std::unique_ptr<std::int32_t, FreeHost> pinned_;
    std::unique_ptr<CUevent_st, FreeEvent> event_;
};

std::unique_ptr<cuda::BucketSwitch> make_switch(const std::vector<std::int32_t>& buckets,
                                                const std::vector<Address>& graphs, Address count, int device) {
    const OnDevice here(device);
    std::vector<cuda::Graph> bodies;
    std::ranges::transform(graphs, std::back_inserter(bodies),
                           [](Address graph) { return reinterpret_cast<cuda::Graph>(graph); });
    return std::make_unique<cuda::BucketSwitch>(buckets, bodies, reinterpret_cast<const std::int32_t*>(count));
}

template <auto member>
Address address(const Router& router) {
    return reinterpret_cast<Address>(router.out().*member);
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
    using Routed = cuda::Routed;
    using Release = py::call_guard<py::gil_scoped_release>;
    module.doc() = "The CUDA router of stage1_pro; call it through stage1_pro.native";
    module.attr("__version__") = STAGE1_VERSION;
    module.def(
        "built", [] { return std::pair(STAGE1_ARCHITECTURES, CUDART_VERSION); },
        "The architectures it was built for, and with which CUDA (13000 is 13.0)");
    module.def(
        "devices",
        [] {
            std::string why;
            const int count = device_count(why);
            return std::pair(count, why);
        },
        "Number of CUDA devices, and what is missing where it is 0; never raises");
    py::class_<Router>(module, "Router", "Decides rows on a device, in buffers of its own")
        .def(py::init<std::size_t, bool, double, double, float, int>(), py::arg("max_rows"), py::arg("use_gate"),
             py::arg("scale"), py::arg("offset"), py::arg("threshold"), py::arg("device"))
        .def("route", &Router::route, py::arg("logits"), py::arg("n"), py::arg("n_classes"), py::arg("gate"),
             py::arg("stream"), Release(), "One launch: decides rows at address logits [n, n_classes]")
        .def("gather", &Router::gather, py::arg("source"), py::arg("row_bytes"), py::arg("capacity"), py::arg("out"),
             py::arg("stream"), Release(), "One launch: the deferred rows of source to the front of out")
        .def("merge", &Router::merge, py::arg("logits"), py::arg("n_classes"), py::arg("capacity"), py::arg("stream"),
             Release(), "One launch: Stage B's logits become the answers of the deferred rows")
        .def("mark", &Router::mark, py::arg("stream"), Release(), "What count() waits for: all on stream so far")
        .def("count", &Router::count, Release(), "How many rows are deferred, after waiting for mark()")
        .def_property_readonly("exited", &address<&Routed::exited>)
        .def_property_readonly("score", &address<&Routed::score>)
        .def_property_readonly("label", &address<&Routed::label>)
        .def_property_readonly("probability", &address<&Routed::probability>)
        .def_property_readonly("deferred", &address<&Routed::deferred>)
        .def_property_readonly("count_address", &address<&Routed::count>);
    py::class_<cuda::BucketSwitch>(module, "BucketSwitch", "Runs the graph of the smallest bucket that holds the count")
        .def(py::init(&make_switch), py::arg("buckets"), py::arg("graphs"), py::arg("count"), py::arg("device"))
        .def(
            "launch",
            [](const cuda::BucketSwitch& self, Address stream) { self.launch(reinterpret_cast<cuda::Stream>(stream)); },
            py::arg("stream"), Release(), "Enqueues the whole on a stream");
}

}  // namespace stage1::bindings
