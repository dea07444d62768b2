// ditfleet cancel: takes a job back, wherever it is.
#include <stdlib.h>

#include "ops/cli/connect.h"

static int cancel(struct connection *c, const char *id)
{
    struct err err = {.code = ERR_NONE};
    struct queue *q = NULL;
    Ditfleet__V1__State state = DITFLEET__V1__STATE__STATE_UNKNOWN;
    int rc = connection_open(c, &q, &err);
    rc = rc ? rc : queue_cancel(q, connection_tenant(c), id, &state, &err);
    connection_close(c, q);
    if (rc != 0)
        return cli_fail(&err);
    if (state != DITFLEET__V1__STATE__STATE_CANCELLED) {
        fprintf(stderr, "ditfleet: job %s had ended before: %s\n", id, job_state_name(state));
        return CLI_FAILED;
    }
    printf("%s CANCELLED\n", id);
    return CLI_OK;
}

static int run(const struct cli_command *self, int argc, char **argv)
{
    struct connection c = {0};
    const struct cli_flag flags[] = {CONNECTION_FLAGS(c), TENANT_FLAG(c)};
    const char **operands = calloc((size_t)argc, sizeof *operands);
    int n = 0;
    int code =
        operands ? cli_parse(self, flags, sizeof flags / sizeof *flags, NULL, argc, argv, operands, &n) : CLI_FAILED;
    code = code < 0 ? cli_operands(self, n, 1) : code;
    code = code < 0 ? cancel(&c, operands[0]) : code;
    free(operands);
    return code;
}

const struct cli_command cli_cancel = {"cancel", "ID", "take a job back", run, false};
