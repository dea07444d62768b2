// gatherer.h: the thread that reports to the other nodes, over Redis, where groups that span them stand, and brings
// back what those report (proto/gather.h). The supervisor's loop never waits for it.
#ifndef DITFLEET_SUPERVISOR_GATHERER_H
#define DITFLEET_SUPERVISOR_GATHERER_H

#include "proto/log.h"
#include "supervisor/span.h"

struct gatherer;

// Copies what it needs. The calling thread has blocked the signals it handles.
int gatherer_start(const struct conf *conf, const struct log *log, struct gatherer **out, struct err *err);
void gatherer_stop(struct gatherer *g); // what was said last still goes out; NULL is fine

// Where this node's part of the group stands now; goes out at once when it is new, and again and again. Never blocks.
void gatherer_say(struct gatherer *g, const struct span_nodes *group, const struct gather_node *mine);
// The group is no more, or spans nodes no more: that is said once. Others are none of this function's business.
void gatherer_forget(struct gatherer *g, const char *group);

// A view that came since the last call and answers what is said now, the caller's to gather_view_free. False: none.
bool gatherer_hear(struct gatherer *g, const char *group, const struct gather_node *mine, struct gather_view *view);
// Readable (an eventfd) when there is one; gatherer_rest makes it unreadable until the next.
int gatherer_fd(const struct gatherer *g);
void gatherer_rest(struct gatherer *g);

#endif
