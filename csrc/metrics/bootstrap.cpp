// Resamples of sorted rows, on any number of threads: replicate b is what stream b draws.
#include "stage1/bootstrap.hpp"

#include <algorithm>
#include <array>
#include <memory>
#include <numeric>

#include "packed.hpp"
#include "stage1/machine.hpp"
#include "suite.hpp"

namespace stage1 {
namespace {

std::size_t width_of(const Suite& suite) {
    return suite.curve || suite.exits || !suite.nll.empty() || !suite.brier.empty() || !suite.coverages.empty() ||
                   !suite.risks.empty()
               ? fixed_columns + suite.coverages.size() + suite.risks.size()
               : 1;
}

}  // namespace

template <Loss L>
bool bootstrap(const Rows<L>& rows, const Suite& suite, const Strata& strata, std::uint64_t seed, unsigned threads,
               std::size_t replicates, std::span<double> out, const std::function<bool()>& interrupted) {
    const std::size_t n = rows.loss.size();
    const std::size_t width = width_of(suite);
    const std::size_t units = std::accumulate(strata.sizes.begin(), strata.sizes.end(), std::size_t{0});
    std::unique_ptr<const PackedRows> packed;
    if constexpr (std::same_as<L, std::uint8_t>) {
        if (n < most_packed) {
            packed = std::make_unique<const PackedRows>(rows, suite);
        }
    }
    const std::size_t room = packed ? packed->padded() : n;
    const bool mapped = !rows.unit.empty();
    const std::size_t together = packed && packed->has_means() ? batch : 1;

    const auto make_work = [&]() -> std::function<void(std::size_t)> {
        struct Buffers {
            Aligned<std::uint8_t> drawn;
            std::array<Aligned<std::uint8_t>, batch> counts;
            PackedRows::Scratch scratch;
        };
        const auto own = std::make_shared<Buffers>();
        own->drawn.resize(mapped ? units : 0);
        for (std::size_t r = 0; r < together; ++r) {
            own->counts[r].resize(room);
        }
        return [&, own](std::size_t item) {
            const std::size_t first = item * together;
            const std::size_t last = std::min(first + together, replicates);
            std::array<const std::uint8_t*, batch> drawn;
            for (std::size_t replicate = first; replicate < last; ++replicate) {
                const std::span<std::uint8_t> counts = own->counts[replicate - first];
                const std::span<std::uint8_t> by_unit = mapped ? std::span(own->drawn) : counts.first(units);
                draw_counts(Stream(seed, replicate), strata, by_unit);
                for (std::size_t row = 0; mapped && row < n; ++row) {
                    counts[row] = by_unit[rows.unit[row]];
                }
                const std::span<double> to = out.subspan(replicate * width, width);
                bool measured = false;
                if constexpr (std::same_as<L, std::uint8_t>) {
                    measured = packed && packed->measure(counts.data(), own->scratch, to);
                }
                if (!measured) {
                    measure_counted(rows, suite, std::span<const std::uint8_t>(counts), to);
                }
                std::fill(drawn.begin() + static_cast<std::ptrdiff_t>(replicate - first), drawn.end(), counts.data());
            }
            if (together == batch) {
                packed->means(drawn, out.subspan(first * width, (last - first) * width), width);
            }
        };
    };
    return parallel_for((replicates + together - 1) / together, threads, make_work, interrupted);
}

bool bootstrap_augrc_of_cells(const Rows<std::uint8_t>& rows, const PoissonTables& tables, std::uint64_t seed,
                              unsigned threads, std::span<double> out, const std::function<bool()>& interrupted) {
    // A run of equal errors is a cell. Tie groups of right and wrong rows are cells of their own: there right rows pay
    // for errors that stand behind them.
    struct Cell {
        bool wrong;
        bool mixed;  // the wrong rows of a tie group, whose right rows are the cell before
    };
    std::vector<Cell> cells;
    std::vector<std::uint32_t> sizes;
    std::uint32_t begin = 0;
    bool closed = true;
    for (const std::uint32_t end : rows.tie_ends) {
        const bool mixed = rows.loss[begin] != rows.loss[end - 1];
        const auto wrong = std::find(rows.loss.begin() + begin, rows.loss.begin() + end, std::uint8_t{1});
        const auto n_right = static_cast<std::uint32_t>(wrong - rows.loss.begin()) - begin;
        for (const bool is_wrong : {false, true}) {
            const std::uint32_t size = is_wrong ? end - begin - n_right : n_right;
            if (size == 0) {
                continue;
            }
            if (!closed && !mixed && cells.back().wrong == is_wrong) {
                sizes.back() += size;
                continue;
            }
            cells.push_back({is_wrong, mixed && is_wrong});
            sizes.push_back(size);
            closed = mixed;
        }
        begin = end;
    }
    const CellSampler sampler(sizes, tables);
    const double n = static_cast<double>(rows.loss.size());
    const auto make_work = [&]() -> std::function<void(std::size_t)> {
        const auto counts = std::make_shared<std::vector<std::uint32_t>>(cells.size());
        return [&, counts](std::size_t replicate) {
            sampler.draw(Stream(seed, replicate), *counts);
            std::uint64_t pairs = 0;
            std::uint64_t errors = 0;
            for (std::size_t cell = 0; cell < cells.size(); ++cell) {
                const std::uint64_t count = (*counts)[cell];
                pairs += 2 * count * errors;
                if (cells[cell].wrong) {
                    pairs += count * count + (cells[cell].mixed ? count * (*counts)[cell - 1] : 0);
                    errors += count;
                }
            }
            out[replicate] = static_cast<double>(pairs) / (2 * n * n);
        };
    };
    return parallel_for(out.size(), threads, make_work, interrupted);
}

template bool bootstrap(const Rows<std::uint8_t>&, const Suite&, const Strata&, std::uint64_t, unsigned, std::size_t,
                        std::span<double>, const std::function<bool()>&);
template bool bootstrap(const Rows<double>&, const Suite&, const Strata&, std::uint64_t, unsigned, std::size_t,
                        std::span<double>, const std::function<bool()>&);

}  // namespace stage1
