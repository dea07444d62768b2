// batch.h: many jobs from one file, for `ditfleet submit --from`.
#ifndef DITFLEET_CLI_BATCH_H
#define DITFLEET_CLI_BATCH_H

#include <stddef.h>

#include "proto/job.h"

struct batch {
    Ditfleet__V1__Job **jobs; // (n)
    size_t n;
};

// Reads path ("-": standard input). format, or if it is NULL path's suffix, says what it holds:
//   txt    a prompt a line; empty lines are passed over
//   csv    as RFC 4180; the first record names fields of the job, an empty cell leaves its field alone
//   jsonl  a JSON object a line, its keys fields of the job: "output.url" or {"output": {"url": ..}}, {"labels": {"k":
//   "v"}}
// Each job is a copy of base with those fields set. A base with an id gives them the ids ID-1, ID-2, ... unless they
// have their own. check sees each job when it is whole, and may still change it; what it refuses fails the file. Errors
// name file and line; ERR_IO, ERR_NOT_FOUND, ERR_INVALID, ERR_NO_MEMORY or check's; *out is empty then.
typedef int batch_check(Ditfleet__V1__Job *job, struct err *err);
int batch_read(const char *path, const char *format, const Ditfleet__V1__Job *base, batch_check *check,
               struct batch *out, struct err *err);
void batch_free(struct batch *batch);

#endif
