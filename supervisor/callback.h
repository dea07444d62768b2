// callback.h: makes the callbacks of final jobs: takes them from the queue's outbox, POSTs them, signed, and tries
// again until they are taken or their budget is spent.
//
// A thread of its own with a connection to Redis of its own, so that no receiver holds up a job, an admission or the
// supervisor's loop. Several supervisors share the work; what a killed one had in hand falls to the others when its
// lease runs out. Delivery is at least once; webhook-id is the same for each try.
#ifndef DITFLEET_SUPERVISOR_CALLBACK_H
#define DITFLEET_SUPERVISOR_CALLBACK_H

#include "proto/conf.h"

struct callback;

// Whether conf's [callback] could serve: reads the secrets. conf has a secret_file.
int callback_check(const struct conf *conf, struct err *err);

// Starts the thread: conf has a secret_file. Copies what it needs of conf and log. The calling thread has blocked the
// signals it handles.
int callback_start(struct callback **out, const struct conf *conf, const struct log *log, struct err *err);
// Gives back what is in hand and ends the thread; may take a few seconds while a command waits for its deadline.
void callback_stop(struct callback *c); // NULL is fine

// Takes over what a reload may change: all of [callback], the log level. Reads the secrets anew; after an error the old
// ones stay. What is under way is finished as it was begun.
int callback_configure(struct callback *c, const struct conf *conf, const struct log *log, struct err *err);

#endif
