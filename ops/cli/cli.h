// cli.h: what the subcommands of `ditfleet` share: the table of commands, flags, exit codes.
//
// A subcommand is one file with one struct cli_command, listed in main.c. Flags are a table; the fields of a job are
// flags too (--num-inference-steps sets num_inference_steps), taken from the rules in proto/job.c.
#ifndef DITFLEET_CLI_H
#define DITFLEET_CLI_H

#include <stdbool.h>
#include <stdio.h>

#include "proto/job.h"

enum cli_exit {
    CLI_OK = 0,
    CLI_FAILED = 1,      // the job or the operation failed; the reason is on stderr
    CLI_USAGE = 2,       // a flag or argument is wrong
    CLI_UNAVAILABLE = 3, // Redis or the supervisor cannot be reached
    CLI_INTERRUPTED = 130,
};

struct cli_command {
    const char *name;
    const char *arguments;                                             // "ID", "", as shown in the usage line
    const char *summary;                                               // one line
    int (*run)(const struct cli_command *self, int argc, char **argv); // argv[0] is the command's name
    bool local; // its job never travels: the fields that say how and where to are no flags of it
};

extern const struct cli_command cli_generate, cli_submit, cli_show, cli_cancel, cli_status, cli_tenant, cli_bench,
    cli_doctor, cli_plan, cli_tune, cli_backlog, cli_config, cli_model, cli_dead, cli_acl, cli_jobs, cli_drain,
    cli_resume;

enum cli_kind { CLI_STRING, CLI_INT, CLI_DOUBLE, CLI_BOOL };

struct cli_flag {
    const char *name;  // "--model", or "-o"
    const char *value; // what follows it, for --help; NULL for CLI_BOOL
    const char *doc;
    enum cli_kind kind;
    void *target;    // const char **, int *, double *, bool *
    double min, max; // of numbers
};

// The flags of a plan's degrees, but data_degree, and of its weights; want: a struct plan, blocks, weights: const char
// *.
#define CLI_DEGREES(want, blocks, weights)                                                                             \
    {"--ulysses-degree", "N", "ranks that share attention heads; default: chosen", CLI_INT, &(want).ulysses, 1,        \
     COMM_MAX_RANKS},                                                                                                  \
        {"--ring-degree", "N",          "groups of such ranks that pass keys and values round; default: chosen",       \
         CLI_INT,         &(want).ring, 1,                                                                             \
         COMM_MAX_RANKS},                                                                                              \
        {"--cfg-degree",                                                                                               \
         "N",                                                                                                          \
         "2: guidance branches on two halves of the ranks; default: chosen",                                           \
         CLI_INT,                                                                                                      \
         &(want).cfg,                                                                                                  \
         1,                                                                                                            \
         2},                                                                                                           \
        {"--pipefusion-degree",                                                                                        \
         "N",                                                                                                          \
         "stages that share the blocks: pictures close to those of one rank, not equal; default: 1",                   \
         CLI_INT,                                                                                                      \
         &(want).pipe,                                                                                                 \
         1,                                                                                                            \
         COMM_MAX_RANKS},                                                                                              \
        {"--num-pipeline-patch",                                                                                       \
         "N",                                                                                                          \
         "patches that follow each other through the stages; default: as many",                                        \
         CLI_INT,                                                                                                      \
         &(want).patches,                                                                                              \
         1,                                                                                                            \
         PLAN_MAX_PATCHES},                                                                                            \
        {"--pipefusion-blocks",                                                                                        \
         "N,N,...",                                                                                                    \
         "blocks of the model that each stage has; default: as even as can be",                                        \
         CLI_STRING,                                                                                                   \
         &(blocks),                                                                                                    \
         0,                                                                                                            \
         0},                                                                                                           \
        {"--warmup-steps", "N", "steps that take the image whole before that; default: 1", CLI_INT, &(want).warmup, 1, \
         SAMPLER_MAX_STEPS},                                                                                           \
    {                                                                                                                  \
        "--weights", "replicated|sharded",                                                                             \
            "sharded: each rank has a part of every block's, gathered just ahead of use", CLI_STRING, &(weights), 0, 0 \
    }

#define CLI_EXACT(flag)                                                                                                \
    {                                                                                                                  \
        "--exact", NULL, "of GPUs: the bits of one, by Ulysses and guidance parallelism, at some cost of speed",       \
            CLI_BOOL, &(flag), 0, 0                                                                                    \
    }

// Reads argv[1..] by the table, and what it does not name by the job's rules when job is not NULL. *operands (room for
// argc pointers) receives what is no flag, *n_operands how many; NULL: none are allowed. --help prints the manual on
// stdout. Returns -1 to go on, or the exit code: CLI_OK after --help, CLI_USAGE after a message on stderr that names
// the flag and what is allowed.
int cli_parse(const struct cli_command *self, const struct cli_flag *flags, int n_flags, Ditfleet__V1__Job *job,
              int argc, char **argv, const char **operands, int *n_operands);

// The flag that sets the rule's field: "--output-url" of output.url. False: no flag does.
enum { CLI_FLAG_NAME = 64 };
bool cli_job_flag(const struct cli_command *self, const struct job_rule *rule, char name[CLI_FLAG_NAME]);
// NULL: the table has no flag of this name.
const struct cli_flag *cli_find_flag(const struct cli_flag *flags, int n_flags, const char *name);

// "picture.png" -> "picture-2.png" for the third of several images; of one, path itself.
void cli_numbered(const char *path, uint32_t index, uint32_t count, char *out, size_t size);

// -1 when n operands are what is wanted, else CLI_USAGE after a message.
int cli_operands(const struct cli_command *self, int n, int wanted);

// "ditfleet: text" on stderr; returns the exit code that fits the error.
int cli_fail(const struct err *err);

#endif
