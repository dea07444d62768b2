// gather.h: how a worker group of several nodes comes together, over Redis; gather.lua is the rule.
//
// Each node's supervisor reports a few times a second. The report that completes the set of offers forms the group; no
// supervisor decides alone, and one that asks again hears the same.
#ifndef DITFLEET_GATHER_H
#define DITFLEET_GATHER_H

#include "proto/queue.h"

enum {
    GATHER_MARK = 17, // of an offer or a formation: 16 hexadecimal digits and a zero
    GATHER_SECRET = 25,
    GATHER_TERMS = 4096,
    GATHER_PLACES = 64 * 64,
    GATHER_REASON = 400,
};

enum gather_phase {
    GATHER_AWAY,  // has no ranks; reason: why
    GATHER_OFFER, // would start its ranks: mark, drawn anew for each offer, terms, places
    GATHER_RUN,   // has the ranks of the formation that mark names, or starts them
    GATHER_DRAIN, // the same, but they are told to finish
};

struct gather_node {
    enum gather_phase phase;
    char mark[GATHER_MARK];
    int64_t age_ms;             // since it was heard of; -1: never. Not reported
    char terms[GATHER_TERMS];   // of its last offer, as are places: an offer alone is reported with them
    char places[GATHER_PLACES]; // of its ranks, in order, with spaces between them
    char reason[GATHER_REASON];
};

// Whether they say the same; ages are not said.
bool gather_same(const struct gather_node *a, const struct gather_node *b);

struct gather_view {
    char formation[GATHER_MARK]; // "": the offer was not taken
    char secret[GATHER_SECRET];
    int n_nodes;
    struct gather_node *nodes; // (n_nodes), in the order of their ranks; freed by gather_view_free
};

// Says where node `me` of the group stands and hears of all. names: (n_nodes), in the order of their ranks, the same
// for all nodes. Errors as of any operation of the queue; repeating it is safe.
int gather(struct queue *q, const char *group, const char *const *names, int n_nodes, int me,
           const struct gather_node *mine, struct gather_view *out, struct err *e);
void gather_view_free(struct gather_view *v);

#endif
