// ditfleet config: the configuration file, judged and explained.
#include <stdlib.h>
#include <string.h>

#include "ops/cli/json.h"
#include "ops/cli/manual.h"
#include "proto/conf.h"
#include "supervisor/supervisor.h"

static int check(const char *path, bool json)
{
    struct err err = {.code = ERR_NONE};
    struct conf *c = NULL;
    int rc = conf_load(path, &c, &err);
    rc = rc ? rc : supervisor_check(c, &err);
    if (rc == 0 && json)
        json_print(json_pack("{s:s,s:s,s:i}", "path", c->path, "node", c->fleet.node, "groups", c->n_groups));
    else if (rc == 0)
        printf("%s: good: node %s, %d groups\n", path, c->fleet.node, c->n_groups);
    conf_free(c);
    if (rc == 0)
        return CLI_OK;
    cli_fail(&err);
    return CLI_FAILED; // whatever the code: the file was judged
}

static int run(const struct cli_command *self, int argc, char **argv)
{
    bool json = false;
    const struct cli_flag flags[] = {{"--json", NULL, "check: print one JSON object", CLI_BOOL, &json, 0, 0}};
    const char **operands = calloc((size_t)argc, sizeof *operands);
    int n = 0;
    int code =
        operands ? cli_parse(self, flags, sizeof flags / sizeof *flags, NULL, argc, argv, operands, &n) : CLI_FAILED;
    if (code < 0) {
        const char *verb = n > 0 ? operands[0] : "";
        const bool checks = strcmp(verb, "check") == 0, prints = strcmp(verb, "example") == 0,
                   explains = strcmp(verb, "man") == 0;
        code = cli_operands(self, checks || prints || explains ? n : 0, checks ? 2 : 1);
        if (code < 0 && checks)
            code = check(operands[1], json);
        else if (code < 0 && prints)
            conf_print_doc(stdout);
        else if (code < 0)
            manual_configuration();
        code = code < 0 ? CLI_OK : code;
    }
    free(operands);
    return code;
}

const struct cli_command cli_config = {"config", "check FILE | example | man",
                                       "judge a configuration file; print what one may say", run, true};
