#include "stage1/sweep.hpp"

#include "arrays.hpp"
#include "stage1/order.hpp"

namespace stage1::bindings {
namespace {

using Counts = Array<std::int64_t>;

template <class C, class L>
py::typing::Tuple<Array<double>, Counts, Array<ErrorSum<L>>, Counts, Counts, Counts, Counts> sweep(
    const Array<C>& confidence, const Array<L>& error, const Array<std::uint8_t>& answer) {
    const auto scores = view(confidence);
    const auto losses = view(error);
    const auto answers = view(answer);
    check_rows(scores, losses);
    const std::size_t n = scores.size();
    if (!answers.empty() && answers.size() != n) {
        throw std::invalid_argument("answer must be empty or as long as confidence");
    }
    const auto scratch = std::make_unique_for_overwrite<std::uint32_t[]>(2 * n);
    const std::span<std::uint32_t> rows(scratch.get(), n);
    std::span<std::uint32_t> tie_ends(scratch.get() + n, n);
    {
        const py::gil_scoped_release release;
        tie_ends = tie_ends.first(sort_order(scores, losses, rows, tie_ends));
    }
    const std::size_t known = answers.empty() ? 0 : tie_ends.size();
    auto threshold = make_array<double>(tie_ends.size());
    auto accepted = make_array<std::int64_t>(tie_ends.size());
    auto errors = make_array<ErrorSum<L>>(tie_ends.size());
    auto positive = make_array<std::int64_t>(known);
    auto false_negative = make_array<std::int64_t>(known);
    auto negative = make_array<std::int64_t>(known);
    auto false_positive = make_array<std::int64_t>(known);
    const SweepCounts<ErrorSum<L>> counts{fill(threshold),      fill(accepted), fill(errors),        fill(positive),
                                          fill(false_negative), fill(negative), fill(false_positive)};
    {
        const py::gil_scoped_release release;
        count_accepted<C, L>(scores, losses, answers, rows, tie_ends, counts);
    }
    return py::make_tuple(threshold, accepted, errors, positive, false_negative, negative, false_positive);
}

using Number = std::int64_t;

py::typing::Tuple<Number, Number, Number, Number> search_dual(const Counts& rows, const Counts& positives,
                                                              bool exit_error, Number fnr_numerator,
                                                              Number fnr_denominator, Number second_numerator,
                                                              Number second_denominator) {
    const auto accepted = view(rows);
    const auto found = view(positives);
    if (accepted.empty() || found.size() != accepted.size()) {
        throw std::invalid_argument("rows and positives must have one length of at least 1");
    }
    DualCuts cuts{};
    {
        const py::gil_scoped_release release;
        cuts = stage1::search_dual(accepted, found, exit_error ? Second::exit_error : Second::false_positive_rate,
                                   {fnr_numerator, fnr_denominator}, {second_numerator, second_denominator});
    }
    return py::make_tuple(cuts.best.upper, cuts.best.lower, cuts.nearest.upper, cuts.nearest.lower);
}

template <class C, class L>
void bind(py::module_& module) {
    module.def("sweep", &sweep<C, L>, py::arg("confidence").noconvert(), py::arg("error").noconvert(),
               py::arg("answer").noconvert(),
               "At every distinct threshold [M]: itself, then rows, errors, positives, false negatives, negatives and "
               "false positives accepted");
}

}  // namespace

void bind_sweep(py::module_& module) {
    bind<float, std::uint8_t>(module);
    bind<float, double>(module);
    bind<double, std::uint8_t>(module);
    bind<double, double>(module);
    module.def("search_dual", &search_dual, py::arg("rows").noconvert(), py::arg("positives").noconvert(),
               py::arg("exit_error"), py::arg("fnr_numerator"), py::arg("fnr_denominator"), py::arg("second_numerator"),
               py::arg("second_denominator"),
               "Tie groups above the upper and before the lower threshold: of the best pair, of the nearest one");
}

}  // namespace stage1::bindings
