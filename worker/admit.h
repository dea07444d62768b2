// admit.h: the leader's admission thread: takes jobs in at the doors, says which models this group serves, and never
// waits for denoising.
#ifndef DITFLEET_ADMIT_H
#define DITFLEET_ADMIT_H

#include "proto/conf.h"
#include "proto/log.h"

struct admitter;

// conf, group, log and consumer (the worker's id) are borrowed.
int admitter_new(const struct conf *conf, const struct conf_group *group, const struct log *log, const char *consumer,
                 struct admitter **out, struct err *err);
void admitter_free(struct admitter *a);

#endif
