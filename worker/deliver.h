// deliver.h: the thread that turns pixels into a committed result: PNG, upload, finish. It works on one job while the
// main path denoises the next.
#ifndef DITFLEET_DELIVER_H
#define DITFLEET_DELIVER_H

#include "proto/conf.h"
#include "worker/herald.h"
#include "worker/output/upload.h"

struct deliverer;

struct deliver_options {
    const struct conf *conf;
    const struct log *log;
    struct pulse *pulse; // of the main path, which reports progress while it waits
    struct herald *herald;
    const struct upload_policy *policy;
    const char *worker; // the id that results name
};

// All is borrowed and outlives the deliverer.
int deliverer_new(const struct deliver_options *options, struct deliverer **out, struct err *err);
// Waits for the job in hand.
void deliverer_free(struct deliverer *d);

// Takes over a job whose pixels are there; waits while another is being delivered, reporting STAGE_UPLOAD. The job is
// dropped from the herald and freed when its last word is said.
void deliverer_put(struct deliverer *d, struct held *job);
// Waits until nothing is in hand.
void deliverer_wait(struct deliverer *d);

// Whose fault why is: the job named its target and its parameters; memory and our own bugs are ours.
enum queue_cause settle_cause(const struct err *why);
// Says the last word on a job that did not get its picture, over queue: nothing when the queue took it away; else fail,
// by whose fault it was. Main path only. Retries while Redis is away, as long as the lease may last.
void settle_failure(const struct deliver_options *o, struct queue **queue, const struct held *job,
                    const struct err *why, enum queue_cause cause);
// Gives the job back with no attempt charged.
void settle_release(const struct deliver_options *o, struct queue **queue, const struct held *job);

#endif
