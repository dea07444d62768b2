// ditfleet: the command line. One subcommand a file; this one only finds it.
#include <string.h>

#include "ops/cli/cli.h"
#include "ops/cli/manual.h"

static const struct cli_command *const commands[] = {
    &cli_generate, &cli_submit, &cli_show,    &cli_cancel, &cli_status, &cli_tenant, &cli_bench, &cli_plan,
    &cli_tune,     &cli_doctor, &cli_backlog, &cli_config, &cli_model,  &cli_dead,   &cli_acl,   NULL};

int main(int argc, char **argv)
{
    enum manual_form form;
    if (argc < 2) {
        manual_program(stderr, MANUAL_TEXT, commands);
        return CLI_USAGE;
    }
    if (manual_asked(argv[1], &form) || strcmp(argv[1], "help") == 0) {
        manual_program(stdout, form, commands);
        return CLI_OK;
    }
    for (int i = 0; commands[i]; i++)
        if (strcmp(argv[1], commands[i]->name) == 0)
            return commands[i]->run(commands[i], argc - 1, argv + 1);
    fprintf(stderr, "ditfleet: unknown command %s\n\n", argv[1]);
    manual_program(stderr, MANUAL_TEXT, commands);
    return CLI_USAGE;
}
