// Choosing tokens by logits, what is done to logits before, and log probabilities.
//
// No row is sorted as a whole: the maxima of its groups of 64 tokens say above which logit some hundred tokens must lie, and
// nearly always what is kept ends among those. If not, more are taken, in the end all.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace tokenmill {

// Row r: temperature 0 takes the most likely token. Else tokens are kept by top_k (0: all), then top_p (1: all), then min_p
// (0: all), and one of them is taken at uniform in [0, 1) of their cumulative probability: in order of ids if nothing was
// asked to be cut, else most likely first. Among equals the lowest id goes first. A token of logit -inf is never taken
// while another is possible. A logit that is not a number counts as -inf.
struct Sample {
    const float* logits;  // [rows][vocabulary], `stride` elements from row to row
    std::int64_t stride;
    int rows, vocabulary;
    const float* temperature;  // [rows], and so are the next ones
    const std::int64_t* top_k;
    const float* top_p;
    const float* min_p;
    const double* uniform;
    std::int64_t* tokens;  // [rows], the result
};

// Of softmax(logits): the log probability of tokens[r], its rank (1: none is likelier), and the k likeliest tokens, lowest
// id first among equals, with their log probabilities.
struct TokenLogprobs {
    const float* logits;
    std::int64_t stride;
    int rows, vocabulary;
    const std::int64_t* tokens;  // [rows]
    int k;                       // at most `vocabulary`
    float* logprobs;             // [rows]
    std::int64_t* ranks;         // [rows]
    std::int64_t* top_ids;       // [rows][k]
    float* top_logprobs;         // [rows][k]
};

// The logits of the tokens of row r's history, history[starts[r]] to history[starts[r + 1]], changed once for each token: by
// repetition, divided if positive and else multiplied, and then, if it stands behind the first prompt_lens[r] tokens, by
// - (count * frequency + presence), where count is how often.
struct Penalties {
    float* logits;  // [rows][vocabulary], `stride` elements from row to row
    std::int64_t stride;
    int rows, vocabulary;
    const std::int64_t* history;
    const std::int64_t* starts;  // [rows + 1]
    const std::int64_t* prompt_lens;  // [rows], and so are the next ones
    const float* repetition;
    const float* frequency;
    const float* presence;
};

TOKENMILL_KERNEL(penalize, void(const Penalties&));
TOKENMILL_KERNEL(sample, void(const Sample&));
TOKENMILL_KERNEL(token_logprobs, void(const TokenLogprobs&));

}  // namespace tokenmill
