#include "sample.h"

#include <algorithm>
#include <cmath>

#include "threads.h"
#include "vec.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

constexpr int kGroup = 64;     // tokens with one maximum
constexpr int kSegment = 512;  // tokens whose weights are summed up before the search for the one to take
constexpr int kWidths[] = {256, 4096};

struct Candidate {
    float value;  // a logit first, then exp of it
    int id;
};

bool goes_before(const Candidate& a, const Candidate& b) { return a.value != b.value ? a.value > b.value : a.id < b.id; }

// Sixteen logits of which only the first n exist. The others are -inf, and so is what is not a number.
F load_logits(const float* x, int n) {
    if (n >= 16) return max(load(x), set(-INFINITY));  // of a NaN and another, max takes the second
    float lanes[16];
    for (int i = 0; i < 16; ++i) lanes[i] = i < n ? x[i] : -INFINITY;
    return max(load(lanes), set(-INFINITY));
}

// One row of logits, with memory to work in.
class Row {
  public:
    static std::size_t bytes(int vocabulary) {
        return sizeof(Candidate) * (static_cast<std::size_t>(vocabulary) + groups(vocabulary)) + 4 * groups(vocabulary);
    }

    Row(const float* logits, int count, void* memory) : logits_(logits), count_(count) {
        candidates_ = static_cast<Candidate*>(memory);
        order_ = candidates_ + count;
        peaks_ = reinterpret_cast<float*>(order_ + groups(count));
        for (int group = 0; group < groups(count); ++group) {
            const int begin = group * kGroup, end = std::min(count, begin + kGroup);
            F most = set(-INFINITY);
            for (int i = begin; i < end; i += 16) most = max(most, load_logits(logits + i, end - i));
            peaks_[group] = largest(most);
            most_ = std::max(most_, peaks_[group]);
        }
    }

    bool without_weights() const { return std::isinf(most_); }
    std::int64_t most_likely() const;
    std::int64_t one_of_all(float temperature, double uniform);
    std::int64_t one_of_kept(float temperature, std::int64_t top_k, float top_p, float min_p, double uniform);

    double sum_of_weights(float temperature, int begin, int end) const;
    double log_probability(double log_sum, float logit) const { return static_cast<double>(logit) - most_ - log_sum; }
    std::int64_t rank(float logit) const;
    const Candidate* top(int k);

  private:
    static int groups(int vocabulary) { return (vocabulary + kGroup - 1) / kGroup; }

    F weights(F logits, float temperature) const { return exp((logits - set(most_)) / set(temperature)); }
    float lower_bound(int width);
    int gather(float bound);
    void weigh_candidates(int count, float temperature);
    struct Kept {
        int count;
        double total;  // of their weights
        bool ended;    // by a rule, not for want of candidates
    };
    Kept keep(int count, double mass, std::int64_t top_k, float top_p, float min_p) const;
    Kept sort_and_keep(int count, double mass, std::int64_t top_k, float top_p, float min_p);

    const float* logits_;
    int count_;
    float most_ = -INFINITY;
    Candidate* candidates_;
    Candidate* order_;  // of groups
    float* peaks_;      // maxima of groups
};

std::int64_t Row::most_likely() const {
    for (int group = 0; group < groups(count_); ++group) {
        if (peaks_[group] != most_) continue;
        for (int i = group * kGroup; i < std::min(count_, (group + 1) * kGroup); ++i) {
            if (logits_[i] == most_) return i;
        }
    }
    return 0;
}

// Weights are exp((logit - most) / temperature). The largest becomes 0 first: a division by a tiny temperature may overflow
// to -inf, but not to inf.
double Row::sum_of_weights(float temperature, int begin, int end) const {
    double total = 0;
    for (int segment = begin; segment < end; segment += kSegment) {
        const int stop = std::min(end, segment + kSegment);
        F sums = zero();
        for (int i = segment; i < stop; i += 16) sums = sums + weights(load_logits(logits_ + i, stop - i), temperature);
        total += sum(sums);
    }
    return total;
}

std::int64_t Row::one_of_all(float temperature, double uniform) {
    auto* sums = reinterpret_cast<double*>(candidates_);  // of segments
    const int segments = (count_ + kSegment - 1) / kSegment;
    double total = 0;
    for (int index = 0; index < segments; ++index) {
        const int begin = index * kSegment;
        sums[index] = sum_of_weights(temperature, begin, std::min(count_, begin + kSegment));
        total += sums[index];
    }
    // The first segment, and then token, with which the cumulative weight exceeds the target. Should rounding leave the
    // target beyond all, it is the last that has any weight.
    const double target = uniform * total;
    double before = 0;
    int chosen = 0;
    for (int index = 0; index < segments; ++index) {
        if (!(sums[index] > 0)) continue;
        chosen = index;
        if (before + sums[index] > target) break;
        before += sums[index];
    }
    const int end = std::min(count_, (chosen + 1) * kSegment);
    int token = 0;
    for (int i = chosen * kSegment; i < end; i += 16) {
        float lanes[16];
        store(lanes, weights(load_logits(logits_ + i, end - i), temperature));
        for (int lane = 0; lane < 16; ++lane) {
            if (!(lanes[lane] > 0)) continue;
            token = i + lane;
            before += lanes[lane];
            if (before > target) return token;
        }
    }
    return token;
}

// A logit that at least `width` tokens reach, -inf if that is all that can be said.
float Row::lower_bound(int width) {
    const int count = groups(count_);
    if (width > count) return -INFINITY;
    for (int group = 0; group < count; ++group) order_[group] = {peaks_[group], group};
    std::nth_element(order_, order_ + (width - 1), order_ + count, goes_before);
    return order_[width - 1].value;
}

// Makes all tokens of at least that logit candidates.
int Row::gather(float bound) {
    int count = 0;
    for (int group = 0; group < groups(count_); ++group) {
        if (!(peaks_[group] >= bound)) continue;
        for (int i = group * kGroup; i < std::min(count_, (group + 1) * kGroup); ++i) {
            const float logit = logits_[i] >= -INFINITY ? logits_[i] : -INFINITY;
            candidates_[count] = {logit, i};
            count += logit >= bound;
        }
    }
    return count;
}

void Row::weigh_candidates(int count, float temperature) {
    for (int i = 0; i < count; i += 16) {
        float lanes[16] = {};
        const int stop = std::min(16, count - i);
        for (int lane = 0; lane < stop; ++lane) lanes[lane] = candidates_[i + lane].value;
        store(lanes, weights(load(lanes), temperature));
        for (int lane = 0; lane < stop; ++lane) candidates_[i + lane].value = lanes[lane];
    }
}

// How many of the sorted candidates the three rules keep; each keeps the first ones. `mass` is the weight of all tokens.
Row::Kept Row::keep(int count, double mass, std::int64_t top_k, float top_p, float min_p) const {
    const std::int64_t limit = top_k > 0 ? std::min<std::int64_t>(top_k, count_) : count_;
    if (limit > count && top_k > 0) return {0, 0, false};
    if (top_k > 0) {
        mass = 0;
        for (int i = 0; i < limit; ++i) mass += candidates_[i].value;
    }
    const double enough = top_p < 1 ? static_cast<double>(top_p) * mass : INFINITY;
    const float least = min_p * candidates_[0].value;
    double total = 0;
    for (int i = 0; i < count; ++i) {
        const float weight = candidates_[i].value;
        if (i > 0 && (i >= limit || total >= enough || weight < least || !(weight > 0))) return {i, total, true};
        total += weight;
    }
    return {count, total, count >= limit};
}

// Sorts candidates from the front, no more of them than it takes to see what is kept.
Row::Kept Row::sort_and_keep(int count, double mass, std::int64_t top_k, float top_p, float min_p) {
    for (int sorted = 0;;) {
        const int next = std::min(count, std::max(1024, 4 * sorted));
        if (next < count) std::nth_element(candidates_ + sorted, candidates_ + next, candidates_ + count, goes_before);
        std::sort(candidates_ + sorted, candidates_ + next, goes_before);
        const Kept kept = keep(next, mass, top_k, top_p, min_p);
        if (kept.ended || next == count) return kept;
        sorted = next;
    }
}

std::int64_t Row::one_of_kept(float temperature, std::int64_t top_k, float top_p, float min_p, double uniform) {
    const double mass = top_k == 0 && top_p < 1 ? sum_of_weights(temperature, 0, count_) : 0;
    const auto attempt = [&](float bound, std::int64_t& token) {
        const int count = gather(bound);
        weigh_candidates(count, temperature);
        const Kept kept = sort_and_keep(count, mass, top_k, top_p, min_p);
        // Tokens below the bound may weigh as much as the last candidates, so what is kept must end before those.
        float at_bound[16];
        store(at_bound, weights(set(bound), temperature));
        if (count < count_ && !(kept.ended && candidates_[kept.count - 1].value > at_bound[0])) return false;
        const double target = uniform * kept.total;
        double before = 0;
        for (int i = 0; i < kept.count; ++i) {
            token = candidates_[i].id;
            before += candidates_[i].value;
            if (before > target) break;
        }
        return true;
    };
    std::int64_t token = 0;
    for (int width : kWidths) {
        const float bound = lower_bound(width);
        if (bound > -INFINITY && attempt(bound, token)) return token;
    }
    attempt(-INFINITY, token);
    return token;
}

std::int64_t Row::rank(float logit) const {
    const F one = set(1), at = set(logit);
    std::int64_t above = 0;
    for (int segment = 0; segment < count_; segment += kSegment) {
        const int stop = std::min(count_, segment + kSegment);
        F counts = zero();
        for (int i = segment; i < stop; i += 16) {
            counts = counts + choose_less(at, load_logits(logits_ + i, stop - i), one, zero());
        }
        above += static_cast<std::int64_t>(sum(counts));
    }
    return above + 1;
}

const Candidate* Row::top(int k) {
    const int count = gather(lower_bound(k));
    std::partial_sort(candidates_, candidates_ + k, candidates_ + count, goes_before);
    return candidates_;
}

std::int64_t choose(const Sample& call, int r, void* memory) {
    Row row(call.logits + r * call.stride, call.vocabulary, memory);
    const float temperature = call.temperature[r], top_p = call.top_p[r], min_p = call.min_p[r];
    const std::int64_t top_k = call.top_k[r];
    if (temperature == 0 || row.without_weights()) return row.most_likely();
    const bool cut = (top_k > 0 && top_k < call.vocabulary) || top_p < 1 || min_p > 0;
    return cut ? row.one_of_kept(temperature, top_k, top_p, min_p, call.uniform[r])
               : row.one_of_all(temperature, call.uniform[r]);
}

// `counts` [vocabulary] may hold anything: only the places of tokens in the history are used, so that they alone are set.
void penalize_row(const Penalties& call, int r, std::int32_t* counts) {
    float* logits = call.logits + r * call.stride;
    const std::int64_t *begin = call.history + call.starts[r], *end = call.history + call.starts[r + 1];
    const float repetition = call.repetition[r], frequency = call.frequency[r], presence = call.presence[r];
    constexpr std::int32_t done = -1;
    for (const std::int64_t* token = begin; token < end; ++token) counts[*token] = 0;
    for (const std::int64_t* token = begin + call.prompt_lens[r]; token < end; ++token) ++counts[*token];
    for (const std::int64_t* token = begin; token < end; ++token) {
        std::int32_t& count = counts[*token];
        if (count == done) continue;
        float& logit = logits[*token];
        logit = logit > 0 ? logit / repetition : logit * repetition;
        if (count > 0) logit -= static_cast<float>(count) * frequency + presence;
        count = done;
    }
}

}  // namespace

void penalize(const Penalties& call) {
    parallel(call.rows, [&](int r, int thread) {
        penalize_row(call, r, static_cast<std::int32_t*>(scratch(thread, sizeof(std::int32_t) * call.vocabulary)));
    });
}

void sample(const Sample& call) {
    parallel(call.rows, [&](int r, int thread) {
        call.tokens[r] = choose(call, r, scratch(thread, Row::bytes(call.vocabulary)));
    });
}

void token_logprobs(const TokenLogprobs& call) {
    parallel(call.rows, [&](int r, int thread) {
        const float* logits = call.logits + r * call.stride;
        Row row(logits, call.vocabulary, scratch(thread, Row::bytes(call.vocabulary)));
        const double log_sum = std::log(row.sum_of_weights(1.0f, 0, call.vocabulary));
        const float chosen = logits[call.tokens[r]];
        call.logprobs[r] = static_cast<float>(row.log_probability(log_sum, chosen));
        call.ranks[r] = row.rank(chosen);
        if (call.k == 0) return;
        const Candidate* top = row.top(call.k);
        for (int i = 0; i < call.k; ++i) {
            call.top_ids[std::int64_t{r} * call.k + i] = top[i].id;
            call.top_logprobs[std::int64_t{r} * call.k + i] =
                static_cast<float>(row.log_probability(log_sum, top[i].value));
        }
    });
}

}  // namespace tokenmill::TOKENMILL_ISA
