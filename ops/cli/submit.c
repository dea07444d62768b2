// ditfleet submit: a job into the queue and, with --wait, its picture out of it.
#include <inttypes.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#include "ops/cli/connect.h"
#include "ops/cli/fetch.h"
#include "ops/cli/json.h"
#include "ops/cli/progress.h"
#include "ops/cli/report.h"
#include "proto/clock.h"

enum { LOOK_MS = 250 };   // how often a waiting client looks for Ctrl-C
#define AWAY_SECONDS 30.0 // so long may Redis be away, restarting or failing over, before it gives up

struct submit {
    struct connection connection;
    const char *out;
    bool wait, json;
    int receipt; // replicas that are to confirm it; negative: nobody is
    double receipt_s;
    json_t *received; // what they confirmed; NULL: nothing was asked
    Ditfleet__V1__Job *job;
    char entry[QUEUE_ENTRY_SIZE];
    struct progress progress;
};

static int give_id(Ditfleet__V1__Job *job, struct err *err)
{
    uint64_t random;
    char id[17];
    if (*job->id)
        return 0;
    if (getrandom(&random, sizeof random, 0) != sizeof random)
        return err_set(err, ERR_IO, "the system gave no random bytes for the job's id");
    snprintf(id, sizeof id, "%016" PRIx64, random);
    return job_set_field(job, "id", id, err);
}

static int check(struct submit *s, struct err *err)
{
    if (s->out && !s->wait)
        return err_set(err, ERR_INVALID, "-o needs --wait: there is no picture to save before the job is done");
    if (!s->job->output)
        return err_set(err, ERR_INVALID, "the job has no output; give --output-url URL or --output-file PATH");
    TRY(give_id(s->job, err));
    return job_validate(s->job, err);
}

static int send_job(struct submit *s, struct queue *q, struct err *err)
{
    void *bytes;
    size_t length;
    TRY(job_pack(s->job, &bytes, &length, err));
    int rc = queue_submit(q, connection_tenant(&s->connection), bytes, length, s->entry, err);
    free(bytes);
    if (rc == 0 && !s->json) {
        printf("id       %s\nentry    %s\n", s->job->id, s->entry);
        fflush(stdout);
    }
    return rc;
}

// Asks how safe the submission is, and tells. An error, too, where it is less safe than was asked for.
static int take_receipt(struct submit *s, struct queue *q, struct err *err)
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
                   "job %s is submitted, but not as safe as asked for (by %s: %s, %u of %d replicas); "
                   "submit it again by the same id to ask again",
                   s->job->id, by, own, r.replicas, s->receipt);
}

// ---- waiting: SIGINT and SIGTERM are blocked meanwhile, and looked for

static void block_signals(void)
{
    sigset_t stop;
    sigemptyset(&stop);
    sigaddset(&stop, SIGINT);
    sigaddset(&stop, SIGTERM);
    sigprocmask(SIG_BLOCK, &stop, NULL);
}

static bool interrupted(void)
{
    sigset_t pending;
    return sigpending(&pending) == 0 && (sigismember(&pending, SIGINT) || sigismember(&pending, SIGTERM));
}

static int on_event(void *arg, const Ditfleet__V1__Event *event)
{
    struct submit *s = arg;
    progress_event(&s->progress, event);
    return interrupted() ? ERR_CANCELLED : 0;
}

// ERR_CANCELLED: by Ctrl-C.
static int await_result(struct submit *s, struct queue *q, Ditfleet__V1__Result **result, struct err *err)
{
    int rc;
    double away_at = 0;
    bool away = false, go_on;
    do {
        *err = (struct err){.code = ERR_NONE};
        rc = queue_await(q, connection_tenant(&s->connection), s->job->id, s->entry, LOOK_MS, on_event, s, result, err);
        if (rc == ERR_UNAVAILABLE && !away)
            away_at = monotonic_seconds();
        away = rc == ERR_UNAVAILABLE;
        if (away)
            nanosleep(&(struct timespec){.tv_nsec = LOOK_MS * 1000000L}, NULL);
        go_on = rc == ERR_TIMEOUT || (away && monotonic_seconds() - away_at < AWAY_SECONDS);
    } while (go_on && !interrupted());
    progress_clear(&s->progress);
    return go_on ? ERR_CANCELLED : rc;
}

static void tell_how_to_go_on(const struct submit *s, const char *why)
{
    char tenant[JOB_MAX_TENANT + 16] = "";
    if (s->connection.tenant)
        snprintf(tenant, sizeof tenant, " --tenant %s", s->connection.tenant);
    fprintf(stderr, "ditfleet: %s; job %s goes on\n  look:   ditfleet show %s%s\n  cancel: ditfleet cancel %s%s\n", why,
            s->job->id, s->job->id, tenant, s->job->id, tenant);
}

static int save_pictures(const struct submit *s, const Ditfleet__V1__Result *result, struct err *err)
{
    for (size_t i = 0; s->out && i < result->n_images; i++) {
        char path[4096];
        cli_numbered(s->out, result->images[i]->index, (uint32_t)result->n_images, path, sizeof path);
        TRY(fetch_picture(result->images[i], path, err));
        if (!s->json)
            printf("saved    %s\n", path);
    }
    return 0;
}

static void print_json(const struct submit *s, const Ditfleet__V1__Result *result)
{
    json_t *object =
        json_pack("{s:s,s:s,s:s}", "id", s->job->id, "entry", s->entry, "tenant", connection_tenant(&s->connection));
    if (s->received)
        json_object_set(object, "receipt", s->received);
    if (result)
        json_object_set_new(object, "result", json_from_message(&result->base));
    json_print(object);
}

static int wait_and_save(struct submit *s, struct queue *q)
{
    struct err err = {.code = ERR_NONE};
    Ditfleet__V1__Result *result = NULL;
    int rc = await_result(s, q, &result, &err);
    if (s->json)
        print_json(s, result);
    if (rc == ERR_CANCELLED) {
        tell_how_to_go_on(s, "stopped waiting");
        return CLI_INTERRUPTED;
    }
    if (rc != 0) {
        tell_how_to_go_on(s, "lost sight of it");
        return cli_fail(&err);
    }
    if (!s->json)
        report_result(result);
    int code = report_outcome(result);
    if (code == CLI_OK && save_pictures(s, result, &err) != 0) {
        cli_fail(&err);
        code = CLI_FAILED;
    }
    result_free(result);
    return code;
}

static int submit(struct submit *s)
{
    struct err err = {.code = ERR_NONE};
    struct queue *q = NULL;
    int rc = check(s, &err);
    rc = rc ? rc : connection_open(&s->connection, &q, &err);
    if (s->wait)
        block_signals();
    rc = rc ? rc : send_job(s, q, &err);
    int code = rc ? cli_fail(&err) : CLI_OK;
    if (rc == 0 && take_receipt(s, q, &err) != 0) {
        cli_fail(&err);
        code = CLI_FAILED;
    }
    if (rc == 0 && s->wait)
        code = wait_and_save(s, q); // the end says more than a receipt
    else if (rc == 0 && s->json)
        print_json(s, NULL);
    json_decref(s->received);
    connection_close(&s->connection, q);
    return code;
}

static int run(const struct cli_command *self, int argc, char **argv)
{
    struct submit s = {
        .job = job_new(), .receipt = -1, .receipt_s = 5, .progress = {.to = stderr, .terminal = isatty(2)}};
    const struct cli_flag flags[] = {
        CONNECTION_FLAGS(s.connection),
        TENANT_FLAG(s.connection),
        {"--wait", NULL, "show the progress and wait for the result", CLI_BOOL, &s.wait, 0, 0},
        {"-o", "FILE", "with --wait: save the picture; of several, FILE-0, FILE-1, ...", CLI_STRING, &s.out, 0, 0},
        {"--receipt", "N", "wait until it is on Redis' disk (7.2 or newer) and N replicas have it; tell what is known",
         CLI_INT, &s.receipt, 0, 100},
        {"--receipt-timeout", "S", "seconds that this may take (default 5)", CLI_DOUBLE, &s.receipt_s, 0.001, 3600},
        {"--json", NULL, "print one JSON object", CLI_BOOL, &s.json, 0, 0},
    };
    int code = s.job ? cli_parse(self, flags, sizeof flags / sizeof *flags, s.job, argc, argv, NULL, NULL) : CLI_FAILED;
    if (code < 0)
        code = submit(&s);
    job_free(s.job);
    return code;
}

const struct cli_command cli_submit = {"submit", "", "put a job into the queue; with --wait, see it through", run,
                                       false};
