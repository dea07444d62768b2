// span.h: what a group that spans nodes says to the other nodes and makes of what it hears. A report goes out and a
// view comes in a few times a second (gatherer.h); nothing here waits or talks to Redis.
#ifndef DITFLEET_SUPERVISOR_SPAN_H
#define DITFLEET_SUPERVISOR_SPAN_H

#include "proto/conf.h"
#include "proto/gather.h"
#include "worker/comm/comm.h"

// A node that has said nothing for so long is lost.
#define SPAN_SILENT_SECONDS 10.0

struct span;

// Who is in a group, by the configuration of the last offer.
struct span_nodes {
    char group[65];
    int n_nodes, me; // me: this node's place
    int ranks, local_ranks;
    struct conf_node nodes[CONF_MAX_NODES]; // (n_nodes)
};

int span_new(struct span **out, struct err *err);
void span_free(struct span *s); // NULL is fine

// Makes ready to start this node's ranks: places where they are called, a mark drawn anew. *c and *g live until the
// next span_offer. ERR_IO: the address is none of this machine's; ERR_UNSUPPORTED: models with too long names.
int span_offer(struct span *s, const struct conf *c, const struct conf_group *g, struct err *err);
// The places are given up, and nobody waits for anybody.
void span_withdraw(struct span *s);
const struct span_nodes *span_nodes(const struct span *s);

// What goes out. mark: the formation's for GATHER_RUN and GATHER_DRAIN; unused for GATHER_OFFER.
void span_report(const struct span *s, enum gather_phase phase, const char *mark, const char *reason,
                 struct gather_node *out);

enum span_news {
    SPAN_NOTHING,
    SPAN_FORMED, // the offer was taken: see span_meeting
    SPAN_DRAIN,  // another node's ranks are told to finish
    SPAN_OVER,   // another node's ranks are gone, or the node is; why
};
// Takes in a view, which was asked for by a report of this phase and mark. now: monotonic seconds. why: SPAN_OVER's
// reason, or what an offer waits for.
enum span_news span_hear(struct span *s, enum gather_phase phase, const char *mark, const struct gather_view *view,
                         double now, char why[GATHER_REASON]);

// After SPAN_FORMED: the formation's name, and a descriptor (close-on-exec, the caller's) from which a rank reads the
// struct comm_tcp_meeting; -1 with *err.
const char *span_formation(const struct span *s);
int span_meeting(const struct span *s, struct err *err);
// Where this node's rank i (of its own) is called; stays the span's.
int span_listener(const struct span *s, int i);

#endif
