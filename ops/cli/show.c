// ditfleet show: what the queue knows of one job.
#include <inttypes.h>
#include <stdlib.h>

#include "ops/cli/connect.h"
#include "ops/cli/json.h"
#include "ops/cli/report.h"

static double seconds(uint64_t from_ms, uint64_t to_ms)
{
    return ((double)to_ms - (double)from_ms) / 1000;
}

static void print_times(const struct queue_record *r)
{
    printf("created  %.1f s ago, updated %.1f s ago\n", seconds(r->created_ms, r->now_ms),
           seconds(r->updated_ms, r->now_ms));
    if (job_state_final(r->state))
        return;
    if (r->lease_ms)
        printf("lease    runs out in %.1f s\n", seconds(r->now_ms, r->lease_ms));
    if (r->due_ms > r->now_ms)
        printf("due      in %.1f s\n", seconds(r->now_ms, r->due_ms));
    if (r->deadline_ms)
        printf("deadline in %.1f s\n", seconds(r->now_ms, r->deadline_ms));
}

static void print_record(const struct queue_record *r, const Ditfleet__V1__Result *result)
{
    printf("id       %s\nentry    %s\npool     %s, priority %s, price %.3f GPU-seconds\n", r->id, r->entry, r->pool,
           r->priority, (double)r->gpu_ms / 1000);
    printf("attempts %" PRIu64 " begun, %u failed by its own error, %u by the fleet's\n", r->epoch, r->attempts_app,
           r->attempts_infra);
    print_times(r);
    if (result) {
        report_result(result);
        if (result->error)
            printf("error    %s: %s\n", result->error->code, result->error->message);
        return;
    }
    printf("state    %s\n", job_state_name(r->state));
    if (*r->worker)
        printf("worker   %s\n", r->worker);
    if (*r->stage)
        printf("stage    %s %u/%u\n", r->stage, r->step, r->steps);
    if (*r->error_code)
        printf("error    %s: %s (of the last attempt that failed)\n", r->error_code, r->error);
}

// The payload is left out: it holds the headers' values, which are secrets.
static void print_json(const struct queue_record *r, const Ditfleet__V1__Result *result)
{
    json_t *object = json_pack(
        "{s:s,s:s,s:s,s:s,s:s,s:s,s:s,s:i,s:i,s:I,s:i,s:i,s:I,s:I,s:I,s:I,s:I,s:I,s:I}", "id", r->id, "entry", r->entry,
        "state", job_state_name(r->state), "pool", r->pool, "priority", r->priority, "worker", r->worker, "stage",
        r->stage, "step", (int)r->step, "steps", (int)r->steps, "attempts", (json_int_t)r->epoch, "attempts_app",
        (int)r->attempts_app, "attempts_infra", (int)r->attempts_infra, "gpu_ms", (json_int_t)r->gpu_ms, "created_ms",
        (json_int_t)r->created_ms, "updated_ms", (json_int_t)r->updated_ms, "lease_ms", (json_int_t)r->lease_ms,
        "due_ms", (json_int_t)r->due_ms, "deadline_ms", (json_int_t)r->deadline_ms, "now_ms", (json_int_t)r->now_ms);
    if (*r->error_code)
        json_object_set_new(object, "error", json_pack("{s:s,s:s}", "code", r->error_code, "message", r->error));
    if (result)
        json_object_set_new(object, "result", json_from_message(&result->base));
    json_print(object);
}

static int show(struct connection *c, const char *id, bool json)
{
    struct err err = {.code = ERR_NONE};
    struct queue *q = NULL;
    struct queue_record record = {0};
    Ditfleet__V1__Result *result = NULL;
    int rc = connection_open(c, &q, &err);
    rc = rc ? rc : queue_get(q, connection_tenant(c), id, &record, &err);
    if (rc == 0 && record.result)
        rc = result_unpack(record.result, record.result_length, &result, &err);
    if (rc == 0)
        (json ? print_json : print_record)(&record, result);
    result_free(result);
    queue_record_free(&record);
    connection_close(c, q);
    return rc ? cli_fail(&err) : CLI_OK;
}

static int run(const struct cli_command *self, int argc, char **argv)
{
    struct connection c = {0};
    bool json = false;
    const struct cli_flag flags[] = {
        CONNECTION_FLAGS(c), TENANT_FLAG(c), {"--json", NULL, "print one JSON object", CLI_BOOL, &json, 0, 0}};
    const char **operands = calloc((size_t)argc, sizeof *operands);
    int n = 0;
    int code =
        operands ? cli_parse(self, flags, sizeof flags / sizeof *flags, NULL, argc, argv, operands, &n) : CLI_FAILED;
    code = code < 0 ? cli_operands(self, n, 1) : code;
    code = code < 0 ? show(&c, operands[0], json) : code;
    free(operands);
    return code;
}

const struct cli_command cli_show = {"show", "ID", "what the queue knows of one job", run, false};
