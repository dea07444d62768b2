// ditfleet drain, ditfleet resume: this node's groups take no more jobs, and take them again.
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "ops/cli/connect.h"
#include "ops/cli/json.h"
#include "supervisor/control.h"

enum { LOOK_MS = 200 };

static const char *text(const json_t *object, const char *name)
{
    const char *value = json_string_value(json_object_get(object, name));
    return value ? value : "";
}

// Whether a group of the status is one of those that were asked to drain, and still has workers.
static bool still_drains(const json_t *group, const json_t *asked)
{
    size_t i;
    json_t *name;
    const char *state = text(group, "state");
    if (strcmp(state, "stopped") == 0 || strcmp(state, "failed") == 0)
        return false;
    json_array_foreach(asked, i, name)
    {
        if (strcmp(json_string_value(name), text(group, "name")) == 0)
            return true;
    }
    return false;
}

// Until all have stopped; that is bounded by their grace time.
static int await_stop(const char *path, const json_t *asked, struct err *err)
{
    for (bool going = true; going;) {
        json_t *status = NULL, *group;
        size_t i;
        const int rc = control_request(path, "{\"cmd\":\"status\"}", &status, err);
        going = false;
        json_array_foreach(json_object_get(status, "groups"), i, group)
        {
            going = going || still_drains(group, asked);
        }
        json_decref(status);
        TRY(rc);
        if (going)
            nanosleep(&(struct timespec){.tv_nsec = LOOK_MS * 1000000L}, NULL);
    }
    return 0;
}

static int steer(const char *verb, const struct conf *conf, const char *group, bool wait, json_t **reply,
                 struct err *err)
{
    char path[CONTROL_PATH_BYTES];
    json_t *request = json_pack("{s:s,s:s*}", "cmd", verb, "group", group);
    char *text = request ? json_dumps(request, JSON_COMPACT) : NULL;
    int rc = text ? control_request(control_path(conf, path), text, reply, err)
                  : err_set(err, ERR_INVALID, "the group's name is no UTF-8");
    free(text);
    json_decref(request);
    TRY(rc);
    return wait ? await_stop(path, json_object_get(*reply, "groups"), err) : 0;
}

static void report(json_t *reply, bool json, const char *became)
{
    size_t i;
    json_t *name;
    if (json) {
        json_print(json_incref(reply));
        return;
    }
    json_array_foreach(json_object_get(reply, "groups"), i, name)
    {
        printf("%s %s\n", json_string_value(name), became);
    }
}

static int run(const struct cli_command *self, int argc, char **argv)
{
    struct connection c = {0};
    struct err err = {.code = ERR_NONE};
    bool json = false, wait = false;
    const bool drains = strcmp(self->name, "drain") == 0;
    json_t *reply = NULL;
    const struct cli_flag flags[] = {
        {"--config", "FILE", "the supervisor's configuration, to find it by", CLI_STRING, &c.config, 0, 0},
        {"--json", NULL, "print one JSON object", CLI_BOOL, &json, 0, 0},
        {"--wait", NULL, "until its workers are gone", CLI_BOOL, &wait, 0, 0}, // of drain alone
    };
    const char **operands = calloc((size_t)argc, sizeof *operands);
    int n = 0;
    int code = operands ? cli_parse(self, flags, drains ? 3 : 2, NULL, argc, argv, operands, &n) : CLI_FAILED;
    if (code < 0 && n > 1)
        code = cli_operands(self, n, 1);
    if (code < 0) {
        int rc = connection_configure(&c, &err);
        rc = rc ? rc : steer(self->name, c.conf, n ? operands[0] : NULL, wait, &reply, &err);
        code = rc ? cli_fail(&err) : CLI_OK;
        if (rc == 0)
            report(reply, json, !drains ? "starts" : wait ? "stopped" : "drains");
    }
    json_decref(reply);
    connection_close(&c, NULL);
    free(operands);
    return code;
}

const struct cli_command cli_drain = {"drain", "[GROUP]", "this node's groups finish what they have and stop", run,
                                      false};
const struct cli_command cli_resume = {"resume", "[GROUP]", "start what was drained or has failed", run, false};
