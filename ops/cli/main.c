// ditfleet: the command line. One subcommand a file; this one only finds it.
#include <string.h>

#include "ops/cli/cli.h"

static const struct cli_command *const commands[] = {&cli_generate, &cli_submit, &cli_show,    &cli_cancel,
                                                     &cli_status,   &cli_tenant, &cli_bench,   &cli_plan,
                                                     &cli_tune,     &cli_doctor, &cli_backlog, NULL};

static void print_usage(FILE *to)
{
    fprintf(to, "ditfleet: image generation on a fleet of GPU workers\n\nusage: ditfleet COMMAND [flags]\n\n");
    for (int i = 0; commands[i]; i++)
        fprintf(to, "  %-10s %s\n", commands[i]->name, commands[i]->summary);
    fprintf(to,
            "\n`ditfleet COMMAND --help` lists a command's flags.\n"
            "Exit status: 0 done, 1 failed, 2 wrong usage, 3 Redis or supervisor not reachable, 130 interrupted.\n");
}

int main(int argc, char **argv)
{
    if (argc < 2) {
        print_usage(stderr);
        return CLI_USAGE;
    }
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0 || strcmp(argv[1], "help") == 0) {
        print_usage(stdout);
        return CLI_OK;
    }
    for (int i = 0; commands[i]; i++)
        if (strcmp(argv[1], commands[i]->name) == 0)
            return commands[i]->run(commands[i], argc - 1, argv + 1);
    fprintf(stderr, "ditfleet: unknown command %s\n\n", argv[1]);
    print_usage(stderr);
    return CLI_USAGE;
}
