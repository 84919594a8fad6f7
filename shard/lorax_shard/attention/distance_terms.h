// Terms that scores have by distance: products of queries and of keys with rows of tables.
//
//   score[i][t] += scaling * (q[i] . key_table[place] + k[t] . query_table[place])
//
// with the place of the distance between both, which goes down or stays as the token goes on: what
// lies between is computed, with whole vectors, for some queries and the tokens of a step.

#pragma once

#include <cstring>

#include "plan.h"

class DistanceTerms {
   public:
    static int64_t numbers(int64_t key_dim) {
        return tile_rows * (key_dim + query_places) + step_tokens * key_places + 48;
    }

    DistanceTerms(const AttendCall& call, float* memory) : c(call) {
        Pieces pieces{memory};
        copied = pieces.take(tile_rows * c.key_dim);
        query_terms = pieces.take(tile_rows * query_places);
        key_terms = pieces.take(step_tokens * key_places);
    }

    // Computes the terms of the keys of a step for queries that follow each other, up to
    // most_queries_by_distance. The distance of the step's first token from the first of them is
    // at `centre`.
    void take_keys(const float* const* keys, int64_t head, Tokens in, int64_t centre,
                   int64_t num_queries) {
        const Places reached = places_of(in, centre, num_queries);
        key_base = reached.first;
        const float* table = c.query_table + head * c.key_dim * c.table_stride + reached.first;
        for (int64_t t = in.first; t < in.last; t += tile_rows) {
            const int64_t count = std::min<int64_t>(tile_rows, in.last - t);
            for (int64_t i = 0; i < count; ++i)
                std::memcpy(copied + i * c.key_dim, keys[t + i], c.key_dim * sizeof(float));
            scores_at<key_places>[count](copied, table, c.table_stride, c.key_dim, 0,
                                         reached.num_vectors, key_terms + t * key_places);
        }
    }

    // Adds the terms of up to tile_rows queries, which are scaled, to their scores of some tokens.
    void add(const float* queries, int64_t count, int64_t head, Tokens some, int64_t centre,
             float* scores) {
        const Places reached = places_of(some, centre, count);
        if (c.key_table)
            scores_at<query_places>[count](
                queries, c.key_table + head * c.key_dim * c.table_stride + reached.first,
                c.table_stride, c.key_dim, 0, reached.num_vectors, query_terms);
        const auto scaling = static_cast<float>(c.scaling * score_units);
        for (int64_t i = 0; i < count; ++i) {
            const int32_t* places = c.places + centre - i;
            float* x = scores + i * step_tokens;
            if (c.key_table) {
                const float* own = query_terms + i * query_places - reached.first;
                for (int64_t t = some.first; t < some.last; ++t) x[t] += own[places[t]];
            }
            if (c.query_table) {
                const float* own = key_terms - key_base;
                for (int64_t t = some.first; t < some.last; ++t)
                    x[t] += own[t * key_places + places[t]] * scaling;
            }
        }
    }

   private:
    // Room for the distances between a tile's queries and a step, and for those of a few of them,
    // each with what is left of a vector at both ends.
    static constexpr int64_t key_places = most_queries_by_distance + 2 * step_tokens;
    static constexpr int64_t query_places = 2 * step_tokens;

    // From the number `first` on, so many vectors.
    struct Places {
        int64_t first, num_vectors;
    };

    Places places_of(Tokens some, int64_t centre, int64_t num_queries) const {
        const int64_t lowest = c.places[centre + some.last - 1];
        const int64_t highest = c.places[centre - (num_queries - 1) + some.first];
        const int64_t first = lowest - lowest % num_lanes;
        return {first, (highest - first) / num_lanes + 1};
    }

    const AttendCall& c;
    float *copied, *query_terms, *key_terms;
    int64_t key_base = 0;  // the place of the first of key_terms
};
