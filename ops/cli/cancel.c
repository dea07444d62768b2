// ditfleet cancel: takes jobs back, wherever they are.
#include <stdlib.h>

#include "ops/cli/connect.h"
#include "ops/cli/json.h"

// CLI_OK when it is cancelled now.
static int cancel_one(struct queue *q, const char *tenant, const char *id, bool json)
{
    struct err err = {.code = ERR_NONE};
    Ditfleet__V1__State state = DITFLEET__V1__STATE__STATE_UNKNOWN;
    if (queue_cancel(q, tenant, id, &state, &err) != 0)
        return cli_fail(&err);
    if (json)
        json_print(json_pack("{s:s,s:s}", "id", id, "state", job_state_name(state)));
    if (state != DITFLEET__V1__STATE__STATE_CANCELLED) {
        fprintf(stderr, "ditfleet: job %s had ended before: %s\n", id, job_state_name(state));
        return CLI_FAILED;
    }
    if (!json)
        printf("%s CANCELLED\n", id);
    return CLI_OK;
}

// One that fails does not keep the others; the first failure's exit code.
static int cancel(struct connection *c, const char *const *ids, int n, bool json)
{
    struct err err = {.code = ERR_NONE};
    struct queue *q = NULL;
    int code = connection_open(c, &q, &err) ? cli_fail(&err) : CLI_OK;
    for (int i = 0; q && i < n && code != CLI_UNAVAILABLE; i++) {
        const int one = cancel_one(q, connection_tenant(c), ids[i], json);
        code = code == CLI_OK || one == CLI_UNAVAILABLE ? one : code;
    }
    connection_close(c, q);
    return code;
}

static int run(const struct cli_command *self, int argc, char **argv)
{
    struct connection c = {0};
    bool json = false;
    const struct cli_flag flags[] = {
        CONNECTION_FLAGS(c), TENANT_FLAG(c), {"--json", NULL, "print one JSON object a job", CLI_BOOL, &json, 0, 0}};
    const char **operands = calloc((size_t)argc, sizeof *operands);
    int n = 0;
    int code =
        operands ? cli_parse(self, flags, sizeof flags / sizeof *flags, NULL, argc, argv, operands, &n) : CLI_FAILED;
    code = code < 0 && n == 0 ? cli_operands(self, n, 1) : code;
    code = code < 0 ? cancel(&c, operands, n, json) : code;
    free(operands);
    return code;
}

const struct cli_command cli_cancel = {"cancel", "ID...", "take jobs back", run, false};
