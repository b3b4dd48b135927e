// AUGRC and the bootstrap of the selective suite.
#include "stage1/bootstrap.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>
#include <optional>
#include <tuple>
#include <utility>

#include "arrays.hpp"

namespace stage1::bindings {
namespace {

// What must hold for a kernel not to read past an array.
void require(bool holds, const char* what) {
    if (!holds) {
        throw std::invalid_argument(what);
    }
}

Strata strata_of(std::span<const std::uint32_t> strata, const Array<std::uint64_t>& tables, std::size_t units) {
    std::size_t total = 0;
    for (const std::uint32_t size : strata) {
        require(size != 0, "strata must not be empty");
        total += size;
    }
    require(total == units && units < std::size_t{1} << 31, "strata must add up to the units");
    static_assert(sizeof(CountTable) == 32 * sizeof(std::uint64_t));
    require(tables.ndim() == 2 && tables.shape(0) == static_cast<py::ssize_t>(strata.size()) && tables.shape(1) == 32,
            "tables must have shape [strata, 32]");
    return {strata, {reinterpret_cast<const CountTable*>(tables.data()), strata.size()}};
}

template <class C, class L>
SortedRows<L> sort_checked(std::span<const C> confidence, std::span<const L> loss, std::span<const std::uint32_t> unit,
                           std::size_t units) {
    require(!confidence.empty() && confidence.size() < std::size_t{1} << 31 && loss.size() == confidence.size() &&
                (unit.empty() || unit.size() == confidence.size()),
            "arrays must have one length of 1 to 2^31 - 1");
    require(!unit.empty() || units == confidence.size() || units == 0, "without unit every row is one");
    require(std::all_of(unit.begin(), unit.end(), [=](std::uint32_t owner) { return owner < units; }),
            "unit must be below the number of units");
    return sort_rows(confidence, loss, unit);
}

template <class C, class L>
double augrc(const Array<C>& confidence, const Array<L>& error) {
    const auto scores = view(confidence);
    const auto losses = view(error);
    const py::gil_scoped_release release;
    return stage1::augrc(sort_checked<C, L>(scores, losses, {}, 0).view());
}

PoissonTables poisson_tables(const Array<std::uint64_t>& reach, const Array<std::uint32_t>& starts,
                             const Array<std::uint32_t>& lowest, std::uint32_t n_units) {
    const PoissonTables tables{view(reach), view(starts), view(lowest)};
    if (!tables.lowest.empty()) {
        require(tables.starts.size() == tables.lowest.size() + 1 && tables.starts.front() == 0 &&
                    tables.starts.back() == tables.reach.size() &&
                    std::is_sorted(tables.starts.begin(), tables.starts.end()) && tables.lowest.size() < 33 &&
                    n_units >> (tables.lowest.size() - 1) <= 1,
                "tables must hold a law for each digit of a size");
    }
    return tables;
}

bool signalled() {
    const py::gil_scoped_acquire acquire;
    return PyErr_CheckSignals() != 0;
}

template <class C, class L>
std::tuple<Array<double>, double, double, double> bootstrap_augrc(
    const Array<C>& confidence, const Array<L>& error, const Array<std::uint32_t>& unit, std::uint32_t n_units,
    const Array<std::uint64_t>& table, const Array<std::uint64_t>& reach, const Array<std::uint32_t>& starts,
    const Array<std::uint32_t>& lowest, std::size_t n_replicates, std::uint64_t seed, unsigned threads) {
    const auto scores = view(confidence);
    const auto losses = view(error);
    const auto owners = view(unit);
    const std::array<std::uint32_t, 1> sizes{n_units};
    const auto strata = strata_of(sizes, table, n_units);
    require(threads != 0, "threads must be at least 1");
    const auto cells = poisson_tables(reach, starts, lowest, n_units);
    auto replicates = make_array<double>(n_replicates);
    const auto out = fill(replicates);
    bool complete = false;
    double value = 0;
    Moments moments;
    {
        const py::gil_scoped_release release;
        const auto rows = sort_checked<C, L>(scores, losses, owners, n_units);
        value = stage1::augrc(rows.view());
        moments = augrc_influence(rows.view(), n_units, value);
        bool by_cells = false;
        if constexpr (std::same_as<L, std::uint8_t>) {
            by_cells = !cells.lowest.empty();
            if (by_cells) {
                require(owners.empty(), "cells are of rows");
                complete = bootstrap_augrc_of_cells(rows.view(), cells, seed, threads, out, signalled);
            }
        }
        if (!by_cells) {
            complete = bootstrap(rows.view(), Suite{}, strata, seed, threads, n_replicates, out, signalled);
        }
    }
    if (!complete) {
        throw py::error_already_set();
    }
    return {replicates, value, moments.second, moments.third};
}

// The rows and what is measured on them, checked.
template <class L>
std::pair<Rows<L>, Suite> suite_of(const Array<L>& error, const Array<std::uint32_t>& tie_ends,
                                   const Array<std::uint32_t>& unit, const Array<std::uint8_t>& kind,
                                   std::optional<std::size_t> n_exit, const Array<double>& nll,
                                   const Array<double>& brier, const Array<double>& coverages,
                                   const Array<double>& risks) {
    const Rows<L> rows{view(error), view(tie_ends), view(unit)};
    const std::size_t n = rows.loss.size();
    std::uint32_t end = 0;
    for (const std::uint32_t next : rows.tie_ends) {
        require(next > end, "tie_ends must ascend");
        end = next;
    }
    require(n != 0 && end == n, "tie_ends must end with the rows");
    Suite suite;
    suite.coverages = view(coverages);
    suite.risks = view(risks);
    suite.nll = view(nll);
    suite.brier = view(brier);
    suite.kind = view(kind);
    suite.curve = true;
    suite.exits = n_exit.has_value();
    suite.n_exit = n_exit.value_or(0);
    const auto fits = [=](std::size_t size) { return size == 0 || size == n; };
    require(fits(suite.nll.size()) && fits(suite.brier.size()) && fits(suite.kind.size()) && fits(rows.unit.size()) &&
                suite.n_exit <= n,
            "columns must have one value per row");
    return {rows, suite};
}

template <class L>
Array<double> measure_suite(const Array<L>& error, const Array<std::uint32_t>& tie_ends,
                            const Array<std::uint8_t>& kind, std::optional<std::size_t> n_exit,
                            const Array<double>& nll, const Array<double>& brier, const Array<double>& coverages,
                            const Array<double>& risks) {
    const Array<std::uint32_t> no_unit(0);
    const auto [rows, suite] = suite_of(error, tie_ends, no_unit, kind, n_exit, nll, brier, coverages, risks);
    auto values = make_array<double>(fixed_columns + suite.coverages.size() + suite.risks.size());
    const auto out = fill(values);
    const py::gil_scoped_release release;
    measure(rows, suite, out);
    return values;
}

template <class L>
Array<double> bootstrap_suite(const Array<L>& error, const Array<std::uint32_t>& tie_ends,
                              const Array<std::uint32_t>& unit, const Array<std::uint32_t>& sizes,
                              const Array<std::uint64_t>& tables, const Array<std::uint8_t>& kind,
                              std::optional<std::size_t> n_exit, const Array<double>& nll, const Array<double>& brier,
                              const Array<double>& coverages, const Array<double>& risks, std::size_t n_replicates,
                              std::uint64_t seed, unsigned threads) {
    const auto [rows, suite] = suite_of(error, tie_ends, unit, kind, n_exit, nll, brier, coverages, risks);
    const std::size_t units = std::accumulate(sizes.data(), sizes.data() + sizes.size(), std::size_t{0});
    const auto strata = strata_of(view(sizes), tables, units);
    require(!rows.unit.empty() || units == rows.loss.size(), "without unit every row is one");
    require(std::all_of(rows.unit.begin(), rows.unit.end(), [=](std::uint32_t owner) { return owner < units; }),
            "unit must be below the number of units");
    require(threads != 0, "threads must be at least 1");
    const std::size_t width = fixed_columns + suite.coverages.size() + suite.risks.size();
    Array<double> replicates({static_cast<py::ssize_t>(n_replicates), static_cast<py::ssize_t>(width)});
    const std::span<double> out(replicates.mutable_data(), n_replicates * width);
    bool complete = false;
    {
        const py::gil_scoped_release release;
        complete = bootstrap(rows, suite, strata, seed, threads, n_replicates, out, signalled);
    }
    if (!complete) {
        throw py::error_already_set();
    }
    return replicates;
}

Array<std::uint8_t> resample_counts(const Array<std::uint32_t>& sizes, const Array<std::uint64_t>& tables,
                                    std::size_t first, std::size_t n_replicates, std::uint64_t seed) {
    const auto sizes_of = view(sizes);
    const std::size_t units = std::accumulate(sizes_of.begin(), sizes_of.end(), std::size_t{0});
    const auto strata = strata_of(sizes_of, tables, units);
    Array<std::uint8_t> counts({static_cast<py::ssize_t>(n_replicates), static_cast<py::ssize_t>(units)});
    const std::span<std::uint8_t> out(counts.mutable_data(), n_replicates * units);
    const py::gil_scoped_release release;
    for (std::size_t replicate = 0; replicate < n_replicates; ++replicate) {
        draw_counts(Stream(seed, first + replicate), strata, out.subspan(replicate * units, units));
    }
    return counts;
}

template <class L>
void bind_suite(py::module_& module) {
    module.def("measure_suite", &measure_suite<L>, py::arg("error").noconvert(), py::arg("tie_ends").noconvert(),
               py::arg("kind").noconvert(), py::arg("n_exit"), py::arg("nll").noconvert(), py::arg("brier").noconvert(),
               py::arg("coverages").noconvert(), py::arg("risks").noconvert(),
               "Every metric of sorted rows [8 + coverages + risks]");
    module.def("bootstrap_suite", &bootstrap_suite<L>, py::arg("error").noconvert(), py::arg("tie_ends").noconvert(),
               py::arg("unit").noconvert(), py::arg("sizes").noconvert(), py::arg("tables").noconvert(),
               py::arg("kind").noconvert(), py::arg("n_exit"), py::arg("nll").noconvert(), py::arg("brier").noconvert(),
               py::arg("coverages").noconvert(), py::arg("risks").noconvert(), py::arg("n_replicates"), py::arg("seed"),
               py::arg("threads"), "Every metric of resampled sorted rows [n_replicates, 8 + coverages + risks]");
}

template <class C, class L>
void bind_augrc(py::module_& module) {
    module.def("augrc", &augrc<C, L>, py::arg("confidence").noconvert(), py::arg("error").noconvert(),
               "AUGRC of rows [N]");
    module.def("bootstrap_augrc", &bootstrap_augrc<C, L>, py::arg("confidence").noconvert(),
               py::arg("error").noconvert(), py::arg("unit").noconvert(), py::arg("n_units"),
               py::arg("table").noconvert(), py::arg("reach").noconvert(), py::arg("starts").noconvert(),
               py::arg("lowest").noconvert(), py::arg("n_replicates"), py::arg("seed"), py::arg("threads"),
               "AUGRC of resampled units [n_replicates] (rows, or clusters of rows), AUGRC itself, and the sums of "
               "squares and of cubes of the units' influences on it; with laws for cells their counts are drawn");
}

}  // namespace

void bind_bootstrap(py::module_& module) {
    bind_augrc<float, std::uint8_t>(module);
    bind_augrc<float, double>(module);
    bind_augrc<double, std::uint8_t>(module);
    bind_augrc<double, double>(module);
    module.def("resample_counts", &resample_counts, py::arg("sizes").noconvert(), py::arg("tables").noconvert(),
               py::arg("first"), py::arg("n_replicates"), py::arg("seed"),
               "How often each unit is in each resample [n_replicates, units]");
    bind_suite<std::uint8_t>(module);
    bind_suite<double>(module);
}

}  // namespace stage1::bindings
