// ditfleet submit: a job into the queue and, with --wait, its picture out of it. Of many: submit_many.c.
#include "ops/cli/submit.h"

#include <inttypes.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#include "ops/cli/batch.h"
#include "ops/cli/fetch.h"
#include "ops/cli/json.h"
#include "ops/cli/progress.h"
#include "ops/cli/report.h"
#include "proto/clock.h"

int submit_check(Ditfleet__V1__Job *job, struct err *err)
{
    uint64_t random;
    char id[17];
    if (!job->output)
        return err_set(err, ERR_INVALID, "the job has no output; give --output-url URL or --output-file PATH");
    if (!*job->id) {
        if (getrandom(&random, sizeof random, 0) != sizeof random)
            return err_set(err, ERR_IO, "the system gave no random bytes for the job's id");
        snprintf(id, sizeof id, "%016" PRIx64, random);
        TRY(job_set_field(job, "id", id, err));
    }
    return job_validate(job, err);
}

int submit_send(const struct submit *s, struct queue *q, struct submission *j, struct err *err)
{
    void *bytes;
    size_t length;
    TRY(job_pack(j->job, &bytes, &length, err));
    int rc = queue_submit(q, connection_tenant(&s->connection), bytes, length, j->entry, err);
    free(bytes);
    return rc;
}

int submit_receipt(struct submit *s, struct queue *q, struct err *err)
{
    struct queue_receipt r;
    bool confirmed;
    if (s->receipt < 0)
        return 0;
    TRY(queue_receipt(q, (unsigned)s->receipt, (int)(1000 * s->receipt_s), &r, &confirmed, err));
    const char *by = r.on_disk ? "WAITAOF" : "WAIT", *own = r.local     ? "on the server's disk"
                                                            : r.on_disk ? "not known to be on the server's disk"
                                                                        : "in the server's memory";
    if (!s->json)
        printf("receipt  %s: %s, %s of %u replicas\n", by, own, r.on_disk ? "on the disks" : "in the memory",
               r.replicas);
    s->received = json_pack("{s:s,s:b,s:i,s:b}", "by", by, "on_server_disk", r.local > 0, "replicas", (int)r.replicas,
                            "confirmed", confirmed);
    if (confirmed)
        return 0;
    return err_set(err, ERR_TIMEOUT,
                   "submitted, but not as safe as asked for (by %s: %s, %u of %d replicas); "
                   "submit again by the same id to ask again",
                   by, own, r.replicas, s->receipt);
}

// ---- waiting: SIGINT and SIGTERM are blocked meanwhile, and looked for

void submit_block_signals(void)
{
    sigset_t stop;
    sigemptyset(&stop);
    sigaddset(&stop, SIGINT);
    sigaddset(&stop, SIGTERM);
    sigprocmask(SIG_BLOCK, &stop, NULL);
}

bool submit_interrupted(void)
{
    sigset_t pending;
    return sigpending(&pending) == 0 && (sigismember(&pending, SIGINT) || sigismember(&pending, SIGTERM));
}

static int on_event(void *arg, const Ditfleet__V1__Event *event)
{
    progress_event(arg, event);
    return submit_interrupted() ? ERR_CANCELLED : 0;
}

// ERR_CANCELLED: by Ctrl-C.
static int await_result(const struct submit *s, struct queue *q, const struct submission *j,
                        Ditfleet__V1__Result **result, struct err *err)
{
    struct progress progress = {.to = stderr, .terminal = isatty(2)};
    int rc;
    double away_at = 0;
    bool away = false, go_on;
    Ditfleet__V1__Event waits = DITFLEET__V1__EVENT__INIT; // of which nothing is told before it is claimed
    waits.state = DITFLEET__V1__STATE__STATE_QUEUED;
    progress_event(&progress, &waits);
    do {
        *err = (struct err){.code = ERR_NONE};
        rc = queue_await(q, connection_tenant(&s->connection), j->job->id, j->entry, SUBMIT_LOOK_MS, on_event,
                         &progress, result, err);
        if (rc == ERR_UNAVAILABLE && !away)
            away_at = monotonic_seconds();
        away = rc == ERR_UNAVAILABLE;
        if (away)
            nanosleep(&(struct timespec){.tv_nsec = SUBMIT_LOOK_MS * 1000000L}, NULL);
        go_on = rc == ERR_TIMEOUT || (away && monotonic_seconds() - away_at < SUBMIT_AWAY_SECONDS);
    } while (go_on && !submit_interrupted());
    progress_clear(&progress);
    return go_on ? ERR_CANCELLED : rc;
}

static void tell_how_to_go_on(const struct submit *s, const char *id, const char *why)
{
    char tenant[JOB_MAX_TENANT + 16] = "";
    if (s->connection.tenant)
        snprintf(tenant, sizeof tenant, " --tenant %s", s->connection.tenant);
    fprintf(stderr, "ditfleet: %s; job %s goes on\n  look:   ditfleet show %s%s\n  cancel: ditfleet cancel %s%s\n", why,
            id, id, tenant, id, tenant);
}

int submit_save(const struct submit *s, const char *to, const Ditfleet__V1__Result *result, struct err *err)
{
    for (size_t i = 0; i < result->n_images; i++) {
        char path[4096];
        cli_numbered(to, result->images[i]->index, (uint32_t)result->n_images, path, sizeof path);
        TRY(fetch_picture(result->images[i], path, err));
        if (!s->json)
            printf("saved    %s\n", path);
    }
    return 0;
}

void submit_print_json(const struct submit *s, const struct submission *j, const Ditfleet__V1__Result *result)
{
    json_t *object =
        json_pack("{s:s,s:s,s:s}", "id", j->job->id, "entry", j->entry, "tenant", connection_tenant(&s->connection));
    if (s->received)
        json_object_set(object, "receipt", s->received);
    if (result)
        json_object_set_new(object, "result", json_from_message(&result->base));
    json_print(object);
}

static int wait_and_save(const struct submit *s, struct queue *q, const struct submission *j)
{
    struct err err = {.code = ERR_NONE};
    Ditfleet__V1__Result *result = NULL;
    int rc = await_result(s, q, j, &result, &err);
    if (s->json)
        submit_print_json(s, j, result);
    if (rc == ERR_CANCELLED) {
        tell_how_to_go_on(s, j->job->id, "stopped waiting");
        return CLI_INTERRUPTED;
    }
    if (rc != 0) {
        tell_how_to_go_on(s, j->job->id, "lost sight of it");
        return cli_fail(&err);
    }
    if (!s->json)
        report_result(result);
    int code = report_outcome(result);
    if (code == CLI_OK && s->out && submit_save(s, s->out, result, &err) != 0) {
        cli_fail(&err);
        code = CLI_FAILED;
    }
    result_free(result);
    return code;
}

static int submit_one(struct submit *s, struct queue *q, struct submission *j)
{
    struct err err = {.code = ERR_NONE};
    int code = CLI_OK;
    if (submit_send(s, q, j, &err) != 0)
        return cli_fail(&err);
    if (!s->json) {
        printf("id       %s\nentry    %s\n", j->job->id, j->entry);
        fflush(stdout);
    }
    if (submit_receipt(s, q, &err) != 0) {
        cli_fail(&err);
        code = CLI_FAILED;
    }
    if (s->wait)
        return wait_and_save(s, q, j); // the end says more than a receipt
    if (s->json)
        submit_print_json(s, j, NULL);
    return code;
}

// What the flags say together, and the jobs.
static int take_jobs(struct submit *s, Ditfleet__V1__Job *base, struct batch *many, struct err *err)
{
    if (s->out && !s->wait)
        return err_set(err, ERR_INVALID, "-o needs --wait: there is no picture to save before the job is done");
    if (s->format && !s->from)
        return err_set(err, ERR_INVALID, "--format is of --from FILE");
    if (!s->from)
        return submit_check(base, err);
    if (s->out && !strstr(s->out, "{id}"))
        return err_set(err, ERR_INVALID, "-o %.200s: of many jobs it needs {id}, as in pictures/{id}.png", s->out);
    return batch_read(s->from, s->format, base, submit_check, many, err);
}

static int submit(struct submit *s, Ditfleet__V1__Job *base)
{
    struct err err = {.code = ERR_NONE};
    struct queue *q = NULL;
    struct batch many = {0};
    int rc = take_jobs(s, base, &many, &err);
    rc = rc ? rc : connection_open(&s->connection, &q, &err);
    if (s->wait)
        submit_block_signals();
    int code = rc        ? cli_fail(&err)
               : s->from ? submit_many(s, q, &many)
                         : submit_one(s, q, &(struct submission){.job = base});
    batch_free(&many);
    json_decref(s->received);
    connection_close(&s->connection, q);
    return code;
}

static int run(const struct cli_command *self, int argc, char **argv)
{
    struct submit s = {.receipt = -1, .receipt_s = 5};
    Ditfleet__V1__Job *job = job_new();
    const struct cli_flag flags[] = {
        CONNECTION_FLAGS(s.connection),
        TENANT_FLAG(s.connection),
        {"--from", "FILE",
         "submit a job for each line: FILE.txt has prompts, FILE.csv names fields in its first line, FILE.jsonl has "
         "objects; the other flags are for all of them, and --id gives ID-1, ID-2, ...",
         CLI_STRING, &s.from, 0, 0},
        {"--format", "txt|csv|jsonl", "what FILE is, where its name does not say; FILE may be - then", CLI_STRING,
         &s.format, 0, 0},
        {"--wait", NULL, "show the progress and wait for the result", CLI_BOOL, &s.wait, 0, 0},
        {"-o", "FILE",
         "with --wait: save the picture; of several, FILE-0, FILE-1, ...; with --from FILE has {id} in it", CLI_STRING,
         &s.out, 0, 0},
        {"--receipt", "N", "wait until it is on Redis' disk (7.2 or newer) and N replicas have it; tell what is known",
         CLI_INT, &s.receipt, 0, 100},
        {"--receipt-timeout", "S", "seconds that this may take (default 5)", CLI_DOUBLE, &s.receipt_s, 0.001, 3600},
        {"--json", NULL, "print one JSON object, or with --from one a line", CLI_BOOL, &s.json, 0, 0},
    };
    int code = job ? cli_parse(self, flags, sizeof flags / sizeof *flags, job, argc, argv, NULL, NULL) : CLI_FAILED;
    if (code < 0)
        code = submit(&s, job);
    job_free(job);
    return code;
}

const struct cli_command cli_submit = {"submit", "", "put jobs into the queue; with --wait, see them through", run,
                                       false};
