// Table of contents of the compiled core. Arguments arrive checked: stage1_pro/_native.py is the only caller.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>
#include <stdexcept>

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

// What must hold for a kernel not to read past an array.
void require(bool holds, const char* what) {
    if (!holds) {
        throw std::invalid_argument(what);
    }
}

stage1::Strata strata_of(const Array<std::uint32_t>& sizes, const Array<std::uint64_t>& tables, std::size_t units) {
    const auto strata = view(sizes);
    std::size_t total = 0;
    for (const std::uint32_t size : strata) {
        require(size != 0, "strata must not be empty");
        total += size;
    }
    require(total == units && units < std::size_t{1} << 31, "strata must add up to the units");
    static_assert(sizeof(stage1::CountTable) == 32 * sizeof(std::uint64_t));
    require(tables.ndim() == 2 && tables.shape(0) == sizes.size() && tables.shape(1) == 32,
            "tables must have shape [strata, 32]");
    return {strata, {reinterpret_cast<const stage1::CountTable*>(tables.data()), strata.size()}};
}

template <class C, class L>
stage1::SortedRows<L> sort_checked(std::span<const C> confidence, std::span<const L> loss,
                                   std::span<const std::uint32_t> unit, std::size_t units) {
    require(!confidence.empty() && confidence.size() < std::size_t{1} << 31 && loss.size() == confidence.size() &&
                (unit.empty() || unit.size() == confidence.size()),
            "arrays must have one length of 1 to 2^31 - 1");
    require(!unit.empty() || units == confidence.size() || units == 0, "without unit every row is one");
    require(std::all_of(unit.begin(), unit.end(), [=](std::uint32_t owner) { return owner < units; }),
            "unit must be below the number of units");
    return stage1::sort_rows(confidence, loss, unit);
}

template <class C, class L>
double augrc(const Array<C>& confidence, const Array<L>& error) {
    const auto scores = view(confidence);
    const auto losses = view(error);
    const py::gil_scoped_release release;
    return stage1::augrc(sort_checked<C, L>(scores, losses, {}, 0).view());
}

bool signalled() {
    const py::gil_scoped_acquire acquire;
    return PyErr_CheckSignals() != 0;
}

template <class C, class L>
Array<double> bootstrap_augrc(const Array<C>& confidence, const Array<L>& error, const Array<std::uint32_t>& unit,
                              std::uint32_t n_units, const Array<std::uint64_t>& table, std::size_t n_replicates,
                              std::uint64_t seed, unsigned threads) {
    const auto scores = view(confidence);
    const auto losses = view(error);
    const auto owners = view(unit);
    Array<std::uint32_t> sizes(1);
    sizes.mutable_at(0) = n_units;
    const auto strata = strata_of(sizes, table, n_units);
    require(threads != 0, "threads must be at least 1");
    Array<double> replicates(static_cast<py::ssize_t>(n_replicates));
    const std::span<double> out(replicates.mutable_data(), n_replicates);
    bool complete = false;
    {
        const py::gil_scoped_release release;
        const auto rows = sort_checked<C, L>(scores, losses, owners, n_units);
        complete = stage1::bootstrap(rows.view(), stage1::Suite{}, strata, seed, threads, n_replicates, out, signalled);
    }
    if (!complete) {
        throw py::error_already_set();
    }
    return replicates;
}

template <class L>
Array<double> bootstrap_suite(const Array<L>& error, const Array<std::uint32_t>& tie_ends,
                              const Array<std::uint32_t>& unit, const Array<std::uint32_t>& sizes,
                              const Array<std::uint64_t>& tables, const Array<std::uint8_t>& kind,
                              std::optional<std::size_t> n_exit, const Array<double>& nll, const Array<double>& brier,
                              const Array<double>& coverages, const Array<double>& risks, std::size_t n_replicates,
                              std::uint64_t seed, unsigned threads) {
    const stage1::Rows<L> rows{view(error), view(tie_ends), view(unit)};
    const std::size_t n = rows.loss.size();
    std::uint32_t end = 0;
    for (const std::uint32_t next : rows.tie_ends) {
        require(next > end, "tie_ends must ascend");
        end = next;
    }
    require(n != 0 && end == n, "tie_ends must end with the rows");
    const std::size_t units = std::accumulate(sizes.data(), sizes.data() + sizes.size(), std::size_t{0});
    const auto strata = strata_of(sizes, tables, units);
    require(rows.unit.empty() ? units == n : rows.unit.size() == n, "unit must have one entry per row");
    require(std::all_of(rows.unit.begin(), rows.unit.end(), [=](std::uint32_t owner) { return owner < units; }),
            "unit must be below the number of units");
    stage1::Suite suite;
    suite.coverages = view(coverages);
    suite.risks = view(risks);
    suite.nll = view(nll);
    suite.brier = view(brier);
    suite.kind = view(kind);
    suite.curve = true;
    suite.exits = n_exit.has_value();
    suite.n_exit = n_exit.value_or(0);
    const auto fits = [=](std::size_t size) { return size == 0 || size == n; };
    require(fits(suite.nll.size()) && fits(suite.brier.size()) && fits(suite.kind.size()) && suite.n_exit <= n,
            "columns must have one value per row");
    require(threads != 0, "threads must be at least 1");
    const std::size_t width = stage1::fixed_columns + suite.coverages.size() + suite.risks.size();
    Array<double> replicates({static_cast<py::ssize_t>(n_replicates), static_cast<py::ssize_t>(width)});
    const std::span<double> out(replicates.mutable_data(), n_replicates * width);
    bool complete = false;
    {
        const py::gil_scoped_release release;
        complete = stage1::bootstrap(rows, suite, strata, seed, threads, n_replicates, out, signalled);
    }
    if (!complete) {
        throw py::error_already_set();
    }
    return replicates;
}

template <class L>
void bind_suite(py::module_& module) {
    module.def("bootstrap_suite", &bootstrap_suite<L>, py::arg("error").noconvert(), py::arg("tie_ends").noconvert(),
               py::arg("unit").noconvert(), py::arg("sizes").noconvert(), py::arg("tables").noconvert(),
               py::arg("kind").noconvert(), py::arg("n_exit"), py::arg("nll").noconvert(), py::arg("brier").noconvert(),
               py::arg("coverages").noconvert(), py::arg("risks").noconvert(), py::arg("n_replicates"), py::arg("seed"),
               py::arg("threads"), "Every metric of resampled sorted rows [n_replicates, 8 + coverages + risks]");
}

template <class C, class L>
void bind(py::module_& module) {
    module.def("augrc", &augrc<C, L>, py::arg("confidence").noconvert(), py::arg("error").noconvert(),
               "AUGRC of rows [N]");
    module.def("bootstrap_augrc", &bootstrap_augrc<C, L>, py::arg("confidence").noconvert(),
               py::arg("error").noconvert(), py::arg("unit").noconvert(), py::arg("n_units"),
               py::arg("table").noconvert(), py::arg("n_replicates"), py::arg("seed"), py::arg("threads"),
               "AUGRC of resampled units (rows, or clusters of rows) [n_replicates]");
}

}  // namespace

PYBIND11_MODULE(_core, module) {
    module.doc() = "Compiled kernels of stage1_pro; call them through stage1_pro._native";
    module.attr("__version__") = STAGE1_VERSION;
    bind<float, std::uint8_t>(module);
    bind<float, double>(module);
    bind<double, std::uint8_t>(module);
    bind<double, double>(module);
    bind_suite<std::uint8_t>(module);
    bind_suite<double>(module);
}
