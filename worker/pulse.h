// pulse.h: the thread that speaks with the supervisor: heartbeats with stage and step, the order to drain, and the end
// of the connection. The main path only stores numbers here and never waits.
#ifndef DITFLEET_PULSE_H
#define DITFLEET_PULSE_H

#include "proto/log.h"
#include "proto/msg.h"

struct pulse;

// Called on the pulse's thread when the supervisor is gone; the process must end within a second.
typedef void pulse_orphaned(void *arg);

// control_fd is taken over; it may be set blocking or not. Sends HELLO. SIGTERM from elsewhere (a user, a container's
// stop) is taken as the order to drain, if the caller has blocked it before it made any thread.
int pulse_new(int control_fd, const struct log *log, pulse_orphaned *orphaned, void *arg, struct pulse **out,
              struct err *err);
// Sends BYE with the reason, ends the thread.
void pulse_free(struct pulse *p, const char *reason);

void pulse_ready(struct pulse *p);
// Where the main path is; every call counts as progress. job may be NULL: as before; "": none.
void pulse_report(struct pulse *p, enum stage stage, uint32_t step, uint32_t steps, const char *job);
void pulse_busy(struct pulse *p, double seconds); // adds device-seconds spent on a job

// True once the supervisor (or a signal) asked to stop. since_s: how long ago.
bool pulse_draining(struct pulse *p, double *since_s);
// True while draining once only so much of the grace time is left as giving jobs back takes, after another step_s in
// which nobody asks.
bool pulse_must_release(struct pulse *p, double grace_s, double step_s);
// Seconds since the main path last made progress, and the stage it is in.
double pulse_stalled(struct pulse *p, enum stage *stage);

#endif
