// ditfleet: the command line. One subcommand a file; this one only finds it.
#include <string.h>

#include "ops/cli/cli.h"
#include "ops/cli/manual.h"
#include "ops/cli/nearest.h"

static const struct cli_command *const commands[] = {&cli_generate, &cli_submit, &cli_jobs,    &cli_show,   &cli_cancel,
                                                     &cli_dead,     &cli_status, &cli_backlog, &cli_drain,  &cli_resume,
                                                     &cli_plan,     &cli_tune,   &cli_bench,   &cli_doctor, &cli_config,
                                                     &cli_model,    &cli_tenant, &cli_acl,     NULL};

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
    struct nearest nearest = {.typed = argv[1]};
    for (int i = 0; commands[i]; i++)
        nearest_offer(&nearest, commands[i]->name);
    fprintf(stderr, "ditfleet: unknown command %.80s", argv[1]);
    if (nearest.word) {
        fprintf(stderr, "; did you mean %s?\n", nearest.word);
    } else {
        fputs("\n\n", stderr);
        manual_program(stderr, MANUAL_TEXT, commands);
    }
    return CLI_USAGE;
}
