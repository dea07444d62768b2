// submit.h: what submitting one job (submit.c) and many (submit_many.c) share.
#ifndef DITFLEET_CLI_SUBMIT_H
#define DITFLEET_CLI_SUBMIT_H

#include <jansson.h>

#include "ops/cli/batch.h"
#include "ops/cli/connect.h"

enum { SUBMIT_LOOK_MS = 250 };   // how often a waiting client looks for Ctrl-C
#define SUBMIT_AWAY_SECONDS 30.0 // so long may Redis be away, restarting or failing over, before it gives up

struct submit {
    struct connection connection;
    const char *out;           // NULL: pictures are not fetched
    const char *from, *format; // NULL: the flags are the one job
    bool wait, json;
    int receipt; // replicas that are to confirm it; negative: nobody is
    double receipt_s;
    json_t *received; // what they confirmed; NULL: nothing was asked
};

struct submission {
    Ditfleet__V1__Job *job;
    char entry[QUEUE_ENTRY_SIZE];
};

// Gives the job an id if it has none, and checks it.
int submit_check(Ditfleet__V1__Job *job, struct err *err);
int submit_send(const struct submit *s, struct queue *q, struct submission *j, struct err *err);
// Asks how safe all that was sent is, and tells. An error, too, where it is less safe than was asked for.
int submit_receipt(struct submit *s, struct queue *q, struct err *err);
// From here on SIGINT and SIGTERM are blocked, and looked for.
void submit_block_signals(void);
bool submit_interrupted(void);
// Fetches a result's pictures to the path `to`, numbered if there are several.
int submit_save(const struct submit *s, const char *to, const Ditfleet__V1__Result *result, struct err *err);
void submit_print_json(const struct submit *s, const struct submission *j, const Ditfleet__V1__Result *result);

// Submits all, and with --wait sees them through. Returns the exit code: CLI_OK when all succeeded.
int submit_many(struct submit *s, struct queue *q, const struct batch *batch);

#endif
