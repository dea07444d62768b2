// herald.h: the thread that renews leases and tells the queue how far jobs are, over its own connection. A lease is
// renewed only while the holder makes progress; what the queue answers (cancelled, expired, stale) lands in held.stop.
#ifndef DITFLEET_HERALD_H
#define DITFLEET_HERALD_H

#include "proto/conf.h"
#include "worker/held.h"
#include "worker/pulse.h"

enum { HERALD_MAX_HELD = 2 }; // one denoising, one uploading

struct herald;

// conf, log and pulse are borrowed.
int herald_new(const struct conf *conf, const struct log *log, struct pulse *pulse, struct herald **out,
               struct err *err);
void herald_free(struct herald *h);

// From hold to drop the lease is renewed; drop waits until the thread is done with the job. At most HERALD_MAX_HELD.
void herald_hold(struct herald *h, struct held *job);
void herald_drop(struct herald *h, struct held *job);
// Stores where the job is, to be told in order as soon as the connection is free. Never waits.
void herald_report(struct herald *h, struct held *job, const struct queue_progress *progress);

#endif
