// check.h: what must be true of the queue after every command, whatever goes wrong.
//
// A check keeps its own account of each job and compares it with what the store holds: the records that a command wrote
// after that command, everything now and then. What it promises, by the names that a broken promise is reported with:
//   move      a state changes only as PROTOCOL.md draws it, by an operation that may, for a reason that holds
//   final     a final job's state, result and attempts stay
//   fence     only the last claim's holder writes, while it holds the job
//   charge    an attempt is charged to whom the operation says, and never beyond the limit
//   commit    a job is committed once in a history, and at most once more for each failover
//   place     a job is in the index of its state and in no other; a job that is not final never expires
//   lost      a job that Redis took stays until it is final; an entry leaves its door only for a record or a receipt
//   stats     counters equal a recount
//   fair      ready counts, rings and ready sets agree; virtual time does not run backwards
//   callback  a final job's callback is in the outbox until it is settled, by whoever has it in hand
//   script    no operation ends in an error
// Jobs are named j<k>; job k is of tenant k % CHECK_TENANTS.
#ifndef DITFLEET_SIM_CHECK_H
#define DITFLEET_SIM_CHECK_H

#include "server.h"

#include "proto/job.h"

#define CHECK_PREFIX "dit:{sim}:"
enum { CHECK_TENANTS = 3, CHECK_JOBS = 6000, CHECK_RETENTION_MS = 60000 }; // retention_ms is at least this

struct check;
struct check *check_new(struct store *store);
void check_free(struct check *c);
const char *check_tenant(unsigned k); // of job k

// Around each command that the server runs, at what time of the server's. check_after: false, a promise is broken.
void check_before(struct check *c, size_t argc, const struct text *argv);
bool check_after(struct check *c, size_t argc, const struct text *argv, struct text reply, int64_t now_ms);
// Everything; stats and pools are the replies of these operations, now.
bool check_all(struct check *c, struct text stats, struct text pools, int64_t now_ms);
// What is broken, beginning with its name; "": nothing.
const char *check_broken(const struct check *c);

// The store goes back to where the copy was taken; NULL: to nothing.
struct check_copy;
struct check_copy *check_copy(const struct check *c);
void check_restore(struct check *c, const struct check_copy *copy);

// What else the simulation does and sees.
void check_misplaced(struct check *c, unsigned k);                  // an index lost job k, by no fault of the script
Ditfleet__V1__State check_state(const struct check *c, unsigned k); // 0: there is no record
unsigned check_live(const struct check *c);                         // jobs not final
unsigned long check_total(const struct check *c, Ditfleet__V1__State final); // that ended so, in this history
bool check_quiet(const struct check *c); // all jobs final, doors and outbox empty, nothing held

// The simulation found a promise broken itself.
bool check_fail(struct check *c, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
