// Table of contents of the compiled core. Arguments arrive checked: stage1_pro/_native.py is the only caller.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "arrays.hpp"
#include "stage1/bootstrap.hpp"

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
std::span<const T> view(const Array<T>& array) {
    if (array.ndim() != 1) {
        throw std::invalid_argument("arrays must have one dimension");
    }
    return {array.data(), static_cast<std::size_t>(array.size())};
}

template <class C, class L>
stage1::SortedRows<L> sort_checked(std::span<const C> confidence, std::span<const L> loss,
                                   std::span<const std::uint32_t> cluster, std::size_t n_clusters) {
    if (confidence.empty() || loss.size() != confidence.size() ||
        cluster.size() != (n_clusters != 0 ? confidence.size() : 0) || confidence.size() >= std::size_t{1} << 31 ||
        n_clusters >= std::size_t{1} << 31) {
        throw std::invalid_argument("arrays must have one length of 1 to 2^31 - 1");
    }
    for (const std::uint32_t owner : cluster) {
        if (owner >= n_clusters) {
            throw std::invalid_argument("cluster must be below n_clusters");
        }
    }
    return stage1::sort_rows(confidence, loss, cluster);
}

template <class C, class L>
double augrc(const Array<C>& confidence, const Array<L>& error) {
    const auto scores = view(confidence);
    const auto losses = view(error);
    const py::gil_scoped_release release;
    return stage1::augrc(sort_checked<C, L>(scores, losses, {}, 0));
}

template <class C, class L>
Array<double> bootstrap_augrc(const Array<C>& confidence, const Array<L>& error, const Array<std::uint32_t>& cluster,
                              std::size_t n_clusters, std::size_t n_replicates, std::uint64_t seed, unsigned threads) {
    const auto scores = view(confidence);
    const auto losses = view(error);
    const auto owners = view(cluster);
    Array<double> replicates(static_cast<py::ssize_t>(n_replicates));
    const std::span<double> out(replicates.mutable_data(), n_replicates);
    if (threads == 0) {
        throw std::invalid_argument("threads must be at least 1");
    }
    bool complete = false;
    {
        const py::gil_scoped_release release;
        complete = stage1::bootstrap_augrc(sort_checked<C, L>(scores, losses, owners, n_clusters), n_clusters, seed,
                                           threads, out, [] {
                                               const py::gil_scoped_acquire acquire;
                                               return PyErr_CheckSignals() != 0;
                                           });
    }
    if (!complete) {
        throw py::error_already_set();
    }
    return replicates;
}

template <class C, class L>
void bind(py::module_& module) {
    module.def("augrc", &augrc<C, L>, py::arg("confidence").noconvert(), py::arg("error").noconvert(),
               "AUGRC of rows [N]");
    module.def("bootstrap_augrc", &bootstrap_augrc<C, L>, py::arg("confidence").noconvert(),
               py::arg("error").noconvert(), py::arg("cluster").noconvert(), py::arg("n_clusters"),
               py::arg("n_replicates"), py::arg("seed"), py::arg("threads"),
               "AUGRC of resampled rows, or of resampled clusters [n_replicates]");
}

}  // namespace

PYBIND11_MODULE(_core, module) {
    module.doc() = "Compiled kernels of stage1_pro; call them through stage1_pro._native";
    module.attr("__version__") = STAGE1_VERSION;
    bind<float, std::uint8_t>(module);
    bind<float, double>(module);
    bind<double, std::uint8_t>(module);
    bind<double, double>(module);
    stage1::bindings::bind_order(module);
    stage1::bindings::bind_sweep(module);
    stage1::bindings::bind_route(module);
}
