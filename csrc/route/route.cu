#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "kernels.cuh"

namespace stage1::cuda {
namespace {

// A thread's row ends here and a warp's begins: below it a warp would idle, above it a thread reads too far apart.
constexpr std::size_t most_classes_of_a_thread = 32;
constexpr unsigned most_blocks_y = 65535;

unsigned blocks(std::size_t items, std::size_t each) { return static_cast<unsigned>((items + each - 1) / each); }

void check(const char* what, cudaError_t status) {
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
    }
}

void check_launch(const char* what) { check(what, cudaGetLastError()); }

template <class Unit>
bool try_gather(const void* source, std::size_t row_bytes, const std::int32_t* index, const std::int32_t* count,
                std::size_t capacity, void* out, Stream stream) {
    const auto places = reinterpret_cast<std::uintptr_t>(source) | reinterpret_cast<std::uintptr_t>(out) | row_bytes;
    if (places % sizeof(Unit) != 0) {
        return false;
    }
    constexpr unsigned units_of_a_thread = 4;
    const std::size_t width = row_bytes / sizeof(Unit);
    const unsigned chunks = blocks(width, block_threads * units_of_a_thread);
    const dim3 grid(static_cast<unsigned>(capacity), chunks < most_blocks_y ? chunks : most_blocks_y);
    gather_kernel<Unit><<<grid, block_threads, 0, stream>>>(static_cast<const Unit*>(source), width, index, count,
                                                            static_cast<Unit*>(out));
    check_launch("gather");
    return true;
}

}  // namespace

std::size_t scratch_bytes(std::size_t capacity) {
    const std::size_t tiles = blocks(capacity, block_threads / warp_size);
    return sizeof(Scratch) + tiles * sizeof(TileState);
}

void route(const float* logits, std::size_t n, std::size_t n_classes, const float* gate, const Rule& rule,
           const Routed& out, void* scratch, Stream stream) {
    const auto launch = [&](auto kernel, std::size_t tile_rows) {
        // No rows still have a count.
        const unsigned grid = n == 0 ? 1 : blocks(n, tile_rows);
        kernel<<<grid, block_threads, 0, stream>>>(logits, static_cast<int>(n), static_cast<int>(n_classes), gate, rule,
                                                   out, static_cast<Scratch*>(scratch));
    };
    if (n_classes <= most_classes_of_a_thread) {
        launch(route_kernel<1>, block_threads);
    } else {
        launch(route_kernel<warp_size>, block_threads / warp_size);
    }
    check_launch("route");
}

void gather(const void* source, std::size_t row_bytes, const std::int32_t* index, const std::int32_t* count,
            std::size_t capacity, void* out, Stream stream) {
    if (capacity == 0 || row_bytes == 0) {
        return;
    }
    // The widest copy that every address and the width allow.
    if (!try_gather<uint4>(source, row_bytes, index, count, capacity, out, stream) &&
        !try_gather<std::uint32_t>(source, row_bytes, index, count, capacity, out, stream) &&
        !try_gather<std::uint16_t>(source, row_bytes, index, count, capacity, out, stream)) {
        try_gather<std::uint8_t>(source, row_bytes, index, count, capacity, out, stream);
    }
}

void merge(const float* logits, std::size_t n_classes, std::size_t capacity, const Routed& out, Stream stream) {
    if (capacity == 0) {
        return;
    }
    const int classes = static_cast<int>(n_classes);
    if (n_classes <= most_classes_of_a_thread) {
        merge_kernel<1><<<blocks(capacity, block_threads), block_threads, 0, stream>>>(logits, classes, out);
    } else {
        const unsigned grid = blocks(capacity, block_threads / warp_size);
        merge_kernel<warp_size><<<grid, block_threads, 0, stream>>>(logits, classes, out);
    }
    check_launch("merge");
}

#if CUDART_VERSION >= 12080

namespace {

constexpr std::size_t most_buckets = 32;

struct Buckets {
    std::int32_t rows[most_buckets];
    int size;
};

__global__ void choose_kernel(cudaGraphConditionalHandle handle, Buckets buckets, const std::int32_t* count) {
    int chosen = 0;
    while (chosen < buckets.size && buckets.rows[chosen] < *count) {
        ++chosen;
    }
    // No body has that number.
    cudaGraphSetConditional(handle, static_cast<unsigned>(*count == 0 ? buckets.size : chosen));
}

cudaGraphNode_t add_node(cudaGraph_t graph, const cudaGraphNode_t* after, cudaGraphNodeParams& parameters) {
    cudaGraphNode_t node = nullptr;
#if CUDART_VERSION >= 13000
    check("graph", cudaGraphAddNode(&node, graph, after, nullptr, after != nullptr, &parameters));
#else
    check("graph", cudaGraphAddNode(&node, graph, after, after != nullptr, &parameters));
#endif
    return node;
}

struct OwnedGraph {
    cudaGraph_t graph = nullptr;
    ~OwnedGraph() {
        if (graph != nullptr) {
            cudaGraphDestroy(graph);
        }
    }
};

}  // namespace

BucketSwitch::BucketSwitch(std::span<const std::int32_t> buckets, std::span<const Graph> graphs,
                           const std::int32_t* count) {
    if (buckets.empty() || buckets.size() > most_buckets || buckets.size() != graphs.size()) {
        throw std::invalid_argument("buckets must be 1 to 32, with a graph each");
    }
    OwnedGraph whole;
    check("graph", cudaGraphCreate(&whole.graph, 0));
    cudaGraphConditionalHandle handle;
    const auto none = static_cast<unsigned>(buckets.size());
    check("graph", cudaGraphConditionalHandleCreate(&handle, whole.graph, none, cudaGraphCondAssignDefault));

    Buckets sizes{};
    for (const std::int32_t rows : buckets) {
        sizes.rows[sizes.size++] = rows;
    }
    void* arguments[] = {&handle, &sizes, &count};
    cudaGraphNodeParams choose{};
    choose.type = cudaGraphNodeTypeKernel;
    choose.kernel.func = reinterpret_cast<void*>(&choose_kernel);
    choose.kernel.gridDim = dim3(1);
    choose.kernel.blockDim = dim3(1);
    choose.kernel.kernelParams = arguments;
    const cudaGraphNode_t chosen = add_node(whole.graph, nullptr, choose);

    cudaGraphNodeParams cases{};
    cases.type = cudaGraphNodeTypeConditional;
    cases.conditional.handle = handle;
    cases.conditional.type = cudaGraphCondTypeSwitch;
    cases.conditional.size = none;
    add_node(whole.graph, &chosen, cases);
    for (std::size_t bucket = 0; bucket < buckets.size(); ++bucket) {
        cudaGraphNode_t child = nullptr;
        check("graph",
              cudaGraphAddChildGraphNode(&child, cases.conditional.phGraph_out[bucket], nullptr, 0, graphs[bucket]));
    }
    cudaGraphExec_t executable = nullptr;
    check("graph", cudaGraphInstantiate(&executable, whole.graph, 0));
    executable_ = executable;
}

BucketSwitch::~BucketSwitch() {
    if (executable_ != nullptr) {
        cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(executable_));
    }
}

void BucketSwitch::launch(Stream stream) const {
    check("graph", cudaGraphLaunch(static_cast<cudaGraphExec_t>(executable_), stream));
}

#else

BucketSwitch::BucketSwitch(std::span<const std::int32_t>, std::span<const Graph>, const std::int32_t*) {
    throw std::runtime_error("a switch over buckets needs CUDA 12.8 at build time");
}
BucketSwitch::~BucketSwitch() = default;
void BucketSwitch::launch(Stream) const {}

#endif

}  // namespace stage1::cuda
